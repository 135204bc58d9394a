"""A workdir on Cloud Storage, served by an emulator on this machine."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import gcs
import pytest
import runs

from starnet_jax import errors
from starnet_jax.data import digits

pytest.importorskip("gcsfs")
FLAGS = [*runs.SMALL, "--config.epochs=3"]


@pytest.fixture(scope="module")
def bucket():
    """Port and environment of a server that holds the bucket `runs`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, gcs.__file__, str(port), "runs"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    yield Bucket(port)
    process.kill()


class Bucket:
    """What the test sees of the bucket, past the library."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/storage/v1/b/runs/o"
        self.environment = runs.environment(**gcs.environment(port))

    def names(self, prefix: str) -> list[str]:
        with urllib.request.urlopen(f"{self.url}?prefix={prefix}") as reply:
            return [item["name"] for item in json.load(reply).get("items", [])]

    def read(self, name: str) -> str:
        quoted = urllib.parse.quote(name, safe="")
        with urllib.request.urlopen(f"{self.url}/{quoted}?alt=media") as reply:
            return reply.read().decode()

    def overwrite(self, name: str, content: bytes) -> None:
        url = f"{self.url.replace('/storage', '/upload/storage')}?uploadType=media&name="
        request = urllib.request.Request(url + urllib.parse.quote(name, safe=""), content)
        urllib.request.urlopen(request).close()

    def rows(self, run: str) -> list[dict]:
        lines = self.read(f"{run}/metrics.jsonl").splitlines()
        return [
            {k: v for k, v in json.loads(line).items() if not k.startswith("time")}
            for line in lines
        ]


def test_a_run_in_a_bucket_is_killed_damaged_and_goes_on(bucket, tmp_path):
    local = runs.main(runs.QUICKSTART, f"--workdir={tmp_path}", *FLAGS)
    assert local.returncode == 0, local.stderr

    flags = [runs.QUICKSTART, "--workdir=gs://runs/one", *FLAGS]
    killed = subprocess.Popen(
        runs.command(*flags), env=bucket.environment, stderr=subprocess.DEVNULL
    )
    while "one/checkpoints/42/commit_success.txt" not in bucket.names("one/checkpoints/42/"):
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    bucket.overwrite("one/checkpoints/42/weights.safetensors", b"something else")

    again = runs.main(*flags, env=bucket.environment)
    assert again.returncode == 0, again.stderr
    assert "weights.safetensors is not what was written" in again.stderr
    assert "continuing from gs://runs/one/checkpoints/21" in again.stderr
    assert bucket.rows("one") == runs.rows(tmp_path)
    assert any(name.endswith("42/digest.json") for name in bucket.names("one/checkpoints/aside/"))
    assert bucket.names("one/tensorboard/") and bucket.names("one/result.json")

    evaluated = runs.main(*flags, "--mode=eval", env=bucket.environment)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "450/450" in evaluated.stdout


def test_a_dataset_in_a_bucket_is_trained_on(bucket, tmp_path):
    digits._builder_class()(data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    for file in (tmp_path / "digits" / digits.VERSION).iterdir():
        bucket.overwrite(f"data/digits/{digits.VERSION}/{file.name}", file.read_bytes())
    process = runs.main(
        runs.QUICKSTART,
        f"--workdir={tmp_path}/run",
        *runs.SMALL,
        "--config.epochs=1",
        "--config.data.source=tfds",
        "--config.data.name=digits",
        "--config.data.dir=gs://runs/data",
        env=bucket.environment | {"EPATH_USE_TF": "0", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert process.returncode == 0, process.stderr
    assert "450/450" in process.stdout


def test_a_bucket_that_is_not_there_ends_in_one_line(bucket):
    flags = [runs.QUICKSTART, "--workdir=gs://no-such-bucket/one", *FLAGS]
    process = runs.main(*flags, env=bucket.environment)
    assert process.returncode == errors.BAD_INPUT, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith(("[", "  "))]
    assert len(lines) == 1 and "gs://no-such-bucket/one" in lines[0], process.stderr
