"""RandAugment equals the stored outputs of timm 0.6.13, and plain Pillow where NumPy took over."""

import json
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from starnet_jax.data import randaugment
from starnet_jax.data.randaugment import OPS, RandAugment, augment, draw, level, parse

FILL = (124, 116, 104)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]
OTHERS = [op for op in OPS if op not in GEOMETRIC]


def table(function):
    return [function(i) for i in range(256)] * 3


def posterize(image, bits):
    return image.point(table(lambda i: i & ~(2 ** (8 - int(bits)) - 1)))


def solarize_add(image, add):
    return image.point(table(lambda i: min(255, i + int(add)) if i < 128 else i))


PLAIN = {
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
    "Invert": lambda image, _: ImageOps.invert(image),
    "PosterizeIncreasing": posterize,
    "SolarizeIncreasing": ImageOps.solarize,
    "SolarizeAdd": solarize_add,
    "ColorIncreasing": lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    "ContrastIncreasing": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "BrightnessIncreasing": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "SharpnessIncreasing": lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
}


def matrix(op, value, size):
    """What Pillow's affine transform is told, for an image of `size` (width, height)."""
    return {
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
        "TranslateXRel": (1, 0, value * size[0], 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, value * size[1]),
    }[op]


def by_pillow(image, op, value, resample):
    """The operation in plain Pillow, uint8 [H,W,3] -> uint8 [H,W,3]."""
    image = Image.fromarray(image)
    if op in PLAIN:
        return np.asarray(PLAIN[op](image, value))
    how = {"resample": FILTERS[resample], "fillcolor": FILL}
    if op == "Rotate":
        return np.asarray(image.rotate(value, **how))
    affine = Image.Transform.AFFINE
    return np.asarray(image.transform(image.size, affine, matrix(op, value, image.size), **how))


@pytest.fixture(scope="module")
def ops(golden):
    with np.load(golden / "randaugment" / "ops.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def levels(golden):
    return json.loads((golden / "randaugment" / "levels.json").read_text())


# --- Golden data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_output_equals_the_golden_bytes(ops, op):
    cases = np.flatnonzero(ops["op"] == op)
    assert cases.size
    for i in cases:
        image = ops["input"][ops["image"][i]]
        before = image.copy()
        result = randaugment.apply(image, op, ops["level"][i], str(ops["resample"][i]))
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, ops["output"][i], err_msg=f"case {i}")
        np.testing.assert_array_equal(image, before)


def test_operations_and_fill_are_the_golden_ones(levels):
    assert list(OPS) == levels["ops_in_order"]
    assert tuple(levels["fill"]) == randaugment.FILL == FILL


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("magnitudes", "expected"),
    [("magnitudes", "level"), ("fractional_magnitudes", "fractional_level")],
)
def test_levels_equal_the_golden_ones(levels, op, magnitudes, expected):
    expected = levels[expected][op]
    if not isinstance(expected, dict):
        expected = {"positive": expected, "negative": expected}
    for sign, values in ((1, expected["positive"]), (-1, expected["negative"])):
        for i, magnitude in enumerate(levels[magnitudes]):
            got = level(op, magnitude, sign)
            if values is None:
                assert got is None
            elif isinstance(values[i], int):
                assert isinstance(got, int)
                assert got == values[i]
            else:
                assert got == pytest.approx(values[i], rel=1e-12, abs=0)
                assert math.copysign(1, got) == math.copysign(1, values[i])


# --- Equality with Pillow -------------------------------------------------------------------------

sides = st.integers(1, 40)
noise = st.tuples(sides, sides, st.just(3)).flatmap(lambda shape: hnp.arrays(np.uint8, shape))
narrow = st.tuples(sides, sides, st.just(3)).flatmap(  # few values, so that histograms are uneven
    lambda shape: hnp.arrays(np.uint8, shape, elements=st.integers(90, 140))
)
images = st.one_of(noise, narrow, noise.map(lambda image: image[:, ::-1]))
magnitudes = st.one_of(st.floats(0, 10), st.integers(0, 1000).map(lambda i: i / 100))
signs = st.sampled_from((1, -1))


@pytest.mark.parametrize("op", OTHERS)
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(image=images, magnitude=magnitudes, sign=signs)
def test_colour_operation_equals_pillow(op, image, magnitude, sign):
    value = level(op, magnitude, sign)
    hypothesis.assume(op != "PosterizeIncreasing" or value > 0)
    result = randaugment.apply(image, op, value, "none")
    np.testing.assert_array_equal(result, by_pillow(image, op, value, "none"))


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("op", GEOMETRIC)
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(image=images, magnitude=magnitudes, sign=signs)
def test_geometric_operation_equals_pillow(op, resample, image, magnitude, sign):
    value = level(op, magnitude, sign)
    result = randaugment.apply(image, op, value, resample)
    np.testing.assert_array_equal(result, by_pillow(image, op, value, resample))


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("op", GEOMETRIC)
@pytest.mark.parametrize(
    "value", [2 / 9, -2 / 9, -0.28, 0.25, 0.405, 1 / 3, -0.45, 1e-17, 1.0, -1.5, 40.0]
)
def test_geometric_operation_equals_pillow_on_pixel_borders(op, resample, value):
    image = np.random.default_rng(0).integers(0, 256, (200, 230, 3), np.uint8)
    result = randaugment.apply(image, op, value, resample)
    np.testing.assert_array_equal(result, by_pillow(image, op, value, resample))


@pytest.mark.parametrize("op", ["Brightness", "Contrast", "Color", "Sharpness"])
def test_blends_equal_pillow_for_every_byte_and_many_factors(op):
    ramp = np.arange(256, dtype=np.uint8)
    image = np.stack([np.tile(ramp, (9, 1)), np.tile(ramp[::-1], (9, 1)), np.tile(ramp, (9, 1))], 2)
    for magnitude in np.linspace(0, 10, 201):
        value = level(op, magnitude)
        result = randaugment.apply(image, op, value, "none")
        expected = by_pillow(image, op + "Increasing", value, "none")
        np.testing.assert_array_equal(result, expected, err_msg=str(value))


@pytest.mark.parametrize("op", ["SolarizeIncreasing", "SolarizeAdd", "PosterizeIncreasing"])
def test_tables_equal_pillow_for_every_byte_and_level(op):
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for value in range(1, 9) if op == "PosterizeIncreasing" else range(257):
        result = randaugment.apply(image, op, value, "none")
        np.testing.assert_array_equal(result, by_pillow(image, op, value, "none"), str(value))


def test_posterize_to_no_bits_is_black():
    image = np.full((4, 5, 3), 255, np.uint8)
    assert level("PosterizeIncreasing", 10) == 0
    assert not randaugment.apply(image, "PosterizeIncreasing", 0, "none").any()


# --- Bad calls ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.zeros((4, 4, 3), np.float32)}, r"uint8 \[H,W,3\], not float32 \[4, 4, 3\]"),
        ({"image": np.zeros((4, 4), np.uint8)}, r"not uint8 \[4, 4\]"),
        ({"op": "SheerX"}, "'SheerX'; did you mean 'ShearX'?"),
        ({"resample": "cubic"}, "'cubic'; did you mean 'bicubic'?"),
        ({"resample": "none"}, "ShearX needs resample"),
        ({"resample": None}, "ShearX needs resample"),
        ({"resample": ""}, "unknown resample ''"),
        ({"image": [[[0, 0, 0]]]}, r"uint8 \[H,W,3\], not int64 \[1, 1, 3\]"),
        ({"level": None}, "ShearX needs a level"),
        ({"level": math.nan}, "ShearX needs a level"),
    ],
)
def test_bad_argument_is_named(change, message):
    good = {"image": np.zeros((4, 4, 3), np.uint8), "op": "ShearX", "level": 0.1}
    with pytest.raises(ValueError, match=message):
        randaugment.apply(**good | {"resample": "bilinear"} | change)


@pytest.mark.parametrize("op", OPS)
def test_arrays_of_jax_do_as_well(op):
    image = np.random.default_rng(3).integers(0, 256, (9, 7, 3), np.uint8)
    resample = "bicubic" if op in GEOMETRIC else None
    result = randaugment.apply(jnp.asarray(image), op, level(op, 5), resample)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, by_pillow(image, op, level(op, 5), resample))


# --- Notation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("rand", RandAugment()),
        ("rand-m9-mstd0.5-inc1", RandAugment(9, 0.5, increasing=True)),
        ("rand-m1-mstd0.5-inc1", RandAugment(1, 0.5, increasing=True)),
        ("rand-inc0-n3-m7", RandAugment(7, num_layers=3)),
        ("rand-m12-mmax15", RandAugment(12, magnitude_max=15)),
        ("rand-mstd101", RandAugment(magnitude_std=math.inf)),
        ("rand-n100", RandAugment(num_layers=100)),
    ],
)
def test_parse_reads(spec, policy):
    assert parse(spec) == policy


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rand-mm9", ["unknown token 'mm9' in 'rand-mm9'", "m<magnitude>", "inc<0|1>"]),
        ("rand-m9-w0", ["unknown token 'w0'"]),
        ("rand-m9--inc1", ["unknown token ''"]),
        ("rand-9", ["unknown token '9'"]),
        ("rand-m", ["malformed token 'm' in", "m<magnitude>"]),
        ("rand-m9x", ["malformed token 'm9x'"]),
        ("rand-m9\n", [r"malformed token 'm9\n'"]),
        ("rand-mstd.5", ["unknown token 'mstd.5'"]),
        ("rand-n2.5", ["malformed token 'n2.5'", "n<layers>"]),
        ("rand-n101", ["n<layers> is at most 100, not 101; write n100 or less"]),
        ("rand-n" + "9" * 5000, ["n<layers> is at most 100"]),
        ("rand-m" + "9" * 5000, ["m<magnitude> is at most 1000"]),
        ("rand-mmax1001", ["mmax<highest magnitude> is at most 1000, not 1001"]),
        ("rand-inc2", ["malformed token 'inc2'", "inc<0|1>"]),
        ("rand-m9-m1", ["repeated token 'm1'"]),
        ("autoaugment", ["'autoaugment' must begin with 'rand'", "rand-m9-mstd0.5-inc1"]),
        ("", ["'' must begin with 'rand'"]),
        (9, ["9 must begin with 'rand'"]),
    ],
)
def test_parse_refuses_in_one_line(spec, words):
    with pytest.raises(ValueError) as caught:
        parse(spec)
    message = str(caught.value)
    assert message.startswith("augment.randaugment: ")
    assert "\n" not in message
    for word in words:
        assert word in message


# --- Draws ----------------------------------------------------------------------------------------

IMAGES = 30_000
SIGMAS = 4.5  # a right sampler fails one such bound in 150,000 seeds


def near(count, total, probability):
    return abs(count - total * probability) < SIGMAS * math.sqrt(
        total * probability * (1 - probability)
    )


@pytest.fixture(scope="module", params=["rand-m9-mstd0.5-inc1", "rand-m1-mstd0.5-inc1"])
def drawn(request):
    """A policy, and for each of many images the list that `draw` returned."""
    policy = parse(request.param)
    rng = np.random.default_rng(2024)
    return policy, [draw(rng, policy) for _ in range(IMAGES)]


def test_each_of_two_operations_is_applied_half_of_the_time(drawn):
    _, lists = drawn
    for applied, probability in enumerate((0.25, 0.5, 0.25)):
        assert near(sum(len(ops) == applied for ops in lists), IMAGES, probability)


def test_operations_are_uniform_and_drawn_with_replacement(drawn):
    _, lists = drawn
    for position in (0, -1):
        names = [ops[position][0] for ops in lists if len(ops) == 2]
        assert all(near(names.count(op), len(names), 1 / 15) for op in OPS)
    pairs = [ops for ops in lists if len(ops) == 2]
    assert near(sum(first[0] == second[0] for first, second in pairs), len(pairs), 1 / 15)


def clipped_normal(mean, std, low=0.0, high=10.0):
    """Mean and standard deviation of a normal variable clipped to [low, high]."""
    x = np.linspace(mean - 10 * std, mean + 10 * std, 200_001)
    weight = np.exp(-0.5 * ((x - mean) / std) ** 2)
    weight /= weight.sum()
    x = x.clip(low, high)
    average = (weight * x).sum()
    return average, math.sqrt((weight * (x - average) ** 2).sum())


def test_magnitudes_are_normal_and_clipped(drawn):
    policy, lists = drawn
    magnitudes = np.array([abs(v) / 0.03 for ops in lists for op, v, _ in ops if op[:5] == "Shear"])
    mean, std = clipped_normal(policy.magnitude, policy.magnitude_std)
    n = len(magnitudes)
    assert abs(magnitudes.mean() - mean) < SIGMAS * std / math.sqrt(n)
    assert abs(magnitudes.std() - std) < SIGMAS * std / math.sqrt(2 * n)
    assert magnitudes.min() >= 0
    assert magnitudes.max() <= 10 + 1e-9
    clipped = math.erfc(2 / math.sqrt(2)) / 2  # the nearer bound is two deviations away
    assert near(np.sum((magnitudes == 0) | (magnitudes > 10 - 1e-9)), n, clipped)


def test_signs_and_filters_are_even_and_independent(drawn):
    _, lists = drawn
    moved = [(v > 0, how) for ops in lists for op, v, how in ops if op in GEOMETRIC and v]
    for positive in (True, False):
        for how in FILTERS:
            assert near(moved.count((positive, how)), len(moved), 0.25)
    factors = [v for ops in lists for op, v, _ in ops if op == "ColorIncreasing" and v != 1]
    assert near(sum(v > 1 for v in factors), len(factors), 0.5)


def test_only_geometric_operations_name_a_filter_and_only_levelled_ones_a_level(drawn):
    _, lists = drawn
    for ops in lists[:2000]:
        for op, value, resample in ops:
            assert (resample == "none") == (op in OTHERS)
            assert (value is None) == (op in ("AutoContrast", "Equalize", "Invert"))


def test_levels_without_noise_are_those_of_the_magnitude():
    rng = np.random.default_rng(0)
    for _ in range(300):
        for op, value, _ in draw(rng, parse("rand-m7-inc1")):
            assert value in (level(op, 7), level(op, 7, -1))


def test_infinite_noise_is_uniform():
    rng = np.random.default_rng(0)
    lists = [draw(rng, parse("rand-m8-mstd101-inc1")) for _ in range(10_000)]
    values = np.array([abs(v) / 0.3 for ops in lists for op, v, _ in ops if op[:5] == "Shear"])
    counts = np.histogram(values, bins=8, range=(0, 0.8))[0]
    assert counts.sum() == len(values)
    assert all(near(count, len(values), 1 / 8) for count in counts)


def test_without_inc_the_plain_operations_are_drawn():
    rng = np.random.default_rng(0)
    names = {op for _ in range(500) for op, _, _ in draw(rng, parse("rand-m9"))}
    assert names == {op.removesuffix("Increasing") for op in OPS}
    assert level("Posterize", 9) == 3
    assert level("Solarize", 9) == 230
    assert level("Color", 9) == pytest.approx(1.72)
    assert level("ShearX", 9, -1) == level("ShearX", 9) * -1


def test_draw_uses_the_same_amount_of_randomness_for_every_image():
    for spec in ("rand-m9-mstd0.5-inc1", "rand-n4"):
        rngs = [np.random.default_rng(seed) for seed in (5, 5)]
        draw(rngs[0], parse(spec))
        draw(rngs[1], RandAugment(num_layers=parse(spec).num_layers, probability=0.0))
        assert rngs[0].random() == rngs[1].random()


@pytest.mark.parametrize("shape", [(224, 224, 3), (31, 47, 3)])
def test_augment_applies_what_draw_draws(shape):
    image = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    image.flags.writeable = False
    policy = parse("rand-m9-mstd0.5-inc1")
    for seed in range(40):
        expected = image
        for op, value, resample in draw(np.random.default_rng(seed), policy):
            expected = randaugment.apply(expected, op, value, resample)
        result = augment(image, np.random.default_rng(seed), policy)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, expected)


def test_results_outlive_later_calls():
    image = np.random.default_rng(2).integers(0, 256, (60, 50, 3), np.uint8)
    cases = [(op, level(op, 5), "bicubic" if op in GEOMETRIC else "none") for op in OPS]
    results = [randaugment.apply(image, *case) for case in cases]
    copies = [result.copy() for result in results]
    for case in cases:
        randaugment.apply(image[::-1], *case)
    for result, copy in zip(results, copies, strict=True):
        np.testing.assert_array_equal(result, copy)
