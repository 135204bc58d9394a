"""Parameters in and out: PyTorch state dicts to Flax variables and back, as NumPy arrays."""

from starnet_jax.weights.torch import from_torch, to_torch

__all__ = ["from_torch", "to_torch"]
