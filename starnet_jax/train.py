"""The story of a run, top to bottom: devices, data, model, steps, state, loop."""

import contextlib
import dataclasses
import errno
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from starnet_jax import config as config_lib
from starnet_jax import mesh as mesh_lib
from starnet_jax import metrics, processes, train_state, train_step
from starnet_jax import workdir as workdir_lib
from starnet_jax.checkpoint import Checkpoints
from starnet_jax.config import RunConfig
from starnet_jax.data.records import is_remote
from starnet_jax.data.source import Source, open_source
from starnet_jax.errors import BadInput
from starnet_jax.interruption import Listener, Watchdog
from starnet_jax.log import log
from starnet_jax.loop import Loop, Setup, evaluate_all
from starnet_jax.models import has_batch_norm, overview
from starnet_jax.train_state import TrainState
from starnet_jax.train_step import Steps

FEW = 32  # images that a BatchNorm statistic should have
DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EACCES", "ENOENT", "ENOTDIR", "ESTALE")
}


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
    if profile and is_remote(workdir):
        raise BadInput("--profile: needs a --workdir on a disk")
    listener.grace_seconds = config.checkpoint.grace_seconds
    workdir_lib.check(workdir, config)
    processes.join(config.mesh)
    with Watchdog(config.mesh.step_timeout) as watchdog:
        return _train(config, workdir, listener, profile, clock, watchdog)


def _train(config, workdir, listener, profile, clock, watchdog) -> dict:
    """Trains once the processes have met."""
    with processes.together():
        setup = _setup(config)
    config, speaks = setup.config, processes.is_first()
    with processes.together():
        lock = workdir_lib.create(workdir) if speaks else contextlib.nullcontext()
    with processes.together():
        if not (is_remote(workdir) or workdir.is_dir()):
            raise BadInput(f"--workdir: {workdir} is not on a disk that all processes share")
    clock.load(workdir / "time.json")

    watchdog.alive()
    with lock, _disk_errors_in_one_line(workdir):
        with Checkpoints(workdir, config.checkpoint) as checkpoints:
            state = _initial_state(setup, checkpoints)
            first_step = int(state.step)
            if first_step > config.total_steps:
                raise BadInput(
                    f"config.epochs: {config.epochs} end at step {config.total_steps}, but "
                    f"{workdir} is at step {first_step}"
                )
            result = workdir_lib.result(workdir)
            if result and result["last"]["step"] == first_step == config.total_steps:
                log("nothing left to train")
                return result
            with clock.during("compiling"):
                setup = _compiled(setup, state)
            watchdog.alive()
            checkpoints.check_space(state)
            if speaks:
                workdir_lib.write_config(workdir, config)
            with metrics.Reporter(workdir, config, first_step, clock, speaks) as reporter:
                loop = Loop(setup, checkpoints, reporter, clock, listener, watchdog)
                loop.run(state, first_step, profile)
        log(reporter.where_the_time_went())
        result = metrics.result(reporter, config, clock)
        if speaks:
            workdir_lib.write_json(workdir / "result.json", result)
    return result


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
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        if checkpoints.newest is None:
            raise BadInput(f"--workdir: {workdir} holds no finished checkpoint to evaluate")
        log(f"evaluating {checkpoints.directory}/{checkpoints.newest}")
        state = train_state.abstract(config, mesh)
        needed = {name: getattr(state, name) for name in ("params", "batch_stats", "ema")}
        state = state.replace(**checkpoints.restore(checkpoints.newest, needed))
    steps = train_step.build(config, mesh)
    return {
        name: evaluate_all(Setup(config, mesh, source, source, steps), state)
        for name, source in sources.items()
    }


def _mesh(config: RunConfig) -> Mesh:
    """The devices, once batch and model are known to fit them."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if jax.distributed.is_initialized():
            raise
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
