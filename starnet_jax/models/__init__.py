"""Named models, their registry and an overview of their parameters."""

from starnet_jax.models.overview import overview
from starnet_jax.models.registry import create_model, has_batch_norm, model_names, reduction

__all__ = ["create_model", "has_batch_norm", "model_names", "overview", "reduction"]
