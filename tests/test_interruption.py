"""Runs that are told to end save, say so with their exit code, and go on to the same bits."""

import http.server
import json
import queue
import signal
import subprocess
import threading
import time

import chaos
import pytest
import runs

from starnet_jax import errors, interruption

SMALL = [*runs.SMALL, "--config.ema=0.9", "--config.eval.batch_size=1"]  # evaluation takes a while
GRACE = 30


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody interrupts."""
    workdir, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        process = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *SMALL)
        assert process.returncode == 0, process.stderr
        yield workdir


def start(workdir, *flags, **extra) -> subprocess.Popen:
    return subprocess.Popen(
        runs.command(runs.QUICKSTART, f"--workdir={workdir}", *SMALL, *flags),
        env=runs.environment(**extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def log_until(process: subprocess.Popen, text: str) -> list[str]:
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {lines}")


def wait_until(process: subprocess.Popen, condition) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def evaluating(workdir) -> bool:
    """Whether step 21 has its training row but not yet its evaluation."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return bool(lines) and '"step": 21,' in lines[-1] and "eval/top1" not in lines[-1]


def stepping(workdir) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and path.read_text().count("\n") >= 5


def saving(workdir) -> bool:
    return any((workdir / "checkpoints").glob("21.orbax-checkpoint-tmp*"))


def goes_on_to_the_same_bits(workdir, whole) -> None:
    again = runs.main(runs.QUICKSTART, f"--workdir={workdir}", *SMALL)
    assert again.returncode == 0, again.stderr
    chaos.assert_same_run(whole, workdir, 42)


@pytest.mark.parametrize("window", ["devices:", "compiling the steps"])
def test_a_signal_before_the_first_step_ends_the_run_at_once(window, whole, tmp_path):
    process = start(tmp_path)
    log_until(process, window)
    process.send_signal(signal.SIGTERM)
    assert process.wait(GRACE) == errors.INTERRUPTED
    assert "SIGTERM: nothing to save" in process.stderr.read()
    goes_on_to_the_same_bits(tmp_path, whole)


@pytest.mark.parametrize(
    ("window", "number"),
    [
        (stepping, signal.SIGTERM),
        (stepping, signal.SIGINT),
        (evaluating, signal.SIGTERM),
        (saving, signal.SIGTERM),
    ],
)
def test_a_signal_later_on_is_followed_by_a_checkpoint(window, number, whole, tmp_path):
    process = start(tmp_path)
    wait_until(process, lambda: window(tmp_path))
    process.send_signal(number)
    assert process.wait(GRACE) == errors.INTERRUPTED
    *_, last = process.stderr.read().splitlines()
    assert last.startswith("interrupted: saved step ")
    step = int(last.split()[3])
    assert (tmp_path / "checkpoints" / str(step) / "digest.json").exists()
    if window is evaluating:
        assert step == 21
    goes_on_to_the_same_bits(tmp_path, whole)


def test_a_second_signal_ends_at_once(tmp_path):
    process = start(tmp_path)
    wait_until(process, lambda: evaluating(tmp_path))
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(GRACE) in (128 + signal.SIGINT, 128 + signal.SIGTERM)


def test_one_signal_to_one_process_of_two_ends_both_at_the_same_step(tmp_path):
    arguments = [*chaos.small(tmp_path), "--config.epochs=1000"]
    started = chaos.start(arguments)
    wait_until(started[1], lambda: stepping(tmp_path))
    started[1].send_signal(signal.SIGTERM)
    logs = chaos.finish(started)
    assert [process.returncode for process in started] == [errors.INTERRUPTED] * 2, logs
    saved = {log.split("saved step ")[1].split()[0] for log in logs}
    assert len(saved) == 1
    assert (tmp_path / "checkpoints" / saved.pop() / "digest.json").exists()


def test_a_process_that_hangs_does_not_hang_the_other(tmp_path):
    arguments = [*chaos.small(tmp_path), "--config.epochs=1000", "--config.mesh.step_timeout=30"]
    started = chaos.start(arguments)
    wait_until(started[0], lambda: stepping(tmp_path))
    started[1].send_signal(signal.SIGSTOP)
    assert started[0].wait(90) == errors.INTERRUPTED
    started[1].kill()
    log = chaos.finish(started)[0]
    assert "another process is lost" in log or ("all stacks" in log and "most recent call" in log)


@pytest.fixture
def metadata_server():
    """What a Google Cloud VM asks about itself, and a way to announce the end."""
    answers = {"preempted": "FALSE", "maintenance-event": "NONE"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rsplit("/", 1)[1]].encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}", answers
    server.shutdown()


def test_a_preemption_notice_is_followed_by_a_checkpoint(metadata_server, tmp_path):
    address, answers = metadata_server
    process = start(tmp_path, "--config.epochs=10000", GCE_METADATA_HOST=address)
    wait_until(process, lambda: stepping(tmp_path))
    answers["preempted"] = "TRUE"
    assert process.wait(GRACE) == errors.INTERRUPTED
    log = process.stderr.read()
    assert "notice from Google Cloud, preempted: TRUE" in log
    assert "interrupted: saved step " in log


def test_a_run_that_diverges_says_so_and_names_the_last_good_checkpoint(tmp_path):
    process = runs.main(
        runs.QUICKSTART,
        f"--workdir={tmp_path}",
        *runs.SMALL,
        "--config.schedule.warmup_learning_rate=0.001",
        "--config.optimizer.learning_rate=1e38",
        "--config.checkpoint.permanent_steps=1",
    )
    assert process.returncode == errors.DIVERGED, process.stderr
    last = process.stderr.splitlines()[-1]
    assert last.startswith("diverged: step ")
    good = last.rsplit("last good checkpoint: ", 1)[1]
    step = int(last.split()[2].rstrip(":"))
    assert good == f"{tmp_path}/checkpoints/{step - 1}"
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step - 1


def test_a_few_steps_that_are_not_finite_may_be_left_out(tmp_path):
    process = runs.main(
        runs.QUICKSTART,
        f"--workdir={tmp_path}",
        *runs.SMALL,
        "--config.schedule.warmup_learning_rate=0.001",
        "--config.optimizer.learning_rate=1e38",
        "--config.optimizer.skip_nonfinite=5",
    )
    assert process.returncode == errors.DIVERGED, process.stderr
    left_out = [row["train/skipped"] for row in runs.rows(tmp_path) if row["train/skipped"]]
    assert left_out == [1, 2, 3, 4, 5]
    assert "left out, 5 of at most 5 in a row" in process.stderr


# --- The pieces, with a clock and an exit of the test's own ---------------------------------------


def test_the_grace_period_ends_a_run_that_does_not_save():
    ends = queue.Queue()
    listener = interruption.Listener(exit_process=ends.put)
    listener.grace_seconds = 0.05
    with listener.working():
        listener.hear("SIGTERM")
        assert ends.get(timeout=10) == errors.INTERRUPTED


def test_a_notice_and_the_signal_that_follows_it_are_one_reason_to_end():
    ends = []
    listener = interruption.Listener(exit_process=ends.append)
    with listener.working():
        listener.hear("notice")
        listener.hear_signal(signal.SIGTERM)
        listener.hear("another notice")
        assert not ends
        listener.hear_signal(signal.SIGTERM)
    assert ends == [128 + signal.SIGTERM]


def test_a_log_that_nobody_reads_ends_no_run(tmp_path):
    arguments = runs.command(runs.QUICKSTART, f"--workdir={tmp_path}", *SMALL)
    process = subprocess.Popen(arguments, env=runs.environment(), stderr=subprocess.PIPE)
    wait_until(process, lambda: stepping(tmp_path))
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(GRACE) == errors.INTERRUPTED


def test_the_watchdog_barks_only_when_nothing_finishes(capfd):
    now, ends = [0.0], []
    watchdog = interruption.Watchdog(10.0, now=lambda: now[0], exit_process=ends.append)
    for now[0] in (9.0, 18.0, 27.0):
        watchdog.check()
        watchdog.alive()
    assert not ends
    now[0] = 37.5
    watchdog.check()
    assert ends == [errors.INTERRUPTED]
    log = capfd.readouterr().err
    assert "mesh.step_timeout" in log and "most recent call first" in log
