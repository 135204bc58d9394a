import json

from starnet_jax import metrics


def test_restart_cuts_later_rows_and_a_half_written_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "train/loss": 1.0}) for step in (1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "tr')
    file = metrics.MetricsFile(path, last_step=2)
    file.write({"step": 3, "train/loss": 2.0})
    file.close()
    assert [row["step"] for row in metrics.read_rows(path)] == [1, 2, 3]
    assert metrics.read_rows(path)[-1]["train/loss"] == 2.0
    assert file.rows == metrics.read_rows(path)


def test_every_second_belongs_to_one_activity(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(now))
    clock = metrics.Clock("start-up")
    clock.switch("training")
    with clock.during("saving"):
        pass
    clock.switch("done")
    assert clock.seconds == {"start-up": 1.0, "training": 2.0 + 4.0, "saving": 3.0}


def test_tensorboard_holds_what_the_jsonl_holds(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    from starnet_jax import config as config_lib

    config = config_lib.resolve(
        {"batch_size": 8, "epochs": 1, "data": {"train_examples": 16}, "log": {"tensorboard": True}}
    )
    with metrics.Reporter(tmp_path, config, 0, metrics.Clock("training")) as reporter:
        reporter.write(1, {"train/loss": 0.5})
        reporter.write(2, {"train/loss": 0.25})
    (file,) = (tmp_path / "tensorboard").iterdir()
    written, data = {}, file.read_bytes()
    while data:  # length, its checksum, an event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            written[event.step, value.tag] = value.simple_value
        data = data[16 + length :]
    assert written[1, "train/loss"] == 0.5 and written[2, "train/loss"] == 0.25
