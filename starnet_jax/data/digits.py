"""The embedded data: scikit-learn's 1,797 scanned handwritten digits as a TFDS dataset on disk.

Nothing is downloaded: the scans are part of scikit-learn (UCI optical recognition of digits).
"""

import contextlib
import fcntl
import io
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from starnet_jax.data import records
from starnet_jax.errors import BadInput
from starnet_jax.log import log

VERSION = "1.0.0"
NUM_TEST = 450
MARGIN = (
    2  # empty pixels around the 8x8 scan, so that a crop shifts the digit instead of cutting it
)


def default_dir() -> Path:
    """Where the dataset is prepared unless `data.dir` says otherwise."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "starnet_jax"


def prepare(data_dir: str | os.PathLike):
    """Returns the TFDS builder of the digits below `data_dir`, written there if it is not yet.

    Damaged ones are written anew. Several processes may do this at once.

    Splits `train` (1,347) and `test` (450), stratified; PNG of 12x12 grey pixels; class names 0-9.

    Raises:
      BadInput: the folder cannot be written.
    """
    data_dir = Path(os.path.expanduser(data_dir))
    folder = data_dir / "digits" / VERSION
    if builder := _open(folder):
        return builder
    try:
        with _one_at_a_time(folder.parent):
            return _open(folder) or _write(data_dir, folder)  # another process may have been faster
    except records.file_errors() as error:
        if builder := _open(folder):
            return builder
        raise BadInput(f"config.data.dir: cannot write the digits to {data_dir}: {error}") from None


def _open(folder: Path):
    """The builder of the digits; None where they are missing or damaged."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        builder = tfds.builder_from_directory(folder)
        shards = [s for split in builder.info.splits.values() for s in split.file_instructions]
        whole = bool(shards)
        if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:  # else not from here
            for shard in shards:
                found = ArrayRecordReader(os.fspath(shard.filename)).read_all()
                whole &= len(found) == shard.examples_in_shard
    except Exception:  # bytes that are no dataset fail in many ways
        return None
    return builder if whole else None


def _write(data_dir: Path, folder: Path):
    import tensorflow_datasets as tfds

    if folder.exists():
        log(f"the digits in {folder} are damaged; they are written anew")
        shutil.rmtree(folder)
    with _quiet():
        _builder_class()(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return tfds.builder_from_directory(folder)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    grey = np.pad(grey, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))[..., None]
    x_train, x_test, y_train, y_test = train_test_split(
        grey, digits.target, test_size=NUM_TEST, stratify=digits.target, random_state=0
    )
    return {"train": (x_train, y_train), "test": (x_test, y_test)}


def _builder_class():
    import tensorflow_datasets as tfds

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """8x8 scans of handwritten digits by 13 writers."""

        VERSION = tfds.core.Version(VERSION)
        pkg_dir_path = Path(__file__).parent  # TFDS looks for its README beside the builder

        def _info(self):
            side = 8 + 2 * MARGIN
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(side, side, 1), encoding_format="png"),
                        "label": tfds.features.ClassLabel(names=list("0123456789")),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # nothing to download
            return {name: self._generate_examples(*split) for name, split in _splits().items()}

        def _generate_examples(self, images, labels):
            for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                yield i, {"image": image, "label": int(label)}

    return Digits


@contextlib.contextmanager
def _quiet():
    """TFDS draws its own progress bars; for a second of work they only hide ours."""
    level = logging.getLogger("absl").level
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.getLogger("absl").setLevel(level)
