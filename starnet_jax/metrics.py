"""What a run says: the table, the progress bar, `metrics.jsonl`, TensorBoard, Weights & Biases."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from starnet_jax import workdir as workdir_lib
from starnet_jax.config import RunConfig
from starnet_jax.data.records import is_remote
from starnet_jax.errors import BadInput


class Clock:
    """Where the wall time goes: every second belongs to exactly one activity."""

    def __init__(self, activity: str):
        self.seconds: dict[str, float] = {}  # of this start
        self.starts = 1
        self._before: dict[str, float] = {}  # of the starts before
        self._activity, self._since = activity, time.monotonic()

    @property
    def all_seconds(self) -> dict[str, float]:
        """Seconds per activity over all starts of the run, as far as they could be written."""
        self.switch(self._activity)
        names = self._before | self.seconds
        return {k: self._before.get(k, 0.0) + self.seconds.get(k, 0.0) for k in names}

    def load(self, path: Path) -> None:
        """Goes on from what an earlier start wrote; a file that is damaged counts as none."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            stored = json.loads(path.read_text())
            before = {str(k): float(v) for k, v in stored["seconds"].items()}
            if not all(0 <= seconds < 1e12 for seconds in before.values()):
                return
            self.starts, self._before = int(stored["starts"]) + 1, before

    def save(self, path: Path) -> None:
        """Writes the seconds per activity, for the next start."""
        seconds = {name: round(value, 2) for name, value in self.all_seconds.items()}
        workdir_lib.write_json(path, {"starts": self.starts, "seconds": seconds})

    def switch(self, activity: str) -> str:
        """Starts `activity` and returns the one that it ends."""
        now, ended = time.monotonic(), self._activity
        self.seconds[ended] = self.seconds.get(ended, 0.0) + now - self._since
        self._activity, self._since = activity, now
        return ended

    @contextlib.contextmanager
    def during(self, activity: str):
        """Counts the block as `activity`, then goes back to what was before."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def stepping(self) -> tuple[float, float]:
        """Seconds spent on training steps so far, and the part of them spent waiting for data."""
        self.switch(self._activity)
        waiting = self.seconds.get("waiting for data", 0.0)
        return self.seconds.get("training", 0.0) + waiting, waiting


class MetricsFile:
    """`metrics.jsonl`: one flat object a line, each step once; only process 0 writes.

    On a disk a row stands as soon as it is written; in a bucket, where nothing can be added to an
    object, after the next `sync`.
    """

    def __init__(self, path: Path, last_step: int, writes: bool = True):
        """Opens the file and cuts the rows past `last_step`, which a restart will make again."""
        self._path, self._writes, self._file = path, writes, None
        self.rows = [row for row in read_rows(path) if row["step"] <= last_step]
        self._rewrite()

    def write(self, row: dict) -> None:
        """Adds a row; to one of the same step it adds what is new."""
        again = bool(self.rows) and self.rows[-1]["step"] == row["step"]
        self.rows.append(self.rows.pop() | row if again else row)
        if self._file and again:
            self._rewrite()
        elif self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Sees to it that all rows outlive the process and the machine."""
        if self._file:
            os.fsync(self._file.fileno())
        else:
            self._rewrite()

    def _rewrite(self) -> None:
        if not self._writes:
            return
        self.close()
        workdir_lib.write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))
        if not is_remote(self._path):
            self._file = self._path.open("a")

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_rows(path: Path) -> list[dict]:
    """The complete rows of a `metrics.jsonl`; a line cut off by a kill is left out.

    Raises:
      BadInput: something else is in the file.
    """
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(row["step"], int) for row in rows):
            raise ValueError("a row without its step")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--workdir: cannot read {path}: {' '.join(str(error).split())}") from None
    return rows


class Reporter:
    """Shows and writes the metrics of a training run; one object per start of the process.

    Of several processes only the first (`speaks`) does; all keep the rows.
    """

    def __init__(
        self, workdir: Path, config: RunConfig, first_step: int, clock: Clock, speaks: bool = True
    ):
        self.workdir, self._config, self._clock, self._speaks = workdir, config, clock, speaks
        self._file = MetricsFile(workdir / "metrics.jsonl", first_step, speaks)
        self._events = _events_folder(workdir)
        self._tensorboard = _tensorboard(self._events, config, first_step) if speaks else None
        self._wandb = _wandb(workdir, config) if speaks else None
        self._progress = _progress_bar(speaks)
        self._task = self._progress.add_task(
            "", total=config.total_steps, completed=first_step, epoch="", rate=0.0
        )
        self._mark = first_step, (0.0, 0.0)  # step of the last row, and `clock.stepping()` then
        self._table_mark = self._mark  # the same for the last line of the table
        self._base = 0.0, 0.0  # `clock.stepping()` when the steps began
        self._timed = first_step, time.monotonic()  # when the steps began
        self._header_due = True

    def __enter__(self):
        self._progress.start()
        return self

    def __exit__(self, *_):
        self._progress.stop()
        self.sync()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    @property
    def rows(self) -> list[dict]:
        """All rows of the run, those before a restart included."""
        return self._file.rows

    def evaluated(self, step: int) -> bool:
        """Whether `step`, the newest with a row, has been evaluated."""
        row = self.rows[-1] if self.rows else {}
        return row.get("step") == step and "eval/top1" in row

    @property
    def best(self) -> dict | None:
        """The row with the best evaluation: of the averaged weights, where the run keeps them."""
        key = "eval/ema_top1" if self._config.ema else "eval/top1"
        return max((row for row in self.rows if key in row), key=lambda row: row[key], default=None)

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        epoch = -(-step // self._config.steps_per_epoch)
        self._progress.update(self._task, completed=step, epoch=epoch)

    def start_timing(self, step: int) -> None:
        """Starts the measurement of speed: what came before was start-up and compilation."""
        self._base = self._clock.stepping()
        self._mark = self._table_mark = step, self._base
        self._timed = step, time.monotonic()

    def write(self, step: int, scalars: dict) -> None:
        """Adds to the row of `step` everywhere; an evaluation also makes a line of the table."""
        row = {"step": step, "time": time.time()} | {k: _plain(v) for k, v in scalars.items()}
        if step > self._mark[0]:
            row |= self._speed(step, self._mark)
            self._mark = step, self._clock.stepping()
            self._progress.update(self._task, rate=row["time/images_per_second"])
        self._file.write(row)
        measured = {k: v for k, v in row.items() if "/" in k}
        if self._tensorboard:
            for key, value in measured.items():
                self._tensorboard.add_scalar(key, value, step, walltime=row["time"])
        if self._wandb:
            self._wandb.log(measured, step=step)
        if self._speaks and "eval/top1" in row:
            self._print(self.rows[-1])

    def sync(self) -> None:
        """Sees to it that everything so far outlives the process; for a checkpoint to stand on."""
        if not self._speaks:
            return
        self._file.sync()
        self._clock.save(self.workdir / "time.json")
        if self._tensorboard and is_remote(self.workdir):
            self._tensorboard.flush()
            for file in self._events.iterdir():
                (self.workdir / "tensorboard" / file.name).write_bytes(file.read_bytes())

    def _speed(self, step: int, mark: tuple[int, tuple[float, float]]) -> dict[str, float]:
        """Images a second and the share of time spent waiting for data, since the mark."""
        since_step, (stepping, waiting) = mark
        stepping_now, waiting_now = self._clock.stepping()
        seconds = max(stepping_now - stepping, 1e-9)
        images = (step - since_step) * self._config.batch_size
        return {
            "time/images_per_second": round(images / seconds, 1),
            "time/data_wait": round((waiting_now - waiting) / seconds, 4),
        }

    def where_the_time_went(self) -> str:
        """The shares of the wall time, and what to change where the input is the limit."""
        seconds_by_name = self._clock.all_seconds
        total = sum(seconds_by_name.values())
        shares = sorted(seconds_by_name.items(), key=lambda item: -item[1])
        starts = f" of {self._clock.starts} starts" if self._clock.starts > 1 else ""
        text = f"time{starts}: "
        text += ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares)
        stepping, waiting = np.subtract(self._clock.stepping(), self._base)
        if waiting > max(INPUT_BOUND * stepping, WORTH_SAYING):
            workers, cores = self._config.data.workers, os.cpu_count()
            cure = f"raise config.data.workers from {workers} to {cores}"
            if workers >= cores:
                cure = f"all {cores} cores decode; take smaller images or a host with more cores"
            text += (
                f"\ninput-bound: {waiting / stepping:.0%} of the training time was waiting for "
                f"data; {cure}, or find the slow part with python -m starnet_jax.data.doctor"
            )
        return text

    def _print(self, row: dict) -> None:
        self._progress.stop()  # so that bar and table do not share a line
        if self._header_due:
            print(HEADER + ("    EMA %" if self._config.ema else ""))
            self._header_due = False
        row = row | self._speed(row["step"], self._table_mark)  # of the whole epoch
        self._table_mark = row["step"], self._clock.stepping()
        print(table_row(row, self._config, self._seconds_left(row["step"])), flush=True)
        self._progress.start()

    def _seconds_left(self, step: int) -> float:
        first_step, start = self._timed
        per_step = (time.monotonic() - start) / max(step - first_step, 1)
        return per_step * (self._config.total_steps - step)


INPUT_BOUND = 0.1  # share of waiting from which the log speaks up,
WORTH_SAYING = 5.0  # and seconds

HEADER = "epoch    step     loss  images/s  top-1 %  top-5 %         seen      ETA"


def table_row(row: dict, config: RunConfig, seconds_left: float) -> str:
    """One line of the console table, below `HEADER`."""
    seen = f"{row['eval/count']}/{row['eval/count']}"
    minutes, seconds = divmod(round(seconds_left), 60)
    line = (
        f"{row['step'] / config.steps_per_epoch:5.0f} {row['step']:7d} "
        f"{row.get('train/loss', float('nan')):8.4f} "
        f"{row['time/images_per_second']:9,.0f} {100 * row['eval/top1']:8.2f} "
        f"{100 * row['eval/top5']:8.2f} {seen:>12} {minutes:5d}:{seconds:02d}"
    )
    if "eval/ema_top1" in row:
        line += f" {100 * row['eval/ema_top1']:8.2f}"
    return line


def result(reporter: Reporter, config: RunConfig, clock: Clock) -> dict:
    """What `result.json` says of a finished run, restarts included.

    Returns:
      `last` and `best` rows with an evaluation, `examples` trained on, `starts`, `seconds` per
      activity, and `goodput`: the share of them that training steps took.
    """
    seconds = clock.all_seconds
    return {
        "last": reporter.rows[-1],
        "best": reporter.best,
        "examples": config.total_steps * config.batch_size,
        "starts": clock.starts,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "goodput": round(seconds.get("training", 0.0) / sum(seconds.values()), 4),
    }


def _plain(value) -> float | int:
    return np.asarray(value).item()


def _progress_bar(speaks: bool) -> Progress:
    return Progress(
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not (speaks and sys.stderr.isatty()),
    )


def _events_folder(workdir: Path) -> Path:
    """Where TensorBoard's events are written; those of a bucket are copied there later."""
    return Path(tempfile.mkdtemp()) if is_remote(workdir) else workdir / "tensorboard"


def _tensorboard(folder: Path, config: RunConfig, first_step: int):
    if not config.log.tensorboard:
        return None
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step + 1)


def _wandb(workdir: Path, config: RunConfig):
    if config.log.wandb is None:
        return None
    import wandb

    return wandb.init(
        project=config.log.wandb,
        dir=None if is_remote(workdir) else str(workdir),
        id=hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16],  # a restart goes on
        resume="allow",
        config=config.to_json(),
    )
