"""The promise of the README's first line, over seeds."""

import json

import numpy as np
import pytest
import runs


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
