"""The depthwise convolution against float64 loops over the taps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from starnet_jax.ops import depthwise_conv

LOWERINGS = ["shifted", "xla"]
every_lowering = pytest.mark.parametrize("lowering", LOWERINGS)
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}  # of one result, relative

odd = st.sampled_from([1, 3, 5, 7, 9])
side = st.sampled_from([1, 2, 3, 4, 7, 11])
cases = dict(
    batch=st.sampled_from([1, 2]),
    image=st.tuples(side, side),
    channels=st.sampled_from([1, 3, 4]),
    kernel=st.tuples(odd, odd),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 2**32 - 1),
)


def convolve(x_BHWC, kernel_KK1C):
    """The definition: one tap after the other, gathered from the zero-padded input."""
    _, h, w, _ = x_BHWC.shape
    kh, kw, _, _ = kernel_KK1C.shape
    x_pad = padded(x_BHWC, kh, kw)
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    return sum(x_pad[:, i : i + h, j : j + w] * kernel_KK1C[i, j, 0] for i, j in taps)


def gradients(x_BHWC, kernel_KK1C, dy_BHWC):
    """Every tap of the definition in reverse: scattered to the input, summed into the kernel."""
    _, h, w, _ = x_BHWC.shape
    kh, kw, _, _ = kernel_KK1C.shape
    x_pad = padded(x_BHWC, kh, kw)
    dx_pad, dkernel = np.zeros_like(x_pad), np.zeros_like(kernel_KK1C)
    for i in range(kh):
        for j in range(kw):
            dx_pad[:, i : i + h, j : j + w] += dy_BHWC * kernel_KK1C[i, j, 0]
            dkernel[i, j, 0] = (x_pad[:, i : i + h, j : j + w] * dy_BHWC).sum((0, 1, 2))
    return dx_pad[:, kh // 2 : kh // 2 + h, kw // 2 : kw // 2 + w], dkernel


def padded(x_BHWC, kh, kw):
    return np.pad(x_BHWC, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))


def value_and_gradients(x, kernel, dy, lowering):
    y, transpose = jax.vjp(partial(depthwise_conv, lowering=lowering), x, kernel)
    return y, *transpose(dy)


ours = {
    lowering: oracle.compiled(partial(value_and_gradients, lowering=lowering))
    for lowering in LOWERINGS
}


def draw(shape, seed, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def draw_case(batch, image, channels, kernel, dtype, seed):
    """Input, kernel and output gradient."""
    shapes = (batch, *image, channels), (*kernel, 1, channels), (batch, *image, channels)
    return [draw(shape, [seed, i], dtype) for i, shape in enumerate(shapes)]


def as_float64(arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def assert_close(actual, expected, magnitude):
    """`magnitude` is what the sum would be were all terms positive: it bounds rounding."""
    bound = ROUNDING[actual.dtype.name] * np.abs(expected) + 1e-5 * magnitude
    np.testing.assert_array_less(np.abs(np.asarray(actual, np.float64) - expected), bound + 1e-30)


@every_lowering
@settings(deadline=None, max_examples=15)
@given(**cases)
@example(batch=1, image=(1, 1), channels=3, kernel=(9, 9), dtype="float32", seed=0)
@example(batch=2, image=(11, 2), channels=4, kernel=(7, 7), dtype="bfloat16", seed=0)
def test_values_equal_the_definition(lowering, **case):
    x, kernel, dy = draw_case(**case)
    y, _, _ = ours[lowering](x, kernel, dy)
    x, kernel = as_float64((x, kernel))
    assert_close(y, convolve(x, kernel), convolve(abs(x), abs(kernel)))


@every_lowering
@settings(deadline=None, max_examples=15)
@given(**cases)
@example(batch=1, image=(1, 1), channels=3, kernel=(9, 9), dtype="float32", seed=0)
@example(batch=2, image=(11, 2), channels=4, kernel=(7, 7), dtype="bfloat16", seed=0)
def test_input_gradient_equals_the_definition(lowering, **case):
    x, kernel, dy = draw_case(**case)
    _, dx, _ = ours[lowering](x, kernel, dy)
    x, kernel, dy = as_float64((x, kernel, dy))
    assert_close(dx, gradients(x, kernel, dy)[0], gradients(x, abs(kernel), abs(dy))[0])


@every_lowering
@settings(deadline=None, max_examples=15)
@given(**cases)
@example(batch=1, image=(1, 1), channels=3, kernel=(9, 9), dtype="float32", seed=0)
@example(batch=2, image=(11, 2), channels=4, kernel=(7, 7), dtype="bfloat16", seed=0)
def test_kernel_gradient_equals_the_definition(lowering, **case):
    x, kernel, dy = draw_case(**case)
    _, _, dkernel = ours[lowering](x, kernel, dy)
    x, kernel, dy = as_float64((x, kernel, dy))
    assert_close(dkernel, gradients(x, kernel, dy)[1], gradients(abs(x), kernel, abs(dy))[1])


@every_lowering
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_keep_the_dtype_of_the_input(lowering, dtype):
    x, kernel, dy = draw_case(2, (4, 3), 3, (3, 5), dtype, 0)
    results = ours[lowering](x, kernel, dy)
    assert [result.dtype for result in results] == [dtype] * 3


@every_lowering
def test_bfloat16_sums_in_float32(lowering):
    # In bfloat16, 256 + 1 is 256: a running sum would never see the 48 ones.
    x = jnp.ones((1, 7, 7, 1), jnp.bfloat16)
    kernel = jnp.ones((7, 7, 1, 1), jnp.bfloat16).at[0, 0].set(256)
    y = depthwise_conv(x, kernel, lowering=lowering)
    assert y[0, 3, 3, 0] == 304


@every_lowering
def test_works_under_jit(lowering):
    x, kernel, _ = draw_case(2, (5, 4), 3, (5, 3), "float32", 1)
    convolution = partial(depthwise_conv, lowering=lowering)
    np.testing.assert_allclose(
        jax.jit(convolution)(x, kernel), convolution(x, kernel), rtol=1e-6, atol=1e-6
    )


@every_lowering
@pytest.mark.parametrize("in_axes", [(0, 0), (0, None), (None, 0)])
def test_vmap_equals_a_loop(lowering, in_axes):
    xs, kernels = draw((3, 2, 5, 4, 3), 1), draw((3, 5, 3, 1, 3), 2)
    args = [a if axis == 0 else a[0] for a, axis in zip((xs, kernels), in_axes, strict=True)]

    def results(x, kernel):
        y, transpose = jax.vjp(partial(depthwise_conv, lowering=lowering), x, kernel)
        return y, *transpose(jnp.cos(y))

    mapped = oracle.compiled(jax.vmap(results, in_axes))(*args)
    one = oracle.compiled(results)
    looped = [
        one(xs[i if in_axes[0] == 0 else 0], kernels[i if in_axes[1] == 0 else 0]) for i in range(3)
    ]
    looped = [jnp.stack(result) for result in zip(*looped, strict=True)]
    assert max(map(oracle.relative, mapped, looped)) < 1e-6


@every_lowering
def test_gradient_of_a_gradient_equals_float64(lowering):
    x, kernel, v = draw_case(2, (4, 3), 3, (3, 5), "float32", 3)
    w = draw(kernel.shape, 4)

    def hessian_product(convolution, x, kernel, v, w):
        def loss(x, kernel):
            return jnp.sin(convolution(x, kernel)).sum()

        def along(x, kernel):
            dx, dkernel = jax.grad(loss, (0, 1))(x, kernel)
            return (dx * v).sum() + (dkernel * w).sum()

        return jax.grad(along, (0, 1))(x, kernel)

    def native(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )

    convolution = partial(depthwise_conv, lowering=lowering)
    products = oracle.compiled(partial(hessian_product, convolution))(x, kernel, v, w)
    with jax.enable_x64(True):
        double = [jnp.asarray(a) for a in as_float64((x, kernel, v, w))]
        expected = as_float64(jax.jit(partial(hessian_product, native))(*double))
    assert max(map(oracle.relative, products, expected)) < 1e-5


@every_lowering
def test_rematerialised_gradients_are_the_same(lowering):
    x, kernel, _ = draw_case(2, (5, 4), 3, (5, 3), "float32", 5)

    def loss(x, kernel):
        return jnp.sin(depthwise_conv(x, kernel, lowering=lowering)).sum()

    plain = oracle.compiled(jax.grad(loss, (0, 1)))(x, kernel)
    again = oracle.compiled(jax.grad(jax.checkpoint(loss), (0, 1)))(x, kernel)
    assert max(map(oracle.relative, again, plain)) < 1e-6


@pytest.mark.parametrize("platform, native", [("cpu", False), ("cuda", True), ("tpu", True)])
def test_the_platform_decides_the_lowering(platform, native):
    x, kernel, dy = draw_case(1, (4, 4), 2, (3, 3), "float32", 0)
    traced = jax.jit(partial(value_and_gradients, lowering=None)).trace(x, kernel, dy)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == native


@pytest.mark.parametrize(
    "kernel", [(2, 3, 1, 4), (3, 2, 1, 4), (3, 3, 2, 4), (3, 3, 1, 5)], ids=str
)
def test_a_kernel_that_does_not_fit_is_named_with_the_input(kernel):
    with pytest.raises(ValueError) as error:
        depthwise_conv(jnp.zeros((1, 6, 6, 4)), jnp.zeros(kernel))
    assert str(kernel) in str(error.value)
    assert "(1, 6, 6, 4)" in str(error.value)
