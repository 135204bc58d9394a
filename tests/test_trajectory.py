"""Whole optimizer steps against the authors' training code: losses, final state, weight average."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from starnet_jax import config, create_model, optimizer, train_step
from starnet_jax.train_state import TrainState
from starnet_jax.weights import from_torch, to_torch

NAMES = {"starnet_s050": "starnet_s050", "DemoNet_d12_w32_mul": "demonet_d12_w32_star"}
every_file = pytest.mark.parametrize("file", NAMES)


class Trajectory(NamedTuple):
    """What the training left behind, PyTorch's keys."""

    losses: np.ndarray
    grad_norms: np.ndarray
    final: dict[str, np.ndarray]
    ema: dict[str, np.ndarray]


@cache
def load(folder, file):
    """The stored trajectory and ours."""
    with np.load(folder / "trajectory" / f"{file}.npz") as archive:
        data = dict(archive)
    with oracle.xla_depthwise():
        return data, train(NAMES[file], data)


def train(name, data):
    settings = config.resolve(
        {
            "batch_size": 8,
            "epochs": 1,
            "model": {"name": name, "num_classes": 32},
            "optimizer": {"weight_decay": 0.05},
            "ema": 0.9998,
        }
    )
    tx = optimizer.create(settings, lambda step: jnp.asarray(data["lrs"], jnp.float32)[step])
    variables = from_torch(name, oracle.under("state_init/", data))
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=tx.init(variables["params"]),
        ema=variables,
    )
    model = create_model(name, num_classes=32)
    step = oracle.compiled(partial(train_step.update, model, tx, settings))
    measured = []
    for image, target in zip(data["inputs"], data["targets"], strict=True):
        image_BHWC = (image.transpose(0, 2, 3, 1).astype(np.float32) - 128) / 64
        state, metrics = step(state, image_BHWC, target)
        measured.append(metrics)
    measured = jax.device_get(measured)
    return Trajectory(
        np.array([metrics["train/loss"] for metrics in measured]),
        np.array([metrics["train/grad_norm"] for metrics in measured]),
        to_torch(name, state.variables),
        to_torch(name, state.ema),
    )


def params(data, which):
    """The stored parameters that are no buffers, and have a gradient beyond rounding noise."""
    left_out = {"running_mean", "running_var", "num_batches_tracked"}
    noise = set(data["zero_grad_keys"].tolist())
    stored = oracle.under(which, data)
    keys = (key for key in stored if key.rpartition(".")[2] not in left_out and key not in noise)
    return {key: stored[key] for key in keys}


def buffers(data, which, leaf):
    stored = oracle.under(which, data)
    return {key: stored[key] for key in stored if key.endswith(f".{leaf}")}


def test_every_golden_trajectory_is_compared(golden):
    assert {path.stem for path in (golden / "trajectory").glob("*.npz")} == set(NAMES)


@every_file
def test_losses_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    assert oracle.absolute(ours.losses, data["losses"]) <= 1e-5


@every_file
def test_gradient_norms_equal_the_authors(golden, file):
    data, ours = load(golden, file)
    np.testing.assert_allclose(ours.grad_norms, data["grad_norms"], rtol=1e-5)


def test_starnet_ends_with_the_authors_parameters(golden):
    data, ours = load(golden, "starnet_s050")
    expected = params(data, "state_final/")
    assert oracle.beyond(oracle.absolute, 1e-5, ours.final, expected) == {}


@pytest.mark.parametrize("leaf, tolerance", [("running_mean", 2e-2), ("running_var", 1e-5)])
def test_starnet_ends_with_the_authors_running_statistics(golden, leaf, tolerance):
    data, ours = load(golden, "starnet_s050")
    expected = buffers(data, "state_final/", leaf)
    assert oracle.beyond(oracle.absolute, tolerance, ours.final, expected) == {}


def test_starnet_parameters_without_gradient_stay_within_the_sum_of_the_rates(golden):
    data, ours = load(golden, "starnet_s050")
    initial = {key: data[f"state_init/{key}"] for key in data["zero_grad_keys"].tolist()}
    assert oracle.beyond(oracle.absolute, data["lrs"].sum(), ours.final, initial) == {}


@pytest.mark.parametrize("leaf, tolerance", [("running_mean", 2e-5), ("running_var", 5e-7)])
def test_starnet_average_equals_the_authors(golden, leaf, tolerance):
    data, ours = load(golden, "starnet_s050")
    expected = buffers(data, "state_ema/", leaf)
    assert oracle.beyond(oracle.absolute, tolerance, ours.ema, expected) == {}


def test_demonet_ends_with_the_authors_parameters(golden):
    data, ours = load(golden, "DemoNet_d12_w32_mul")
    expected = params(data, "state_final/")
    assert oracle.beyond(oracle.absolute, 1e-4, ours.final, expected) == {}


def test_demonet_parameters_differ_by_rounding_but_for_one_in_a_thousand(golden):
    data, ours = load(golden, "DemoNet_d12_w32_mul")
    differences = [abs(ours.final[k] - v).ravel() for k, v in params(data, "state_final/").items()]
    assert (np.concatenate(differences) <= 2e-6).mean() >= 0.999


def test_demonet_average_equals_the_authors(golden):
    data, ours = load(golden, "DemoNet_d12_w32_mul")
    expected = params(data, "state_ema/")
    assert oracle.beyond(oracle.absolute, 5e-7, ours.ema, expected) == {}
