"""Saving and restoring the train state; the only file that imports orbax."""

from pathlib import Path

import orbax.checkpoint as ocp

from starnet_jax.config import Checkpoint
from starnet_jax.errors import BadInput
from starnet_jax.train_state import TrainState


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>/`; saves in the background."""

    def __init__(self, workdir: Path, config: Checkpoint):
        self.directory = workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=config.keep)
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint; a half-written one does not count."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState) -> None:
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """Reads the state into the shapes and shardings of `abstract`."""
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (ValueError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise BadInput(
                f"--workdir: cannot read {self.directory}/{step} ({reason}); move it away to go on "
                "from the one before"
            ) from None

    def close(self) -> None:
        """Waits for the last save."""
        self._manager.wait_until_finished()
        self._manager.close()
