"""How a run learns that it must end: signals, preemption notices, and a watchdog; without JAX."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from starnet_jax.errors import INTERRUPTED
from starnet_jax.log import log

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE_SECONDS = 30.0  # between a preemption notice and the end of a Google Cloud VM
# What a Google Cloud VM may ask about its own end, and how the answer begins when it is near.
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE"}
POLL_SECONDS = 2.0


class Listener:
    """Hears that the run must end, and sees to it that it does.

    A run with steps that no checkpoint holds (`working`) finds `heard` set, saves and ends by
    itself, within `grace_seconds`. Otherwise there is nothing to save and the process ends at once.
    A second signal always ends it at once.
    """

    def __init__(self, exit_process: Callable[[int], None] = os._exit):
        self.heard: str | None = None
        self.grace_seconds = GRACE_SECONDS
        self._working = False
        self._signals = 0
        self._grace: threading.Timer | None = None
        self._exit = exit_process

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The block makes progress that a checkpoint must hold before the process may end."""
        self._working = True
        try:
            yield
        finally:
            self._working = False
            if self._grace:
                self._grace.cancel()

    def hear_signal(self, number: int) -> None:
        """Takes note of a signal; the second ends the process at once."""
        self._signals += 1
        if self._signals > 1:
            log(f"{signal.Signals(number).name} again: ending at once, without saving")
            self._exit(128 + number)
            return
        self.hear(signal.Signals(number).name)

    def hear(self, what: str) -> None:
        """Takes note of a reason to end; another one besides changes nothing."""
        if self.heard is not None:
            return
        self.heard = what
        if not self._working:
            log(f"{what}: nothing to save; start the same command again")
            self._exit(INTERRUPTED)
            return
        log(f"{what}: the run will save and end; once more ends it at once")
        self._grace = threading.Timer(self.grace_seconds, self._too_late)
        self._grace.daemon = True
        self._grace.start()

    def _too_late(self) -> None:
        log(f"no checkpoint within {self.grace_seconds:g} s; what came after the last one is lost")
        self._exit(INTERRUPTED)


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    """Hears SIGTERM, SIGINT and, on Google Cloud, preemption notices while the block runs.

    Python calls signal handlers between two steps of the main thread, which a compilation can keep
    away for minutes. So the interpreter only writes the signal's number to a pipe, at once, and a
    thread listens to that.
    """
    listener = Listener()
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    old_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_hear_signals, args=(listener, read), daemon=True).start()
    stop = threading.Event()
    if metadata_server := _metadata_server():
        arguments = (listener, metadata_server, stop)
        threading.Thread(target=_hear_notices, args=arguments, daemon=True).start()
    try:
        yield listener
    finally:
        stop.set()
        signal.set_wakeup_fd(old_pipe)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)


def _hear_signals(listener: Listener, read: int) -> None:
    while number := os.read(read, 1):
        if number[0] in SIGNALS:
            listener.hear_signal(number[0])
    os.close(read)


def _metadata_server() -> str | None:
    """Where a Google Cloud VM learns about itself; None elsewhere."""
    if host := os.environ.get("GCE_METADATA_HOST"):
        return host
    with contextlib.suppress(OSError):
        if "Google" in Path("/sys/class/dmi/id/product_name").read_text():
            return "metadata.google.internal"
    return None


def _hear_notices(listener: Listener, server: str, stop: threading.Event) -> None:
    while not stop.wait(POLL_SECONDS):
        for name, beginning in NOTICES.items():
            request = urllib.request.Request(
                f"http://{server}/computeMetadata/v1/instance/{name}",
                headers={"Metadata-Flavor": "Google"},
            )
            with contextlib.suppress(urllib.error.URLError, OSError):
                with urllib.request.urlopen(request, timeout=POLL_SECONDS) as reply:
                    notice = reply.read(64).decode(errors="replace").strip()
                if notice.startswith(beginning):
                    listener.hear(f"notice from Google Cloud, {name}: {notice}")
                    return


class Watchdog:
    """Ends the process where no step finishes for `seconds`, so that it is started again.

    A lost host or a broken link shows as a collective that never ends; every thread's stack is
    printed first.
    """

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], None] = os._exit,
    ):
        self._seconds, self._now, self._exit = seconds, now, exit_process
        self._stop = threading.Event()
        self.alive()

    def alive(self) -> None:
        """A step, an evaluation batch or a save has finished."""
        self._last = self._now()

    def check(self) -> None:
        """Ends the process if the time is over."""
        if self._now() - self._last > self._seconds:
            log(f"no step finished within {self._seconds:g} s (mesh.step_timeout); all stacks:")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            self._exit(INTERRUPTED)

    def __enter__(self):
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._seconds / 4)):
            self.check()
