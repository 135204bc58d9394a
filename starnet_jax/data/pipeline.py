"""Batches for one process: decoded and augmented by workers, ahead of the device."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from starnet_jax.config import Augment
from starnet_jax.data import decode, order, randaugment, workers
from starnet_jax.data.decode import Undecodable
from starnet_jax.data.randaugment import RandAugment
from starnet_jax.data.records import DamagedRecord
from starnet_jax.data.source import Label, Source
from starnet_jax.errors import BadInput
from starnet_jax.log import log

Batch = dict[str, np.ndarray]
MAX_LABELS = 32  # of one image, where any of several is right
LOGGED_SKIPS = 10


def train_batches(
    source: Source,
    augment: Augment,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    steps: range,
    share: slice,
    workers: int,
    processes: bool | None = None,
) -> Iterator[Batch]:
    """Yields this process's share of the global batch of each step.

    An image that cannot be decoded is left out, counted and logged; the next one of the same global
    batch that can be takes its place. What stands at a position is a function of (seed, step,
    position) alone: not of shares, workers or restarts.

    Args:
      source: the training split.
      augment: random crop, flip, RandAugment or colour jitter.
      image_size: side of the images, in pixels.
      batch_size: of the global batch.
      seed: of order and augmentation.
      steps: the steps to make; a restart passes a later range and gets the same batches.
      share: which positions of the global batch are this process's.
      workers: decoding threads, or processes.
      processes: whether to decode in processes; None for those from more than 4 workers on. The
        batches are the same.

    Yields:
      `image` uint8 [b,H,W,3], `label` int32 [b], `index` int32 [b], b the length of the share.

    Raises:
      BadInput: an unknown RandAugment policy, or not one image of a batch can be decoded.
    """
    policy = randaugment.parse(augment.randaugment) if augment.randaugment else None
    job = _TrainJob(source, augment, policy, image_size, batch_size, seed)

    def rows():
        for step in steps:
            indices = order.step_indices(seed, step, batch_size, len(source))
            yield [(step, p, int(indices[p])) for p in range(batch_size)[share]]

    return _train_batches(job, rows(), workers, processes)


def eval_batches(
    source: Source,
    *,
    image_size: int,
    crop: float,
    batch_size: int,
    share: slice,
    workers: int,
    processes: bool | None = None,
) -> Iterator[Batch]:
    """Yields every example exactly once over all processes, in order.

    Every process yields equally many batches; `mask` bool [b] is False where a batch is filled up.
    Where any of several labels is right, `label` is int32 [b,MAX_LABELS], filled up with -1.
    Arguments and batches are otherwise those of `train_batches`.

    Raises:
      BadInput: an example cannot be read or decoded; the message names it.
    """
    several = isinstance(source.encoded(0)[1], tuple)

    def rows():
        for start in range(0, len(source), batch_size):
            yield [(i,) for i in range(start, start + batch_size)[share]]

    return _eval_batches(_EvalJob(source, image_size, crop), rows(), several, workers, processes)


def _train_batches(job, rows, count, processes) -> Iterator[Batch]:
    skips = _Skips()
    shape = job.image_size, job.image_size, 3
    for image, results in workers.run(job, rows, shape, count, processes):
        labels, indices, skipped = zip(*results, strict=True)
        skips.add(skipped)
        yield {
            "image": image,
            "label": np.array(labels, np.int32),
            "index": np.array(indices, np.int32),
        }


def _eval_batches(job, rows, several, count, processes) -> Iterator[Batch]:
    shape = job.image_size, job.image_size, 3
    for image, results in workers.run(job, rows, shape, count, processes):
        labels, indices = zip(*results, strict=True)
        index = np.array(indices, np.int32)
        label = _filled_up(labels) if several else np.array(labels, np.int32)
        yield {"image": image, "label": label, "index": index, "mask": index < len(job.source)}


@dataclass(frozen=True)
class _TrainJob:
    """Makes the example at one position of a step."""

    source: Source
    augment: Augment
    policy: RandAugment | None
    image_size: int
    batch_size: int
    seed: int

    def __call__(
        self, step: int, position: int, index: int
    ) -> tuple[np.ndarray, tuple[Label, int, list[str]]]:
        """The image; its label, its index, and what could not be decoded before it."""
        skipped: list[str] = []
        while True:
            try:
                image, label = self._example(step, position, index)
                return image, (label, index, skipped)
            except DamagedRecord as error:
                skipped.append(str(error))
            except Undecodable as error:
                skipped.append(f"{self.source.name(index)}: {error}")
            if len(skipped) == self.batch_size:
                raise BadInput(
                    f"config.data: not one image of step {step} can be decoded; {skipped[0]}"
                )
            indices = order.step_indices(self.seed, step, self.batch_size, len(self.source))
            index = int(indices[(position + len(skipped)) % self.batch_size])

    def _example(self, step: int, position: int, index: int) -> tuple[np.ndarray, Label]:
        encoded, label = self.source.encoded(index)
        image = decode.train_image(
            encoded,
            self.image_size,
            order.example_rng(self.seed, step, position),
            self.augment.crop_scale,
            self.augment.crop_ratio,
            self.augment.flip,
            self.augment.color_jitter,
            self.policy,
        )
        return image, label


@dataclass(frozen=True)
class _EvalJob:
    """Makes one example of the evaluation; past the last, an empty one."""

    source: Source
    image_size: int
    crop: float

    def __call__(self, index: int) -> tuple[np.ndarray, tuple[Label, int]]:
        """The image; its label and index."""
        if index >= len(self.source):
            return np.zeros((self.image_size, self.image_size, 3), np.uint8), (0, index)
        encoded, label = self.source.encoded(index)
        try:
            return decode.eval_image(encoded, self.image_size, self.crop), (label, index)
        except Undecodable as error:
            raise Undecodable(f"{self.source.name(index)}: {error}") from error


def _filled_up(labels: tuple[Label, ...]) -> np.ndarray:
    filled = np.full((len(labels), MAX_LABELS), -1, np.int32)
    for row, several in zip(filled, labels, strict=True):
        several = several if isinstance(several, tuple) else ()
        row[: len(several)] = several
    return filled


class _Skips:
    """Counts the images that were left out; logs the first few, then ever fewer."""

    def __init__(self):
        self._count = 0

    def add(self, skipped: tuple[list[str], ...]) -> None:
        for message in (message for messages in skipped for message in messages):
            self._count += 1
            if self._count <= LOGGED_SKIPS or self._count & (self._count - 1) == 0:
                log(f"data: left out an image, {self._count} so far: {message}")
