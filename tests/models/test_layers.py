"""BatchNorm, stochastic depth and initial weights against NumPy and PyTorch's rules."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

from starnet_jax import create_model
from starnet_jax.models.layers import BatchNorm, DropPath


class Case:
    """A BatchNorm, its input, and the answers in float64."""

    def __init__(self, batch_of_group, groups, image, channels, momentum, epsilon, seed):
        rng = np.random.default_rng(seed)
        shape = (groups * batch_of_group, *image, channels)
        self.layer = BatchNorm(groups=groups, momentum=momentum, epsilon=epsilon)
        self.x = rng.normal(3 * rng.normal(size=channels), 2, shape).astype(np.float32)
        scale, bias, mean = rng.normal(size=(3, channels)).astype(np.float32)
        var = rng.uniform(0.5, 2, channels).astype(np.float32)
        self.variables = {
            "params": {"scale": scale, "bias": bias},
            "batch_stats": {"mean": mean, "var": var},
        }
        x = self.x.astype(np.float64).reshape(groups, -1, channels)
        axis_mean, axis_var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
        y = (x - axis_mean) / np.sqrt(axis_var + epsilon) * scale + bias
        self.y_train = y.reshape(shape)
        self.y_eval = (self.x.astype(np.float64) - mean) / np.sqrt(var + epsilon) * scale + bias
        unbiased = x.var(1, ddof=1)
        self.mean = (1 - momentum) * mean + momentum * axis_mean.mean((0, 1))
        self.var = (1 - momentum) * var + momentum * unbiased.mean(0)

    def train(self):
        y, changed = self.layer.apply(self.variables, self.x, True, mutable=["batch_stats"])
        return y, changed["batch_stats"]


any_case = dict(
    batch_of_group=st.sampled_from([2, 3]),
    groups=st.sampled_from([1, 2, 3]),
    image=st.sampled_from([(1, 1), (2, 3)]),
    channels=st.sampled_from([1, 4]),
    momentum=st.sampled_from([0.1, 0.01, 1.0]),
    epsilon=st.sampled_from([1e-5, 1e-1]),
    seed=st.integers(0, 2**32 - 1),
)


@settings(deadline=None, max_examples=15)
@given(**any_case)
def test_batchnorm_normalises_each_group_by_its_own_statistics(**case):
    case = Case(**case)
    np.testing.assert_allclose(case.train()[0], case.y_train, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=15)
@given(**any_case)
def test_running_mean_moves_to_the_average_over_groups(**case):
    case = Case(**case)
    np.testing.assert_allclose(case.train()[1]["mean"], case.mean, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(**any_case)
def test_running_variance_moves_to_the_unbiased_average_over_groups(**case):
    case = Case(**case)
    np.testing.assert_allclose(case.train()[1]["var"], case.var, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=15)
@given(**any_case)
def test_batchnorm_evaluates_with_the_running_statistics(**case):
    case = Case(**case)
    y = case.layer.apply(case.variables, case.x, False)
    np.testing.assert_allclose(y, case.y_eval, rtol=1e-5, atol=1e-5)


def test_batchnorm_by_hand():
    # Mean 3, variance 2 biased and 8/3 unbiased, running statistics a tenth of the way there.
    x = jnp.array([1.0, 3.0, 3.0, 5.0]).reshape(4, 1, 1, 1)
    variables = BatchNorm().init(jax.random.key(0), x, True)
    y, changed = BatchNorm().apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), np.array([-2, 0, 0, 2]) / np.sqrt(2 + 1e-5), rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], [0.3], rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], [0.9 + 0.8 / 3], rtol=1e-6)


def test_batchnorm_gradient_flows_through_the_batch_statistics():
    case = Case(5, 2, (1, 1), 3, 0.1, 1e-5, seed=0)
    dy = np.random.default_rng(1).normal(size=case.x.shape).astype(np.float32)

    def loss(x):
        y, _ = case.layer.apply(case.variables, x, True, mutable=["batch_stats"])
        return (y * dy).sum()

    x, dy_GNC = (a.astype(np.float64).reshape(2, 5, 3) for a in (case.x, dy))
    inverse = 1 / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    normal = (x - x.mean(1, keepdims=True)) * inverse
    projected = dy_GNC - dy_GNC.mean(1, keepdims=True)
    projected -= normal * (dy_GNC * normal).mean(1, keepdims=True)
    expected = (case.variables["params"]["scale"] * inverse * projected).reshape(case.x.shape)
    assert oracle.relative(jax.grad(loss)(case.x), expected) < 1e-5


def test_initialising_in_training_mode_leaves_the_running_statistics_at_0_and_1():
    x = jnp.full((4, 2, 2, 3), 7.0)
    statistics = BatchNorm().init(jax.random.key(0), x, True)["batch_stats"]
    np.testing.assert_array_equal(statistics["mean"], np.zeros(3))
    np.testing.assert_array_equal(statistics["var"], np.ones(3))


def test_variance_survives_a_mean_far_from_0():
    # The difference of the mean square and the squared mean would be 0 or 0.0625 here.
    x = 1024 + jnp.array([-0.125, 0.125]).reshape(2, 1, 1, 1)
    variables = BatchNorm(momentum=1.0).init(jax.random.key(0), x, True)
    _, changed = BatchNorm(momentum=1.0).apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(changed["batch_stats"]["var"], [2 * 0.125**2], rtol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_bfloat16_batchnorm_gives_bfloat16(train):
    x = jnp.ones((4, 2, 2, 3), jnp.bfloat16)
    layer = BatchNorm(jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x, True)
    y, _ = layer.apply(variables, x, train, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16


def test_bfloat16_batchnorm_keeps_float32_statistics():
    x = np.random.default_rng(0).normal(1, 2, (64, 1, 1, 3)).astype(jnp.bfloat16)
    layer = BatchNorm(jnp.bfloat16, momentum=1.0)
    variables = layer.init(jax.random.key(0), x, True)
    _, changed = layer.apply(variables, x, True, mutable=["batch_stats"])
    x = x.astype(np.float64).reshape(64, 3)
    np.testing.assert_allclose(changed["batch_stats"]["mean"], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(changed["batch_stats"]["var"], x.var(0, ddof=1), rtol=1e-6)


def dropped(rate, x, train=True, seed=0):
    rngs = {"drop_path": jax.random.key(seed)}
    return DropPath(rate).apply({}, x, train, rngs=rngs)


def test_drop_path_drops_examples_at_its_rate():
    y = dropped(0.3, jnp.ones((10_000, 1, 1, 2)))
    # Five standard deviations of the mean.
    assert np.mean(y[:, 0, 0, 0] == 0) == pytest.approx(0.3, abs=5 * (0.21 / 10_000) ** 0.5)


def test_drop_path_drops_an_example_as_a_whole():
    zero = np.asarray(dropped(0.5, jnp.ones((64, 2, 3, 4)))) == 0
    assert (zero.all((1, 2, 3)) == zero.any((1, 2, 3))).all()


def test_drop_path_draws_for_each_example():
    zero = np.asarray(dropped(0.5, jnp.ones((64, 1, 1, 1)))) == 0
    assert 0 < zero.sum() < 64


def test_drop_path_scales_what_it_keeps():
    x = np.random.default_rng(0).normal(size=(64, 2, 2, 3)).astype(np.float32)
    y = np.asarray(dropped(0.2, x))
    kept = y.any((1, 2, 3))
    np.testing.assert_allclose(y[kept], x[kept] / 0.8, rtol=1e-6)


def test_drop_path_draws_anew_for_another_key():
    x = jnp.ones((64, 1, 1, 1))
    assert (dropped(0.5, x, seed=0) != dropped(0.5, x, seed=1)).any()


def test_drop_path_keeps_bfloat16():
    assert dropped(0.5, jnp.ones((4, 2), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate, train", [(0.0, True), (0.5, False)])
def test_drop_path_is_the_identity_without_rate_or_training(rate, train):
    x = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    np.testing.assert_array_equal(DropPath(rate).apply({}, x, train), x)


@pytest.mark.parametrize("name, blocks", [("starnet_s1", 15), ("demonet_d6_w8", 6)])
def test_drop_rates_rise_linearly_from_0_over_all_blocks(name, blocks):
    rates = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates.append(context.module.rate)
        return next_function(*args, **kwargs)

    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = create_model(name, num_classes=2, drop_path=0.3)
    with oracle.xla_depthwise(), nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), x)
    np.testing.assert_allclose(rates, [0.3 * i / (blocks - 1) for i in range(blocks)])


@pytest.fixture(scope="module")
def starnet():
    """Initial parameters of the smallest StarNet."""
    return initial("starnet_s050", (1, 32, 32, 3))


@pytest.fixture(scope="module")
def demonet():
    """Initial parameters of a small DemoNet."""
    return initial("demonet_d2_w64", (1, 16, 16, 3))


@pytest.fixture(scope="module")
def demonet_2d():
    """Initial parameters of the network of points."""
    return initial("demonet_2d", (1, 2))


def initial(name, shape):
    model = create_model(name, **({} if name == "demonet_2d" else {"num_classes": 1000}))
    with oracle.xla_depthwise():
        variables = oracle.compiled(model.init)(jax.random.key(0), jnp.zeros(shape))
    return traverse_util.flatten_dict(jax.device_get(variables["params"]), sep="/")


# fan_in is the number of inputs that one output sums: of one channel in a depthwise convolution.
@pytest.mark.parametrize("leaf", ["kernel", "bias"])
@pytest.mark.parametrize(
    "path, fan_in",
    [
        ("stem/conv", 3 * 9),
        ("stages_0/downsample/conv", 32 * 9),
        ("stages_3/downsample/conv", 64 * 9),
        ("stages_3/blocks_0/dwconv/conv", 49),
        ("stages_3/blocks_0/f1/conv", 128),
        ("stages_3/blocks_0/f2/conv", 128),
        ("stages_3/blocks_0/g/conv", 3 * 128),
        ("stages_3/blocks_0/dwconv2/conv", 49),
    ],
)
def test_starnet_convolutions_start_uniform_within_one_over_the_root_of_fan_in(
    starnet, path, fan_in, leaf
):
    values = starnet[f"{path}/{leaf}"] * fan_in**0.5
    assert abs(values).max() <= 1 + 1e-6
    # Quartiles of the uniform distribution, within five standard deviations of theirs.
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [-0.5, 0, 0.5], atol=5 * values.size**-0.5)


def test_starnet_branches_start_different(starnet):
    block = "stages_3/blocks_0"
    f1, f2 = starnet[f"{block}/f1/conv/kernel"], starnet[f"{block}/f2/conv/kernel"]
    assert (f1 != f2).mean() > 0.99


@pytest.mark.parametrize("leaf, value", [("scale", 1), ("bias", 0)])
def test_starnet_norms_start_as_the_identity(starnet, leaf, value):
    norms = [v for k, v in starnet.items() if k.split("/")[-2:] in (["bn", leaf], ["norm", leaf])]
    assert norms
    assert all((norm == value).all() for norm in norms)


# The authors' truncation lies at -2 and 2, 100 deviations away, so that it cuts nothing off.
def assert_normal_002(values):
    deviation = 5 * (2 * values.size) ** -0.5
    assert values.std() == pytest.approx(0.02, rel=deviation)
    assert (abs(values) > 0.04).mean() == pytest.approx(0.0455, abs=5 * 0.21 * values.size**-0.5)


def test_starnet_head_starts_normal_with_deviation_002(starnet):
    assert_normal_002(starnet["head/kernel"])


def test_starnet_head_bias_starts_at_0(starnet):
    assert not starnet["head/bias"].any()


@pytest.mark.parametrize("layer", ["stem", "blocks_1/dwconv", "blocks_1/f", "blocks_1/g", "head"])
def test_demonet_weights_start_normal_with_deviation_002(demonet, layer):
    assert_normal_002(demonet[f"{layer}/kernel"])


@pytest.mark.parametrize("layer", ["stem", "blocks_3/f", "blocks_3/g"])
def test_point_network_weights_start_normal_with_deviation_002(demonet_2d, layer):
    assert_normal_002(demonet_2d[f"{layer}/kernel"])


def test_demonet_biases_start_at_0(demonet):
    assert not any(value.any() for key, value in demonet.items() if key.endswith("/bias"))


def test_point_network_biases_start_at_0(demonet_2d):
    assert not any(value.any() for key, value in demonet_2d.items() if key.endswith("/bias"))


def test_demonet_layer_scale_starts_at_1e_6(demonet):
    gammas = [value for key, value in demonet.items() if key.endswith("/gamma")]
    assert len(gammas) == 2
    assert all((gamma == np.float32(1e-6)).all() for gamma in gammas)


def test_point_network_has_no_layer_scale(demonet_2d):
    assert not any(key.endswith("gamma") for key in demonet_2d)
