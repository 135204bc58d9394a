"""StarNet, the four-stage classifier of paper section 4.1 and Table 5."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from starnet_jax.models.layers import (
    BatchNorm,
    ConvBN,
    DepthwiseConvBN,
    DropPath,
    Dtype,
    precision,
    trunc_normal,
)
from starnet_jax.ops import star

STEM_WIDTH = 32  # for every variant, also where base_dim is smaller


class StarBlock(nn.Module):
    """x + dwconv2(g(star(f1(y), f2(y)))) with y = dwconv(x); [B,H,W,C] to the same shape.

    The second depthwise convolution has no BatchNorm (paper Fig. 3).
    """

    mlp_ratio: int
    op: str
    activation: str
    activation_placement: str
    drop_path: float
    bn_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        channels = x_BHWC.shape[-1]
        shared = dict(bn_groups=self.bn_groups, dtype=self.dtype)
        wide = self.mlp_ratio * channels
        y_BHWC = DepthwiseConvBN(**shared, name="dwconv")(x_BHWC, train)
        x1 = ConvBN(wide, with_bn=False, **shared, name="f1")(y_BHWC, train)
        x2 = ConvBN(wide, with_bn=False, **shared, name="f2")(y_BHWC, train)
        y = star(
            x1, x2, op=self.op, activation=self.activation, placement=self.activation_placement
        )
        y_BHWC = ConvBN(channels, **shared, name="g")(y, train)
        y_BHWC = DepthwiseConvBN(with_bn=False, **shared, name="dwconv2")(y_BHWC, train)
        return x_BHWC + DropPath(self.drop_path)(y_BHWC, train)


class Stage(nn.Module):
    """Halves the map with a 3x3 ConvBN to `width` channels, then star blocks, one per drop rate."""

    width: int
    drop_paths: tuple[float, ...]
    block: dict
    bn_groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        shared = dict(bn_groups=self.bn_groups, dtype=self.dtype)
        x_BHWC = ConvBN(self.width, kernel=3, stride=2, **shared, name="downsample")(x_BHWC, train)
        for j, rate in enumerate(self.drop_paths):
            block = StarBlock(drop_path=rate, **self.block, **shared, name=f"blocks_{j}")
            x_BHWC = block(x_BHWC, train)
        return x_BHWC


class StarNet(nn.Module):
    """Image classifier: images [B,H,W,3], normalised, to float32 logits [B,num_classes].

    Attributes:
      base_dim: width of the first stage; each further stage doubles it.
      depths: star blocks per stage.
      mlp_ratio: width of the two branches over the width of the block.
      num_classes: size of the head.
      stage_ops: the operation of each stage, keys of `ops.OPS` (paper Table 7).
      activation: key of `ops.ACTIVATIONS` (paper Table 17); the stem keeps ReLU6.
      activation_placement: key of `ops.PLACEMENTS` (paper Table 9).
      drop_path: stochastic depth of the last block; earlier blocks rise to it linearly from 0.
      bn_groups: see `layers.BatchNorm`.
      dtype: computation; parameters and statistics stay float32.
    """

    base_dim: int
    depths: tuple[int, ...]
    mlp_ratio: int = 4
    num_classes: int = 1000
    stage_ops: tuple[str, ...] = ("star",) * 4
    activation: str = "relu6"
    activation_placement: str = "first"
    drop_path: float = 0.0
    bn_groups: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool = False) -> jax.Array:
        shared = dict(bn_groups=self.bn_groups, dtype=self.dtype)
        x_BHWC = x_BHWC.astype(self.dtype)
        x_BHWC = ConvBN(STEM_WIDTH, kernel=3, stride=2, **shared, name="stem")(x_BHWC, train)
        x_BHWC = jax.nn.relu6(x_BHWC)
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        for i, depth in enumerate(self.depths):
            block = dict(
                mlp_ratio=self.mlp_ratio,
                op=self.stage_ops[i],
                activation=self.activation,
                activation_placement=self.activation_placement,
            )
            drop_paths, rates = tuple(rates[:depth]), rates[depth:]
            width = self.base_dim * 2**i
            x_BHWC = Stage(width, drop_paths, block, **shared, name=f"stages_{i}")(x_BHWC, train)
        x_BHWC = BatchNorm(self.dtype, self.bn_groups, name="norm")(x_BHWC, train)
        x_BC = x_BHWC.mean((1, 2), dtype=jnp.float32)
        head = nn.Dense(
            self.num_classes,
            precision=precision(jnp.float32),
            kernel_init=trunc_normal,
            name="head",
        )
        return head(x_BC)
