import subprocess
import sys

import pytest

HEAVY = ("tensorflow", "tensorflow_datasets", "torch", "matplotlib", "sklearn", "onnx", "wandb")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("starnet_jax, starnet_jax.errors", ("jax", *HEAVY)),
        ("starnet_jax.main, starnet_jax.config", ("jax", *HEAVY)),
        ("starnet_jax.models, starnet_jax.ops, starnet_jax.weights", HEAVY),
        ("starnet_jax.train_step, starnet_jax.train_state, starnet_jax.evaluate", HEAVY),
        ("starnet_jax.train, starnet_jax.data.pipeline", HEAVY),
    ],
)
def test_import_stays_light(modules, absent):
    script = f"import {modules}, sys; print([m for m in {absent!r} if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.stdout.strip() == "[]", process.stderr
