"""Image folders: `train/` and `val/`, one directory per class."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from starnet_jax.data.records import DamagedRecord
from starnet_jax.errors import BadInput, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
EVAL_SPLITS = ("val", "validation", "test")  # what people call it, in the order of preference
LISTING_THREADS = 16


class Folder:
    """The images of a split, class after class, by name within a class.

    The classes are the sorted names of the directories in `train/`, as torchvision numbers them,
    and every other split must have the same. Images may lie deeper than one level; hidden files
    and directories are passed over.
    """

    def __init__(self, root: str | None, split: str | None):
        """Lists the images below `root`.

        Args:
          root: `data.dir`, a local directory.
          split: name of a directory in it. `val`, `validation` and `test` stand for each other
            where only another of them is there; None takes the first that is there.

        Raises:
          BadInput: a directory is missing, empty or not readable, or the splits have not the
            same classes.
        """
        self.path = _split_path(root, split)
        self.class_names = _classes(self.path)
        _check_same_classes(self.path.parent / "train", self.path, self.class_names)
        folders = [self.path / name for name in self.class_names]
        with ThreadPoolExecutor(LISTING_THREADS, thread_name_prefix="list") as pool:
            files = list(pool.map(_images, folders))
        for folder, found in zip(folders, files, strict=True):
            if not found:
                raise BadInput(
                    f"config.data.dir: the class folder {folder} has no images "
                    f"({', '.join(SUFFIXES)}); fill or remove it"
                )
        # NumPy holds a million paths in one piece of memory, which forked processes share
        self._files = np.array([os.fsencode(file) for found in files for file in found])
        self._labels = np.repeat(np.arange(len(files)), [len(found) for found in files])

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The file's content and its label; raises DamagedRecord where it cannot be read."""
        try:
            return Path(self.name(index)).read_bytes(), int(self._labels[index])
        except OSError as error:
            raise DamagedRecord(f"{self.name(index)}: {error.strerror}") from None

    def name(self, index: int) -> str:
        """The path of the file."""
        label, file = self._labels[index], os.fsdecode(self._files[index])
        return str(self.path / self.class_names[label] / file)


def _split_path(root: str | None, split: str | None) -> Path:
    if root is None:
        raise BadInput("config.data.dir: data.source='folder' needs the folder around train/, val/")
    if "://" in root:
        raise BadInput(
            f"config.data.dir: an image folder lies on a local disk, not at {root}; prepare a TFDS "
            "dataset there (python -m starnet_jax.data.prepare) and set data.source='tfds'"
        )
    path = Path(root).expanduser()
    found = [entry.name for entry in _visible(path) if entry.is_dir()]
    names = (split, *EVAL_SPLITS) if split in EVAL_SPLITS else (split,) if split else EVAL_SPLITS
    for name in names:
        if name in found:
            return path / name
    known = nearest(names[0], found[:10]) if found else "; it has no folders"
    raise BadInput(f"config.data.dir: {root} has no folder {names[0]!r}{known}")


def _classes(path: Path) -> Sequence[str]:
    entries = list(_visible(path))
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        images = [entry.name for entry in entries if _is_image(entry.name)]
        what = f"images such as {images[0]} but no class folders" if images else "no class folders"
        raise BadInput(f"config.data.dir: {path} holds {what}; it needs one folder for each class")
    return names


def _check_same_classes(train: Path, path: Path, names: Sequence[str]) -> None:
    """A class that only one split has would shift the labels of all classes after it."""
    if path == train or not train.is_dir():
        return
    expected = _classes(train)
    if missing := sorted(set(expected) - set(names)):
        raise BadInput(
            f"config.data.dir: {path} has no folder for class {missing[0]!r} of {train} "
            f"({len(missing)} missing)"
        )
    if unknown := sorted(set(names) - set(expected)):
        raise BadInput(
            f"config.data.dir: {path / unknown[0]} is no class of {train}"
            f"{nearest(unknown[0], expected[:10])}"
        )


def _images(folder: Path) -> list[str]:
    """The sorted paths of all images below `folder`, relative to it; links are followed."""
    found, pending, seen = [], [""], set()
    while pending:
        below = pending.pop()
        place = os.path.realpath(folder / below)
        if place in seen:  # a link back up
            continue
        seen.add(place)
        for entry in _visible(folder / below):
            path = os.path.join(below, entry.name)
            if entry.is_dir():
                pending.append(path)
            elif _is_image(entry.name):
                found.append(path)
    return sorted(found)


def _visible(path: Path) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(path) as entries:
            yield from (entry for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise BadInput(f"config.data.dir: cannot read {path}: {error.strerror}") from None


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
