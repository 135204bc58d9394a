"""The promise of the README's first line, over seeds."""

import json
import subprocess
import time

import numpy as np
import pytest
import runs

from starnet_jax import errors


@pytest.mark.slow
def test_five_seeds_reach_99_percent_of_the_held_out_digits(tmp_path):
    top1 = []
    for seed in range(5):
        workdir = tmp_path / str(seed)
        process = runs.main(
            f"--config={runs.ROOT}/configs/quickstart.py",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
        )
        assert process.returncode == 0, process.stderr
        top1.append(json.loads((workdir / "result.json").read_text())["last"]["eval/top1"])
    print(top1)
    assert np.mean(top1) >= 0.99
    assert min(top1) >= 0.984


@pytest.mark.slow
def test_four_devices_give_the_losses_of_one_in_the_shipped_run(tmp_path):
    """Its seed keeps every ReLU6 input of the first 20 steps away from the kinks."""
    losses = {}
    for devices in (1, 4):
        workdir = tmp_path / str(devices)
        flags = [f"--config={runs.ROOT}/configs/quickstart.py", f"--workdir={workdir}"]
        command = runs.command(*flags, "--config.log.every_steps=1")
        process = subprocess.Popen(command, env=runs.environment(devices))
        while not ((workdir / "metrics.jsonl").exists() and len(runs.rows(workdir)) >= 20):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(60) == errors.INTERRUPTED
        losses[devices] = [row["train/loss"] for row in runs.rows(workdir)][:20]
    np.testing.assert_allclose(losses[4], losses[1], rtol=0, atol=1e-5)
