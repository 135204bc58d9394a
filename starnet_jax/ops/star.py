"""The star operation and its peers: how two linear branches become one."""

from functools import partial

import jax
import jax.numpy as jnp

# How the branches meet (paper section 3.1). A new entry is a new `model.op`.
OPS = {"star": jnp.multiply, "sum": jnp.add}

# Paper Table 17, with GELU exactly as PyTorch computes it, and none at all (Tables 4 and 9).
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "leaky_relu": partial(jax.nn.leaky_relu, negative_slope=0.01),
    "hard_swish": jax.nn.hard_swish,
}

# Where the activation stands (paper Table 9); "first" is the paper's choice: act(x1) * x2. Its row
# without one is the activation "identity".
PLACEMENTS = {
    "first": lambda op, act, x1, x2: op(act(x1), x2),
    "both": lambda op, act, x1, x2: op(act(x1), act(x2)),
    "product": lambda op, act, x1, x2: act(op(x1, x2)),
}


def star(
    x1: jax.Array,
    x2: jax.Array,
    *,
    op: str = "star",
    activation: str = "relu6",
    placement: str = "first",
) -> jax.Array:
    """Joins two branches of equal shape and dtype: `relu6(x1) * x2` by default.

    Args:
      x1: any shape, floating.
      x2: the same shape and dtype.
      op: a key of `OPS`; "star" multiplies, "sum" adds (paper section 3.1).
      activation: a key of `ACTIVATIONS` (paper Table 17).
      placement: a key of `PLACEMENTS` (paper Table 9).

    Raises:
      KeyError: a mode that the tables above do not hold.
    """
    return PLACEMENTS[placement](OPS[op], ACTIVATIONS[activation], x1, x2)
