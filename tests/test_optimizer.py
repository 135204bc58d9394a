"""Learning rate, decay mask and AdamW against timm's numbers and NumPy."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from starnet_jax import config, create_model, optimizer
from starnet_jax.weights.torch import torch_key


def imagenet_config(rate=3e-3, **schedule):
    """The published run: 300 epochs, 10 of cooldown, 625 steps each."""
    return config.resolve(
        {
            "batch_size": 2048,
            "epochs": 300,
            "data": {"train_examples": 1_281_167},
            "optimizer": {"learning_rate": rate},
            "schedule": {"cooldown_epochs": 10, **schedule},
        }
    )


def short_config(**schedule):
    """20 epochs and 3 of cooldown, 7 steps each."""
    return config.resolve(
        {
            "batch_size": 1,
            "epochs": 20,
            "data": {"train_examples": 7},
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"cooldown_epochs": 3, **schedule},
        }
    )


def rates(settings, steps):
    return np.asarray(optimizer.schedule(settings)(jnp.asarray(steps)))


@pytest.mark.parametrize("step_of_epoch", [0, 624], ids=["first_step", "last_step"])
@pytest.mark.parametrize("rate", ["3e-3", "4e-3"])
def test_rate_of_every_epoch_equals_timm(golden, rate, step_of_epoch):
    with open(golden / "schedule" / f"lr_{rate}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row["epoch"]) * 625 + step_of_epoch for row in rows]
    ours = rates(imagenet_config(float(rate)), steps)
    np.testing.assert_allclose(ours, [float(row["lr"]) for row in rows], rtol=1e-6)


@pytest.mark.parametrize(
    "epoch, rate",
    [
        (0, 1e-6),
        (1, 6.008e-4),
        (4, 2.4002e-3),
        (5, 2.998e-3),
        (150, 1.505e-3),
        (299, 1.008e-5),
        (300, 1e-5),
        (309, 1e-5),
    ],
)
def test_rate_follows_the_published_recipe(epoch, rate):
    assert rates(imagenet_config(), epoch * 625) == pytest.approx(rate, rel=5e-4)


def test_rate_is_float32():
    assert optimizer.schedule(imagenet_config())(jnp.int32(3)).dtype == jnp.float32


def test_per_step_rate_meets_the_per_epoch_rate_at_epoch_starts():
    starts = np.arange(310) * 625
    np.testing.assert_allclose(
        rates(imagenet_config(per="step"), starts),
        rates(imagenet_config(per="epoch"), starts),
        rtol=1e-6,
    )


def test_per_step_rate_rises_in_every_step_of_the_warmup():
    # The first rate behind the warm-up is the cosine's, already below the peak.
    assert (np.diff(rates(short_config(per="step"), np.arange(5 * 7))) > 0).all()


def test_per_step_rate_falls_in_every_step_of_the_cosine():
    assert (np.diff(rates(short_config(per="step"), np.arange(5 * 7, 20 * 7 + 1))) < 0).all()


def test_rate_stays_at_the_minimum_in_the_cooldown():
    cooldown = rates(short_config(per="step"), np.arange(20 * 7, 23 * 7))
    np.testing.assert_allclose(cooldown, 1e-5, rtol=1e-6)


def test_without_warmup_the_first_rate_is_the_peak():
    assert rates(short_config(warmup_epochs=0), 0) == pytest.approx(1e-2, rel=1e-6)


@pytest.mark.parametrize(
    "file, name",
    [("starnet_s050", "starnet_s050"), ("DemoNet_d12_w32_mul", "demonet_d12_w32_star")],
)
def test_decay_falls_on_the_same_parameters_as_in_timm(golden, file, name):
    with np.load(golden / "trajectory" / f"{file}.npz") as data:
        expected = dict.fromkeys(data["decay_keys"].tolist(), True)
        expected |= dict.fromkeys(data["no_decay_keys"].tolist(), False)
    model = create_model(name, num_classes=32)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    mask = traverse_util.flatten_dict({"params": optimizer.decay_mask(params)})
    assert {torch_key(path): decays for path, decays in mask.items()} == expected


@pytest.mark.parametrize(
    "leaf, shape, decays",
    [
        ("kernel", (7, 7, 1, 4), True),
        ("kernel", (4, 8), True),
        ("bias", (4,), False),
        ("bias", (2, 4), False),
        ("scale", (4,), False),
        ("gamma", (4,), False),
    ],
)
def test_decay_falls_on_tensors_that_are_no_bias(leaf, shape, decays):
    params = {"layer": {leaf: jnp.zeros(shape)}}
    assert optimizer.decay_mask(params) == {"layer": {leaf: decays}}


def test_updates_are_adamw_with_decoupled_decay_and_no_clipping():
    settings = config.resolve(
        {"batch_size": 1, "epochs": 1, "optimizer": {"weight_decay": 0.3, "b1": 0.8, "b2": 0.9}}
    )
    learning_rates = [0.1, 0.02, 0.3]
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    grads = [{k: 1e3 * rng.normal(size=v.shape) for k, v in params.items()} for _ in range(3)]

    tx = optimizer.create(settings, lambda step: jnp.asarray(learning_rates)[step])
    ours = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    state = tx.init(ours)
    for grad in grads:
        updates, state = tx.update(grad, state, ours)
        ours = {k: ours[k] + updates[k] for k in ours}

    expected = {"kernel": adamw(params, grads, learning_rates, "kernel", decay=0.3)}
    expected["bias"] = adamw(params, grads, learning_rates, "bias", decay=0.0)
    for key, value in expected.items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, atol=1e-6)


def adamw(params, grads, learning_rates, key, decay, b1=0.8, b2=0.9, eps=1e-8):
    """Loshchilov and Hutter's algorithm for one parameter."""
    p, m, v = params[key], 0.0, 0.0
    for t, (grad, rate) in enumerate(zip(grads, learning_rates, strict=True), start=1):
        m = b1 * m + (1 - b1) * grad[key]
        v = b2 * v + (1 - b2) * grad[key] ** 2
        p = p * (1 - rate * decay)
        p = p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


def updates_of(params, **settings):
    """What one step with unit gradients and learning rate 1 changes, without weight decay."""
    run = config.resolve(
        {"batch_size": 1, "epochs": 1, "optimizer": {"weight_decay": 0.0} | settings}
    )
    tx = optimizer.create(run, lambda step: 1.0)
    return tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]


def test_layer_decay_shrinks_the_rate_block_by_block_from_the_head():
    leaf = jnp.ones(1)
    params = {
        "stem": {"conv": leaf},
        "stages_0": {"downsample": leaf, "blocks_0": leaf, "blocks_1": leaf},
        "stages_1": {"downsample": leaf, "blocks_0": leaf},
        "norm": leaf,
        "head": leaf,
    }
    whole, decayed = updates_of(params), updates_of(params, layer_decay=0.5)
    factors = jax.tree.map(lambda d, w: round(float((d / w)[0]), 6), decayed, whole)
    assert factors == {
        "stem": {"conv": 0.5**6},
        "stages_0": {"downsample": 0.5**5, "blocks_0": 0.5**4, "blocks_1": 0.5**3},
        "stages_1": {"downsample": 0.5**2, "blocks_0": 0.5},
        "norm": 1.0,
        "head": 1.0,
    }


def test_clipping_bounds_the_norm_of_all_gradients_together():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    run = config.resolve({"batch_size": 1, "epochs": 1, "optimizer": {"clip_norm": 1.0}})
    tx = optimizer.create(run, lambda step: 1.0)
    _, state = tx.update(jax.tree.map(lambda p: p + 5, params), tx.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    expected = (1 - run.optimizer.b1) * 0.5  # four gradients of 5, scaled to norm 1
    np.testing.assert_allclose(np.concatenate(jax.tree.leaves(first_moment)), expected, rtol=1e-6)
