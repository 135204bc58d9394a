"""The loop of a run: when to step, evaluate, save and stop."""

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from starnet_jax import evaluate, metrics, processes
from starnet_jax import mesh as mesh_lib
from starnet_jax.checkpoint import Checkpoints
from starnet_jax.config import RunConfig
from starnet_jax.data import pipeline
from starnet_jax.data.source import Source
from starnet_jax.errors import Diverged, Interrupted
from starnet_jax.interruption import Listener, Watchdog
from starnet_jax.log import log
from starnet_jax.train_state import TrainState
from starnet_jax.train_step import Steps

PROFILED_STEPS = range(5, 10)  # after the start, which is slower


@dataclass(frozen=True)
class Setup:
    """What training stands on; made without touching the workdir."""

    config: RunConfig
    mesh: Mesh
    train_source: Source
    eval_source: Source
    steps: Steps


class Loop:
    """Steps, evaluations and checkpoints, in the order in which a restart repeats them."""

    def __init__(self, setup, checkpoints, reporter, clock, listener, watchdog):
        self._setup: Setup = setup
        self._config: RunConfig = setup.config
        self._checkpoints: Checkpoints = checkpoints
        self._reporter: metrics.Reporter = reporter
        self._clock: metrics.Clock = clock
        self._listener: Listener = listener
        self._watchdog: Watchdog = watchdog
        self._vote = processes.Vote(setup.mesh)
        self._late: tuple[int, dict] | None = None  # the newest step and its unread metrics
        self._saved_at = time.monotonic()

    def run(self, state: TrainState, first_step: int, profile: bool) -> None:
        """Trains on from `first_step` to the last one; all is saved when it returns.

        Raises:
          Interrupted: the listener has heard something; the state is saved.
          Diverged: too many steps in a row without finite loss and gradient.
        """
        self._keep_best()
        with self._listener.working():
            missing = self._evaluation_due(first_step) and not self._reporter.evaluated(first_step)
            if first_step and missing and not self._evaluate(first_step, state):
                self._stop(first_step)
            batches = _train_batches(self._setup, first_step, profile, self._reporter.workdir)
            self._clock.switch("training")
            self._reporter.start_timing(first_step)
            with closing(batches):
                for step in range(first_step + 1, self._config.total_steps + 1):
                    state = self._step(step, state, batches)
            self._wait_for_save()

    def _step(self, step: int, state: TrainState, batches: Iterator[pipeline.Batch]) -> TrainState:
        with self._clock.during("waiting for data"):
            batch = mesh_lib.put(next(batches), self._setup.mesh)
        state, measured = self._setup.steps.train(state, batch)
        self._read_late()
        self._late = step, measured
        self._reporter.advance(step)

        stop, save = self._vote(self._listener.heard is not None, self._minutes_over())
        if stop or save or self._save_due(step):
            self._read_late()
            self._save(step, state)
        if stop:
            self._stop(step)
        if self._evaluation_due(step):
            self._read_late()
            finished = self._evaluate(step, state)
            if self._checkpoints.newest != step and (
                not finished or self._checkpoints.best == step
            ):
                self._save(step, state)
            if not finished:
                self._stop(step)
        return state

    def _read_late(self) -> None:
        """Reads the metrics of the newest step, one step late, so that no device waits for it."""
        if self._late is None:
            return
        (step, measured), self._late = self._late, None
        measured = jax.device_get(measured)
        self._watchdog.alive()
        if measured["train/skipped"]:
            self._refuse(step, measured)
        if step % self._config.log.every_steps == 0 or self._evaluation_due(step):
            self._reporter.write(step, measured)

    def _refuse(self, step: int, measured: dict) -> None:
        """Ends the run when more steps in a row were not finite than the config allows."""
        loss, norm = measured["train/loss"], measured["train/grad_norm"]
        what = f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        allowed = self._config.optimizer.skip_nonfinite
        if measured["train/skipped"] <= allowed:
            log(f"{what}; left out, {measured['train/skipped']} of at most {allowed} in a row")
            return
        newest = self._checkpoints.newest
        good = f"{self._checkpoints.directory}/{newest}" if newest else "none, it began anew"
        raise Diverged(f"{what}; last good checkpoint: {good}")

    def _evaluate(self, step: int, state: TrainState) -> bool:
        """Adds an evaluation to the row of `step`; returns whether it came to its end."""
        with self._clock.during("evaluation"):
            scores = evaluate_all(self._setup, state, self._go_on)
        if scores is None:
            return False
        self._reporter.write(step, scores)
        self._keep_best()
        return True

    def _go_on(self) -> bool:
        self._watchdog.alive()
        return not self._vote(self._listener.heard is not None, False)[0]

    def _save(self, step: int, state: TrainState) -> None:
        with self._clock.during("saving"):
            self._reporter.sync()  # a restart goes on after this step, so its row must stand
            self._checkpoints.save(step, state)
        self._watchdog.alive()
        self._saved_at = time.monotonic()

    def _wait_for_save(self) -> None:
        with self._clock.during("saving"):
            self._checkpoints.wait()

    def _stop(self, step: int) -> None:
        self._wait_for_save()
        raise Interrupted(
            f"saved step {step} of {self._config.total_steps} in {self._checkpoints.directory}; "
            "the same command goes on from there"
        )

    def _evaluation_due(self, step: int) -> bool:
        return step == self._config.total_steps or _due(
            step, self._config.eval.every_epochs, self._config
        )

    def _save_due(self, step: int) -> bool:
        permanent = self._config.checkpoint.permanent_steps
        return (
            step == self._config.total_steps
            or _due(step, self._config.checkpoint.every_epochs, self._config)
            or (permanent is not None and step % permanent == 0)
        )

    def _keep_best(self) -> None:
        best = self._reporter.best
        if self._config.checkpoint.keep_best and best:
            self._checkpoints.best = best["step"]

    def _minutes_over(self) -> bool:
        minutes = self._config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes


def _train_batches(
    setup: Setup, first_step: int, profile: bool, workdir: Path
) -> Generator[pipeline.Batch]:
    config = setup.config
    batches = pipeline.train_batches(
        setup.train_source,
        config.augment,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=range(first_step, config.total_steps),
        share=mesh_lib.share(config.batch_size),
        workers=config.data.workers,
    )
    return _profiled(batches, workdir / "profile") if profile else batches


def evaluate_all(
    setup: Setup, state: TrainState, go_on: Callable[[], bool] = lambda: True
) -> dict | None:
    """Metrics of the raw and, where the run keeps one, the averaged weights; None if stopped."""
    config = setup.config
    weights = {"eval/": state.variables}
    if state.ema is not None:
        weights["eval/ema_"] = state.ema
    batch_size = mesh_lib.eval_batch_size(config)
    batches = pipeline.eval_batches(
        setup.eval_source,
        image_size=config.data.image_size,
        crop=config.eval.crop,
        batch_size=batch_size,
        share=mesh_lib.share(batch_size),
        workers=config.data.workers,
    )
    with closing(batches):
        return evaluate.evaluate(
            setup.steps.evaluate,
            weights,
            batches,
            setup.mesh,
            setup.eval_source,
            config.model.num_classes,
            go_on,
        )


def _due(step: int, every_epochs: int, config: RunConfig) -> bool:
    return step % (every_epochs * config.steps_per_epoch) == 0


def _profiled(batches: Generator[pipeline.Batch], folder: Path) -> Generator[pipeline.Batch]:
    """Passes the batches on and traces the few steps that use `PROFILED_STEPS`."""
    tracing = False
    try:
        for i, batch in enumerate(batches):
            if i == PROFILED_STEPS.start:
                jax.profiler.start_trace(str(folder))
                tracing = True
            if i == PROFILED_STEPS.stop:
                break
            yield batch
        else:
            return
        tracing = _stop_trace(folder)
        yield batch
        yield from batches
    finally:
        if tracing:
            _stop_trace(folder)
        batches.close()


def _stop_trace(folder: Path) -> bool:
    jax.profiler.stop_trace()
    log(f"profile: steps traced to {folder}")
    return False
