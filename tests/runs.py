"""Starts the real command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICKSTART = f"--config={ROOT}/configs/quickstart.py:star,tiny"
SMALL = ["--config.model.name=demonet_d2_w16", "--config.log.every_steps=1"]


def environment(devices: int = 1, **extra: str) -> dict[str, str]:
    """The environment of this process, with that many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | extra


def main(*arguments: object, devices: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs `python -m starnet_jax.main` to its end."""
    options = {"env": environment(devices)} | options
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=600, **options
    )


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "starnet_jax.main", *map(str, arguments)]


def rows(workdir: Path) -> list[dict]:
    """The metrics of a run without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [
        {k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith("time/")}
        for line in lines
        if line.endswith("\n")
    ]
