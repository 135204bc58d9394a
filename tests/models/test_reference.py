"""The networks against PyTorch ones in float64, written from the paper for these tests."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import oracle
import pytest

torch = pytest.importorskip("torch")

import torch_reference  # noqa: E402

pytestmark = pytest.mark.torch

MIXED = ("star", "sum", "star", "sum")


class Case(NamedTuple):
    """The same network twice; no ReLU input of the seed lies within 1e-5 of a kink."""

    name: str
    settings: dict
    make: Callable
    shape: tuple[int, ...]
    seed: int


def starnet(name, seed, **settings):
    make = lambda: torch_reference.starnet(name, 10, **settings)  # noqa: E731
    return Case(name, settings, make, (2, 3, 64, 64), seed)


def demonet(op):
    make = lambda: torch_reference.demonet(3, 32, 10, op)  # noqa: E731
    return Case("demonet_d3_w32", {"op": op}, make, (4, 3, 32, 32), seed=0)


def demonet_2d(ops):
    make = lambda: torch_reference.demonet_2d(ops)  # noqa: E731
    return Case("demonet_2d", {"stage_ops": ops}, make, (16, 2), seed=5)


CASES = {
    "starnet_s1": starnet("starnet_s1", seed=6),
    "starnet_s150_mixed": starnet("starnet_s150", seed=3, stage_ops=MIXED),
    "demonet_star": demonet("star"),
    "demonet_sum": demonet("sum"),
    "demonet_2d_mixed": demonet_2d(("star", "sum", "sum", "star")),
}
every_case = pytest.mark.parametrize("case", CASES)


@cache
def load(key):
    """The passes of PyTorch in float64 and ours; the compiler's seconds are spent once per case."""
    torch.set_num_threads(1)  # more of them and XLA's would wait for each other
    case = CASES[key]
    network = torch_reference.randomize(case.make(), case.seed)
    state_dict = {k: v.numpy().copy() for k, v in network.state_dict().items()}
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.shape, generator=generator)
    classes = len(state_dict["head.bias"])
    labels = torch.randint(classes, (len(x),), generator=generator)
    with oracle.xla_depthwise():
        ours = oracle.passes(case.name, state_dict, x.numpy(), labels.numpy(), **case.settings)
    return reference_passes(network.double(), x.double(), labels), ours


def reference_passes(network, x, labels):
    eval_logits = network.eval()(x)
    train_logits = network.train()(x)
    loss = torch.nn.functional.cross_entropy(train_logits, labels)
    loss.backward()
    return oracle.Passes(
        eval_logits.detach().numpy(),
        train_logits.detach().numpy(),
        loss.detach().numpy(),
        {key: value.grad.numpy() for key, value in network.named_parameters()},
        {key: value.numpy() for key, value in network.named_buffers() if ".running_" in key},
    )


@every_case
def test_evaluation_logits_equal_pytorch(case):
    expected, ours = load(case)
    assert oracle.relative(ours.eval_logits, expected.eval_logits) <= 2e-5


@every_case
def test_training_logits_equal_pytorch(case):
    expected, ours = load(case)
    assert oracle.relative(ours.train_logits, expected.train_logits) <= 2e-5


@every_case
def test_loss_equals_pytorch(case):
    expected, ours = load(case)
    assert oracle.absolute(ours.loss, expected.loss) <= 1e-5


@every_case
def test_gradients_equal_pytorch(case):
    expected, ours = load(case)
    grads = {key: grad for key, grad in expected.grads.items() if not vanishes(grad)}
    assert oracle.beyond(oracle.relative, 1e-4, ours.grads, grads) == {}


@every_case
def test_gradients_that_batchnorm_cancels_are_rounding_noise(case):
    expected, ours = load(case)
    grads = {key: grad for key, grad in expected.grads.items() if vanishes(grad)}
    assert oracle.beyond(oracle.absolute, 1e-5, ours.grads, grads) == {}


@every_case
def test_running_statistics_after_a_step_equal_pytorch(case):
    expected, ours = load(case)
    assert ours.running.keys() == expected.running.keys()
    assert oracle.beyond(oracle.relative, 5e-6, ours.running, expected.running) == {}


def vanishes(grad):
    """Whether the gradient is 0 but for rounding in float64."""
    return abs(grad).max() < 1e-10
