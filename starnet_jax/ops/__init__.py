"""The operations of the network as plain JAX functions; they import jax only."""

from starnet_jax.ops.depthwise_conv import depthwise_conv
from starnet_jax.ops.star import ACTIVATIONS, OPS, PLACEMENTS, star

__all__ = ["ACTIVATIONS", "OPS", "PLACEMENTS", "depthwise_conv", "star"]
