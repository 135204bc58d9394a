"""The story of a run, top to bottom: devices, data, model, steps, state, loop."""

import contextlib
import dataclasses
import errno
import importlib.util
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from starnet_jax import config as config_lib
from starnet_jax import evaluate, metrics, processes, train_state, train_step
from starnet_jax import mesh as mesh_lib
from starnet_jax import workdir as workdir_lib
from starnet_jax.checkpoint import Checkpoints
from starnet_jax.config import RunConfig
from starnet_jax.data import pipeline
from starnet_jax.data.source import Source, open_source
from starnet_jax.errors import BadInput, Diverged, Interrupted
from starnet_jax.interruption import Listener, Watchdog
from starnet_jax.log import log
from starnet_jax.models import has_batch_norm, overview
from starnet_jax.train_state import TrainState
from starnet_jax.train_step import Steps

FEW = 32  # images that a BatchNorm statistic should have
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)
PROFILED_STEPS = range(5, 10)  # after the start, so that compilation stays out of the trace


@dataclass(frozen=True)
class Setup:
    """What training stands on; made without touching the workdir."""

    config: RunConfig
    mesh: Mesh
    train_source: Source
    eval_source: Source
    steps: Steps


def train(config: RunConfig, workdir: Path, listener: Listener, profile: bool = False) -> dict:
    """Trains to the end, from the newest intact checkpoint of `workdir` if there is one.

    Returns:
      What `metrics.result` returns; it stands in `result.json`.

    Raises:
      BadInput: something in the config, the data or the workdir cannot work.
      Interrupted: `listener` has heard something; the state is saved.
      Diverged: loss or gradient is not finite any more.
    """
    clock = metrics.Clock("start-up")
    listener.grace_seconds = config.checkpoint.grace_seconds
    workdir_lib.check(workdir, config)
    processes.join(config.mesh)
    with processes.together():
        setup = _setup(config)
    config, speaks = setup.config, jax.process_index() == 0
    with processes.together():
        lock = workdir_lib.create(workdir) if speaks else contextlib.nullcontext()
    clock.load(workdir / "time.json")

    with lock, _disk_errors_in_one_line(workdir), Watchdog(config.mesh.step_timeout) as watchdog:
        with closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
            state = _initial_state(setup, checkpoints)
            first_step = int(state.step)
            if first_step > config.total_steps:
                raise BadInput(
                    f"config.epochs: {config.epochs} end at step {config.total_steps}, but "
                    f"{workdir} is at step {first_step}"
                )
            if first_step == config.total_steps and (result := workdir_lib.result(workdir)):
                log("nothing left to train")
                return result
            with clock.during("compiling"):
                setup = _compiled(setup, state)
            if speaks:
                workdir_lib.write_config(workdir, config)
            with metrics.Reporter(workdir, config, first_step, clock, speaks) as reporter:
                run = _Run(setup, checkpoints, reporter, clock, listener, watchdog)
                with processes.losses_end_here():
                    run.train(state, first_step, profile)
        log(reporter.where_the_time_went())
        result = metrics.result(reporter, config, clock)
        if speaks:
            workdir_lib.write_json(workdir / "result.json", result)
    return result


class _Run:
    """The loop, and what its stanzas share."""

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

    def train(self, state: TrainState, first_step: int, profile: bool) -> None:
        """Steps, evaluations and checkpoints in the order in which a restart repeats them."""
        self._is_best(first_step)
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
            self._read_late()  # its row must stand before a restart goes on after it
            self._save(step, state)
        if stop:
            self._stop(step)
        if self._evaluation_due(step):
            self._read_late()
            finished = self._evaluate(step, state)
            if self._checkpoints.newest != step and (self._is_best(step) or not finished):
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
            scores = _evaluate(self._setup, state, self._go_on)
        if scores is not None:
            self._reporter.write(step, scores)
        return scores is not None

    def _go_on(self) -> bool:
        self._watchdog.alive()
        return not self._vote(self._listener.heard is not None, False)[0]

    def _save(self, step: int, state: TrainState) -> None:
        with self._clock.during("saving"):
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

    def _is_best(self, step: int) -> bool:
        """Whether the evaluation of `step` is the best, whose checkpoint is kept."""
        best = self._reporter.best
        if self._config.checkpoint.keep_best and best:
            self._checkpoints.best = best["step"]
        return self._checkpoints.best == step

    def _minutes_over(self) -> bool:
        minutes = self._config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes


def evaluate_checkpoint(config: RunConfig, workdir: Path) -> dict[str, dict]:
    """Evaluates the newest checkpoint of `workdir` on the eval split and on `eval.sets`.

    Returns:
      The `eval/...` metrics of each test set.

    Raises:
      BadInput: the workdir is another model's or holds no checkpoint, or a set cannot be opened.
    """
    workdir_lib.check(workdir, config, of_model=True)
    processes.join(config.mesh)
    if not (workdir / "checkpoints").is_dir():
        raise BadInput(f"--workdir: {workdir} holds no checkpoint to evaluate")
    mesh = _mesh(config)
    sources = _test_sets(config)
    with closing(Checkpoints(workdir, config.checkpoint, read_only=True)) as checkpoints:
        if checkpoints.newest is None:
            raise BadInput(f"--workdir: {workdir} holds no finished checkpoint to evaluate")
        log(f"evaluating {checkpoints.directory}/{checkpoints.newest}")
        state = train_state.abstract(config, mesh)
        needed = {name: getattr(state, name) for name in ("params", "batch_stats", "ema")}
        state = state.replace(**checkpoints.restore(checkpoints.newest, needed))
    steps = train_step.build(config, mesh)
    return {
        name: _evaluate(Setup(config, mesh, source, source, steps), state)
        for name, source in sources.items()
    }


def _mesh(config: RunConfig) -> Mesh:
    """The devices, once batch and model are known to fit them."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise BadInput(f"JAX_PLATFORMS={platforms}: no such device: {error}") from None
    mesh = mesh_lib.create(config)
    train_state.model(config, mesh)
    if has_batch_norm(config.model.name):
        groups = mesh_lib.bn_groups(config, mesh) * config.optimizer.accumulate
        if (size := config.batch_size // groups) < FEW:
            log(f"bn_group: statistics of {size} images are noisy; {FEW} or more are not")
    processes.check(config, mesh)
    return mesh


def _setup(config: RunConfig) -> Setup:
    """Checks the settings against devices, model and data."""
    wandb = importlib.util.find_spec("wandb")  # a folder of that name has no origin
    if config.log.wandb and (wandb is None or wandb.origin is None):
        raise BadInput("config.log.wandb: needs `pip install wandb`")
    mesh = _mesh(config)
    train_source = open_source(config.data, config.data.train_split, config.model.num_classes)
    eval_source = open_source(config.data, config.data.eval_split, config.model.num_classes)
    if train_source.several:
        raise BadInput("config.data.name: images with several labels can be tested on, not trained")
    config = config_lib.with_train_examples(config, len(train_source))
    log(
        f"data: {_data_name(config)}, {len(train_source)} to train on, "
        f"{len(eval_source)} to test on, {config.model.num_classes} classes"
    )
    return Setup(config, mesh, train_source, eval_source, train_step.build(config, mesh))


def _test_sets(config: RunConfig) -> dict[str, Source]:
    """The eval split and the further test sets, by name."""
    num_classes = config.model.num_classes
    sources = {_data_name(config): open_source(config.data, config.data.eval_split, num_classes)}
    for name in config.eval.sets:
        data = dataclasses.replace(config.data, source="tfds", name=name)
        sources[name] = open_source(data, None, num_classes)
    return sources


def _data_name(config: RunConfig) -> str:
    return config.data.name if config.data.source == "tfds" else config.data.source


def _initial_state(setup: Setup, checkpoints: Checkpoints) -> TrainState:
    config, step = setup.config, checkpoints.newest
    if step is None:
        log(f"model: initialising {config.model.name}")
        state = train_state.create(config, setup.mesh)
    else:
        log(f"continuing from {checkpoints.directory}/{step}")
        state = checkpoints.restore(step, train_state.abstract(config, setup.mesh))
    log(f"model: {config.model.name}\n{overview(state.params)}")
    return state


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


def _evaluate(
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


def _compiled(setup: Setup, state: TrainState) -> Setup:
    """Compiles the steps before there is anything to lose."""
    config, mesh = setup.config, setup.mesh
    log("compiling the steps")
    train_batch = train_step.abstract_batch(config, mesh)
    eval_batch = train_step.abstract_batch(config, mesh, evaluation=True)
    classes_K = jax.ShapeDtypeStruct((config.model.num_classes,), bool)
    steps = Steps(
        train=setup.steps.train.lower(state, train_batch).compile(),
        evaluate=setup.steps.evaluate.lower(state.variables, eval_batch, classes_K).compile(),
    )
    return dataclasses.replace(setup, steps=steps)


@contextlib.contextmanager
def _disk_errors_in_one_line(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise BadInput(
            f"--workdir: cannot write {error.filename or workdir}: {error.strerror}; "
            "the checkpoints are intact, and the same command goes on from them"
        ) from None


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
