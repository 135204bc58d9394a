"""The command: `python -m starnet_jax.main --config=configs/quickstart.py --workdir=DIR`."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from starnet_jax import command, interruption
from starnet_jax.interruption import Listener


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m starnet_jax.main",
        description="Trains or evaluates a network; the same command again continues the run.",
        epilog="--config.KEY=VALUE overrides a setting: --config.optimizer.learning_rate=1e-3",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="such as configs/quickstart.py or configs/starnet.py:s1",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="where everything of the run goes: a folder, or gs://BUCKET/FOLDER",
    )
    parser.add_argument(
        "--mode",
        choices=("train", "eval"),
        default="train",
        help="eval: score the newest checkpoint of the workdir",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="trace a few steps to DIR/profile, for TensorBoard or Perfetto",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    flags, overrides = command.split_overrides(argv)
    arguments = _parser().parse_args(flags)
    if arguments.mode == "eval":
        _evaluate(arguments, overrides)
        return
    with interruption.listening() as listener:  # before the imports, which take seconds
        _train(arguments, overrides, listener)


def _train(arguments: argparse.Namespace, overrides: dict[str, str], listener: Listener) -> None:
    config, workdir, train, processes = _load(arguments, overrides)
    with processes.ending_together(), processes.losses_end_here():
        result = train.train(config, workdir, listener, arguments.profile)
    if not processes.is_first():
        return
    last, seconds = result["last"], sum(result["seconds"].values())
    averaged = "eval/ema_top1" in last
    top1, count = last["eval/ema_top1" if averaged else "eval/top1"], last["eval/count"]
    print(
        f"done in {seconds:.0f} s: top-1 {100 * top1:.2f} % ({round(top1 * count)}/{count}"
        f"{' with averaged weights' if averaged else ''}); "
        f"checkpoints, metrics and result.json are in {workdir}"
    )


def _evaluate(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    config, workdir, train, processes = _load(arguments, overrides)
    with processes.ending_together(), processes.losses_end_here():
        measured = train.evaluate_checkpoint(config, workdir)
    if processes.is_first():
        _print_eval(measured)


def _load(arguments: argparse.Namespace, overrides: dict[str, str]):
    """The settings and what works with them, imported after the flags are checked."""
    from starnet_jax import config as config_lib
    from starnet_jax import workdir as workdir_lib

    config = config_lib.load(arguments.config, overrides)
    workdir = workdir_lib.locate(arguments.workdir)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow greets on import
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # and has a word to say about oneDNN
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # orbax also logs what it raises
    from starnet_jax import processes, train

    return config, workdir, train, processes


def _print_eval(measured: dict[str, dict]) -> None:
    width = max(len("data"), *map(len, measured))
    head = f"{'weights':<9} {'top-1 %':>8} {'top-5 %':>8} {'loss':>8} {'seen':>13}"
    print(f"{'data':<{width}}  {head}")
    for data, row in measured.items():
        seen = f"{row['eval/count']}/{row['eval/count']}"
        for weights, prefix in (("raw", "eval/"), ("averaged", "eval/ema_")):
            if prefix + "top1" in row:
                top1, top5, loss = (row[prefix + key] for key in ("top1", "top5", "loss"))
                scores = f"{100 * top1:8.2f} {100 * top5:8.2f} {loss:8.4f} {seen:>13}"
                print(f"{data:<{width}}  {weights:<9} {scores}")


if __name__ == "__main__":
    command.end(main(sys.argv[1:]))
