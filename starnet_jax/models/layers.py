"""Layers with PyTorch's semantics: initialisation, BatchNorm statistics, stochastic depth."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from starnet_jax.ops import depthwise_conv

Dtype = jnp.dtype | type

# PyTorch's default for a convolution is uniform(+-1/sqrt(fan_in)), weight and bias alike.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
# The authors' truncated normal cuts at -2 and 2, 100 deviations away: nothing.
trunc_normal = nn.initializers.normal(0.02)


def torch_uniform_bias(fan_in: int) -> nn.initializers.Initializer:
    """PyTorch's default bias: uniform(+-1/sqrt(fan_in))."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1, 1) / fan_in**0.5

    return init


def precision(dtype: Dtype) -> lax.Precision | None:
    """float32 means float32: TPU and GPU would otherwise round the inputs of products."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


class DepthwiseConv(nn.Module):
    """7x7 depthwise convolution with bias, [B,H,W,C] to the same shape.

    `torch_init` is StarNet's initialisation; otherwise DemoNet's truncated normal and zero bias.
    """

    dtype: Dtype = jnp.float32
    torch_init: bool = True
    size: int = 7

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        channels = x_BHWC.shape[-1]
        kernel_init = torch_uniform if self.torch_init else trunc_normal
        bias_init = torch_uniform_bias(self.size**2) if self.torch_init else nn.initializers.zeros
        kernel = self.param("kernel", kernel_init, (self.size, self.size, 1, channels))
        bias = self.param("bias", bias_init, (channels,))
        y_BHWC = depthwise_conv(x_BHWC.astype(self.dtype), kernel.astype(self.dtype))
        return y_BHWC + bias.astype(self.dtype)


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's semantics: eps 1e-5, momentum 0.1, unbiased running variance.

    In training the batch is cut into `groups` equal runs of consecutive examples, each normalised
    by its own statistics; the running statistics take the average over groups. One group is the
    global batch, whatever the number of devices. Statistics are float32.
    """

    dtype: Dtype = jnp.float32
    groups: int = 1
    momentum: float = 0.1
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        channels = x_BHWC.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            return self._normalize(x_BHWC, running_mean.value, running_var.value, scale, bias)

        x_GBHWC = x_BHWC.reshape(self.groups, -1, *x_BHWC.shape[1:])
        axes = tuple(range(1, x_GBHWC.ndim - 1))
        x32 = x_GBHWC.astype(jnp.float32)
        mean = x32.mean(axes, keepdims=True)
        var = jnp.square(x32 - mean).mean(axes, keepdims=True)
        if not self.is_initializing():
            n = x_GBHWC.size // (self.groups * channels)
            unbiased = var * (n / max(n - 1, 1))
            self._update(running_mean, mean)
            self._update(running_var, unbiased)
        return self._normalize(x_GBHWC, mean, var, scale, bias).reshape(x_BHWC.shape)

    def _update(self, running: nn.Variable, batch: jax.Array) -> None:
        average_C = batch.reshape(self.groups, -1).mean(0)
        running.value += self.momentum * (lax.stop_gradient(average_C) - running.value)

    def _normalize(self, x, mean, var, scale, bias):
        y = (x.astype(jnp.float32) - mean) * (lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype)


class ConvBN(nn.Module):
    """Convolution with bias, then BatchNorm unless told otherwise; parameters `conv` and `bn`.

    `kernel` 1 is a matrix product over channels, 3 a convolution padded by 1.
    """

    features: int
    kernel: int = 1
    stride: int = 1
    with_bn: bool = True
    bn_groups: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        fan_in = self.kernel**2 * x_BHWC.shape[-1]
        shared = dict(
            dtype=self.dtype,
            precision=precision(self.dtype),
            kernel_init=torch_uniform,
            bias_init=torch_uniform_bias(fan_in),
            name="conv",
        )
        if self.kernel == 1:
            x_BHWC = nn.Dense(self.features, **shared)(x_BHWC)
        else:
            pad, size = self.kernel // 2, (self.kernel, self.kernel)
            x_BHWC = nn.Conv(self.features, size, self.stride, padding=pad, **shared)(x_BHWC)
        if self.with_bn:
            x_BHWC = BatchNorm(self.dtype, self.bn_groups, name="bn")(x_BHWC, train)
        return x_BHWC


class DepthwiseConvBN(nn.Module):
    """Depthwise 7x7 convolution, then BatchNorm unless told otherwise; parameters as `ConvBN`."""

    with_bn: bool = True
    bn_groups: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array, train: bool) -> jax.Array:
        x_BHWC = DepthwiseConv(self.dtype, name="conv")(x_BHWC)
        if self.with_bn:
            x_BHWC = BatchNorm(self.dtype, self.bn_groups, name="bn")(x_BHWC, train)
        return x_BHWC


class DropPath(nn.Module):
    """Stochastic depth: drops whole examples of a branch at `rate`, scales the kept by 1/(1-rate).

    Draws from the random stream `drop_path` in training.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        shape = (x.shape[0], *[1] * (x.ndim - 1))
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)
