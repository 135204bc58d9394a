"""DemoNet, the isotropic testbed of paper section 3.2, and its two-dimensional sister."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from starnet_jax.models.layers import DepthwiseConv, DropPath, Dtype, precision, trunc_normal
from starnet_jax.ops import star

PATCH = 16  # side of a stem patch, in pixels
LAYER_SCALE = 1e-6  # initial gamma: in the authors' code, not in the paper


class DemoBlock(nn.Module):
    """x + gamma * g(star(halves of f(dwconv(norm(x))))), channels last; x keeps its shape.

    Each branch is three times as wide as the block. The two-dimensional network has neither the
    depthwise convolution nor gamma (`spatial=False`).
    """

    op: str
    activation: str
    activation_placement: str
    spatial: bool = True
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        width = x.shape[-1]
        dense = partial(
            nn.Dense, dtype=self.dtype, precision=precision(self.dtype), kernel_init=trunc_normal
        )
        y = _layer_norm(self.dtype)(x)
        if self.spatial:
            y = DepthwiseConv(self.dtype, torch_init=False, name="dwconv")(y)
        x1, x2 = jnp.split(dense(6 * width, name="f")(y), 2, axis=-1)
        y = star(
            x1, x2, op=self.op, activation=self.activation, placement=self.activation_placement
        )
        y = dense(width, name="g")(y)
        if self.spatial:
            gamma = self.param("gamma", nn.initializers.constant(LAYER_SCALE), (width,))
            y = y * gamma.astype(self.dtype)
        return x + DropPath(self.drop_path)(y, train)


class DemoNet(nn.Module):
    """Isotropic classifier: images [B,H,W,3], normalised, to float32 logits [B,num_classes].

    Attributes are StarNet's; `stage_ops` holds one operation per block.
    """

    width: int
    stage_ops: tuple[str, ...]
    num_classes: int = 1000
    activation: str = "gelu"
    activation_placement: str = "first"
    drop_path: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        stem = nn.Conv(
            self.width,
            (PATCH, PATCH),
            PATCH,
            padding="VALID",
            dtype=self.dtype,
            precision=precision(self.dtype),
            kernel_init=trunc_normal,
            name="stem",
        )
        x_BHWC = stem(x_BHWC.astype(self.dtype))
        rates = np.linspace(0, self.drop_path, len(self.stage_ops)).tolist()
        for i, (op, rate) in enumerate(zip(self.stage_ops, rates, strict=True)):
            block = DemoBlock(
                op,
                self.activation,
                self.activation_placement,
                drop_path=rate,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )
            x_BHWC = block(x_BHWC, train)
        return _head(self.num_classes, x_BHWC.mean((1, 2), dtype=jnp.float32))


class DemoNet2D(nn.Module):
    """The decision-boundary network (supplement B): points [B,2] to float32 logits [B,num_classes].

    LayerNorm stays, as in the authors' code; without it the star's advantage is gone.
    """

    stage_ops: tuple[str, ...] = ("star",) * 4
    width: int = 100
    num_classes: int = 2
    activation: str = "relu"
    activation_placement: str = "first"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BC: jax.Array, train: bool = False) -> jax.Array:
        stem = nn.Dense(
            self.width,
            dtype=self.dtype,
            precision=precision(self.dtype),
            kernel_init=trunc_normal,
            name="stem",
        )
        x_BC = stem(x_BC.astype(self.dtype))
        for i, op in enumerate(self.stage_ops):
            block = DemoBlock(
                op,
                self.activation,
                self.activation_placement,
                spatial=False,
                dtype=self.dtype,
                name=f"blocks_{i}",
            )
            x_BC = block(x_BC, train)
        return _head(self.num_classes, x_BC.astype(jnp.float32))


def _layer_norm(dtype: Dtype) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name="norm")


def _head(num_classes: int, x_BC: jax.Array) -> jax.Array:
    """LayerNorm and the linear classifier, in float32."""
    dense = nn.Dense(
        num_classes, precision=precision(jnp.float32), kernel_init=trunc_normal, name="head"
    )
    return dense(_layer_norm(jnp.float32)(x_BC))
