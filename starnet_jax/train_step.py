"""The pure train and eval steps, jitted over the mesh; the recipe of the paper in one place."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from starnet_jax import mesh as mesh_lib
from starnet_jax import optimizer, train_state
from starnet_jax.config import RunConfig
from starnet_jax.data import on_device
from starnet_jax.train_state import TrainState


class Steps(NamedTuple):
    """`train(state, batch) -> (state, metrics)` and `evaluate(variables, batch, classes) -> sums`.

    `train` donates the state.
    """

    train: Callable
    evaluate: Callable


def build(config: RunConfig, mesh: Mesh) -> Steps:
    """The jitted steps that `main` runs: state replicated, batch cut along the data axis."""
    model = train_state.model(config, mesh)
    schedule = optimizer.schedule(config)
    tx = optimizer.create(config, schedule)
    replicated, by_example = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        image_BHWC, target_BK = on_device.train_inputs(
            _key(config, state.step, use=0),
            batch["image"],
            batch["label"],
            config.model.num_classes,
            config.augment,
        )
        metrics = {"train/learning_rate": schedule(state.step)}
        state, measured = update(model, tx, config, state, image_BHWC, target_BK, mesh.size)
        return state, metrics | measured

    def eval_step(variables: dict, batch: dict, classes_K: jax.Array) -> dict:
        logits_BK = model.apply(variables, on_device.normalize(batch["image"]), train=False)
        return eval_sums(logits_BK, batch["label"], batch["mask"], classes_K)

    return Steps(
        train=jax.jit(
            train_step,
            in_shardings=(replicated, by_example),
            out_shardings=replicated,
            donate_argnums=0,
        ),
        evaluate=jax.jit(
            eval_step,
            in_shardings=(replicated, by_example, replicated),
            out_shardings=replicated,
        ),
    )


def abstract_batch(config: RunConfig, mesh: Mesh, evaluation: bool = False) -> dict:
    """Shapes, dtypes and shardings of the batch that crosses from data to step."""
    size = mesh_lib.eval_batch_size(config) if evaluation else config.batch_size
    side = config.data.image_size
    shapes = dict(image=((size, side, side, 3), jnp.uint8), label=((size,), jnp.int32))
    shapes |= dict(index=((size,), jnp.int32))
    shapes |= dict(mask=((size,), bool)) if evaluation else {}
    sharding = mesh_lib.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def update(
    model: nn.Module,
    tx: optax.GradientTransformation,
    config: RunConfig,
    state: TrainState,
    image_BHWC: jax.Array,
    target_BK: jax.Array,
    devices: int = 1,
) -> tuple[TrainState, dict]:
    """One optimizer step on normalised images and soft targets, in `optimizer.accumulate` parts.

    Where loss or gradient is not finite, nothing of the state changes but the counts of steps.

    Returns:
      The next state; float32 `train/loss` and `train/grad_norm`, int32 `train/skipped`.
    """
    key = _key(config, state.step, use=1)

    def loss_fn(params, image_BHWC, target_BK, key):
        logits_BK, changed = model.apply(
            state.variables | {"params": params},
            image_BHWC,
            train=True,
            rngs={"drop_path": key},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy(logits_BK, target_BK).mean()
        return loss, changed.get("batch_stats", {})

    gradients = partial(jax.value_and_grad(loss_fn, has_aux=True), state.params)
    if config.optimizer.accumulate == 1:
        (loss, batch_stats), grads = gradients(image_BHWC, target_BK, key)
    else:
        parts = config.optimizer.accumulate
        inputs = [_cut(x, parts, devices) for x in (image_BHWC, target_BK)]
        (loss, batch_stats), grads = _mean(gradients, *inputs, jax.random.split(key, parts))
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    changed = state.replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    if config.ema:
        average = optax.incremental_update(changed.variables, state.ema, 1 - config.ema)
        changed = changed.replace(ema=average)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    state = jax.tree.map(partial(jnp.where, finite), changed, state)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    state = state.replace(step=state.step + 1, skipped=skipped)
    return state, {"train/loss": loss, "train/grad_norm": grad_norm, "train/skipped": skipped}


def _cut(x: jax.Array, parts: int, devices: int) -> jax.Array:
    """[B,...] to [parts,B/parts,...], each part with equally many examples of every device."""
    x = x.reshape(devices, parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(parts, -1, *x.shape[3:])


def _mean(function: Callable, *inputs: jax.Array):
    """The mean of `function` over the first axis of its inputs, one after another."""
    shapes = jax.eval_shape(function, *(x[0] for x in inputs))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(*part)), None

    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda leaf: leaf / inputs[0].shape[0], total)


def _key(config: RunConfig, step: jax.Array, use: int) -> jax.Array:
    """The randomness of one step for one use; nothing else enters, so a restart draws the same."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), step), use)


def eval_sums(
    logits_BK: jax.Array,
    label_BL: jax.Array,
    mask_B: jax.Array,
    classes_K: jax.Array | None = None,
) -> dict:
    """Sums over the examples that `mask_B` admits: `loss`, `top1`, `top5`, `count`.

    Args:
      logits_BK: float32; a row with a NaN counts as wrong.
      label_BL: int32, the right classes, filled up with -1; or [B] where there is exactly one.
      mask_B: bool.
      classes_K: bool, the classes that take part; all by default.
    """
    if label_BL.ndim == 1:
        label_BL = label_BL[:, None]
    if classes_K is not None:
        logits_BK = jnp.where(classes_K, logits_BK, -jnp.inf)
    right_BL = label_BL >= 0
    index_BL = jnp.maximum(label_BL, 0)

    log_p_BK = jax.nn.log_softmax(logits_BK)
    log_p_BL = jnp.take_along_axis(log_p_BK, index_BL, axis=1)
    loss_B = -jax.nn.logsumexp(log_p_BL, axis=1, where=right_BL)

    logit_BL = jnp.where(right_BL, jnp.take_along_axis(logits_BK, index_BL, axis=1), -jnp.inf)
    best_B1 = logit_BL.max(1, keepdims=True)
    best_BL = right_BL & (logit_BL == best_B1)
    class_B1 = jnp.where(best_BL, label_BL, logits_BK.shape[1]).min(1, keepdims=True)
    # An equal logit of a lower class stands ahead, as in a stable sort.
    tied_BK = (logits_BK == best_B1) & (jnp.arange(logits_BK.shape[1]) < class_B1)
    rank_B = ((logits_BK > best_B1) | tied_BK).sum(1)
    rank_B = jnp.where(jnp.isnan(logits_BK).any(1), 5, rank_B)  # beyond the top 5

    sums = {"loss": loss_B, "top1": rank_B < 1, "top5": rank_B < 5, "count": mask_B}
    return {k: jnp.where(mask_B, v, 0).sum(dtype=jnp.float32) for k, v in sums.items()}
