"""The authors' way from JPEG to batch, restated plainly: Pillow, op by op, a pool of processes.

What timm 0.6.13 with torchvision does on the host for `rand-m*-mstd0.5-inc1`: decode the whole
image, random resized crop with a random filter, flip, RandAugment, and a collate function that
joins uint8 images with channels first. Batches come back through shared memory, as those of
PyTorch's DataLoader do.
"""

import contextlib
import io
import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import shared_memory

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

FILL = (124, 116, 104)
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
STAGES = ("decode", "crop, resize", "flip", "RandAugment", "copy")


def decode(encoded: bytes) -> Image.Image:
    """Opens and decodes the whole image."""
    with io.BytesIO(encoded) as file:
        return Image.open(file).convert("RGB")


def crop_and_resize(image: Image.Image, size: int) -> Image.Image:
    """A random resized crop: area 0.08 to 1, ratio 3/4 to 4/3, bilinear or bicubic."""
    left, top, width, height = _box(*image.size)
    image = image.crop((left, top, left + width, top + height))
    return image.resize((size, size), random.choice(FILTERS))


def _box(width: int, height: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = random.uniform(0.08, 1.0) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w <= width and h <= height:
            return random.randint(0, width - w), random.randint(0, height - h), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side


def flip(image: Image.Image) -> Image.Image:
    """A mirror image half the time."""
    if random.random() < 0.5:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def augment(image: Image.Image, magnitude: float) -> Image.Image:
    """Two operations drawn with replacement, each applied half the time."""
    for op in random.choices(OPS, k=2):
        if random.random() < 0.5:
            strength = min(max(random.gauss(magnitude, 0.5), 0.0), 10.0) / 10
            image = op(image, strength, random.choice(FILTERS))
    return image


def _sign() -> int:
    return random.choice((-1, 1))


def _factor(strength: float) -> float:
    return max(0.1, 1.0 + _sign() * 0.9 * strength)


def _affine(image: Image.Image, matrix: tuple[float, ...], resample) -> Image.Image:
    method = Image.Transform.AFFINE
    return image.transform(image.size, method, matrix, resample=resample, fillcolor=FILL)


def _rotate(image, strength, resample):
    return image.rotate(_sign() * 30 * strength, resample=resample, fillcolor=FILL)


def _posterize(image, strength, resample):
    bits = 4 - int(4 * strength)
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def _solarize_add(image, strength, resample):
    add = int(110 * strength)
    table = [min(255, i + add) if i < 128 else i for i in range(256)]
    return image.point(table * 3)


OPS: tuple[Callable, ...] = (
    lambda image, strength, resample: ImageOps.autocontrast(image),
    lambda image, strength, resample: ImageOps.equalize(image),
    lambda image, strength, resample: ImageOps.invert(image),
    _rotate,
    _posterize,
    lambda image, strength, resample: ImageOps.solarize(image, 256 - int(256 * strength)),
    _solarize_add,
    lambda image, strength, resample: ImageEnhance.Color(image).enhance(_factor(strength)),
    lambda image, strength, resample: ImageEnhance.Contrast(image).enhance(_factor(strength)),
    lambda image, strength, resample: ImageEnhance.Brightness(image).enhance(_factor(strength)),
    lambda image, strength, resample: ImageEnhance.Sharpness(image).enhance(_factor(strength)),
    lambda image, strength, resample: _affine(
        image, (1, _sign() * 0.3 * strength, 0, 0, 1, 0), resample
    ),
    lambda image, strength, resample: _affine(
        image, (1, 0, 0, _sign() * 0.3 * strength, 1, 0), resample
    ),
    lambda image, strength, resample: _affine(
        image, (1, 0, _sign() * 0.45 * strength * image.size[0], 0, 1, 0), resample
    ),
    lambda image, strength, resample: _affine(
        image, (1, 0, 0, 0, 1, _sign() * 0.45 * strength * image.size[1]), resample
    ),
)


def batches(
    files: Sequence[str],
    *,
    magnitude: float,
    size: int,
    batch_size: int,
    workers: int,
    mix: bool = False,
) -> Iterator[tuple[int, ...]]:
    """Makes uint8 [batch_size,3,size,size], each by one process of a pool, as a DataLoader does.

    Yields the shape of each batch when it has arrived in this process.

    Args:
      files: paths of images, a whole number of batches.
      magnitude: of RandAugment.
      size: side of the images, in pixels.
      batch_size: images in a batch.
      workers: processes.
      mix: whether the collate function also applies mixup or cutmix, as the authors' does.
    """
    parts = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        tasks = ((part, magnitude, size, mix) for part in parts)
        for name in pool.imap(_make_batch, tasks):
            with contextlib.closing(shared_memory.SharedMemory(name)) as memory:
                memory.unlink()
                yield (batch_size, 3, size, size)


def _make_batch(task: tuple) -> str:
    files, magnitude, size, mix = task
    images = [np.asarray(_load(file, magnitude, size)).transpose(2, 0, 1) for file in files]
    memory = shared_memory.SharedMemory(create=True, size=len(files) * 3 * size * size)
    batch = np.ndarray((len(files), 3, size, size), np.uint8, memory.buf)
    collate(images, batch, mix)
    del batch
    memory.close()
    return memory.name


def _load(file: str, magnitude: float, size: int) -> Image.Image:
    with open(file, "rb") as opened:
        image = Image.open(opened).convert("RGB")
    return augment(flip(crop_and_resize(image, size)), magnitude)


def collate(images: Sequence[np.ndarray], batch: np.ndarray, mix: bool) -> None:
    """Fills `batch` uint8 [B,3,H,W] with the images, mixed with those in reverse order if asked."""
    weight = random.betavariate(0.8, 0.8) if mix else 1.0
    cut = mix and random.random() < 0.5
    for i, (image, partner) in enumerate(zip(images, reversed(images), strict=True)):
        if cut:
            side = int(image.shape[1] * math.sqrt(1 - weight))
            top = left = (image.shape[1] - side) // 2
            image = image.copy()
            image[:, top : top + side, left : left + side] = partner[
                :, top : top + side, left : left + side
            ]
        elif mix:
            mixed = image.astype(np.float32) * weight + partner.astype(np.float32) * (1 - weight)
            image = np.rint(mixed, out=mixed)
        batch[i] = image


def stages(encoded: Sequence[bytes], magnitude: float, size: int) -> dict[str, float]:
    """CPU seconds an image of each of `STAGES`, in this process."""
    seconds = dict.fromkeys(STAGES, 0.0)
    batch = np.zeros((len(encoded), 3, size, size), np.uint8)
    for data, target in zip(encoded, batch, strict=True):
        clock = [time.thread_time()]
        image = decode(data)
        clock.append(time.thread_time())
        image = crop_and_resize(image, size)
        clock.append(time.thread_time())
        image = flip(image)
        clock.append(time.thread_time())
        image = augment(image, magnitude)
        clock.append(time.thread_time())
        target[:] = np.asarray(image).transpose(2, 0, 1)
        clock.append(time.thread_time())
        for stage, start, end in zip(STAGES, clock, clock[1:], strict=False):
            seconds[stage] += (end - start) / len(encoded)
    return seconds
