"""A batch computed in parts gives the step of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from starnet_jax import config, create_model, optimizer, train_step
from starnet_jax.errors import BadInput
from starnet_jax.mesh import bn_groups
from starnet_jax.models.starnet import StarNet
from starnet_jax.train_state import TrainState

BATCH, SIDE, CLASSES = 16, 32, 5


def small_starnet(groups):
    return StarNet(
        8, (1, 1), mlp_ratio=2, num_classes=CLASSES, stage_ops=("star", "sum"), bn_groups=groups
    )


def small_demonet(groups):
    del groups  # no BatchNorm
    return create_model("demonet_d1_w8", num_classes=CLASSES)


def one_step(accumulate, model):
    settings = config.resolve(
        {
            "batch_size": BATCH,
            "epochs": 1,
            "optimizer": {"accumulate": accumulate},
            "schedule": {"warmup_epochs": 0},
            "data": {"train_examples": BATCH},
            "ema": 0.9,
        }
    )
    rng = np.random.default_rng(0)
    image = rng.normal(size=(BATCH, SIDE, SIDE, 3)).astype(np.float32)
    target = np.eye(CLASSES, dtype=np.float32)[rng.integers(CLASSES, size=BATCH)]
    variables = oracle.compiled(model.init)(jax.random.key(0), image[:1])
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    tx = optimizer.create(settings, optimizer.schedule(settings))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=tx.init(variables["params"]),
        ema=variables,
    )
    step = oracle.compiled(lambda s, x, y: train_step.update(model, tx, settings, s, x, y))
    return step(state, image, target)


@pytest.mark.parametrize("make", [small_demonet, small_starnet])
def test_four_parts_equal_the_whole(make):
    """BatchNorm groups of four examples, so that the parts do not cut a group."""
    whole_state, whole = one_step(1, make(groups=4))
    parts_state, parts = one_step(4, make(groups=1))
    for key in whole:
        np.testing.assert_allclose(parts[key], whole[key], rtol=2e-5)
    for got, expected in zip(
        jax.tree.leaves(parts_state.batch_stats),
        jax.tree.leaves(whole_state.batch_stats),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    gradients = jax.tree.leaves(whole_state.opt_state[0].mu)
    largest = max(float(jnp.abs(gradient).max()) for gradient in gradients)
    for got, expected in zip(jax.tree.leaves(parts_state.opt_state[0].mu), gradients, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6 * largest)


def test_parts_take_equally_many_examples_of_every_device():
    x = jnp.arange(16)
    parts = train_step._cut(x, parts=2, devices=4)
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])


def test_batchnorm_groups_that_the_parts_would_cut_are_refused():
    mesh = type("Mesh", (), {"size": 1})()
    settings = {"batch_size": 16, "epochs": 1, "optimizer": {"accumulate": 4}}
    with pytest.raises(BadInput, match="'global' needs the whole batch"):
        bn_groups(config.resolve(settings), mesh)
    with pytest.raises(BadInput, match="8 does not divide 4"):
        bn_groups(config.resolve(settings | {"bn_group": 8}), mesh)
    assert bn_groups(config.resolve(settings | {"bn_group": 2}), mesh) == 2
