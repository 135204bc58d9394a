"""Random access to the raw records of a TFDS split, ArrayRecord or TFRecord, without TensorFlow."""

import bisect
import errno
import hashlib
import itertools
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np

from starnet_jax.errors import BadInput, nearest
from starnet_jax.log import log

FORMATS = ("array_record", "tfrecord")
SCAN_THREADS = 16
REMOTE_BLOCK = 8 << 20  # bytes of one request while a remote file is indexed
PROGRESS_SECONDS = 5.0  # between two lines of progress
_HEADER, _FOOTER = 12, 4  # around the data of a TFRecord: length and its checksum; checksum of data


class DamagedRecord(BadInput):
    """One example that cannot be read; the message names it. Training may go on without it."""


class Shard(NamedTuple):
    """The part of a file that belongs to a split: records `skip` to `skip + take`."""

    path: str
    skip: int
    take: int
    length: int  # records in the whole file


class Records(Protocol):
    """The records of a split, numbered over all its files; for threads, forks and pickles."""

    fingerprint: np.ndarray  # int64 [files,2]: size and modification time

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> bytes: ...

    def name(self, index: int) -> str:
        """File and record number, for messages."""
        ...


def open_records(shards: Sequence[Shard], file_format: str, cache_dir: Path) -> Records:
    """Opens the files of a split.

    TFRecord files on `gs://` are reached through etils.epath; ArrayRecord reads from a disk only.

    Args:
      shards: the files, in the order of the records.
      file_format: `array_record` or `tfrecord`.
      cache_dir: where the index of TFRecord files is kept.

    Raises:
      BadInput: an unknown format, a file that is missing or not readable, a file of another
        length. A damaged record raises `DamagedRecord` when it is read.
    """
    if file_format not in FORMATS:
        raise BadInput(
            f"config.data.name: the dataset is stored as {file_format}"
            f"{nearest(file_format, FORMATS)}; prepare it anew"
        )
    if file_format == "array_record" and any(is_remote(shard.path) for shard in shards):
        raise BadInput(
            f"config.data.dir: ArrayRecord files cannot be read from {shards[0].path}; prepare "
            "the dataset there with --file_format=tfrecord, or copy it to a disk"
        )
    shards = [shard for shard in shards if shard.take > 0]
    fingerprint = _fingerprint(shards)
    _allow_open_files(len(shards))
    if file_format == "array_record" or not shards:
        return ArrayRecords(shards, fingerprint)
    return TFRecords(shards, fingerprint, load_index(shards, fingerprint, cache_dir))


class _Shards:
    """Which file and place holds record i."""

    def __init__(self, shards: Sequence[Shard], fingerprint: np.ndarray):
        self.shards = list(shards)
        self.fingerprint = fingerprint
        self._ends = list(itertools.accumulate(shard.take for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        shard, position = self._locate(index)
        return f"{self.shards[shard].path}, record {position}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return shard, self.shards[shard].skip + index - start

    def _damaged(self, index: int, reason: object) -> DamagedRecord:
        return DamagedRecord(f"{self.name(index)}: {' '.join(str(reason).split())}")


class ArrayRecords(_Shards):
    """Records of ArrayRecord files, which carry their own index and checksums."""

    def __init__(self, shards: Sequence[Shard], fingerprint: np.ndarray):
        super().__init__(shards, fingerprint)
        self._readers = {}

    def __getitem__(self, index: int) -> bytes:
        shard, position = self._locate(index)
        key = os.getpid(), shard  # a forked process opens its own
        reader = self._readers.get(key)
        if reader is None:
            reader = self._readers.setdefault(key, self._open(shard, index))
        found, expected = reader.num_records(), self.shards[shard].length
        if found != expected:
            raise self._damaged(index, f"the file is cut off or damaged: {found} of {expected}")
        try:
            return reader.read([position])[0]
        except RuntimeError as error:
            raise self._damaged(index, error) from None

    def _open(self, shard: int, index: int):
        from array_record.python import array_record_module

        path = self.shards[shard].path
        reader = array_record_module.ArrayRecordReader(
            path,
            options="readahead_buffer_size:0",  # the next read is somewhere else
            file_reader_buffer_size=32768,
        )
        if reader.ok():
            return reader
        _check_readable(path)
        try:
            reader.close()
        except RuntimeError as error:  # only here does the reader say why
            raise self._damaged(index, f"the file is cut off or damaged: {error}") from None
        raise self._damaged(index, "the file is cut off or damaged")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_readers": {}}


class Index(NamedTuple):
    """Where the records of TFRecord files lie, file after file."""

    offsets: np.ndarray  # int64 [N]: of the framing around each record
    sizes: np.ndarray  # int64 [N]: bytes of data
    counts: np.ndarray  # int64 [files]: readable records
    damage: np.ndarray  # text [files]: what ends the readable part, or empty


class TFRecords(_Shards):
    """Records of TFRecord files, found through an offset index."""

    def __init__(self, shards: Sequence[Shard], fingerprint: np.ndarray, index: Index):
        super().__init__(shards, fingerprint)
        self._index = index
        self._starts = np.cumsum(index.counts) - index.counts
        self._files: dict[int, int] = {}  # shard to file descriptor
        self._check()

    def __getitem__(self, index: int) -> bytes:
        shard, position = self._locate(index)
        if position >= self._index.counts[shard]:
            raise self._damaged(index, self._index.damage[shard])
        place = self._starts[shard] + position
        offset, size = int(self._index.offsets[place]), int(self._index.sizes[place])
        try:
            framed = self._read(shard, offset, _HEADER + size + _FOOTER)
        except file_errors() as error:
            raise self._unreadable(index, error) from None
        if len(framed) < _HEADER + size + _FOOTER or framed[:8] != struct.pack("<Q", size):
            raise self._damaged(index, "the file has changed since it was opened")
        data = framed[_HEADER:-_FOOTER]
        if masked(google_crc32c.value(data)) != framed[-_FOOTER:]:
            raise self._damaged(index, "the checksum of the data is wrong")
        return data

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.shards[shard].path
        if is_remote(path):
            return _read_remote(path, offset, size)
        file = self._files.get(shard)
        if file is None:
            opened = os.open(path, os.O_RDONLY)
            file = self._files.setdefault(shard, opened)
            if file != opened:  # another thread was faster
                os.close(opened)
        return os.pread(file, size, offset)

    def _unreadable(self, index: int, error: Exception) -> BadInput:
        if getattr(error, "errno", None) == errno.EIO:  # a bad block, not a lost disk
            return self._damaged(index, reason(error))
        return BadInput(f"config.data.dir: cannot read {self.name(index)}: {reason(error)}")

    def _check(self) -> None:
        """Compares what the index found with what the dataset says; logs damaged files."""
        for shard, count, damage in zip(
            self.shards, self._index.counts, self._index.damage, strict=True
        ):
            if damage and count < shard.length:
                log(
                    f"damaged: {shard.path}, record {count}: {damage}; "
                    f"{shard.length - count} of its {shard.length} records cannot be read"
                )
            elif count != shard.length:
                raise BadInput(
                    f"config.data.dir: {shard.path} holds {count} records, "
                    f"but the dataset says {shard.length}"
                )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}

    def __del__(self):
        for file in getattr(self, "_files", {}).values():
            os.close(file)


# --- The index of TFRecord files ------------------------------------------------------------------


def load_index(shards: Sequence[Shard], fingerprint: np.ndarray, cache_dir: Path) -> Index:
    """Returns the index of the files, from the cache unless a file has changed since."""
    path = cache_file(cache_dir, "index", [shard.path for shard in shards])
    cached = load_cached(path, fingerprint)
    if cached is not None:
        return Index(*(cached[name] for name in Index._fields))
    log(f"indexing {len(shards)} TFRecord file(s), once; the index is kept in {cache_dir}")
    with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="index") as pool:
        futures = [pool.submit(_scan_file, shard.path) for shard in shards]
        for _ in progress(as_completed(futures), len(futures), "files indexed"):
            pass
    offsets, sizes, damage = zip(*(future.result() for future in futures), strict=True)
    index = Index(
        np.concatenate(offsets),
        np.concatenate(sizes),
        np.array([len(part) for part in offsets], np.int64),
        np.array(damage, np.str_),
    )
    save_cached(path, fingerprint, index._asdict())
    return index


def scan(read: Callable[[int, int], bytes], file_size: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Walks the framing of one TFRecord file, without reading the data.

    Args:
      read: takes offset and size, returns the bytes there, fewer at the end of the file.
      file_size: in bytes.

    Returns:
      Offsets and data sizes of the readable records, int64 [N] each, and what is wrong with the
      record after them, or empty text.
    """
    offset, offsets, sizes, damage = 0, [], [], ""
    while offset < file_size:
        header = read(offset, _HEADER)
        size = int.from_bytes(header[:8], "little")
        if len(header) == _HEADER and masked(google_crc32c.value(header[:8])) != header[8:]:
            damage = "the framing is damaged: the checksum of its length is wrong"
            break
        if len(header) < _HEADER or offset + _HEADER + size + _FOOTER > file_size:
            damage = "the file ends in the middle of it"
            break
        offsets.append(offset)
        sizes.append(size)
        offset += _HEADER + size + _FOOTER
    return np.array(offsets, np.int64), np.array(sizes, np.int64), damage


def _scan_file(path: str) -> tuple[np.ndarray, np.ndarray, str]:
    try:
        if is_remote(path):
            return scan(_blocks(path), _stat(path)[0])
        with open(path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # do not read the data between the headers
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            number = file.fileno()
            return scan(lambda offset, size: os.pread(number, size, offset), _stat(path)[0])
    except file_errors() as error:
        raise BadInput(f"config.data.dir: cannot read {path}: {reason(error)}") from None


def masked(crc: int) -> bytes:
    """A checksum as TFRecord stores it: rotated and shifted, 4 bytes little-endian."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")


# --- What is kept in the user's cache -------------------------------------------------------------


def cache_file(cache_dir: Path, kind: str, paths: Sequence[str]) -> Path:
    """Where something of this kind about these files is kept."""
    digest = hashlib.sha256("\n".join(map(str, paths)).encode()).hexdigest()
    return Path(cache_dir) / kind / f"{digest[:24]}.npz"


def load_cached(path: Path, fingerprint: np.ndarray) -> dict[str, np.ndarray] | None:
    """The arrays kept at `path`; None where there are none, or files have changed since."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        return arrays if np.array_equal(arrays.pop("fingerprint"), fingerprint) else None
    except Exception:  # missing, cut off or of another version: made again
        return None


def save_cached(path: Path, fingerprint: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays whole or not at all; a folder that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as unfinished:
            try:
                np.savez(unfinished, fingerprint=fingerprint, **arrays)
                os.replace(unfinished.name, path)
            except BaseException:
                os.unlink(unfinished.name)
                raise
    except OSError as error:
        log(f"cannot keep {path}: {error.strerror}; it will be made again at the next start")


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """Passes the items on and logs every few seconds how many there were and how long it takes."""
    start = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last > PROGRESS_SECONDS:
            last = now
            seconds = (now - start) / done * (total - done)
            log(f"{done}/{total} {what}, about {seconds:.0f} s left")


# --- Files, local and remote ----------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Whether the path is a URL such as `gs://bucket/file`."""
    return "://" in str(path)


def file_errors() -> tuple[type[Exception], ...]:
    """What files raise that cannot be reached: OSError and, on `gs://`, errors of TensorFlow."""
    tensorflow = sys.modules.get("tensorflow")  # what is not loaded has raised nothing
    return (OSError, tensorflow.errors.OpError) if tensorflow else (OSError,)


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _fingerprint(shards: Sequence[Shard]) -> np.ndarray:
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        stats = list(pool.map(_stat, (shard.path for shard in shards)))
    return np.array(stats, np.int64).reshape(-1, 2)


def _stat(path: str) -> tuple[int, int]:
    """Size and modification time of a file."""
    try:
        if is_remote(path):
            from etils import epath

            found = epath.Path(path).stat()
            return found.length, int(found.mtime)
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    except file_errors() as error:
        raise BadInput(f"config.data.dir: cannot read {path}: {reason(error)}") from None


def _check_readable(path: str) -> None:
    from etils import epath

    try:
        with epath.Path(path).open("rb") as file:
            file.read(1)
    except file_errors() as error:
        raise BadInput(f"config.data.dir: cannot read {path}: {reason(error)}") from None


def _read_remote(path: str, offset: int, size: int) -> bytes:
    from etils import epath

    with epath.Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _blocks(path: str) -> Callable[[int, int], bytes]:
    """A `read(offset, size)` of a remote file that fetches large blocks."""
    start, block = 0, b""

    def read(offset: int, size: int) -> bytes:
        nonlocal start, block
        if not start <= offset <= offset + size <= start + len(block):
            start, block = offset, _read_remote(path, offset, REMOTE_BLOCK)
        return block[offset - start : offset - start + size]

    return read


def _allow_open_files(count: int) -> None:
    """Raises the soft limit on open files where the files of a split would exceed it."""
    import resource

    needed = count + 512  # the process and other splits have files of their own
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise BadInput(
            f"config.data: the split has {count} files, but this system allows {hard} open files; "
            f"raise the limit to {needed} (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
