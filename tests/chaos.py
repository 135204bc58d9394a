"""Starts runs of several real processes, kills them, and compares what is left with a whole run."""

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import runs

from starnet_jax import errors

LIMIT = 400  # seconds that any run may take


def environments(processes: int, devices: int, **extra: str) -> list[dict[str, str]]:
    """The environment of each process of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    # Compiled once and kept, so that the kills hit more than compilations.
    extra |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if processes == 1:
        return [runs.environment(devices, **extra)]
    return [
        runs.environment(devices, **run, JAX_PROCESS_ID=str(index), **extra)
        for index in range(processes)
    ]


def start(arguments, processes: int = 2, devices: int = 2, **extra: str) -> list[subprocess.Popen]:
    """Starts the processes of one run."""
    all_environments = environments(processes, devices, **extra)
    return [popen(arguments, environment) for environment in all_environments]


def popen(arguments, environment: dict[str, str]) -> subprocess.Popen:
    """Starts one process of a run."""
    return subprocess.Popen(
        runs.command(*arguments),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(started: list[subprocess.Popen]) -> list[str]:
    """Waits for all; returns what each wrote to standard error."""
    try:
        return [process.communicate(timeout=LIMIT)[1] for process in started]
    finally:
        for process in started:
            process.kill()


def run(arguments, processes: int = 2, devices: int = 2, **extra: str) -> list[str]:
    """Runs to the end, which must be a good one; returns the logs."""
    started = start(arguments, processes, devices, **extra)
    logs = finish(started)
    assert [process.returncode for process in started] == [0] * processes, logs
    return logs


def kill_again_and_again(arguments, workdir: Path, kills: int, seed: int) -> None:
    """Starts the run and kills one process, or all, at a random moment; and again."""
    rng = random.Random(seed)
    for _ in range(kills):
        target, there = rng.randrange(1, STEPS - 5), len(rows(workdir))
        started = start([*arguments, "--config.mesh.step_timeout=45"])
        while len(rows(workdir)) < target:
            assert all(process.poll() is None for process in started), finish(started)
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 3.0 if there >= target else 0.3))
        victims = rng.choice([started[:1], started[1:], started])
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        logs = finish(started)
        codes = [process.returncode for process in started if process not in victims]
        assert all(code == errors.INTERRUPTED for code in codes), (codes, logs)


def rows(workdir: Path) -> list[dict]:
    """The metrics so far."""
    return runs.rows(workdir) if (workdir / "metrics.jsonl").exists() else []


def arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by its path."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir.absolute() / "checkpoints" / str(step) / "default"
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        tree = checkpointer.restore(path, restore_args=to_numpy)
    return by_path(tree)


def by_path(tree) -> dict[str, np.ndarray]:
    """The leaves by their path, however its parts are spelled: `params/head/kernel`."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(place, simple=True, separator="/"): np.asarray(leaf)
        for place, leaf in leaves
    }


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Both ended with the same bits and tell the same story, but for the clock."""
    assert runs.rows(one) == runs.rows(other)
    expected, got = arrays(one, step), arrays(other, step)
    assert expected.keys() == got.keys()
    different = [key for key in expected if not np.array_equal(expected[key], got[key])]
    assert not different


def main() -> None:
    """`python tests/chaos.py [KILLS] [SEED]`: the long form of the test, fifty kills by default."""
    import sys
    import tempfile

    kills, seed = (int(x) for x in [*sys.argv[1:], *[50, 0][len(sys.argv) - 1 :]])
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        whole = Path(folder) / "whole"
        run(small(whole))
        for done in range(0, kills, 5):
            killed = Path(folder) / f"killed-{done}"
            kill_again_and_again(small(killed), killed, min(5, kills - done), seed + done)
            run(small(killed))
            assert_same_run(whole, killed, STEPS)
            print(f"{min(done + 5, kills)} of {kills} kills: the same bits", flush=True)


STEPS = 63


def small(workdir: Path) -> list[str]:
    """A run of seconds that keeps an average and saves often."""
    return [
        runs.QUICKSTART,
        f"--workdir={workdir}",
        "--config.epochs=3",
        "--config.model.name=demonet_d2_w16",
        "--config.model.drop_path=0.1",
        "--config.ema=0.9",
        "--config.augment.mixup=0.8",
        "--config.log.every_steps=1",
        "--config.log.tensorboard=false",
        "--config.checkpoint.permanent_steps=7",
        "--config.mesh.start_timeout=20",
        "--config.mesh.step_timeout=200",
    ]


if __name__ == "__main__":
    main()
