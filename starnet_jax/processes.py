"""Several processes as one run: how they meet, agree, and end when one of them is lost."""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import signal
import traceback
from collections.abc import Iterator
from glob import glob

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starnet_jax import __version__
from starnet_jax.config import Processes, RunConfig
from starnet_jax.errors import INTERRUPTED, BadInput, Diverged, Interrupted
from starnet_jax.log import log, name_process

HEARTBEAT_SECONDS = 100  # JAX's own patience with a silent process
LOST = (jax.errors.JaxRuntimeError, TimeoutError)  # what a process sees of the loss of another
# The number of processes, as schedulers tell it to each of them.
SCHEDULERS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def join(settings: Processes) -> None:
    """Meets the other processes of the run, where the environment says that there are any.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` name them; on a Cloud TPU,
    under Slurm and Open MPI, JAX finds them by itself. Must come before anything that uses devices.

    A process that the others do not join within `start_timeout`, or that loses one of them later,
    ends with the exit code for "start me again".

    Raises:
      BadInput: the variables are incomplete or contradict each other.
    """
    arguments = _from_environment()
    if arguments is None:
        return
    _aborts_mean_again()
    jax.config.update("jax_enable_preemption_service", False)  # `interruption` hears SIGTERM
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=round(settings.start_timeout),
            heartbeat_timeout_seconds=round(min(HEARTBEAT_SECONDS, settings.step_timeout)),
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"JAX_COORDINATOR_ADDRESS: the processes cannot meet: {reason}") from None
    if several():
        name_process(jax.process_index())


def check(config: RunConfig, mesh: Mesh) -> None:
    """Shows what takes part, and tries one sum over all of it.

    Raises:
      BadInput: the processes run different settings or versions.
      RuntimeError: the devices cannot add.
    """
    device = mesh.devices.flat[0].device_kind
    log(
        f"devices: {mesh.size} x {device}, {jax.local_device_count()} of them here, "
        f"{jax.process_count()} process(es)"
    )
    if not several():
        return
    by_device = NamedSharding(mesh, PartitionSpec("data"))
    here = np.ones(jax.local_device_count(), np.int32)
    ones = jax.make_array_from_process_local_data(by_device, here)
    total = int(jax.jit(jax.numpy.sum)(ones))
    if total != mesh.size:
        raise RuntimeError(f"a sum over {mesh.size} devices counts {total}")
    said = json.dumps([config.to_json(), __version__, jax.__version__], sort_keys=True)
    digest = np.frombuffer(hashlib.sha256(said.encode()).digest()[:4], np.uint32)
    digests = np.ravel(multihost_utils.process_allgather(digest))
    if (odd := np.flatnonzero(digests != digests[0])).size:
        raise BadInput(f"config: process {odd[0]} has other settings or versions than process 0")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Where bad input ends one process, all others end with it instead of waiting for it."""
    error = None
    try:
        yield
    except BadInput as bad:
        error = bad
    if several():
        failed = np.ravel(multihost_utils.process_allgather(np.int32(error is not None)))
        if failed.any():
            error = error or BadInput(f"process {failed.argmax()} cannot go on; its log says why")
            _leave()
    if error is not None:
        raise error


def from_first(number: int) -> int:
    """The number that process 0 has."""
    if not several():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


class Vote:
    """What any process wants, known to all of them at the same step.

    The answer is that of the call before, so that no process waits for another: the sum over the
    processes runs behind the step.
    """

    def __init__(self, mesh: Mesh):
        self._sharding = NamedSharding(mesh, PartitionSpec("data"))
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._any = jax.jit(lambda wishes_DN: wishes_DN.max(0), out_shardings=everywhere)
        self._answer: jax.Array | None = None

    def __call__(self, *wishes: bool) -> list[bool]:
        """Casts the wishes of this process; all processes must call equally often."""
        if not several():
            return list(wishes)
        before = self._answer
        wishes_DN = np.tile(np.array(wishes, np.int32), (jax.local_device_count(), 1))
        self._answer = self._any(jax.make_array_from_process_local_data(self._sharding, wishes_DN))
        if before is None:
            return [False] * len(wishes)
        return np.asarray(before).astype(bool).tolist()


@contextlib.contextmanager
def losses_end_here() -> Iterator[None]:
    """Where another process has gone, this one ends at once, to be started again with it."""
    try:
        yield
    except LOST as error:
        if not jax.distributed.is_initialized() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        traceback.print_exc()  # should it be something else after all
        log("lost another process, it seems; start all of them again")
        os._exit(INTERRUPTED)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Holds an end to which all processes come until all are there, so that each says why."""
    try:
        yield
    except (Interrupted, Diverged):
        _leave()
        raise
    _leave()


def _leave() -> None:
    if several():
        jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process speaks for all."""
    return jax.process_index() == 0


def several() -> bool:
    """Whether this process is one of several, and has not left them yet."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _from_environment() -> dict | None:
    """The arguments of `jax.distributed.initialize`; None for a process alone."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = map(os.environ.get, names)
    if address is not None:
        if not (":" in address and str(count).isdecimal() and str(index).isdecimal()):
            raise BadInput(
                f"{names[0]}: with it belong {names[1]} and {names[2]}, all as in "
                f"HOST:PORT, 4 and 0; got {address!r}, {count!r}, {index!r}"
            )
        return dict(coordinator_address=address, num_processes=int(count), process_id=int(index))
    chips = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")
    on_tpu_vm = bool(chips) and importlib.util.find_spec("libtpu") is not None
    scheduled = any(os.environ.get(name, "1") not in ("", "0", "1") for name in SCHEDULERS)
    return {} if on_tpu_vm or scheduled else None


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _again(signal_number: int) -> None:
    os.write(2, b"interrupted: another process is lost or did not come in time; start all again\n")
    os._exit(INTERRUPTED)


def _aborts_mean_again() -> None:
    """Gives an abort the exit code for "start me again".

    JAX's runtime aborts the process, past all exceptions, when it has lost another one.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, type(_again)]
    libc.signal(signal.SIGABRT, _again)
