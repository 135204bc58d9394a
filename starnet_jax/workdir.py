"""The folder of a run: made late, written whole, and never shared by two different configs.

It lies on a disk or on Google Cloud Storage, where `etils.epath` gives it the same methods.
"""

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from starnet_jax import __version__
from starnet_jax import config as config_lib
from starnet_jax.config import RunConfig
from starnet_jax.data.records import is_remote
from starnet_jax.errors import BadInput

# May differ between two starts of one run; anything else would make it another run.
_FREE = ("epochs", "eval", "checkpoint", "log", "mesh", "data.workers", "data.dir")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def check(workdir: Path, config: RunConfig, of_model: bool = False) -> None:
    """Raises BadInput where `workdir` holds the run of another config; writes nothing.

    With `of_model` only what shapes the network must agree: enough to evaluate it.
    """
    stored = _stored(workdir)
    if stored is None:
        return
    old, new = _flat(stored), _flat(config.to_json())
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f"{name}.") for name in _FREE)
        free |= of_model and not key.startswith("model.") and key != "ema"
        free |= key == "data.train_examples" and new.get(key) is None  # not counted yet
        if not free and old.get(key) != new.get(key):
            raise BadInput(
                f"--workdir: {workdir} holds a run with config.{key}={old.get(key)!r}, "
                f"not {new.get(key)!r}; take another folder"
            )


def stored_config(workdir: Path) -> RunConfig:
    """The settings of the run in `workdir`.

    Raises:
      BadInput: there is none.
    """
    stored = _stored(workdir)
    if stored is None:
        raise BadInput(f"--workdir: {workdir} holds no checkpoint to evaluate")
    return config_lib.resolve(stored)


def _stored(workdir: Path) -> dict | None:
    path = workdir / "config.json"
    try:
        stored = json.loads(path.read_text())["config"]
        return stored if isinstance(stored, dict) else {}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"--workdir: cannot read {path}: {error}") from None


def locate(text: str) -> Path:
    """The folder that `--workdir` means, on a disk or at `gs://BUCKET/FOLDER`.

    Raises:
      BadInput: another kind of address, an unknown user, or a package that is missing.
    """
    scheme, remote, _ = text.partition("://")
    if not remote:
        folder = Path(os.path.expanduser(text))  # Path.expanduser raises for an unknown user
        if not text or (text.startswith("~") and folder == Path(text)):
            raise BadInput(f"--workdir: {text!r} is no folder, or has no such user")
        return folder
    if scheme != "gs":
        raise BadInput(f"--workdir: {text!r} is no local folder and no gs:// address")
    if importlib.util.find_spec("gcsfs") is None:
        raise BadInput("--workdir: gs:// needs pip install 'starnet-jax[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "0")  # gcsfs starts faster than TensorFlow
    from etils import epath

    return epath.Path(text)


def create(workdir: Path) -> AbstractContextManager:
    """Makes the folder.

    Returns:
      Its lock, held until it is closed or the process ends; a bucket has none.

    Raises:
      BadInput: the folder cannot be written, or another run is using it.
    """
    if is_remote(workdir):
        try:
            (workdir / ".lock").write_text("")
        except Exception as error:  # whatever network, rights and names can do
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"--workdir: cannot write {workdir}: {reason}") from None
        return contextlib.nullcontext()
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"--workdir: another run is using {workdir}") from None
    except OSError as error:
        raise BadInput(f"--workdir: cannot write {workdir}: {error.strerror}") from None
    return lock


def write_config(workdir: Path, config: RunConfig) -> None:
    """Writes `config.json`: settings, versions and command; the folder belongs to them."""
    versions = {name: _version(name) for name in _PACKAGES}
    versions |= {"starnet-jax": __version__, "python": platform.python_version()}
    command = [sys.executable, *sys.argv]
    content = {"config": config.to_json(), "versions": versions, "command": command}
    write_json(workdir / "config.json", content)


def result(workdir: Path) -> dict | None:
    """What `result.json` holds, once the run is finished.

    Raises:
      BadInput: it is not what a run writes.
    """
    path = workdir / "result.json"
    try:
        stored = json.loads(path.read_text())
        for key in ("step", "eval/top1", "eval/count"):
            float(stored["last"][key])
        sum(stored["seconds"].values())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"--workdir: cannot read {path}: {' '.join(str(error).split())}") from None
    return stored


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes the file whole or not at all; in a bucket an object always is whole."""
    if is_remote(path):
        path.write_text(text)
        return
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flat(settings: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in settings.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
