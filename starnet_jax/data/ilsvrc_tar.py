"""The tar files of ILSVRC2012, checked before hours of work go into them."""

import tarfile
from collections.abc import Sequence
from pathlib import Path

from starnet_jax.data import imagenet
from starnet_jax.errors import BadInput
from starnet_jax.log import log


def check(tar: imagenet.Tar, path: Path, wnids: Sequence[str]) -> None:
    """Walks the headers of a tar file to its end; reads no images, and so takes seconds.

    Args:
      tar: what the file should be.
      path: where it lies.
      wnids: the names of the classes, such as n01440764.

    Raises:
      BadInput: it is another file, or it is cut off or damaged.
    """
    try:
        with tarfile.open(path, "r:") as file:
            _check_first(file, tar)
            if path.stat().st_size != tar.num_bytes:
                log(
                    f"{path} has {path.stat().st_size} bytes, not the {tar.num_bytes} of the full "
                    "file: an unfinished download, or a part of ImageNet"
                )
            members = _members(file)
            if tar.split == "train":
                _check_classes(file, members, wnids)
            else:
                _check_images(file, members, tar.num_examples)
    except (OSError, tarfile.TarError) as error:
        raise BadInput(f"--manual_dir: cannot read {path}: {error}") from None


def _check_first(file: tarfile.TarFile, tar: imagenet.Tar) -> None:
    inside = "one .tar for each class" if tar.split == "train" else "the images"
    suffix = ".tar" if tar.split == "train" else ".JPEG"
    first = file.firstmember
    if first is None or not first.name.endswith(suffix):
        found = f"begins with {first.name}" if first else "is empty"
        raise BadInput(f"--manual_dir: {file.name} should hold {inside}, but {found}")


def _members(file: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All headers, up to the empty one that marks the end."""
    try:
        members = file.getmembers()
        whole = _block(file, file.offset) == bytes(tarfile.BLOCKSIZE)
    except tarfile.TarError:
        whole = False
    if not whole:
        raise _bad(file, f"is damaged or cut off at byte {file.offset}; fetch it again")
    return members


def _check_images(file: tarfile.TarFile, members: list[tarfile.TarInfo], most: int) -> None:
    """TFDS gives the labels by the order of names: one too many or too few shifts all others."""
    if len(members) > most:
        raise _bad(file, f"holds {len(members)} files, but should hold {most} images")
    for number, name in enumerate(sorted(member.name for member in members), 1):
        expected = f"ILSVRC2012_val_{number:08}.JPEG"
        if name != expected:
            log(f"{file.name} holds {name} in the place of {expected}, and will give it its label")
            return


def _check_classes(
    file: tarfile.TarFile, members: list[tarfile.TarInfo], wnids: Sequence[str]
) -> None:
    known = {f"{wnid}.tar" for wnid in wnids}
    for member in members:
        if member.name not in known:
            raise _bad(file, f"holds {member.name}, which is no class or was there before")
        known.remove(member.name)
        if not _is_whole_tar(file, member):
            raise _bad(file, f"is damaged: {member.name} in it is cut off or no tar file")


def _is_whole_tar(file: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Looks only at both ends: to walk 1.28 million inner headers takes too long on a slow disk."""
    if not member.size or member.size % tarfile.BLOCKSIZE:
        return False
    start, end = member.offset_data, member.offset_data + member.size
    try:
        tarfile.TarInfo.frombuf(_block(file, start), file.encoding, file.errors)
    except tarfile.TarError:
        return False
    return _block(file, end - tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


def _block(file: tarfile.TarFile, offset: int) -> bytes:
    file.fileobj.seek(offset)
    return file.fileobj.read(tarfile.BLOCKSIZE)


def _bad(file: tarfile.TarFile, reason: str) -> BadInput:
    return BadInput(f"--manual_dir: {file.name} {reason}")
