"""The star operation in all its modes against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from starnet_jax.ops import ACTIVATIONS, OPS, PLACEMENTS, star

OP = {"star": np.multiply, "sum": np.add}
ACTIVATION = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
    "leaky_relu": lambda x: np.where(x < 0, 0.01 * x, x),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
}
PLACEMENT = {
    "first": lambda op, act, x1, x2: op(act(x1), x2),
    "both": lambda op, act, x1, x2: op(act(x1), act(x2)),
    "product": lambda op, act, x1, x2: act(op(x1, x2)),
}
branch = arrays(np.float32, (3, 4), elements=st.floats(-10, 10, width=32))


def test_every_mode_is_compared():
    assert (OPS.keys(), ACTIVATIONS.keys(), PLACEMENTS.keys()) == (
        OP.keys(),
        ACTIVATION.keys(),
        PLACEMENT.keys(),
    )


@pytest.mark.parametrize("placement", PLACEMENT)
@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("op", OP)
@settings(deadline=None, max_examples=25)
@given(x1=branch, x2=branch)
def test_values_equal_numpy(op, activation, placement, x1, x2):
    y = star(x1, x2, op=op, activation=activation, placement=placement)
    expected = PLACEMENT[placement](
        OP[op], ACTIVATION[activation], x1.astype(np.float64), x2.astype(np.float64)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)


@settings(deadline=None, max_examples=25)
@given(x1=branch, x2=branch)
def test_the_default_is_relu6_of_the_first_times_the_second(x1, x2):
    np.testing.assert_allclose(star(x1, x2), np.clip(x1, 0, 6) * x2, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("placement", PLACEMENT)
@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("op", OP)
def test_bfloat16_stays_bfloat16(op, activation, placement):
    x = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    y = jax.eval_shape(
        lambda x1, x2: star(x1, x2, op=op, activation=activation, placement=placement), x, x
    )
    assert (y.shape, y.dtype) == ((2, 3), jnp.bfloat16)


@pytest.mark.parametrize("mode", ["op", "activation", "placement"])
def test_an_unknown_mode_raises(mode):
    with pytest.raises(KeyError, match="sta"):
        star(jnp.ones(2), jnp.ones(2), **{mode: "sta"})
