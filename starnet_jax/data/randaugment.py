"""RandAugment on the host, equal to timm 0.6.13 on Pillow byte for byte.

Source: Cubuk et al., "RandAugment" (CVPR Workshops 2020), with the operations, level rules and
noise that timm 0.6.13 gives `rand-m9-mstd0.5-inc1`, the policy of DemoNet (StarNet: m1).

Pillow rotates, colours and equalizes. The rest is restated in NumPy with Pillow's rounding (that of
x86-64), because it is faster so.
"""

import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from starnet_jax.errors import BadInput, nearest

FILL = (124, 116, 104)  # 255 * ImageNet mean, for what comes from outside the image
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
RESAMPLES = (*FILTERS, "none")


class _Scratch(threading.local):
    """Working memory kept from image to image: fresh pages cost more than the arithmetic."""

    def __init__(self):
        self.arrays = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Returns an array, content arbitrary, the caller's until the thread next says `name`."""
        size = math.prod(shape)
        array = self.arrays.get((name, dtype))
        if array is None or array.size < size:
            array = self.arrays[name, dtype] = np.empty(size, dtype)
        return array[:size].reshape(shape)


_scratch = _Scratch()


# --- Point operations -----------------------------------------------------------------------------


def _autocontrast(image: np.ndarray) -> np.ndarray:
    rows = image.reshape(image.shape[0], -1)  # reducing rows first is ten times faster
    low = rows.min(axis=0).reshape(-1, 3).min(axis=0)
    high = rows.max(axis=0).reshape(-1, 3).max(axis=0)
    if np.all((high - low == 255) | (high == low)):
        return image  # full range or flat: nothing to stretch, as in many photos
    return np.asarray(ImageOps.autocontrast(Image.fromarray(image)))


def _equalize(image: np.ndarray) -> np.ndarray:
    return np.asarray(ImageOps.equalize(Image.fromarray(image)))


def _invert(image: np.ndarray) -> np.ndarray:
    return 255 - image


def _posterize(image: np.ndarray, bits: float) -> np.ndarray:
    # 0 bits give black; newer versions of Pillow refuse that in their own posterize
    return image & np.uint8((0xFF00 >> max(int(bits), 0)) & 0xFF) if bits < 8 else image


def _solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    bright = (image >= int(threshold)).view(np.uint8)
    # 255 - image where bright; several times faster than np.where
    return image ^ np.negative(bright)


def _solarize_add(image: np.ndarray, add: float) -> np.ndarray:
    dark = (image < 128).view(np.uint8)
    return image + np.minimum(255 - image, np.uint8(min(int(add), 255))) * dark


# --- Blends with a plainer version of the image ---------------------------------------------------


def _blend(plain: np.ndarray | np.float32, image: np.ndarray, factor: float) -> np.ndarray:
    """Goes from `plain` (factor 0) to `image` (1) and beyond; float32, truncated as in Pillow."""
    value = _scratch("blend", image.shape, np.float32)
    np.subtract(image, plain, out=value, dtype=np.float32)
    value *= np.float32(factor)
    value += plain
    return value.clip(0, 255, out=value).astype(np.uint8)


def _color(image: np.ndarray, factor: float) -> np.ndarray:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor))


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    grey = np.asarray(Image.fromarray(image).convert("L"))
    mean = int(grey.sum(dtype=np.int64) / grey.size + 0.5)
    return _blend(np.float32(mean), image, factor)


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return _blend(np.float32(0), image, factor)


def _sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the 3x3 mean whose centre counts five times; the border row is left as it is."""
    height, width, _ = image.shape
    wide = _scratch("wide", (height, width * 3), np.uint16)
    wide[:] = image.reshape(wide.shape)
    rows = _scratch("rows", (max(height - 2, 0), width * 3), np.uint16)
    np.add(wide[:-2], wide[1:-1], out=rows)
    rows += wide[2:]
    wide *= 4
    total = wide[1:-1, 3:-3]
    total += rows[:, :-6]
    total += rows[:, 3:-3]
    total += rows[:, 6:]
    total += 6
    total //= 13  # rounds to nearest: an odd divisor has no ties
    smooth = image.copy()
    smooth[1:-1, 1:-1] = total.reshape(smooth[1:-1, 1:-1].shape)
    return _blend(smooth, image, factor)


# --- Geometry -------------------------------------------------------------------------------------


def _rotate(image: np.ndarray, degrees: float, resample: str) -> np.ndarray:
    rotated = Image.fromarray(image).rotate(degrees, FILTERS[resample], fillcolor=FILL)
    return np.asarray(rotated)


def _shear_x(image: np.ndarray, factor: float, resample: str) -> np.ndarray:
    return _slide(image, 1, factor, 0.0, resample)


def _shear_y(image: np.ndarray, factor: float, resample: str) -> np.ndarray:
    return _slide(image, 0, factor, 0.0, resample)


def _translate_x(image: np.ndarray, fraction: float, resample: str) -> np.ndarray:
    return _slide(image, 1, 0.0, fraction * image.shape[1], resample)


def _translate_y(image: np.ndarray, fraction: float, resample: str) -> np.ndarray:
    return _slide(image, 0, 0.0, fraction * image.shape[0], resample)


def _slide(image: np.ndarray, axis: int, slope: float, shift: float, resample: str) -> np.ndarray:
    """Slides each line along `axis` (0 down, 1 across) by `slope * (line + 0.5) + shift` pixels.

    Lines are counted along the other axis. Only one axis moves, so Pillow's two-dimensional filters
    reduce to one dimension, in float64 and in the same order of operations.
    """
    if slope == 0 and shift == 0:
        return image
    planes = image.transpose(2, 1 - axis, axis)  # [channel, line, place]
    _, lines, length = planes.shape
    offset = slope * (np.arange(lines if slope else 1) + 0.5) + shift
    start, fraction, outside = _sources(offset, length)
    seen = np.flatnonzero(~outside.all(axis=0))
    first, last = (seen[0], seen[-1] + 1) if seen.size else (0, 0)
    fraction, outside = fraction[:, first:last], outside[:, first:last]
    take = _windows(lines, length, start + first, last - first)
    interpolate = _linear if resample == "bilinear" else _cubic
    value = _scratch("value", (lines, last - first), np.float64)
    result = np.empty(image.shape, np.uint8)
    for plane, target, fill in zip(planes, result.transpose(2, 1 - axis, axis), FILL, strict=True):
        interpolate(take(plane), fraction, value)
        np.copyto(value, fill, where=outside)
        target[:, :first] = fill
        target[:, first:last] = value.astype(np.uint8)
        target[:, last:] = fill
    return result


def _sources(offset: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Says where the pixels of lines that begin at `offset` [lines] come from.

    Returns:
        Per line, the pixel at or before the source of its first; per pixel, by which fraction of a
        pixel its source lies further; and whether that is outside the image.
    """
    place = np.arange(length, dtype=np.int32)
    source = _scratch("source", (len(offset), length), np.float64)
    np.add(place + 0.5, offset[:, None], out=source)
    outside = (source < 0) | (source >= length)
    source -= 0.5
    start = np.floor(source[:, 0]).astype(np.int32)
    source -= place + start[:, None]  # at most rounded up to 1, which gives the next pixel exactly
    return start.clip(-length, length), source, outside


def _windows(
    lines: int, length: int, start: np.ndarray, width: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Returns plane [lines, length] -> int16 [lines, width + 3], line i from `start[i] - 1` on.

    Two pixels beyond the border repeat it; what lies further out is arbitrary.
    """
    stride = length + 4
    flat = _scratch("flat", (lines * stride + 2 * length,), np.int16)
    body = flat[length : length + lines * stride].reshape(lines, stride)
    windows = np.lib.stride_tricks.sliding_window_view(flat, width + 3)
    index = length + 1 + stride * np.arange(lines) + start

    def take(plane: np.ndarray) -> np.ndarray:
        body[:, 2:-2] = plane
        body[:, :2] = body[:, 2:3]
        body[:, -2:] = body[:, -3:-2]
        return windows[index]

    return take


def _linear(taps: np.ndarray, fraction: np.ndarray, value: np.ndarray) -> None:
    """Fills `value` [lines, width] with interpolations between taps 1 and 2 of each pixel."""
    left, right = taps[:, 1:-2], taps[:, 2:-1]
    np.multiply(right - left, fraction, out=value)
    value += left


def _cubic(taps: np.ndarray, fraction: np.ndarray, value: np.ndarray) -> None:
    """Fills `value` [lines, width] with cubic convolutions (a = -1) of taps 0 to 3."""
    p, q, r, s = taps[:, :-3], taps[:, 1:-2], taps[:, 2:-1], taps[:, 3:]
    square = p - q
    cube = s - r
    cube -= square
    square -= cube
    np.multiply(cube, fraction, out=value)
    value += square
    value *= fraction
    value += np.subtract(r, p, out=cube)
    value *= fraction
    value += q
    np.clip(value, 0, 255, out=value)


# --- What a magnitude from 0 to 10 means to each operation ----------------------------------------


def _up_to(most: float) -> Callable[[float, int], float]:
    return lambda magnitude, sign: sign * (magnitude / 10 * most)


def _around_one(magnitude: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (magnitude / 10 * 0.9))


class Op(NamedTuple):
    """One operation.

    Attributes:
        run: image -> image; also takes the level if `level` is set, and the filter if `geometric`.
        level: (magnitude, sign) -> argument of `run`; integers are truncated, not rounded.
        geometric: moves pixels, so that a filter is needed.
    """

    run: Callable[..., np.ndarray]
    level: Callable[[float, int], float] | None = None
    geometric: bool = False


OPS = {
    "AutoContrast": Op(_autocontrast),
    "Equalize": Op(_equalize),
    "Invert": Op(_invert),
    "Rotate": Op(_rotate, _up_to(30.0), geometric=True),
    "PosterizeIncreasing": Op(_posterize, lambda magnitude, _: 4 - int(magnitude / 10 * 4)),
    "SolarizeIncreasing": Op(_solarize, lambda magnitude, _: 256 - int(magnitude / 10 * 256)),
    "SolarizeAdd": Op(_solarize_add, lambda magnitude, _: int(magnitude / 10 * 110)),
    "ColorIncreasing": Op(_color, _around_one),
    "ContrastIncreasing": Op(_contrast, _around_one),
    "BrightnessIncreasing": Op(_brightness, _around_one),
    "SharpnessIncreasing": Op(_sharpness, _around_one),
    "ShearX": Op(_shear_x, _up_to(0.3), geometric=True),
    "ShearY": Op(_shear_y, _up_to(0.3), geometric=True),
    "TranslateXRel": Op(_translate_x, _up_to(0.45), geometric=True),
    "TranslateYRel": Op(_translate_y, _up_to(0.45), geometric=True),
}
"""The operations of `inc1`: the larger the magnitude, the stronger the change."""


def _from_faint(magnitude: float, _: int) -> float:
    return magnitude / 10 * 1.8 + 0.1


_PLAIN_LEVELS = {
    "PosterizeIncreasing": lambda magnitude, _: int(magnitude / 10 * 4),
    "SolarizeIncreasing": lambda magnitude, _: int(magnitude / 10 * 256),
    "ColorIncreasing": _from_faint,
    "ContrastIncreasing": _from_faint,
    "BrightnessIncreasing": _from_faint,
    "SharpnessIncreasing": _from_faint,
}
PLAIN_OPS = {
    name.removesuffix("Increasing"): op._replace(level=_PLAIN_LEVELS.get(name, op.level))
    for name, op in OPS.items()
}
"""The operations without `inc1`, where some do least in the middle or at the top of the scale."""

_ALL_OPS = OPS | PLAIN_OPS


def level(op: str, magnitude: float, sign: int = 1) -> float | None:
    """Returns the argument that `op` gets at `magnitude` (0 to 10, fractions allowed).

    Degrees for Rotate, a fraction of the side for TranslateXRel and TranslateYRel, bits to keep for
    Posterize, 0 to 256 for Solarize and SolarizeAdd, else a factor; None for operations without
    level. `sign` is +1 or -1 and counts only where both directions exist.

    Raises:
        ValueError: unknown `op`.
    """
    rule = _find(op).level
    return None if rule is None else rule(magnitude, sign)


def apply(image: np.ndarray, op: str, level: float | None, resample: str | None) -> np.ndarray:
    """Returns `image` after one operation.

    Args:
        image: uint8 [H,W,3], RGB, of NumPy or what it converts; left as it is.
        op: a name out of `OPS` or `PLAIN_OPS`.
        level: what `level(op, magnitude)` returns; None or NaN for operations without level.
        resample: "bilinear" or "bicubic"; None or "none" for operations that move no pixels.

    Returns:
        uint8 [H,W,3], possibly read-only, possibly `image` itself.

    Raises:
        ValueError: wrong shape or dtype, unknown name, or missing level or filter.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
    resample = "none" if resample is None else resample
    if resample not in RESAMPLES:
        raise ValueError(f"unknown resample {resample!r}{nearest(resample, RESAMPLES)}")
    run, rule, geometric = _find(op)
    if rule is None:
        return run(image)
    if level is None or math.isnan(level):
        raise ValueError(f"{op} needs a level")
    if not geometric:
        return run(image, float(level))
    if resample == "none":
        raise ValueError(f"{op} needs resample 'bilinear' or 'bicubic'")
    return run(image, float(level), resample)


def _find(op: str) -> Op:
    if op not in _ALL_OPS:
        raise ValueError(f"unknown operation {op!r}{nearest(op, _ALL_OPS)}")
    return _ALL_OPS[op]


# --- Policies -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandAugment:
    """What to draw for each image.

    Attributes:
        magnitude: mean strength.
        magnitude_std: standard deviation of the strength; infinite: uniform from 0 to `magnitude`.
        magnitude_max: strengths are clipped to [0, magnitude_max].
        increasing: draw from `OPS`, else from `PLAIN_OPS`.
        num_layers: operations drawn for an image, with replacement.
        probability: of each drawn operation to be applied.
    """

    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0
    increasing: bool = False
    num_layers: int = 2
    probability: float = 0.5


class _Token(NamedTuple):
    field: str
    form: str
    digits: str
    read: Callable[[str], Any]
    most: float = math.inf


_NUMBER = r"\d+(\.\d+)?"
_TOKENS = {
    "m": _Token("magnitude", "m<magnitude>", _NUMBER, float, most=1000),
    "mstd": _Token(
        "magnitude_std",
        "mstd<noise>",
        _NUMBER,
        lambda digits: float(digits) if float(digits) <= 100 else float("inf"),
    ),
    "mmax": _Token("magnitude_max", "mmax<highest magnitude>", _NUMBER, float, most=1000),
    "n": _Token("num_layers", "n<layers>", r"\d+", int, most=100),
    "inc": _Token("increasing", "inc<0|1>", r"[01]", lambda digit: digit == "1"),
}


def parse(spec: str) -> RandAugment:
    """Reads timm's notation, such as `rand-m9-mstd0.5-inc1`.

    Tokens in any order: `m` (else 10), `mstd` (else 0), `mmax` (else 10), `n` (else 2), `inc` (else
    0). Unlike timm 0.6.13, which takes `inc0` for `inc1` and skips a token without number, every
    token means what it says.

    Raises:
        BadInput: an unknown, malformed, repeated or much too large token (a ValueError with a
            message of one line).
    """
    key = "augment.randaugment"
    first, *tokens = str(spec).split("-")
    if first != "rand":
        raise BadInput(f"{key}: {spec!r} must begin with 'rand', as in 'rand-m9-mstd0.5-inc1'")
    fields: dict[str, Any] = {}
    for text in tokens:
        name, digits = re.fullmatch(r"([^\d]*)(.*)", text, re.DOTALL).groups()
        if name not in _TOKENS:
            known = ", ".join(token.form for token in _TOKENS.values())
            raise BadInput(f"{key}: unknown token {text!r} in {spec!r}; known: {known}")
        token = _TOKENS[name]
        if not re.fullmatch(token.digits, digits):
            raise BadInput(f"{key}: malformed token {text!r} in {spec!r}; write {token.form}")
        if float(digits) > token.most:
            raise BadInput(
                f"{key}: {token.form} is at most {token.most}, not {digits[:20]}; "
                f"write {name}{token.most} or less"
            )
        if token.field in fields:
            raise BadInput(f"{key}: repeated token {text!r} in {spec!r}; write {token.form} once")
        fields[token.field] = token.read(digits)
    return RandAugment(**fields)


_NAMES = {True: tuple(OPS), False: tuple(PLAIN_OPS)}


def draw(rng: np.random.Generator, policy: RandAugment) -> list[tuple[str, float | None, str]]:
    """Returns what to apply to one image: a list of (op, level, resample), as `apply` takes them.

    Sign and filter are drawn for each operation. The use of `rng` depends on `policy` only.
    """
    names = _NAMES[policy.increasing]
    noise = rng.standard_normal(policy.num_layers).tolist()
    chances = rng.random((policy.num_layers, 5)).tolist()
    drawn = []
    for normal, (which, applied, minus, cubic, uniform) in zip(noise, chances, strict=True):
        if applied >= policy.probability:
            continue
        name = names[int(which * len(names))]
        if policy.magnitude_std == float("inf"):
            magnitude = uniform * policy.magnitude
        else:
            magnitude = policy.magnitude + policy.magnitude_std * normal
        magnitude = min(max(magnitude, 0.0), policy.magnitude_max)
        value = level(name, magnitude, -1 if minus < 0.5 else 1)
        resample = "bicubic" if cubic < 0.5 else "bilinear"
        drawn.append((name, value, resample if _ALL_OPS[name].geometric else "none"))
    return drawn


def augment(image: np.ndarray, rng: np.random.Generator, policy: RandAugment) -> np.ndarray:
    """Returns `image` (uint8 [H,W,3], RGB) after what `draw` draws; see `apply` for the result."""
    for op, value, resample in draw(rng, policy):
        image = apply(image, op, value, resample)
    return image
