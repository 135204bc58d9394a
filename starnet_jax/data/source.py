"""Sources: random access to labelled images, one class per kind of storage."""

import os
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from starnet_jax.config import Data
from starnet_jax.data import dataset, decode, digits, imagenet, records
from starnet_jax.data.folder import Folder
from starnet_jax.data.records import DamagedRecord
from starnet_jax.errors import BadInput, nearest
from starnet_jax.log import log

Label = int | tuple[int, ...]  # several where any of them is right
SCAN_THREADS = 8
NOISE_IMAGES = 16
NOISE_SIDE = 4096  # the largest: 0.8 GB of noise


class Source(Protocol):
    """One split: `source[i]` is (RGB image, label); for threads, forks and pickles."""

    class_names: Sequence[str]
    classes: np.ndarray | None  # int32: the classes that take part in the evaluation; None for all
    several: bool  # whether labels are tuples, of which any is right

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]: ...

    def encoded(self, index: int) -> tuple[bytes | Image.Image, Label]:
        """The image as it is stored, and its label; raises DamagedRecord, BadInput."""
        ...

    def name(self, index: int) -> str:
        """What to call the example in a message: the file, or shard and record."""
        ...


def open_source(data: Data, split: str | None, num_classes: int) -> Source:
    """Opens one split of the configured data.

    Args:
      data: the section of the config.
      split: as TFDS writes it, `train[:10%]` included; None is the one to evaluate on:
        `validation`, or else `test`. For an image folder see `folder.Folder`.
      num_classes: of the model.

    Raises:
      BadInput: no such dataset or split, or not as many classes as the model.
    """
    if data.source == "fake":
        return FakeSource(data.train_examples, data.image_size, num_classes)
    if data.source == "folder":
        source = FolderSource(data.dir, split)
    elif data.source == "digits":
        source = TfdsSource(digits.prepare(data.dir or digits.default_dir()), split)
    else:
        source = TfdsSource(dataset.open_prepared(data.name, data.dir), split)
    if len(source.class_names) != num_classes:
        raise BadInput(
            f"config.model.num_classes: {num_classes}, but the data have "
            f"{len(source.class_names)} classes"
        )
    return source


class _Decoded:
    """`source[i]` from `source.encoded(i)`."""

    def __getitem__(self, index: int) -> tuple[Image.Image, Label]:
        image, label = self.encoded(index)
        return (decode.rgb(image) if isinstance(image, bytes) else image), label


class FolderSource(_Decoded, Folder):
    """A split of an image folder."""

    classes = None
    several = False


class TfdsSource(_Decoded):
    """A split of a prepared TFDS dataset whose supervised pair is an image and its class.

    Where the label is a sequence of classes (ImageNet ReaL), images without any are left out.
    """

    def __init__(self, builder, split: str | None, cache_dir: Path | None = None):
        """Opens the files of the split.

        Args:
          builder: of the prepared dataset.
          split: see `open_source`.
          cache_dir: where indices are kept; None for the user's cache folder.

        Raises:
          BadInput: no such split, or the dataset is not of labelled images.
        """
        cache_dir = cache_dir or digits.default_dir()
        self._dataset = builder.info.full_name
        self._image, self._label, self._features = _features(builder)
        class_label = self._features[self._label]
        self.several = hasattr(class_label, "feature")
        self.class_names = (class_label.feature if self.several else class_label).names
        self.classes = None
        if len(self.class_names) == imagenet.NUM_CLASSES:
            self.classes = imagenet.SUBSETS.get(builder.name)
        self._allowed: Container[int] = range(len(self.class_names))
        if self.classes is not None:
            self._allowed = frozenset(self.classes.tolist())

        self._decoders = {self._image: _skip_decoding()}
        shards = _shards(builder, split)
        file_format = builder.info.file_format.value
        self._records = records.open_records(shards, file_format, cache_dir)
        self._kept = self._labelled(shards, cache_dir) if self.several else None
        if not len(self):
            raise BadInput(f"config.data: split {split!r} of {self._dataset} is empty")
        self._check_first()

    def __len__(self) -> int:
        return len(self._records if self._kept is None else self._kept)

    def encoded(self, index: int) -> tuple[bytes, Label]:
        index = self._place(index)
        example = self._parse(index)
        labels = example[self._label]
        labels = tuple(map(int, labels)) if self.several else (int(labels),)
        for label in labels:
            if label not in self._allowed:
                count = len(self._allowed)
                raise BadInput(
                    f"{self._records.name(index)}: label {label} is none of the {count} classes "
                    f"of {self._dataset}"
                )
        return example[self._image], labels if self.several else labels[0]

    def name(self, index: int) -> str:
        return self._records.name(self._place(index))

    def _place(self, index: int) -> int:
        return index if self._kept is None else int(self._kept[index])

    def _parse(self, index: int) -> dict:
        record = self._records[index]
        try:
            return self._features.deserialize_example_np(record, decoders=self._decoders)
        except Exception as error:  # bytes that are no example fail in many ways
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DamagedRecord(f"{self._records.name(index)}: {reason}") from None

    def _labelled(self, shards: Sequence[records.Shard], cache_dir: Path) -> np.ndarray:
        """The records that have a label, int64 [M]; found once by reading all, then kept."""
        parts = [f"{shard.path}[{shard.skip}:{shard.take}]" for shard in shards]
        path = records.cache_file(cache_dir, "labelled", parts)
        cached = records.load_cached(path, self._records.fingerprint)
        total = len(self._records)
        if cached is None:
            log(f"looking for images without labels in {total} records, once")
            with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="labels") as pool:
                found = pool.map(self._has_label, range(total))
                flags = list(records.progress(found, total, "records read"))
            cached = {"kept": np.flatnonzero(flags)}
            records.save_cached(path, self._records.fingerprint, cached)
        kept = cached["kept"]
        log(
            f"{self._dataset}: {total - len(kept)} of {total} images have no label and are left out"
        )
        return kept

    def _has_label(self, index: int) -> bool:
        try:
            return len(self._parse(index)[self._label]) > 0
        except DamagedRecord:  # stays in, so that the evaluation fails and names it
            return True

    def _check_first(self) -> None:
        """Finds unlabelled splits (ImageNet's `test`) before anything long begins."""
        try:
            self.encoded(0)
        except DamagedRecord as error:
            log(f"damaged: {error}")


class FakeSource(_Decoded):
    """Noise with labels, made once and handed out again: the pipeline's own cost, no disk."""

    classes = None
    several = False

    def __init__(self, num_examples: int, image_size: int, num_classes: int):
        if image_size > NOISE_SIDE:
            raise BadInput(
                f"config.data.image_size: {image_size} is too large for data.source='fake', "
                f"which holds {NOISE_IMAGES} images in memory; at most {NOISE_SIDE}"
            )
        rng = np.random.default_rng(0)
        noise = rng.integers(256, size=(NOISE_IMAGES, image_size, image_size, 3), dtype=np.uint8)
        self._images = [Image.fromarray(image) for image in noise]
        self._num_examples = num_examples
        self.class_names = [str(i) for i in range(num_classes)]

    def __len__(self) -> int:
        return self._num_examples

    def encoded(self, index: int) -> tuple[Image.Image, int]:
        return self._images[index % len(self._images)], index % len(self.class_names)

    def name(self, index: int) -> str:
        return f"fake example {index}"


def _features(builder):
    """The names of image and label, and the feature of just these two, to parse no more."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    default = "image", "real_label" if "real_label" in features else "label"
    image, label = (builder.info.supervised_keys or default)[:2]
    kind = features.get(label)
    kind = kind.feature if isinstance(kind, tfds.features.Sequence) else kind
    if not (
        isinstance(features.get(image), tfds.features.Image)
        and isinstance(kind, tfds.features.ClassLabel)
    ):
        raise BadInput(
            f"config.data.name: {builder.name} has no image with a class label, "
            f"only: {', '.join(features)}"
        )
    pair = {key: features[key] for key in (image, label)}
    return image, label, tfds.features.FeaturesDict(pair)


def _skip_decoding():
    import tensorflow_datasets as tfds

    return tfds.decode.SkipDecoding()


def _shards(builder, split: str | None) -> list[records.Shard]:
    splits = builder.info.splits
    if split is None:
        split = next((name for name in ("validation", "test") if name in splits), "validation")
    try:
        instructions = splits[split].file_instructions
    except (ValueError, KeyError):
        base = split.partition("[")[0]
        known = nearest(base, splits) if base not in splits else "; write it like 'train[:10%]'"
        raise BadInput(
            f"config.data: dataset {builder.name!r} has no split {split!r}{known}"
        ) from None
    return [
        records.Shard(os.fspath(part.filename), part.skip, part.take, part.examples_in_shard)
        for part in instructions
    ]
