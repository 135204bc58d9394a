"""The parts of the steps: sums of evaluation, labels, normalisation, weight average, randomness."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from starnet_jax import config, create_model, train_step
from starnet_jax.data.on_device import normalize, soft_labels
from starnet_jax.models.starnet import StarNet
from starnet_jax.train_state import TrainState

EXAMPLES = 6


@st.composite
def batches(draw):
    """Logits of few values, so that many tie; one label each; mask."""
    classes = draw(st.sampled_from([2, 3, 5, 8]))
    logits = draw(arrays(np.float32, (EXAMPLES, classes), elements=st.integers(-3, 3)))
    label = draw(arrays(np.int32, EXAMPLES, elements=st.integers(0, classes - 1)))
    mask = draw(arrays(np.bool_, EXAMPLES))
    return logits, label, mask


@st.composite
def batches_of_many_labels(draw):
    """As `batches`, with one to three labels each in any order, filled up with -1."""
    logits, _, mask = draw(batches())
    class_of = st.integers(0, logits.shape[1] - 1)
    rows = [draw(st.lists(class_of, min_size=1, max_size=3, unique=True)) for _ in logits]
    return logits, np.array([row + [-1] * (3 - len(row)) for row in rows], np.int32), mask


def hits(logits, labels, mask, k):
    """Admitted examples with a label among the first k of a stable sort, largest logit first."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    labels = labels.reshape(len(labels), -1)
    return ((order[:, :, None] == labels[:, None]).any((1, 2)) & mask).sum()


eval_sums = jax.jit(train_step.eval_sums)


@pytest.mark.parametrize("key, k", [("top1", 1), ("top5", 5)])
@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_top_k_counts_as_a_stable_sort_does(key, k, batch):
    assert eval_sums(*batch)[key] == hits(*batch, k)


@pytest.mark.parametrize("key, k", [("top1", 1), ("top5", 5)])
@settings(deadline=None, max_examples=50)
@given(batch=batches_of_many_labels())
def test_any_of_several_labels_is_a_hit(key, k, batch):
    assert eval_sums(*batch)[key] == hits(*batch, k)


@settings(deadline=None, max_examples=50)
@given(batch=batches_of_many_labels())
def test_loss_of_several_labels_is_that_of_their_joint_probability(batch):
    logits, labels, mask = batch
    weight = np.exp(logits.astype(np.float64))
    right = np.where(labels >= 0, np.take_along_axis(weight, labels, axis=1), 0).sum(1)
    total = np.log(weight.sum(1)) - np.log(right)
    np.testing.assert_allclose(eval_sums(*batch)["loss"], total[mask].sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key", ["loss", "top1", "top5", "count"])
@settings(deadline=None, max_examples=30)
@given(batch=batches(), data=st.data())
def test_classes_that_take_no_part_might_as_well_not_exist(key, batch, data):
    logits, label, mask = batch
    takes_part = data.draw(arrays(np.bool_, logits.shape[1]))
    takes_part[label] = True
    renumbered = (np.cumsum(takes_part) - 1).astype(np.int32)
    expected = train_step.eval_sums(logits[:, takes_part], renumbered[label], mask)[key]
    ours = eval_sums(logits, label, mask, takes_part)[key]
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(batch=batches())
def test_loss_is_the_sum_of_cross_entropies_where_the_mask_admits(batch):
    logits, label, mask = batch
    total = np.log(np.exp(logits.astype(np.float64)).sum(1)) - logits[np.arange(EXAMPLES), label]
    np.testing.assert_allclose(eval_sums(*batch)["loss"], total[mask].sum(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(batch=batches())
def test_count_is_what_the_mask_admits(batch):
    assert eval_sums(*batch)["count"] == batch[2].sum()


@pytest.mark.parametrize("key", ["top1", "top5"])
@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize("where", [0, 1])
def test_an_example_with_a_nan_counts_as_wrong(key, classes, where):
    logits = np.zeros((1, classes), np.float32)
    logits[0, where] = np.nan
    assert eval_sums(logits, np.array([0]), np.array([True]))[key] == 0


def test_a_nan_that_the_mask_leaves_out_does_not_reach_the_loss():
    logits = np.array([[0, 0], [np.nan, 0]], np.float32)
    sums = eval_sums(logits, np.array([0, 0]), np.array([True, False]))
    assert sums["loss"] == pytest.approx(np.log(2), rel=1e-6)


def test_sums_are_float32_whatever_the_network_computes_in():
    sums = eval_sums(jnp.zeros((2, 3), jnp.bfloat16), jnp.array([0, 1]), jnp.array([True, True]))
    assert {key: value.dtype.name for key, value in sums.items()} == dict.fromkeys(
        ("loss", "top1", "top5", "count"), "float32"
    )


@settings(deadline=None, max_examples=30)
@given(
    label=arrays(np.int32, 4, elements=st.integers(0, 4)),
    smoothing=st.floats(0, 0.99),
)
def test_soft_labels_spread_the_smoothing_over_all_classes(label, smoothing):
    expected = np.full((4, 5), smoothing / 5)
    expected[np.arange(4), label] += 1 - smoothing
    np.testing.assert_allclose(soft_labels(label, 5, smoothing), expected, rtol=1e-5, atol=1e-7)


def test_normalize_takes_out_imagenets_statistics():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(normalize(image), expected, rtol=1e-5, atol=1e-6)


def test_normalize_gives_float32():
    assert normalize(np.zeros((1, 2, 2, 3), np.uint8)).dtype == jnp.float32


def training(model, **settings):
    """The compiled `update` of a network, and the state, images and targets to start it with."""
    settings = config.resolve({"batch_size": 16, "epochs": 1, **settings})
    tx = optax.sgd(0.1)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
    target = rng.dirichlet(np.ones(5), 16).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    # Random parameters, for a network as initialised hardly depends on its branches.
    draw = lambda s: rng.normal(1, 0.3, s.shape).astype(s.dtype)  # noqa: E731
    variables = {"batch_stats": {}} | jax.tree.map(draw, shapes)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        **variables,
        opt_state=tx.init(variables["params"]),
        ema=variables if settings.ema else None,
    )
    return oracle.compiled(partial(train_step.update, model, tx, settings)), state, image, target


@pytest.fixture(scope="module")
def averaged():
    """The states before, after one and after two steps of a run that keeps an average."""
    model = StarNet(base_dim=4, depths=(1, 0, 0, 0), mlp_ratio=2, num_classes=5)
    with oracle.xla_depthwise():
        update, state, image, target = training(model, ema=0.9)
        states = [state]
        for _ in range(2):
            states.append(update(states[-1], image, target)[0])
    return jax.device_get(states)


@pytest.mark.parametrize("collection", ["params", "batch_stats"])
def test_the_average_moves_a_tenth_of_the_way_after_every_step(averaged, collection):
    first, second, third = (state.variables[collection] for state in averaged)
    expected = jax.tree.map(
        lambda a, b, c: 0.9 * (0.9 * a + 0.1 * b) + 0.1 * c, first, second, third
    )
    moved = jax.tree.map(oracle.absolute, first, third)
    assert max(jax.tree.leaves(moved)) > 1e-2
    differences = jax.tree.map(oracle.absolute, averaged[-1].ema[collection], expected)
    assert max(jax.tree.leaves(differences)) < 1e-6


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts():
    model = StarNet(base_dim=4, depths=(1, 0, 0, 0), mlp_ratio=2, num_classes=5)
    with oracle.xla_depthwise():
        update, state, image, target = training(model, ema=0.9)
        broken = image.copy()
        broken[3, 5, 7, 1] = np.nan
        once, measured = update(state, broken, target)
        twice, _ = update(once, broken, target)
        after, _ = update(twice, image, target)
    assert np.isnan(measured["train/loss"])
    assert [int(s.skipped) for s in (state, once, twice, after)] == [0, 1, 2, 0]
    assert [int(s.step) for s in (state, once, twice, after)] == [0, 1, 2, 3]
    for name in ("params", "batch_stats", "opt_state", "ema"):
        before, left = getattr(state, name), getattr(twice, name)
        jax.tree.map(np.testing.assert_array_equal, left, before)
    moved = jax.tree.map(oracle.absolute, after.params, state.params)
    assert max(jax.tree.leaves(moved)) > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_every_update_counts_a_step(averaged):
    assert [int(state.step) for state in averaged] == [0, 1, 2]


def losses_with_drops(steps, seed):
    """First losses of a network that drops half of its last branch, as if at these steps."""
    model = create_model("demonet_d2_w8", num_classes=5, drop_path=0.5)
    with oracle.xla_depthwise():
        update, state, image, target = training(model, seed=seed)
        measured = [update(state.replace(step=step), image, target)[1] for step in steps]
    return [float(metrics["train/loss"]) for metrics in measured]


def test_the_same_step_drops_the_same_branches():
    first, again = losses_with_drops([3, 3], seed=0)
    assert first == again


def test_another_step_drops_other_branches():
    first, second = losses_with_drops([3, 4], seed=0)
    assert first != second


def test_another_seed_drops_other_branches():
    assert losses_with_drops([3], seed=0) != losses_with_drops([3], seed=1)
