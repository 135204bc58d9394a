"""StarNet-JAX: train, study and ship the networks of "Rewrite the Stars" (Ma et al., CVPR 2024)."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "create_model": "starnet_jax.models",
    "depthwise_conv": "starnet_jax.ops",
    "star": "starnet_jax.ops",
}
__all__ = ["__version__", "create_model", "depthwise_conv", "star"]


def __getattr__(name: str):
    """Loads the public API on first use, so that `starnet_jax.errors` needs no JAX."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'starnet_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
