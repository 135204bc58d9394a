"""Runs on several processes: killed at random, and started again in another layout."""

import shutil

import chaos
import numpy as np
import pytest
import runs

from starnet_jax import errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes that nobody kills; its compilations are kept for the others."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
        chaos.run(chaos.small(folder / "run"))
        yield folder / "run"


def test_five_kills_leave_no_trace(whole, tmp_path):
    chaos.kill_again_and_again(chaos.small(tmp_path), tmp_path, kills=5, seed=0)
    chaos.run(chaos.small(tmp_path))
    chaos.assert_same_run(whole, tmp_path, chaos.STEPS)
    assert [row["step"] for row in runs.rows(tmp_path)] == list(range(1, chaos.STEPS + 1))


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (4, 1)])
def test_another_layout_gives_the_losses_of_two_times_two(processes, devices, whole, tmp_path):
    chaos.run([*chaos.small(tmp_path), "--config.epochs=1"], processes, devices)
    losses = [[row["train/loss"] for row in runs.rows(run)[:20]] for run in (whole, tmp_path)]
    assert len(losses[1]) == 20
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_of_four_devices_goes_on_with_others(devices, whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    longer = [*chaos.small(workdir), "--config.epochs=4"]
    (log,) = chaos.run(longer, processes=1, devices=devices)
    assert f"continuing from {workdir}/checkpoints/{chaos.STEPS}" in log
    rows = runs.rows(workdir)
    assert rows[: chaos.STEPS] == runs.rows(whole)
    assert [row["step"] for row in rows] == list(range(1, 85))


@pytest.mark.parametrize("devices", [1, 8])
def test_weights_of_four_devices_score_the_same_on_others(devices, whole):
    process = runs.main(*chaos.small(whole), "--mode=eval", devices=devices)
    assert process.returncode == 0, process.stderr
    *_, top1, top5, loss, seen = process.stdout.splitlines()[1].split()
    last = runs.rows(whole)[-1]
    assert (top1, top5) == (f"{100 * last['eval/top1']:.2f}", f"{100 * last['eval/top5']:.2f}")
    assert seen == "450/450"
    assert float(loss) == pytest.approx(last["eval/loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_batchnorm_is_global_over_processes(processes, devices, tmp_path):
    """StarNet, statistics over the global batch; GELU, for ReLU6 has kinks to fall off."""
    losses = []
    for layout in ((1, 4), (processes, devices)):
        workdir = tmp_path / str(layout[0])
        flags = ["--config.model.name=starnet_s050", "--config.model.activation=gelu"]
        flags += ["--config.epochs=1", "--config.mesh.step_timeout=1800"]
        flags += ["--config.checkpoint.permanent_steps=none"]
        chaos.run([*chaos.small(workdir), *flags], *layout)
        losses.append([row["train/loss"] for row in runs.rows(workdir)][:20])
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_processes_with_different_settings_do_not_start(tmp_path):
    started = []
    for index, environment in enumerate(chaos.environments(2, 1)):
        flags = [f"--config.seed={index}"]
        started.append(chaos.popen([*chaos.small(tmp_path), *flags], environment))
    logs = chaos.finish(started)
    assert [process.returncode for process in started] == [errors.BAD_INPUT] * 2, logs
    assert all("process 1 has other settings" in log for log in logs)


def test_bad_input_of_one_process_ends_both_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    started = chaos.start(chaos.small(tmp_path / "file" / "w"))
    logs = chaos.finish(started)
    assert [process.returncode for process in started] == [errors.BAD_INPUT] * 2, logs
    assert "Not a directory" in logs[0] and "process 0 cannot go on" in logs[1]


def test_a_process_that_comes_alone_is_told_to_start_again(tmp_path):
    environment = chaos.environments(2, 1)[1]
    flags = [*chaos.small(tmp_path), "--config.mesh.start_timeout=2"]
    process = chaos.popen(flags, environment)
    (log,) = chaos.finish([process])
    assert process.returncode == errors.INTERRUPTED
    assert "did not come in time" in log
