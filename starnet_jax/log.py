"""The log: one line on standard error each, with the seconds since the start."""

import contextlib
import sys
import time

_start = time.monotonic()
_process = ""


def log(message: str) -> None:
    """Writes a line at once."""
    seconds = time.monotonic() - _start
    say(f"[{seconds:6.1f} s{_process}] {message}")


def say(line: str) -> None:
    """Writes to standard error; that nobody listens, or the disk is full, must end no run."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def name_process(index: int) -> None:
    """From now on every line names this process, of several that make one run."""
    global _process
    _process = f", process {index}"
