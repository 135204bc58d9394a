"""The optimizer of the paper: AdamW, a decay mask, a cosine schedule with warm-up."""

import jax
import jax.numpy as jnp
import optax

from starnet_jax.config import RunConfig


def schedule(config: RunConfig) -> optax.Schedule:
    """The learning rate at each step: linear warm-up, cosine to the minimum, cooldown there.

    The cosine counts from epoch 0, so that the first rate after the warm-up is already below the
    peak; by default the rate changes once per epoch (timm 0.6.13, supplement Table 12).

    Returns:
      step (int or int32 array) to float32.
    """
    settings, peak = config.schedule, config.optimizer.learning_rate
    floor, start = settings.min_learning_rate, settings.warmup_learning_rate

    def learning_rate(step):
        steps_per_epoch = config.steps_per_epoch  # here: evaluation builds the optimizer without it
        step = jnp.asarray(step)
        if settings.per == "epoch":
            unit, step = 1, step // steps_per_epoch
        else:
            unit = steps_per_epoch
        warmup, total = settings.warmup_epochs * unit, config.epochs * unit
        ramp = start + (peak - start) * step / max(warmup, 1)
        left = jnp.maximum(total - step, 0) / total
        # sin^2 of what is left equals (1 + cos(pi * done)) / 2 and keeps its digits near the end.
        cosine = floor + (peak - floor) * jnp.sin(jnp.pi / 2 * left) ** 2
        return jnp.where(step < warmup, ramp, cosine).astype(jnp.float32)

    return learning_rate


def decay_mask(params):
    """True where weight decay applies: tensors of more than one axis that are no bias."""

    def decays(path, leaf):
        return leaf.ndim > 1 and path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def create(config: RunConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decoupled decay; clipping and layer-wise decay, not in the paper, when asked."""
    settings = config.optimizer
    adamw = optax.adamw(
        learning_rate,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decay_mask,
    )
    parts = [adamw]
    if settings.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(settings.clip_norm))
    if settings.layer_decay < 1:
        parts.append(_scale_by_layer(settings.layer_decay))
    return optax.chain(*parts) if len(parts) > 1 else adamw


def layer_scales(params, decay: float):
    """The factor on each parameter's rate: 1 in norm and head, `decay` less per block before them.

    Returns:
      A tree of floats in the structure of `params`; the stem has the smallest.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    layers = sorted({layer for path in paths if (layer := _layer(path))})
    depth = {layer: len(layers) - i for i, layer in enumerate(layers)}
    depth[()] = 0

    def scale(path, _):
        return decay ** depth[_layer(path)]

    return jax.tree_util.tree_map_with_path(scale, params)


def _layer(path) -> tuple[int, ...]:
    """Where a parameter stands: (-1,) in the stem, indices of stage and block, () at the end."""
    names = [key.key for key in path]
    if names[0] == "stem":
        return (-1,)
    indices = [name.rsplit("_", 1)[1] for name in names if name.startswith(("stages_", "blocks_"))]
    return tuple(int(index) for index in indices)  # a downsampler stands before block 0


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        del params
        scales = layer_scales(updates, decay)
        return jax.tree.map(lambda u, s: u * s, updates, scales), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
