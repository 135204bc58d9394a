"""Checkpoints that are damaged, half-written, or do not fit on the disk."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chaos
import numpy as np
import pytest
import runs
import safetensors.numpy

from starnet_jax import checkpoint, config, errors, mesh, train_state
from starnet_jax import main as main_lib

FLAGS = [*runs.SMALL, "--config.epochs=3", "--config.ema=0.9", "--config.log.tensorboard=false"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with checkpoints at steps 42 and 63."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    process = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *FLAGS)
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.fixture(scope="module")
def abstract(finished):
    stored = json.loads((finished / "config.json").read_text())["config"]
    settings = config.resolve(stored)
    return train_state.abstract(settings, mesh.create(settings))


def opened(workdir, **settings):
    return checkpoint.Checkpoints(workdir, config.Checkpoint(**settings))


def files(workdir, step) -> list[str]:
    folder = workdir / "checkpoints" / str(step)
    return sorted(os.fspath(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, Path.unlink], ids=["truncate", "flip", "delete"])
def test_whatever_file_is_harmed_what_is_restored_is_what_was_saved(
    harm, finished, abstract, tmp_path, capfd
):
    saved = {step: chaos.arrays(finished, step) for step in (42, 63)}
    names = files(finished, 63)
    assert len(names) > 10
    for i, name in enumerate(names):
        workdir = Path(shutil.copytree(finished, tmp_path / str(i)))
        path = workdir / "checkpoints" / "63" / name
        if path.stat().st_size == 0 and harm is not Path.unlink:
            continue  # a marker without content
        harm(path)
        with opened(workdir) as checkpoints:
            step = checkpoints.newest
            state = checkpoints.restore(step, abstract)
        if step == 42:
            log = capfd.readouterr().err
            assert f"{workdir}/checkpoints/63" in log
            assert path.name in log or name == checkpoint.DIGEST  # whose damage blames another
            assert list((workdir / "checkpoints" / "aside").iterdir())
        restored = chaos.by_path(state)
        assert restored.keys() == saved[step].keys()
        assert all(np.array_equal(restored[key], saved[step][key]) for key in restored)
        shutil.rmtree(workdir)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "result.json").unlink()
    (name,) = [n for n in files(workdir, 63) if n.startswith("default/d/")]
    flip(workdir / "checkpoints" / "63" / name)
    (workdir / "checkpoints" / "84.orbax-checkpoint-tmp").mkdir()
    again = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *FLAGS)
    assert again.returncode == 0, again.stderr
    assert f"{name} is not what was written" in again.stderr
    assert "84.orbax-checkpoint-tmp aside" in again.stderr and "half-written" in again.stderr
    assert f"continuing from {workdir}/checkpoints/42" in again.stderr
    assert len(list((workdir / "checkpoints" / "aside").iterdir())) == 2
    chaos.assert_same_run(finished, workdir, 63)


def test_without_an_intact_checkpoint_a_run_stops_in_one_line(finished, tmp_path, capsys):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "result.json").unlink()
    for step in (42, 63):
        truncate(workdir / "checkpoints" / str(step) / "weights.safetensors")
    before = files(workdir, 42)
    code = main_lib.main([runs.QUICKSTART, f"--workdir={workdir}", *FLAGS])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert code == errors.BAD_INPUT and len(lines) == 1
    assert "no intact checkpoint" in lines[0] and "weights.safetensors" in lines[0]
    assert files(workdir, 42) == before


def test_evaluation_beside_a_training_run_moves_nothing(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    flip(workdir / "checkpoints" / "63" / "weights.safetensors")
    half = workdir / "checkpoints" / "84.orbax-checkpoint-tmp"
    half.mkdir()
    process = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *FLAGS, "--mode=eval")
    assert process.returncode == 0, process.stderr
    assert f"evaluating {workdir}/checkpoints/42" in process.stderr
    assert half.exists() and (workdir / "checkpoints" / "63").exists()


def test_plain_weights_lie_beside_the_state(finished):
    folder, saved = finished / "checkpoints" / "63", chaos.arrays(finished, 63)
    for name, prefix in (("weights", ""), ("ema", "ema/")):
        plain = safetensors.numpy.load_file(folder / f"{name}.safetensors")
        assert plain
        for key, array in plain.items():
            np.testing.assert_array_equal(array, saved[prefix + key])


def test_newest_best_and_permanent_checkpoints_stay(finished, abstract, tmp_path):
    with opened(finished) as source:
        state = source.restore(63, abstract)
    (tmp_path / "checkpoints").mkdir()
    with opened(tmp_path, keep=2, permanent_steps=4) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, state)
            if step == 2:
                checkpoints.best = step
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
    assert kept == [2, 4, 8, 9]


def test_the_best_checkpoint_of_a_run_outlives_later_ones(tmp_path):
    flags = ["--config.optimizer.learning_rate=0.05", "--config.checkpoint.keep=1"]
    flags += ["--config.epochs=6", "--config.log.tensorboard=false"]
    process = runs.main(runs.QUICKSTART, f"--workdir={tmp_path}", *runs.SMALL, *flags)
    assert process.returncode == 0, process.stderr
    best = json.loads((tmp_path / "result.json").read_text())["best"]["step"]
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()}
    assert best < 126  # or the settings test nothing
    assert kept == {best, 126}


def test_a_checkpoint_is_set_aside_under_a_name_that_is_free(finished, tmp_path):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    (workdir / "checkpoints" / "aside" / "0-63" / "file").mkdir(parents=True)
    flip(workdir / "checkpoints" / "63" / "weights.safetensors")
    with opened(workdir) as checkpoints:
        assert checkpoints.newest == 42
    assert (workdir / "checkpoints" / "aside" / "1-63" / "weights.safetensors").exists()


# --- Disks ----------------------------------------------------------------------------------------

ON_A_SMALL_DISK = """
import subprocess, sys
mount, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", mount], check=True)
trained = subprocess.run(command, capture_output=True, text=True)
print(trained.returncode, trained.stderr, sep="\\n<>\\n", end="\\n<>\\n")
subprocess.run(f"rm -rf {mount}/run/checkpoints/*tmp*", shell=True)
evaluated = subprocess.run([*command, "--mode=eval"], capture_output=True, text=True)
print(evaluated.returncode, evaluated.stdout, evaluated.stderr, sep="\\n<>\\n", end="\\n<>\\n")
subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
again = subprocess.run(command, capture_output=True, text=True)
print(again.returncode, again.stderr, sep="\\n<>\\n")
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a disk of its own")
def test_a_full_or_read_only_disk_ends_in_one_line_with_the_checkpoints_intact(tmp_path):
    command = runs.command(
        runs.QUICKSTART,
        f"--workdir={tmp_path}/run",
        *FLAGS,
        "--config.epochs=50",
        "--config.checkpoint.keep=50",
    )
    outside = ["unshare", "--mount", sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path)]
    done = subprocess.run(
        [*outside, *command], env=runs.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    code, log, eval_code, scores, eval_log, ro_code, ro_log = done.stdout.split("\n<>\n")[:7]
    assert int(code) == errors.BAD_INPUT, log
    assert one_error(log).endswith("intact") and "No space left" in one_error(log)
    assert int(eval_code) == 0 and "450/450" in scores, eval_log
    assert int(ro_code) == errors.BAD_INPUT, ro_log
    assert "Read-only file system" in one_error(ro_log)


FULL_DISK_OF_TWO = """
import os, subprocess, sys
mount, address, *command = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", mount], check=True)
started = [
    subprocess.Popen(
        command,
        env=os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(index)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for index in range(2)
]
logs = [process.communicate()[1] for process in started]
print(*(process.returncode for process in started), logs[0], sep="\\n<>\\n")
"""


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a disk of its own")
def test_a_full_disk_ends_all_processes_in_one_line(tmp_path):
    flags = [*FLAGS, "--config.epochs=50", "--config.checkpoint.keep=50"]
    command = runs.command(runs.QUICKSTART, f"--workdir={tmp_path}/run", *flags)
    environment = chaos.environments(2, 2)[0]
    address = environment["JAX_COORDINATOR_ADDRESS"]
    outside = ["unshare", "--mount", sys.executable, "-c", FULL_DISK_OF_TWO, str(tmp_path)]
    done = subprocess.run(
        [*outside, address, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, second, log = done.stdout.split("\n<>\n")[-3:]
    assert int(first.split()[-1]) == int(second) == errors.BAD_INPUT, log
    assert "No space left" in one_error(log)


def one_error(log: str) -> str:
    """The line that says what is wrong; there must be no other but the log's and the overview's."""
    lines = [line for line in log.splitlines() if line and not line.startswith(("[", "  "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), log
    return lines[0]
