"""Where prepared TFDS datasets lie, found by their files: no network, no dataset code."""

import os
import re
from collections.abc import Sequence

from starnet_jax.data import imagenet, records
from starnet_jax.errors import BadInput, nearest

_NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[^:/]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def default_dir() -> str:
    """Where TFDS keeps datasets unless `data.dir` says otherwise."""
    return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def open_prepared(name: str, data_dir: str | None):
    """Returns the TFDS builder of a dataset that is on disk.

    Args:
      name: such as `imagenet2012` or `imagenet_v2/matched-frequency:3.0.0`; without a version the
        newest, without a config the only one.
      data_dir: the directory that holds the folder `name`, or None for TFDS's own.

    Raises:
      BadInput: there is no such dataset, or it is not prepared there; the message says how to
        mend it.
    """
    import tensorflow_datasets as tfds

    path = find(name, data_dir)
    try:
        return tfds.builder_from_directory(path)
    except (*records.file_errors(), ValueError, KeyError, RuntimeError) as error:
        raise BadInput(
            f"config.data.dir: {path} is no readable TFDS dataset: {records.reason(error)}"
        ) from None


def find(name: str, data_dir: str | None):
    """Returns the path of the version that `name` and `data_dir` mean; see `open_prepared`."""
    from etils import epath

    parts = _NAME.fullmatch(name)
    if parts is None:
        raise BadInput(
            f"config.data.name: {name!r} is not NAME, NAME/CONFIG or NAME/CONFIG:VERSION, "
            "such as 'imagenet_v2/matched-frequency:3.0.0'"
        )
    root = epath.Path(data_dir or default_dir()).expanduser()
    if parts["name"] not in _folders(root):
        raise _not_prepared(name, parts["name"], root)
    path = root / parts["name"]
    if config := parts["config"] or _only_config(path):
        if config not in _folders(path):
            known = nearest(config, _configs(path)) if _configs(path) else ""
            raise BadInput(f"config.data.name: {path} has no config {config!r}{known}")
        path /= config
    versions = _versions(path)
    if not versions:
        raise _not_prepared(name, parts["name"], root)
    version = parts["version"] or versions[-1]
    if version not in versions:
        raise BadInput(
            f"config.data.name: {path} has no version {version}{nearest(version, versions)}"
        )
    return path / version


def command(name: str, data_dir: object) -> str:
    """The command that prepares a dataset."""
    tars = " --manual_dir=DIR_WITH_TARS" if name.split(":")[0] in imagenet.TARS else ""
    return f"python -m starnet_jax.data.prepare --name={name} --dir={data_dir}{tars}"


def known_names() -> Sequence[str]:
    """The names of all datasets that TFDS can make."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def _not_prepared(name: str, base: str, root) -> BadInput:
    for inside in (root, root.parent, root.parent.parent):
        if inside.name == base and (_versions(inside) or _configs(inside)):
            return BadInput(
                f"config.data.dir: {root} is a folder of {base} itself; "
                f"did you mean the one around it, '{inside.parent}'?"
            )
    known = known_names()
    if base not in known:
        close = nearest(base, [*_folders(root), *known])
        close = close if "did you mean" in close else ""  # not all 400 names
        return BadInput(f"config.data.name: no TFDS dataset {base!r}{close}")
    what = f"holds no prepared {name}" if root.exists() else "does not exist"
    return BadInput(f"config.data.dir: {root} {what}; to prepare it: {command(name, root)}")


def _only_config(path) -> str | None:
    """The config to take where none is named: none if there are versions, else the only one."""
    configs = _configs(path)
    if _versions(path) or not configs:
        return None
    if len(configs) > 1:
        choices = ", ".join(f"{path.name}/{config}" for config in configs)
        raise BadInput(f"config.data.name: {path.name} has several configs; name one: {choices}")
    return configs[0]


def _configs(path) -> list[str]:
    """The folders that hold a version."""
    return [folder for folder in _folders(path) if _versions(path / folder)]


def _versions(path) -> list[str]:
    """The versions in a folder, the newest last."""
    versions = filter(_VERSION.fullmatch, _folders(path))
    return sorted(versions, key=lambda version: [int(number) for number in version.split(".")])


def _folders(path) -> list[str]:
    try:
        return _entries(path)
    except FileNotFoundError:
        return []
    except records.file_errors() as error:
        raise BadInput(f"config.data.dir: cannot read {path}: {records.reason(error)}") from None


def _entries(path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())
