"""Saving and restoring the train state; the only file that imports orbax."""

import contextlib
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import flax.traverse_util as traverse
import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from orbax.checkpoint import checkpoint_managers

from starnet_jax import processes
from starnet_jax.config import Checkpoint
from starnet_jax.data.records import is_remote
from starnet_jax.errors import BadInput, Diverged, Interrupted
from starnet_jax.log import log
from starnet_jax.train_state import TrainState

DIGEST = "digest.json"  # the last file of a checkpoint: the SHA-256 of every other
FILES_BYTES = 1 << 18  # what the files of a checkpoint take beside their content
ASIDE = "aside"  # where damaged and half-written checkpoints go
COMMITTED = "commit_success.txt"  # orbax's own last file, at the very end
# Orbax writes its own record of the save after the digest; nothing of the state is in these.
_UNDIGESTED = {DIGEST, COMMITTED, "_CHECKPOINT_METADATA"}


class Damaged(Exception):  # noqa: N818
    """A checkpoint that is not what was saved; the message names the file."""


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>/`; saves in the background.

    Each appears under its name when it is complete, with its digest, and not before. Beside the
    state lie `weights.safetensors` and, where the run keeps an average, `ema.safetensors`.
    """

    def __init__(self, workdir: Path, config: Checkpoint, read_only: bool = False):
        """Opens the folder and finds the newest intact checkpoint.

        Unless the folder is only read, those that are damaged or half-written are set aside.

        Raises:
          BadInput: there are checkpoints, and not one is intact.
        """
        self.directory = workdir / "checkpoints"
        self.best: int | None = None  # a step whose checkpoint must stay
        self._read_only = read_only
        with processes.together():
            newest = self._newest_intact() if processes.is_first() else None
        step = processes.from_first(-1 if newest is None else newest)
        self.newest = None if step < 0 else step
        policies = [checkpoint_managers.LatestN(config.keep), _KeepBest(self)]
        if config.permanent_steps:
            policies.append(checkpoint_managers.EveryNSteps(interval_steps=config.permanent_steps))
        self._manager = ocp.CheckpointManager(
            self.directory if is_remote(workdir) else self.directory.absolute(),
            item_handlers=_handler(),
            options=ocp.CheckpointManagerOptions(
                read_only=read_only,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
            ),
        )

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state and writes it in the background, after the one before.

        Raises:
          BadInput: this one or the one before cannot be written.
        """
        with self._errors_in_one_line(step):
            self._manager.wait_until_finished()
        self.check_space(state)
        with self._errors_in_one_line(step):
            if processes.is_first():
                self._saving = step, jax.device_get((state.variables, state.ema))
            self._manager.save(step, args=ocp.args.PyTreeSave(state))
            self.newest = step

    def check_space(self, state: TrainState) -> None:
        """Raises BadInput where the disk is too full for one more checkpoint.

        Asked before, because a disk that fills up under orbax makes many lines of several threads.
        """
        if is_remote(self.directory):
            return
        size = sum(leaf.nbytes for leaf in jax.tree.leaves((state, state.variables, state.ema)))
        with processes.together():
            needed, free = 1.1 * size + FILES_BYTES, shutil.disk_usage(self.directory).free
            if free < needed and processes.is_first():
                raise BadInput(
                    f"--workdir: No space left: a checkpoint takes {needed / 1e6:.1f} MB, and "
                    f"{self.directory} has {free / 1e6:.1f} MB free; those before are intact"
                )

    def restore(self, step: int, abstract: TrainState | dict) -> TrainState | dict:
        """Reads the state into the shapes and shardings of `abstract`.

        Args:
          step: of an intact checkpoint.
          abstract: the whole state, or a dictionary of some of its attributes.
        """
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=isinstance(abstract, dict),
        )
        try:
            return self._manager.restore(step, args=arguments)
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BadInput(
                f"--workdir: cannot read {self.directory}/{step} ({reason}); move it away to go on "
                "from the one before"
            ) from None

    def wait(self) -> None:
        """Waits until what was saved last is complete; raises as `save`."""
        with self._errors_in_one_line(self.newest):
            self._manager.wait_until_finished()

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """Waits for the last save; not where other processes may no longer take part in it."""
        if error in (None, Interrupted, Diverged) or jax.process_count() == 1:
            self.wait()
            self._manager.close()

    def _newest_intact(self) -> int | None:
        """Looks from the newest on for a checkpoint that is what was saved."""
        if not self.directory.is_dir():
            return None
        for path in sorted(self.directory.glob("*.orbax-checkpoint-tmp*")):
            self._set_aside(path, "half-written")
        steps = sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdecimal())
        reasons = []
        for step in reversed(steps):
            try:
                verify(self.directory / str(step))
            except Damaged as reason:
                reasons.append(f"{self.directory}/{step}: {reason}")
                continue
            for damaged, reason in zip(reversed(steps), reasons, strict=False):
                self._set_aside(self.directory / str(damaged), reason)
            return step
        if reasons:
            raise BadInput(
                f"--workdir: no intact checkpoint is left: {'; '.join(reasons)}; "
                "take another folder, or move these away to start anew"
            )
        return None

    def _set_aside(self, path: Path, reason: str) -> None:
        if self._read_only:
            log(f"passing over {path}: {reason}")
            return
        aside = path.parent / ASIDE
        taken = {other.name for other in aside.iterdir()} if aside.is_dir() else set()
        number = next(i for i in itertools.count() if f"{i}-{path.name}" not in taken)
        try:
            aside.mkdir(exist_ok=True)
            _move(path, aside / f"{number}-{path.name}")
        except OSError as error:
            raise BadInput(f"--workdir: cannot move {path}: {error.strerror or error}") from None
        log(f"set {path} aside to {aside}/{number}-{path.name}, which you may remove: {reason}")

    def _finish(self) -> None:
        """Adds the plain weights and the digest, just before the checkpoint takes its name."""
        step, (variables, ema) = self._saving
        unfinished = list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))
        folder = unfinished[0] if unfinished else self.directory / str(step)  # in a bucket
        for name, tree in (("weights", variables), ("ema", ema)):
            if tree is not None:
                flat = traverse.flatten_dict(tree, sep="/")
                arrays = {key: np.ascontiguousarray(value) for key, value in flat.items()}
                (folder / f"{name}.safetensors").write_bytes(safetensors.numpy.save(arrays))
        names = [name for name in _files(folder) if name not in _UNDIGESTED]
        digests = {name: _digest(folder / name) for name in names}
        (folder / DIGEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n")
        self._saving = None

    @contextlib.contextmanager
    def _errors_in_one_line(self, step: int | None) -> Iterator[None]:
        """Full disks, lost mounts and the like become BadInput."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if processes.several() and isinstance(error, processes.LOST):
                raise
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise BadInput(
                f"--workdir: cannot write checkpoint {step} to {self.directory}: {reason}; "
                "the ones before are intact"
            ) from None


class _KeepBest:
    """Orbax's way of asking which checkpoints stay: the best does."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        return [checkpoint.step == self._checkpoints.best for checkpoint in checkpoints]


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Writes each array once; shared among its copies, it would cost seconds of compilation."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def verify(folder: Path) -> None:
    """Compares every file of a checkpoint with its digest.

    Raises:
      Damaged: a file is missing, cannot be read, or is not what was written.
    """
    if is_remote(folder) and not (folder / COMMITTED).exists():
        raise Damaged("half-written")  # a bucket renames nothing: it has its name from the start
    try:
        expected = json.loads((folder / DIGEST).read_text())["sha256"]
    except FileNotFoundError:
        raise Damaged(f"{DIGEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{DIGEST} cannot be read: {' '.join(str(error).split())}") from None
    for name, digest in expected.items():
        try:
            found = _digest(folder / name)
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
        if found != digest:
            raise Damaged(f"{name} is not what was written")


def _move(folder: Path, target: Path) -> None:
    if not is_remote(folder):
        folder.rename(target)
        return
    for name in _files(folder):  # a bucket knows no folders that could be renamed
        (target / name).write_bytes((folder / name).read_bytes())
    folder.rmtree()


def _files(folder: Path, inside: str = "") -> list[str]:
    """All files below a folder, relative to it."""
    names = []
    for path in sorted(folder.iterdir()):
        name = f"{inside}{path.name}"
        names += _files(path, f"{name}/") if path.is_dir() else [name]
    return names


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
