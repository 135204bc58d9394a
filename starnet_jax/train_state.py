"""Everything that training changes, as one pytree."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from starnet_jax import mesh as mesh_lib
from starnet_jax import optimizer
from starnet_jax.config import RunConfig
from starnet_jax.errors import BadInput
from starnet_jax.models import create_model, has_batch_norm, reduction


class TrainState(struct.PyTreeNode):
    """`ema` averages `params` and `batch_stats`; None when the run keeps no average."""

    step: jax.Array  # int32 []: optimizer steps done
    skipped: jax.Array  # int32 []: how many of the last steps in a row were left out
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict | None

    @property
    def variables(self) -> dict:
        return {"params": self.params, "batch_stats": self.batch_stats}


def model(config: RunConfig, mesh: Mesh) -> nn.Module:
    """The configured network.

    Raises:
      BadInput: unknown settings, or images too small for the network's strides.
    """
    side = reduction(config.model.name)
    if side == 0:
        raise BadInput(f"config.model.name: {config.model.name} takes points, not images")
    if config.data.image_size < side:
        raise BadInput(
            f"config.data.image_size: {config.data.image_size} px is nothing after the "
            f"strides of {config.model.name}; the smallest is {side}"
        )
    settings = {key: getattr(config.model, key) for key in config.model.__dataclass_fields__}
    groups = mesh_lib.bn_groups(config, mesh) if has_batch_norm(config.model.name) else 1
    return create_model(**settings, bn_groups=groups)


def create(config: RunConfig, mesh: Mesh) -> TrainState:
    """The initial state, made directly in its place on the mesh."""
    init = jax.jit(lambda: _init(config, mesh), out_shardings=mesh_lib.replicated(mesh))
    # XLA spends 20 s on a CPU optimising random numbers that are drawn once.
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": "0"} if on_cpu else None
    return init.lower().compile(compiler_options=options)()


def abstract(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without making it."""
    sharding = mesh_lib.replicated(mesh)
    shapes = jax.eval_shape(lambda: _init(config, mesh))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)


def _init(config: RunConfig, mesh: Mesh) -> TrainState:
    side = config.data.image_size
    image_BHWC = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = model(config, mesh).lazy_init(jax.random.key(config.seed), image_BHWC)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.create(config, optimizer.schedule(config)).init(params),
        ema={"params": params, "batch_stats": batch_stats} if config.ema else None,
    )
