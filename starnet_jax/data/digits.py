"""The embedded data: scikit-learn's 1,797 scanned handwritten digits as a TFDS dataset on disk.

Nothing is downloaded: the scans are part of scikit-learn (UCI optical recognition of digits).
"""

import contextlib
import io
import logging
import os
from pathlib import Path

import numpy as np

from starnet_jax.errors import BadInput

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

    Splits `train` (1,347) and `test` (450), stratified; PNG of 12x12 grey pixels; class names 0-9.

    Raises:
      BadInput: the folder cannot be written.
    """
    import tensorflow_datasets as tfds

    data_dir = Path(os.path.expanduser(data_dir))
    existing = data_dir / "digits" / VERSION
    try:
        if not existing.exists():
            with _quiet():
                _builder_class()(
                    data_dir=data_dir, file_format="array_record"
                ).download_and_prepare()
        return tfds.builder_from_directory(existing)
    except OSError as error:
        if existing.exists():  # another process was faster
            return tfds.builder_from_directory(existing)
        raise BadInput(f"config.data.dir: cannot write the digits to {data_dir}: {error}") from None


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
