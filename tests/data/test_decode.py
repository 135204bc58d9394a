import io
import math
import struct
import zlib
from random import Random

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from scipy.stats import ks_2samp

from starnet_jax.data import decode, randaugment

MODES = {  # what files of each format hold
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "L", "RGBA", "LA", "P", "1", "I;16"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "L", "CMYK", "RGBA", "1"),
    "WEBP": ("RGB", "RGBA"),
}


def encode(array, file_format, mode, **options):
    """The bytes of a file of uint8 [H,W,3]."""
    image = Image.fromarray(array)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    elif mode in ("LA", "RGBA"):
        image = image.convert(mode)
        image.putalpha(image.getchannel(0))
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(height, width, seed=0):
    """Noise on a ramp: like a photo it does not become flat in a JPEG, nor stay all noise."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height), np.arange(width))[..., None] * [1, 2, 3]
    return ((ramp + rng.integers(60, size=(height, width, 3))) % 256).astype(np.uint8)


@st.composite
def encoded_images(draw):
    """Files of all formats and modes, from one pixel to long strips."""
    file_format = draw(st.sampled_from(list(MODES)))
    mode = draw(st.sampled_from(MODES[file_format]))
    sides = st.one_of(st.integers(1, 20), st.integers(1, 130))
    array = noise(draw(sides), draw(sides), draw(st.integers(0, 9)))
    options = {}
    if file_format == "JPEG":
        options["quality"] = draw(st.integers(20, 98))
        options["progressive"] = draw(st.booleans())
        options["restart_marker_rows"] = draw(st.integers(0, 2))
        if mode == "RGB":
            options |= draw(
                st.sampled_from(
                    [{"subsampling": s} for s in ("4:4:4", "4:2:2", "4:2:0")] + [{"keep_rgb": True}]
                )
            )
    encoded = encode(array, file_format, mode, **options)
    if file_format == "JPEG" and draw(st.booleans()):  # as cameras put a small JPEG into the large
        thumbnail = encode(array[:8, :8], "JPEG", "RGB")
        header = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2)
        encoded = encoded[:2] + header + thumbnail + encoded[2:]
    return encoded


def plain(encoded, size, rng, crop_scale, flip):
    """What `train_image` is to return, written as plainly as Pillow allows."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    left, top, w, h = decode.crop_box(*image.size, rng, crop_scale, (3 / 4, 4 / 3))
    cubic, mirrored = rng.random(2)
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((size, size), Image.BICUBIC if cubic < 0.5 else Image.BILINEAR)
    if mirrored < flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def test_eval_image_equals_the_authors_preprocessing(golden):
    cases = np.load(golden / "preprocess" / "eval_224.npz")
    names = [key.removeprefix("input/") for key in cases if key.startswith("input/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(
            decode.eval_image(cases[f"input/{name}"], 224), cases[f"output/{name}"], err_msg=name
        )


@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([16, 33]))
@settings(deadline=None, max_examples=40)
def test_eval_image_of_any_shape_has_the_asked_size(height, width, size):
    image = np.full((height, width, 3), 77, np.uint8)
    result = decode.eval_image(image, size)
    assert result.shape == (size, size, 3)
    assert (result == 77).all()


def test_eval_image_without_crop_only_resizes():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode.eval_image(image, 32, crop=1.0), expected)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
@settings(max_examples=200)
def test_crop_box_lies_in_the_image(width, height, seed):
    rng = np.random.default_rng(seed)
    left, top, w, h = decode.crop_box(width, height, rng, (0.08, 1.0), (3 / 4, 4 / 3))
    assert w >= 1 and h >= 1
    assert left >= 0 and top >= 0
    assert left + w <= width and top + h <= height


def test_crops_cover_areas_and_aspects_evenly():
    """Area is uniform and aspect log-uniform, as long as the first try fits."""
    rng = np.random.default_rng(0)
    boxes = [decode.crop_box(2000, 2000, rng, (0.1, 0.5), (3 / 4, 4 / 3)) for _ in range(4000)]
    areas = np.array([w * h for _, _, w, h in boxes]) / 2000**2
    aspects = np.log([w / h for _, _, w, h in boxes])
    assert areas.min() >= 0.099 and areas.max() <= 0.501
    for quantile in (0.25, 0.5, 0.75):
        assert abs(np.quantile(areas, quantile) - (0.1 + 0.4 * quantile)) < 0.015
        expected = np.log(3 / 4) + quantile * np.log(16 / 9)
        assert abs(np.quantile(aspects, quantile) - expected) < 0.025


@pytest.mark.parametrize(("size", "expected"), [((400, 40), (53, 40)), ((40, 400), (40, 53))])
def test_extreme_images_fall_back_to_a_central_crop(size, expected):
    left, top, w, h = decode.crop_box(*size, np.random.default_rng(0), (0.9, 1.0), (3 / 4, 4 / 3))
    assert (w, h) == expected
    assert (left, top) == ((size[0] - w) // 2, (size[1] - h) // 2)


def test_flip_is_a_mirror_and_happens_half_the_time():
    ramp = np.tile(np.arange(32, dtype=np.uint8)[:, None] * 8, (32, 1, 3))
    image, whole = Image.fromarray(ramp), ((1.0, 1.0), (1.0, 1.0))
    flipped = 0
    for seed in range(400):
        result = decode.train_image(image, 32, np.random.default_rng(seed), *whole)
        mirror = (result == ramp[:, ::-1]).all()
        assert mirror or (result == ramp).all()
        flipped += mirror
    assert 160 < flipped < 240


def test_every_mode_decodes_to_rgb():
    for mode in ("L", "RGBA", "CMYK", "P", "1", "RGB"):
        file = io.BytesIO()
        Image.new(mode, (5, 4)).save(file, "TIFF")
        assert decode.rgb(file.getvalue()).mode == "RGB"


# --- The fast path against the plain one ----------------------------------------------------------


@given(encoded_images(), st.integers(1, 40), st.integers(0, 1000), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=300)
def test_train_image_equals_a_plain_pillow_pipeline(encoded, size, seed, flip):
    scale = (0.08, 1.0)
    result = decode.train_image(
        encoded, size, np.random.default_rng(seed), crop_scale=scale, flip=flip
    )
    expected = plain(encoded, size, np.random.default_rng(seed), scale, flip)
    assert result.dtype == np.uint8 and result.shape == (size, size, 3)
    np.testing.assert_array_equal(result, expected)


@given(encoded_images(), st.data())
@settings(deadline=None, max_examples=200)
def test_any_part_of_an_image_equals_the_cut_of_the_whole(encoded, data):
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    assert decode.image_size(encoded) == image.size
    left, top = (data.draw(st.integers(0, side - 1)) for side in image.size)
    right = data.draw(st.integers(left + 1, image.width))
    bottom = data.draw(st.integers(top + 1, image.height))
    box = (left, top, right, bottom)
    part = decode.cropped(encoded, box)
    assert part.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(part), np.asarray(image.crop(box)))


@given(encoded_images(), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_evaluation_takes_bytes_as_well_as_pixels(encoded, size):
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    np.testing.assert_array_equal(decode.eval_image(encoded, size), decode.eval_image(pixels, size))


def test_evaluation_takes_any_pixels():
    pixels = noise(50, 40)
    grey, alpha = pixels[..., :1], noise(50, 40, seed=1)[..., :1]
    expected = decode.eval_image(Image.fromarray(pixels), 32)
    same = (
        jnp.asarray(pixels),
        pixels.tolist(),
        pixels.astype(np.int64),
        np.concatenate([pixels, alpha], axis=-1),
        Image.fromarray(pixels).convert("RGBA"),
    )
    for image in same:
        np.testing.assert_array_equal(decode.eval_image(image, 32), expected)
    expected = decode.eval_image(grey.repeat(3, axis=-1), 32)
    for image in (grey, grey[..., 0], grey.tolist(), Image.fromarray(grey[..., 0])):
        result = decode.eval_image(image, 32)
        assert result.dtype == np.uint8 and result.shape == (32, 32, 3)
        np.testing.assert_array_equal(result, expected)


def test_evaluation_takes_any_bytes():
    encoded = encode(noise(50, 40), "PNG", "RGB")
    expected = decode.eval_image(encoded, 32)
    for same in (bytearray(encoded), memoryview(encoded)):
        np.testing.assert_array_equal(decode.eval_image(same, 32), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"not float32 \[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"not uint8 \[4, 4, 2\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"not uint8 \[1, 4, 4, 3\]"),
        (np.zeros((0, 4, 3), np.uint8), r"not uint8 \[0, 4, 3\]"),
        (np.full((4, 4), 256), "pixels from 256 to 256, not 0 to 255"),
        (None, "not object"),
    ],
)
def test_pixels_that_are_no_image_are_named(image, message):
    with pytest.raises(ValueError, match=message):
        decode.eval_image(image, 32)


@pytest.mark.parametrize("sides", [(1, 1), (1, 4000), (4000, 1), (3, 2500), (2, 2)])
def test_tiny_and_very_wide_images_work(sides):
    for file_format in ("JPEG", "PNG"):
        encoded = encode(noise(*sides), file_format, "RGB")
        for seed in range(20):
            result = decode.train_image(encoded, 32, np.random.default_rng(seed))
            assert result.shape == (32, 32, 3)
        assert decode.eval_image(encoded, 32).shape == (32, 32, 3)


def test_of_a_jpeg_only_the_rows_down_to_the_crop_are_decoded(monkeypatch):
    encoded = encode(noise(400, 60), "JPEG", "RGB")
    heights = []
    original = Image.frombytes

    def spy(mode, size, *args):
        heights.append(size[1])
        return original(mode, size, *args)

    monkeypatch.setattr(Image, "frombytes", spy)
    decode.cropped(encoded, (0, 30, 60, 100))
    assert heights == [100 + decode.CONTEXT_ROWS]


# --- What is drawn --------------------------------------------------------------------------------


def test_the_filter_is_bilinear_or_bicubic_half_the_time():
    image = Image.fromarray(noise(40, 40))
    filters = {f: np.asarray(image.resize((16, 16), f)) for f in decode.FILTERS}
    drawn = []
    for seed in range(600):
        rng = np.random.default_rng(seed)
        result = decode.train_image(image, 16, rng, (1.0, 1.0), (1.0, 1.0), flip=0.0)
        (match,) = (f for f, expected in filters.items() if (result == expected).all())
        drawn.append(match == Image.BICUBIC)
    assert 250 < sum(drawn) < 350


def torchvision_box(width, height, random):
    """The crop as torchvision and timm describe it, with Python's own random numbers."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    raise AssertionError("not for these sizes")


@pytest.mark.parametrize("size", [(500, 375), (300, 400), (256, 256)])
def test_crops_are_distributed_as_those_of_torchvision(size):
    rng, random = np.random.default_rng(0), Random(0)
    ours = [decode.crop_box(*size, rng, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)]
    theirs = [torchvision_box(*size, random) for _ in range(5000)]
    ours, theirs = np.array(ours, float).T, np.array(theirs, float).T
    for of in (
        lambda left, top, w, h: w * h,
        lambda left, top, w, h: w / h,
        lambda left, top, w, h: left,
        lambda left, top, w, h: top + h,
    ):
        assert ks_2samp(of(*ours), of(*theirs)).pvalue > 1e-3


def test_the_draws_do_not_hang_on_the_image():
    """So that the augmentation of a position is the same whatever image stands there."""
    after = []
    for size in ((10, 10), (400, 3), (1, 1)):
        rng = np.random.default_rng(5)
        decode.train_image(Image.new("RGB", size), 8, rng)
        after.append(rng.random())
    assert len(set(after)) == 1


def test_randaugment_comes_last_and_keeps_colour_jitter_out():
    policy = randaugment.parse("rand-m9-mstd0.5-inc1")
    encoded = encode(noise(60, 80), "JPEG", "RGB")
    changed = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        before = plain(encoded, 32, rng, (0.08, 1.0), 0.5)
        expected = randaugment.augment(before, rng, policy)
        rng = np.random.default_rng(seed)
        result = decode.train_image(encoded, 32, rng, color_jitter=0.4, policy=policy)
        np.testing.assert_array_equal(result, expected)
        changed += (result != before).any()
    assert changed > 10


def test_colour_jitter_is_a_chain_of_pillow_enhancements_in_random_order():
    image, orders = noise(20, 30), set()
    for seed in range(60):
        result = decode.jitter(image, np.random.default_rng(seed), 0.4)
        rng = np.random.default_rng(seed)
        factors, order = rng.uniform(0.6, 1.4, 3), rng.permutation(3)
        expected = Image.fromarray(image)
        for i in order:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[i]
            expected = enhance(expected).enhance(factors[i])
        np.testing.assert_array_equal(result, np.asarray(expected))
        orders.add(tuple(order))
    assert len(orders) == 6


def test_colour_jitter_acts_without_randaugment():
    image = Image.fromarray(noise(20, 20))
    rngs = [np.random.default_rng(0) for _ in range(2)]
    plain_image, jittered = (
        decode.train_image(image, 16, rng, color_jitter=strength)
        for rng, strength in zip(rngs, (0.0, 0.4), strict=True)
    )
    assert (plain_image != jittered).any()


# --- What cannot be decoded -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoded",
    [b"", b"no image at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", bytes(1000)],
)
def test_what_is_no_image_raises_undecodable(encoded):
    for read in (
        decode.rgb,
        decode.image_size,
        lambda data: decode.eval_image(data, 32),
        lambda data: decode.train_image(data, 32, np.random.default_rng(0)),
    ):
        with pytest.raises(decode.Undecodable):
            read(encoded)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_cut_anywhere_is_undecodable_just_where_pillow_says_so(mode, options):
    encoded = encode(noise(40, 36), "JPEG", mode, **options)
    for end in range(0, len(encoded), 7):
        cut = encoded[:end]
        try:
            expected = np.asarray(Image.open(io.BytesIO(cut)).convert("RGB").crop((3, 2, 30, 12)))
        except Exception:
            with pytest.raises(decode.Undecodable):
                decode.cropped(cut, (3, 2, 30, 12))
        else:
            result = np.asarray(decode.cropped(cut, (3, 2, 30, 12)))
            np.testing.assert_array_equal(result, expected)


@given(encoded_images(), st.data())
@settings(deadline=None, max_examples=150)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_raise_nothing_but_undecodable(encoded, data):
    damaged = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode.train_image(bytes(damaged), 16, np.random.default_rng(0))
    except decode.Undecodable as error:
        assert str(error) and "\n" not in str(error)


def test_absurdly_many_pixels_are_undecodable():
    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0"))
    jpeg = bytearray(encode(noise(20, 20), "JPEG", "RGB"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 60000, 60000)
    for bomb in (png, bytes(jpeg)):
        with pytest.raises(decode.Undecodable, match="pixels"):
            decode.train_image(bomb, 32, np.random.default_rng(0))
        with pytest.raises(decode.Undecodable, match="pixels"):
            decode.eval_image(bomb, 32)


# --- The resize by SIMD ---------------------------------------------------------------------------


@pytest.fixture
def simd():
    pytest.importorskip("cykooz_resizer")
