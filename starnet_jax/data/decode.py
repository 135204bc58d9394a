"""From encoded bytes to a uint8 image of the size that the network takes, with Pillow."""

import contextlib
import io
import math
import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from starnet_jax.data import randaugment
from starnet_jax.data.randaugment import RandAugment
from starnet_jax.errors import BadInput

Encoded = bytes | Image.Image
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
CROP_TRIES = 10
JITTERED = ("Brightness", "Contrast", "Color")
JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
JPEG_HEADERS = (0xC4, 0xCC, *range(0xDB, 0xDE), *range(0xE0, 0xF0), 0xFE)  # tables, comments
JPEG_MODES = {1: "L", 3: "RGB"}  # by components
# Rows below a crop that its last row depends on: a JPEG's chroma is interpolated between row pairs.
CONTEXT_ROWS = 2


class Undecodable(BadInput):
    """Bytes that are no image, or only a part of one; the message says why."""


def rgb(encoded: bytes) -> Image.Image:
    """Decodes an image of any mode that Pillow reads to RGB.

    Raises:
      Undecodable: no image, a truncated one, or one of absurdly many pixels.
    """
    with _reading():
        return _rgb(_load(encoded))


def eval_image(image: ArrayLike | Encoded, size: int, crop: float = 0.875) -> np.ndarray:
    """Resizes the short side to size/crop (bicubic, antialiased) and cuts the centre.

    Equal to the evaluation transform of timm 0.6.13, byte for byte.

    Args:
      image: encoded bytes, a decoded image, or pixels from 0 to 255 of any integer type, [H,W],
        [H,W,1], [H,W,3] or [H,W,4] (the alpha is dropped), of any size.
      size: side of the result, in pixels.
      crop: fraction of the resized short side that the result keeps.

    Returns:
      uint8 [size,size,3].

    Raises:
      Undecodable: see `rgb`.
      ValueError: pixels of another type, shape or range.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        image = rgb(bytes(image))
    elif isinstance(image, Image.Image):
        image = _rgb(image)
    else:
        image = _rgb(_from_pixels(np.asarray(image)))
    short = math.floor(size / crop)
    width, height = image.size
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left = round((resized[0] - size) / 2)
    top = round((resized[1] - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def train_image(
    image: Encoded,
    size: int,
    rng: np.random.Generator,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    color_jitter: float = 0.0,
    policy: RandAugment | None = None,
) -> np.ndarray:
    """A random resized crop, bilinear or bicubic by chance, then a flip, then other colours.

    The order and the distributions are those of timm 0.6.13. Of a JPEG only the rows down to the
    end of the crop are decoded, which changes no byte of the result.

    Args:
      image: encoded bytes or a decoded image, of any size.
      size: side of the result, in pixels.
      rng: the randomness of this example.
      crop_scale: smallest and largest area of the crop, as fractions of the image.
      crop_ratio: smallest and largest width over height of the crop.
      flip: probability of the horizontal flip.
      color_jitter: largest change of brightness, contrast and saturation, as a fraction; without
        effect where there is a `policy`.
      policy: of RandAugment; None for none.

    Returns:
      uint8 [size,size,3], possibly read-only.

    Raises:
      Undecodable: see `rgb`.
    """
    left, top, width, height = crop_box(*image_size(image), rng, crop_scale, crop_ratio)
    box = (left, top, left + width, top + height)
    image = cropped(image, box)
    cubic, mirrored = rng.random(2).tolist()
    image = image.resize((size, size), FILTERS[cubic < 0.5])
    if mirrored < flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    array = np.asarray(image)
    if policy is not None:
        return randaugment.augment(array, rng, policy)
    return jitter(array, rng, color_jitter) if color_jitter else array


def crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws (left, top, width, height) of a random crop, as timm 0.6.13 does.

    Ten tries at an area within `scale` and an aspect within `ratio`, log-uniform; then the largest
    central crop that respects `ratio`. The use of `rng` does not depend on the image.
    """
    narrow, wide = math.log(ratio[0]), math.log(ratio[1])
    for uniform, log_uniform, x, y in rng.random((CROP_TRIES, 4)).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * uniform)
        aspect = math.exp(narrow + (wide - narrow) * log_uniform)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = max(min(width, round(height * aspect)), 1)
    h = max(min(height, round(width / aspect)), 1)
    return (width - w) // 2, (height - h) // 2, w, h


def jitter(image: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Changes brightness, contrast and saturation of uint8 [H,W,3], in random order.

    Each by a factor uniform in [1 - strength, 1 + strength], as torchvision's ColorJitter.
    """
    factors = rng.uniform(max(0.0, 1 - strength), 1 + strength, len(JITTERED)).tolist()
    for i in rng.permutation(len(JITTERED)).tolist():
        image = randaugment.apply(image, JITTERED[i], factors[i], "none")
    return image


def image_size(image: Encoded) -> tuple[int, int]:
    """Width and height, without decoding.

    Raises:
      Undecodable: no image, or one of absurdly many pixels.
    """
    if not isinstance(image, bytes):
        return image.size
    frame = _jpeg_frame(image)
    if frame is None:
        with _reading():
            return _open(image).size
    if frame.width * frame.height > 2 * (Image.MAX_IMAGE_PIXELS or math.inf):
        raise Undecodable(f"{frame.width} x {frame.height} pixels, more than Pillow allows")
    return frame.width, frame.height


def cropped(image: Encoded, box: tuple[int, int, int, int]) -> Image.Image:
    """The part of an image from (left, top) to (right, bottom), in RGB.

    Raises:
      Undecodable: see `rgb`.
    """
    if not isinstance(image, bytes):
        return _rgb(image.crop(box))
    with _reading():
        return _rgb(_load_down_to(box[3], image).crop(box))


def _load_down_to(bottom: int, encoded: bytes) -> Image.Image:
    """Decodes an image; of a JPEG no more than the rows above `bottom` need."""
    frame = _jpeg_frame(encoded)
    if frame is None or encoded.rfind(JPEG_END, frame.place_of_height) < 0:  # cut off: let it fail
        return _load(encoded)
    # libjpeg stops at the height that the header says; it skips the rest up to the end marker
    rows = min(frame.height, bottom + CONTEXT_ROWS)
    place = frame.place_of_height
    encoded = b"".join((encoded[:place], rows.to_bytes(2, "big"), encoded[place + 2 :]))
    if mode := JPEG_MODES.get(frame.components):
        # Pillow's own reading of the header takes a tenth of the time of the decoding
        return Image.frombytes(mode, (frame.width, rows), encoded, "jpeg", mode, "")
    return _load(encoded)


def _open(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded))


def _load(encoded: bytes) -> Image.Image:
    image = _open(encoded)
    image.load()
    return image


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape[:2] if pixels.shape[2:] == (1,) else pixels.shape
    known = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
    if not (known and pixels.size and pixels.dtype.kind in "iu"):
        expected = "integers [H,W], [H,W,1], [H,W,3] or [H,W,4]"
        raise ValueError(f"image must be {expected}, not {pixels.dtype} {list(pixels.shape)}")
    if pixels.dtype != np.uint8 and (pixels.min() < 0 or pixels.max() > 255):
        raise ValueError(f"image has pixels from {pixels.min()} to {pixels.max()}, not 0 to 255")
    return Image.fromarray(pixels.reshape(shape).astype(np.uint8, copy=False))


class _Frame(NamedTuple):
    """What the header of a JPEG says."""

    width: int
    height: int
    components: int
    place_of_height: int  # in the file


def _jpeg_frame(encoded: bytes) -> _Frame | None:
    """Reads a JPEG's header; None: anything else, leave it to Pillow."""
    if not encoded.startswith(JPEG_START):
        return None
    place = len(JPEG_START) - 1
    while place + 10 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker in JPEG_FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", encoded, place + 4)
            known = bits == 8 and width and height
            return _Frame(width, height, components, place + 5) if known else None
        if marker == 0xFF:  # padding
            place += 1
        elif marker in JPEG_HEADERS:
            place += 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
        else:
            return None
    return None


@contextlib.contextmanager
def _reading():
    """Whatever a broken file does to Pillow becomes Undecodable."""
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise Undecodable("not an image of a known format") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Undecodable(reason) from error
