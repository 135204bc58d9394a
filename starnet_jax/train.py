"""The story of a run, top to bottom: devices, data, model, steps, state, loop."""

import dataclasses
import importlib.util
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.sharding import Mesh

from starnet_jax import config as config_lib
from starnet_jax import evaluate, metrics, train_state, train_step
from starnet_jax import mesh as mesh_lib
from starnet_jax import workdir as workdir_lib
from starnet_jax.checkpoint import Checkpoints
from starnet_jax.config import RunConfig
from starnet_jax.data import pipeline
from starnet_jax.data.source import Source, open_source
from starnet_jax.errors import BadInput
from starnet_jax.metrics import log
from starnet_jax.models import has_batch_norm, overview
from starnet_jax.train_state import TrainState
from starnet_jax.train_step import Steps

FEW = 32  # images that a BatchNorm statistic should have
PROFILED_STEPS = range(5, 10)  # after the start, so that compilation stays out of the trace


@dataclass(frozen=True)
class Setup:
    """What training stands on; made without touching the workdir."""

    config: RunConfig
    mesh: Mesh
    train_source: Source
    eval_source: Source
    steps: Steps


def train(config: RunConfig, workdir: Path, profile: bool = False) -> dict:
    """Trains to the end, from the newest checkpoint of `workdir` if there is one.

    Returns:
      What `metrics.write_result` returns.

    Raises:
      BadInput: something in the config, the data or the workdir cannot work.
    """
    clock = metrics.Clock("start-up")
    workdir_lib.check(workdir, config)
    setup = _setup(config)
    config = setup.config
    lock = workdir_lib.create(workdir, config)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    state = _initial_state(setup, checkpoints)
    first_step = int(state.step)
    if first_step > config.total_steps:
        raise BadInput(
            f"config.epochs: {config.epochs} end at step {config.total_steps}, but {workdir} is "
            f"at step {first_step}"
        )
    if first_step == config.total_steps and (result := workdir_lib.result(workdir)):
        log("nothing left to train")
        return result

    reporter = metrics.Reporter(workdir, config, first_step, clock)
    with closing(lock), closing(checkpoints), reporter:
        clock.switch("training")
        state = _loop(setup, state, first_step, reporter, checkpoints, clock, profile)
        if not reporter.evaluated:  # killed after the last step, or `epochs` was lowered to here
            with clock.during("evaluation"):
                reporter.write(config.total_steps, reporter.last | _evaluate(setup, state))
        clock.switch("saving")
    clock.switch("done")
    log(reporter.where_the_time_went())
    return metrics.write_result(workdir, config, reporter.rows, clock)


def _loop(setup, state, first_step, reporter, checkpoints, clock, profile) -> TrainState:
    """Steps, evaluations and checkpoints in the order in which a restart repeats them."""
    config = setup.config
    late = None  # metrics are read one step late, so that the device never waits for the host
    with closing(_train_batches(setup, first_step, profile, reporter.workdir)) as batches:
        for step in range(first_step + 1, config.total_steps + 1):
            with clock.during("waiting for data"):
                batch = mesh_lib.put(next(batches), setup.mesh)
            if step == first_step + 1:
                with clock.during("compiling"):
                    log("compiling the train step")
                    state, measured = jax.block_until_ready(setup.steps.train(state, batch))
                reporter.compiled(step)
            else:
                state, measured = setup.steps.train(state, batch)
            reporter.advance(step)
            if late:
                reporter.write(*late)
                late = None

            last = step == config.total_steps
            save = last or _due(step, config.checkpoint.every_epochs, config)
            if last or _due(step, config.eval.every_epochs, config):
                jax.block_until_ready(measured)
                with clock.during("evaluation"):
                    measured |= _evaluate(setup, state)
                reporter.write(step, measured)
            elif step % config.log.every_steps == 0:
                if save:  # a restart goes on after this step, so its row must stand
                    reporter.write(step, measured)
                else:
                    late = step, measured
            if save:
                with clock.during("saving"):
                    checkpoints.save(step, state)
    return state


def evaluate_checkpoint(config: RunConfig, workdir: Path) -> dict[str, dict]:
    """Evaluates the newest checkpoint of `workdir` on the eval split and on `eval.sets`.

    Returns:
      The `eval/...` metrics of each test set.

    Raises:
      BadInput: the workdir is another model's or holds no checkpoint, or a set cannot be opened.
    """
    workdir_lib.check(workdir, config, of_model=True)
    trained = workdir_lib.stored_config(workdir)
    config = dataclasses.replace(config, optimizer=trained.optimizer)  # the state's shape
    mesh = _mesh(config)
    sources = _test_sets(config)
    with closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise BadInput(f"--workdir: {workdir} holds no finished checkpoint to evaluate")
        log(f"evaluating {checkpoints.directory}/{step}")
        state = checkpoints.restore(step, train_state.abstract(config, mesh))
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
    if jax.process_count() > 1:
        raise BadInput(f"{jax.process_count()} processes: runs on several hosts are not built yet")
    mesh = mesh_lib.create(config)
    train_state.model(config, mesh)
    if has_batch_norm(config.model.name):
        groups = mesh_lib.bn_groups(config, mesh) * config.optimizer.accumulate
        if (size := config.batch_size // groups) < FEW:
            log(f"bn_group: statistics of {size} images are noisy; {FEW} or more are not")
    device = mesh.devices.flat[0].device_kind
    log(f"devices: {mesh.size} x {device}, {jax.process_count()} process(es)")
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
    config, step = setup.config, checkpoints.latest_step()
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


def _evaluate(setup: Setup, state: TrainState) -> dict:
    """Metrics of the raw and, where the run keeps one, the averaged weights."""
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
    return evaluate.evaluate(
        setup.steps.evaluate,
        weights,
        batches,
        setup.mesh,
        setup.eval_source,
        config.model.num_classes,
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
