"""What several tests share: running a network all ways at once, and measures of difference."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax

from starnet_jax import create_model
from starnet_jax.models import layers
from starnet_jax.ops import depthwise_conv
from starnet_jax.weights import from_torch, to_torch


class Passes(NamedTuple):
    """An evaluation forward pass, and a training forward and backward pass, PyTorch's keys."""

    eval_logits: np.ndarray
    train_logits: np.ndarray
    loss: np.ndarray
    grads: dict[str, np.ndarray]
    running: dict[str, np.ndarray]


def passes(
    name: str, state_dict: Mapping, x: np.ndarray, labels: np.ndarray, **settings: Any
) -> Passes:
    """Runs the model `name` on a PyTorch state dict and input; the loss is plain cross entropy."""
    variables = from_torch(name, state_dict)
    model = create_model(name, num_classes=state_dict["head.bias"].size, **settings)
    x = np.moveaxis(x, 1, -1)

    def loss_fn(params, buffers):
        logits, changed = model.apply(
            {"params": params, **buffers}, x, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, changed)

    params = variables.pop("params")
    eval_logits = compiled(model.apply)({"params": params, **variables}, x)
    (loss, (train_logits, changed)), grads = compiled(jax.value_and_grad(loss_fn, has_aux=True))(
        params, variables
    )
    after = to_torch(name, {"params": params, **changed})
    grads = to_torch(name, {"params": grads, **variables})
    return Passes(
        np.asarray(eval_logits),
        np.asarray(train_logits),
        np.asarray(loss),
        {key: grad for key, grad in grads.items() if not _is_buffer(key)},
        {key: value for key, value in after.items() if ".running_" in key},
    )


def compiled(function: Callable) -> Callable:
    """`jax.jit` that skips the optimisations on which a CPU spends most of its compile time."""
    on_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": "0"} if on_cpu else None
    return jax.jit(function, compiler_options=options)


@contextmanager
def xla_depthwise() -> Iterator[None]:
    """Lowers the networks' depthwise convolutions as on an accelerator: quick to compile."""
    native = partial(depthwise_conv, lowering="xla")
    with mock.patch.object(layers, "depthwise_conv", native):
        yield


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected size."""
    return absolute(actual, expected) / float(np.abs(expected).max())


def absolute(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max())


def beyond(
    measure: Callable, tolerance: float, actual: Mapping, expected: Mapping
) -> dict[str, float]:
    """The differences of the arrays of `expected` that are not within the tolerance, by key."""
    differences = {key: measure(actual[key], value) for key, value in expected.items()}
    return {key: value for key, value in differences.items() if not value <= tolerance}


def under(prefix: str, data: Mapping) -> dict[str, np.ndarray]:
    """The entries whose key starts with `prefix`, without it."""
    return {key.removeprefix(prefix): data[key] for key in data if key.startswith(prefix)}


def _is_buffer(key: str) -> bool:
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
