"""The networks against the outputs, gradients and statistics of the authors' code."""

from functools import cache

import numpy as np
import oracle
import pytest

STARNETS = ["starnet_s050", "starnet_s050_sum"]
FILES = [
    *STARNETS,
    "DemoNet_d12_w32_mul",
    "DemoNet_d12_w32_sum",
    "demonet_2d_mul",
    "demonet_2d_sum",
]
every_file = pytest.mark.parametrize("file", FILES)
starnet_files = pytest.mark.parametrize("file", STARNETS)


@cache
def load(folder, file):
    """The stored numbers and ours; the compiler's seconds are spent once per file."""
    with np.load(folder / "models" / f"{file}.npz") as archive:
        data = dict(archive)
    state = oracle.under("state/", data)
    return data, oracle.passes(file, state, data["input"], data["labels"])


def test_every_golden_model_is_compared(golden):
    assert {path.stem for path in (golden / "models").glob("*.npz")} == set(FILES)


@every_file
def test_evaluation_logits_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    assert oracle.relative(ours.eval_logits, data["eval_logits"]) <= 2e-5


@every_file
def test_training_logits_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    assert oracle.relative(ours.train_logits, data["train_logits"]) <= 2e-5


@every_file
def test_loss_equals_the_authors(golden, file):
    data, ours = load(golden, file)
    assert oracle.absolute(ours.loss, data["loss"]) <= 1e-5


@every_file
def test_there_is_a_gradient_for_each_of_the_authors_parameters(golden, file):
    data, ours = load(golden, file)
    assert ours.grads.keys() == oracle.under("grad/", data).keys()


@every_file
def test_gradients_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    grads = oracle.under("grad/", data)
    for key in data["zero_grad_keys"].tolist():
        del grads[key]
    assert oracle.beyond(oracle.relative, 1e-4, ours.grads, grads) == {}


@starnet_files
def test_gradients_that_batchnorm_cancels_are_rounding_noise(golden, file):
    data, ours = load(golden, file)
    grads = {key: data[f"grad/{key}"] for key in data["zero_grad_keys"].tolist()}
    assert oracle.beyond(oracle.absolute, 1e-5, ours.grads, grads) == {}


@starnet_files
def test_running_statistics_after_a_step_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    after = oracle.under("state_after/", data)
    running = {key: after[key] for key in after if ".running_" in key}
    assert oracle.beyond(oracle.relative, 5e-6, ours.running, running) == {}
