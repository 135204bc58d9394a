import json

import pytest

from starnet_jax import config as config_lib
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


def test_seconds_of_earlier_starts_are_added(tmp_path):
    clock = metrics.Clock("training")
    clock.save(tmp_path / "time.json")
    again = metrics.Clock("training")
    again.load(tmp_path / "time.json")
    again.switch("saving")
    assert again.starts == 2
    assert again.all_seconds.keys() == {"training", "saving"}
    assert again.all_seconds["training"] >= clock.seconds["training"]
    (tmp_path / "time.json").write_text('{"starts": "many"')
    fresh = metrics.Clock("training")
    fresh.load(tmp_path / "time.json")
    assert fresh.starts == 1


@pytest.mark.parametrize("wait, words", [(0.01, False), (0.5, True)])
def test_the_log_says_in_words_that_the_input_is_the_limit(wait, words, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    config = config_lib.resolve(
        {
            "batch_size": 8,
            "epochs": 1,
            "data": {"train_examples": 800, "workers": 1},
            "log": {"tensorboard": False},
        }
    )
    clock = metrics.Clock("training")
    with metrics.Reporter(tmp_path, config, 0, clock) as reporter:
        reporter.start_timing(0)
        for step in range(1, 101):
            with clock.during("waiting for data"):
                now[0] += wait
            now[0] += 1.0
            reporter.write(step, {"train/loss": 1.0})
        text = reporter.where_the_time_went()
    assert ("input-bound" in text and "config.data.workers" in text) == words
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["time/data_wait"] == pytest.approx(wait / (1 + wait), abs=1e-3)
    assert rows[-1]["time/images_per_second"] == pytest.approx(8 / (1 + wait), abs=0.1)


def test_a_line_of_the_table_gives_the_speed_of_its_epoch(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    config = config_lib.resolve(
        {
            "batch_size": 8,
            "epochs": 2,
            "data": {"train_examples": 32},
            "log": {"tensorboard": False},
        }
    )
    with metrics.Reporter(tmp_path, config, 0, metrics.Clock("training")) as reporter:
        reporter.start_timing(0)
        for step, seconds in enumerate((1.0, 1.0, 1.0, 5.0), 1):
            now[0] += seconds
            reporter.write(step, {"train/loss": 1.0})
        reporter.write(4, {"eval/top1": 0.5, "eval/top5": 0.5, "eval/count": 2})
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["1", "4", "1.0000", "4"]


def test_tensorboard_holds_what_the_jsonl_holds(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

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
