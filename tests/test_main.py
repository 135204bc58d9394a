import itertools
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
from PIL import Image

from starnet_jax import config as config_lib
from starnet_jax import main as main_lib


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small finished run and what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, runs.main(runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL, "--profile")


def state(workdir, step):
    path = workdir.absolute() / "checkpoints" / str(step) / "default"
    return dict(enumerate(_leaves(ocp.StandardCheckpointer().restore(path))))


def _leaves(tree):
    children = tree.values() if isinstance(tree, dict) else tree
    nested = isinstance(tree, dict | list | tuple)
    return itertools.chain(*map(_leaves, children)) if nested else [np.asarray(tree)]


def test_run_prints_a_table_and_says_where_everything_is(finished):
    workdir, process = finished
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].split()[:3] == ["epoch", "step", "loss"]
    assert "450/450" in lines[1] and "450/450" in lines[2]
    assert str(workdir) in lines[-1]
    assert "all parameters" in process.stderr
    for name in ("config.json", "metrics.jsonl", "result.json", "checkpoints/42", "profile"):
        assert (workdir / name).exists()
    assert list((workdir / "tensorboard").iterdir())


def test_every_step_stands_once_in_the_metrics(finished):
    workdir, _ = finished
    assert [row["step"] for row in runs.rows(workdir)] == list(range(1, 43))


def test_result_repeats_the_last_row(finished):
    workdir, _ = finished
    result = json.loads((workdir / "result.json").read_text())
    assert result["last"]["step"] == 42
    assert result["best"]["eval/top1"] >= result["last"]["eval/top1"]
    assert result["seconds"].keys() >= {"start-up", "compiling", "training", "evaluation", "saving"}


def test_config_and_versions_are_saved_with_the_run(finished):
    workdir, _ = finished
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["config"]["model"]["name"] == "demonet_d2_w16"
    assert saved["versions"]["jax"] and saved["versions"]["starnet-jax"]
    assert config_lib.resolve(saved["config"]).to_json() == saved["config"]


def test_finished_run_started_again_repeats_its_result(finished):
    workdir, first = finished
    result = (workdir / "result.json").read_text()
    again = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL)
    assert again.returncode == 0, again.stderr
    assert (
        again.stdout.splitlines()[-1].split("; ")[1:]
        == first.stdout.splitlines()[-1].split("; ")[1:]
    )
    assert (workdir / "result.json").read_text() == result


def test_eval_mode_reproduces_the_last_evaluation(finished):
    workdir, _ = finished
    process = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL, "--mode=eval")
    assert process.returncode == 0, process.stderr
    last = runs.rows(workdir)[-1]
    row = process.stdout.splitlines()[1].split()
    assert row == [
        "digits",
        "raw",
        f"{100 * last['eval/top1']:.2f}",
        f"{100 * last['eval/top5']:.2f}",
        f"{last['eval/loss']:.4f}",
        "450/450",
    ]


def test_killed_run_continues_to_the_same_bits(finished, tmp_path):
    whole, _ = finished
    arguments = (runs.QUICKSTART, f"--workdir={tmp_path}", *runs.SMALL)
    process = subprocess.Popen(
        runs.command(*arguments), env=runs.environment(), stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "checkpoints" / "21" / "commit_success.txt").exists():
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = runs.main(*arguments)
    assert again.returncode == 0, again.stderr
    assert runs.rows(tmp_path) == runs.rows(whole)
    expected, got = state(whole, 42), state(tmp_path, 42)
    assert expected.keys() == got.keys()
    assert all(np.array_equal(expected[i], got[i]) for i in expected)


def test_four_devices_give_the_losses_of_one(tmp_path):
    """StarNet with BatchNorm over the global batch, mixing, erasing, stochastic depth; 20 steps."""
    losses = {}
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        process = runs.main(
            runs.QUICKSTART,
            f"--workdir={workdir}",
            "--config.epochs=1",
            "--config.log.every_steps=1",
            "--config.augment.mixup=0.8",
            "--config.augment.cutmix=1.0",
            "--config.augment.erase_prob=0.25",
            "--config.model.drop_path=0.1",
            "--config.model.activation=gelu",  # no kink for rounding to fall on either side of
            devices=devices,
        )
        assert process.returncode == 0, process.stderr
        losses[devices] = [row["train/loss"] for row in runs.rows(workdir)][:20]
    assert len(losses[1]) == 20
    np.testing.assert_allclose(losses[4], losses[1], rtol=0, atol=1e-5)


BAD = {
    "missing config": (
        ["--config=configs/quickstat.py", "--workdir={tmp}/w"],
        "configs/quickstart.py",
    ),
    "no config": (["--workdir={tmp}/w"], "--config"),
    "unknown flag": ([runs.QUICKSTART, "--workdr={tmp}/w"], "--workdir"),
    "unknown option": (["--config=configs/quickstart.py:star,tinny", "--workdir={tmp}/w"], "tiny"),
    "unknown key": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.optimiser.learning_rate=1"],
        "optimizer.learning_rate",
    ),
    "mistyped value": ([runs.QUICKSTART, "--workdir={tmp}/w", "--config.epochs=ten"], "epochs"),
    "impossible value": ([runs.QUICKSTART, "--workdir={tmp}/w", "--config.epochs=0"], "at least 1"),
    "unknown model": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.model.name=starnet_s5"],
        "starnet_s",
    ),
    "unknown source": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.data.source=digit"],
        "'digits'",
    ),
    "unknown dataset": (
        [
            runs.QUICKSTART,
            "--workdir={tmp}/w",
            "--config.data.source=tfds",
            "--config.data.name=imagenet2102",
        ],
        "imagenet2012",
    ),
    "wrong class count": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.model.num_classes=7"],
        "10 classes",
    ),
    "small image": ([runs.QUICKSTART, "--workdir={tmp}/w", "--config.data.image_size=16"], "32"),
    "unknown policy": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.augment.randaugment=rand-q9"],
        "rand-q9",
    ),
    "remote workdir": ([runs.QUICKSTART, "--workdir=s3://bucket/w"], "no local folder"),
    "batch over examples": (
        [runs.QUICKSTART, "--workdir={tmp}/w", "--config.batch_size=4096"],
        "1347",
    ),
    "below a file": ([runs.QUICKSTART, "--workdir={tmp}/file/w"], "Not a directory"),
    "read-only mount": ([runs.QUICKSTART, "--workdir=/proc/w"], "/proc/w"),
    "nothing to evaluate": ([runs.QUICKSTART, "--workdir={tmp}/w", "--mode=eval"], "no checkpoint"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    (tmp_path / "file").write_text("")
    code = main_lib.main([argument.format(tmp=tmp_path) for argument in arguments])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
    assert not (tmp_path / "w").exists()


def test_batch_that_the_devices_do_not_divide_ends_in_one_line(tmp_path):
    workdir = tmp_path / "w"
    process = runs.main(
        runs.QUICKSTART, f"--workdir={workdir}", "--config.batch_size=50", devices=4
    )
    assert process.returncode == 2
    assert process.stderr.splitlines() == [
        "error: config.batch_size: 50 is not divisible by 4 devices; the nearest right value is 48"
    ]
    assert not workdir.exists()


def test_a_result_of_fewer_epochs_is_no_result_of_more(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    longer = [runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL, "--config.epochs=3"]
    first = runs.main(*longer)
    assert first.returncode == 0, first.stderr
    shutil.copy(finished[0] / "result.json", workdir)  # as if killed before it was written
    again = runs.main(*longer)
    assert again.returncode == 0, again.stderr
    assert json.loads((workdir / "result.json").read_text())["last"]["step"] == 63


def test_workdir_of_another_config_is_refused(finished, capsys):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    code = main_lib.main(
        [runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL, "--config.optimizer.b1=0.8"]
    )
    assert code == 2
    assert "config.optimizer.b1=0.9" in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == before


def test_a_run_that_is_past_its_last_epoch_is_refused(finished, capsys):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    code = main_lib.main(
        [runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL, "--config.epochs=1"]
    )
    assert code == 2
    assert "is at step 42" in capsys.readouterr().err
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', "\xff", '{"step": 1, "t'])
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "config.json"])
def test_a_damaged_file_of_the_workdir_ends_in_one_line(name, content, finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished[0], workdir)
    if name != "result.json":
        (workdir / "result.json").unlink()
    (workdir / name).write_bytes(content.encode("latin1") + b"\n")
    if (name, content) == ("metrics.jsonl", ""):
        (workdir / name).write_bytes(b"[]\n")
    code = main_lib.main([runs.QUICKSTART, f"--workdir={workdir}", *runs.SMALL])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and name in lines[0]


def test_an_image_that_fails_the_evaluation_costs_no_epoch(tmp_path):
    """The state is saved before the evaluation that ends the run."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(2):
            (tmp_path / split / str(label)).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / str(label) / f"{i}.png")
    (tmp_path / "val" / "1" / "5.png").write_bytes(b"no image")
    process = runs.main(
        runs.QUICKSTART,
        f"--workdir={tmp_path}/run",
        *runs.SMALL,
        "--config.data.source=folder",
        f"--config.data.dir={tmp_path}",
        "--config.data.train_examples=16",
        "--config.model.num_classes=2",
        "--config.batch_size=8",
        "--config.epochs=1",
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: ") and "5.png" in process.stderr
    assert (tmp_path / "run" / "checkpoints" / "2" / "digest.json").exists()


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main_lib.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in main_lib._parser().flags)
