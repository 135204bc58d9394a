"""The devices of all processes as one mesh, and where arrays lie on it."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from starnet_jax.config import RunConfig
from starnet_jax.errors import BadInput


def create(config: RunConfig) -> Mesh:
    """One data axis over all devices of all processes.

    Raises:
      BadInput: a batch that the devices, or a BatchNorm group that the batch, cannot hold.
    """
    # By process: on a TPU slice the plain order would scatter a process's share of the batch.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    sizes = {"batch_size": config.batch_size, "eval.batch_size": eval_batch_size(config)}
    for key, size in sizes.items():
        if size % len(devices):
            near = max(round(size / len(devices)), 1) * len(devices)
            raise BadInput(
                f"config.{key}: {size} is not divisible by {len(devices)} devices; "
                f"the nearest right value is {near}"
            )
    parts = config.optimizer.accumulate
    if config.batch_size % (parts * len(devices)):
        raise BadInput(
            f"config.optimizer.accumulate: {parts} parts on {len(devices)} device(s) do not divide "
            f"batch_size {config.batch_size}"
        )
    return Mesh(np.array(devices), ("data",))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def share(batch_size: int) -> slice:
    """The positions of a global batch that this process decodes."""
    per_process = batch_size // jax.process_count()
    start = jax.process_index() * per_process
    return slice(start, start + per_process)


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes a global array on the mesh of every process's share of a batch."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def eval_batch_size(config: RunConfig) -> int:
    """The global batch of evaluation."""
    return config.eval.batch_size or config.batch_size


def bn_groups(config: RunConfig, mesh: Mesh) -> int:
    """How many BatchNorm groups one part of the global batch is cut into.

    Raises:
      BadInput: groups that do not divide the batch, or that its parts would cut.
    """
    parts, group = config.optimizer.accumulate, config.bn_group
    if group == "global":
        if parts > 1:
            raise BadInput(
                "config.bn_group: 'global' needs the whole batch at once; with "
                f"optimizer.accumulate={parts} take 'device' or a number of examples"
            )
        return 1
    if group == "device":
        return mesh.size
    unbroken = config.batch_size // (parts * mesh.size) if parts > 1 else config.batch_size
    if unbroken % group:
        raise BadInput(
            f"config.bn_group: {group} does not divide {unbroken}, the consecutive examples of "
            "batch_size that are computed together"
        )
    return config.batch_size // (group * parts)
