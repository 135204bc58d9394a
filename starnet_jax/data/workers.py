"""Makes the rows of batches in threads or in processes, a few batches ahead of whoever takes them.

Processes are helpers of the threads: each thread hands its part of a batch to a process of its own,
which writes the rows into memory that both see. They are started anew rather than forked, because
JAX runs threads that a fork would break, and without running the main script again.
"""

import collections
import contextlib
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

Job = Callable[..., tuple[np.ndarray, Any]]

PREFETCH = 4  # batches in the making beside the one in use
CHUNK = 32  # rows at most that one task makes
MAX_THREADS = 4  # decoding and augmenting an image holds Python's lock for a fifth of the time
ALIGNMENT = 64

# Freed memory is kept for the next image: fresh pages cost a quarter of the time of an image. The
# names are glibc's; elsewhere they do nothing. And hundreds of processes need no BLAS threads each.
ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TOP_PAD_": str(1 << 24),
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # should a source import TensorFlow
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(
    job: Job,
    batches: Iterable[Sequence[tuple]],
    shape: tuple[int, ...],
    workers: int,
    processes: bool | None = None,
) -> Iterator[tuple[np.ndarray, list]]:
    """Makes batches in order, whatever the number of workers.

    Args:
      job: from the arguments of a row to an array uint8 of `shape` and anything else; called by
        many threads at once. Processes get it pickled, and share its NumPy arrays, read-only.
      batches: for each batch the arguments of each row.
      shape: of a row.
      workers: threads, or processes.
      processes: whether to work in processes: slower to start, but each with a Python lock of its
        own; None for those from more than `MAX_THREADS` workers on.

    Yields:
      uint8 [rows,*shape], and what `job` returned beside each row. The memory is used again when
      nothing refers to it any more.

    Raises:
      RuntimeError: a process ended. Whatever `job` raises.
    """
    processes = workers > MAX_THREADS if processes is None else processes
    crew = _Processes(job, shape, workers) if processes else _Threads(job, shape)
    with contextlib.closing(crew), ThreadPoolExecutor(workers, "data") as pool:
        pending = collections.deque()
        try:
            for rows in batches:
                pending.append(_start(pool, crew, rows, workers))
                if len(pending) > PREFETCH:
                    yield _finish(pending.popleft())
            while pending:
                yield _finish(pending.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            crew.stop()


def _start(pool, crew, rows: Sequence[tuple], workers: int) -> tuple[np.ndarray, list[Future]]:
    images, place = crew.place(len(rows))
    chunk = min(CHUNK, -(-len(rows) // workers))
    starts = range(0, len(rows), chunk)
    return images, [pool.submit(crew.fill, place, i, rows[i : i + chunk]) for i in starts]


def _finish(started: tuple[np.ndarray, list[Future]]) -> tuple[np.ndarray, list]:
    images, futures = started
    return images, [result for future in futures for result in future.result()]


def _fill(job: Job, images: np.ndarray, start: int, rows: Sequence[tuple]) -> list:
    results = []
    for i, arguments in enumerate(rows, start):
        images[i], result = job(*arguments)
        results.append(result)
    return results


class _Threads:
    """Does the work in the calling thread."""

    def __init__(self, job: Job, shape: tuple[int, ...]):
        self._job, self._shape = job, shape

    def place(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((rows, *self._shape), np.uint8)
        return images, images

    def fill(self, images: np.ndarray, start: int, rows: Sequence[tuple]) -> list:
        return _fill(self._job, images, start, rows)

    def stop(self) -> None:
        """Nothing to stop: a thread ends with its task."""

    close = stop


class _Processes:
    """Hands the work of each calling thread to a process of its own."""

    def __init__(self, job: Job, shape: tuple[int, ...], workers: int):
        self._shape = shape
        self._memory = _Memory()
        parcel, buffers = _pack(job)
        self._helpers = [_Helper(self._memory.file, buffers) for _ in range(workers)]
        self._parcel = parcel, shape
        self._idle: queue.SimpleQueue[_Helper] = queue.SimpleQueue()
        for helper in self._helpers:
            self._idle.put(helper)
        self._thread = threading.local()

    def place(self, rows: int) -> tuple[np.ndarray, tuple[int, int]]:
        images, offset = self._memory.take((rows, *self._shape))
        return images, (offset, rows)

    def fill(self, place: tuple[int, int], start: int, rows: Sequence[tuple]) -> list:
        helper = getattr(self._thread, "helper", None)
        if helper is None:
            helper = self._thread.helper = self._idle.get_nowait()
            helper.send(self._parcel)
        helper.send((place, start, rows))
        return helper.receive()

    def stop(self) -> None:
        for helper in self._helpers:
            helper.process.kill()

    def close(self) -> None:
        for helper in self._helpers:
            helper.process.wait()
            helper.connection.close()


class _Helper:
    """One process, seen from the thread that it works for."""

    def __init__(self, memory, buffers):
        self.connection, theirs = multiprocessing.Pipe()
        files = theirs.fileno(), memory.fileno(), buffers.fileno()
        program = (
            f"import sys; sys.path[:] = {sys.path!r}\n"
            f"from starnet_jax.data import workers; workers.serve{files}"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env=ENVIRONMENT | os.environ,
            stdin=subprocess.DEVNULL,
            stdout=2,  # tables on standard output are for the command alone
            pass_fds=files,
        )
        theirs.close()

    def send(self, message: Any) -> None:
        with self._alive():
            _send(self.connection, message)

    def receive(self) -> list:
        with self._alive():
            error, results = _receive(self.connection)
        if error:
            raise error
        return results

    @contextlib.contextmanager
    def _alive(self):
        try:
            yield
        except (EOFError, ConnectionError):
            code = self.process.wait()
            why = "out of memory, perhaps" if code == -signal.SIGKILL else "see above"
            raise RuntimeError(f"a data process ended with code {code}: {why}") from None


# Connection's own send() and recv() pickle into a BytesIO. One that a failed call's traceback keeps
# crashes early Python 3.12 when it is collected (CPython issue 111049), so plain bytes are sent.


def _send(connection: Connection, message: Any) -> None:
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


class _Memory:
    """Places for batches in a file that exists in memory only."""

    def __init__(self):
        self.file = _memory_file()
        self._free: collections.defaultdict[int, list] = collections.defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
        """An array uint8, content arbitrary, and where in the file it lies.

        The place is free again when neither the array nor a view of it is left.
        """
        size = _whole_pages(shape)
        if self._free[size]:
            offset, pages = self._free[size].pop()
        else:
            offset = os.fstat(self.file.fileno()).st_size
            os.ftruncate(self.file.fileno(), offset + size)
            pages = mmap.mmap(self.file.fileno(), size, offset=offset)
        root = np.frombuffer(pages, np.uint8)
        free = weakref.finalize(root, self._free[size].append, (offset, pages))
        free.atexit = False
        return root[: math.prod(shape)].reshape(shape), offset


def _whole_pages(shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _memory_file():
    if hasattr(os, "memfd_create"):  # /dev/shm is only 64 MB in many containers
        return os.fdopen(os.memfd_create("starnet_jax"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _pack(job: Job) -> tuple[tuple[bytes, list[tuple[int, int]]], Any]:
    """Pickles `job`, its arrays into a file of their own: all processes then hold them once."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(job, protocol=5, buffer_callback=buffers.append)
    file, places = _memory_file(), []
    for buffer in buffers:
        with buffer.raw() as raw:
            start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
            file.seek(start)
            file.write(raw)
            places.append((start, raw.nbytes))
    file.flush()
    return (pickled, places), file


def _unpack(parcel: tuple[bytes, list[tuple[int, int]]], file: int) -> Job:
    pickled, places = parcel
    if not places:
        return pickle.loads(pickled)
    pages = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
    return pickle.loads(pickled, buffers=[pages[start : start + size] for start, size in places])


def serve(connection: int, memory: int, buffers: int) -> None:
    """What a process does from its start until the other end hangs up; takes file descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the training process decides when to end
        signal.signal(number, signal.SIG_IGN)
    warnings.filterwarnings("ignore", module="PIL")  # damaged EXIF and the like
    pages: dict[int, np.ndarray] = {}
    with contextlib.suppress(EOFError, ConnectionError), Connection(connection) as training:
        parcel, shape = _receive(training)
        job = None
        while True:
            (offset, count), start, rows = _receive(training)
            try:
                job = job or _unpack(parcel, buffers)
                if offset not in pages:
                    size = _whole_pages((count, *shape))
                    pages[offset] = np.frombuffer(mmap.mmap(memory, size, offset=offset), np.uint8)
                images = pages[offset][: count * math.prod(shape)].reshape(count, *shape)
                reply = None, _fill(job, images, start, rows)
            except Exception as error:
                reply = _portable(error), None
            _send(training, reply)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    error.add_note(f"In a data process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(error.__notes__))
    return error
