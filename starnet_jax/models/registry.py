"""From a model's name and settings to the module."""

import dataclasses
import re
from collections.abc import Iterable

import jax.numpy as jnp
from flax import linen as nn

from starnet_jax.errors import BadInput, nearest
from starnet_jax.models.demonet import PATCH, DemoNet, DemoNet2D
from starnet_jax.models.starnet import StarNet
from starnet_jax.ops import ACTIVATIONS, OPS, PLACEMENTS

# Paper Table 5 (S1-S4) and supplement Table 13 (050-150).
STARNETS = {
    "starnet_s1": dict(base_dim=24, depths=(2, 2, 8, 3)),
    "starnet_s2": dict(base_dim=32, depths=(1, 2, 6, 2)),
    "starnet_s3": dict(base_dim=32, depths=(2, 2, 8, 4)),
    "starnet_s4": dict(base_dim=32, depths=(3, 3, 12, 5)),
    "starnet_s050": dict(base_dim=16, depths=(1, 1, 3, 1), mlp_ratio=3),
    "starnet_s100": dict(base_dim=20, depths=(1, 2, 4, 1)),
    "starnet_s150": dict(base_dim=24, depths=(1, 2, 4, 2), mlp_ratio=3),
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_DEMONET = re.compile(r"demonet_d(?P<depth>[1-9]\d*)_w(?P<width>[1-9]\d*)")


def model_names() -> list[str]:
    """The named models; DemoNet stands for any depth and width."""
    return [*STARNETS, "demonet_d12_w192", "demonet_2d"]


def create_model(
    name: str,
    *,
    op: str | None = None,
    stage_ops: tuple[str, ...] | None = None,
    dtype: str = "float32",
    bn_groups: int = 1,
    **overrides,
) -> nn.Module:
    """Makes a model from its name, such as `starnet_s1` or `demonet_d12_w192_sum`.

    Args:
      name: one of `model_names()`, or `demonet_d{depth}_w{width}`; a suffix `_star` or `_sum` sets
        the operation.
      op: the operation of the whole network, a key of `ops.OPS`; "star" by default.
      stage_ops: the operation of each stage (StarNet) or block (DemoNet), over `op`.
      dtype: computation, "float32" or "bfloat16"; logits are float32 either way.
      bn_groups: see `layers.BatchNorm`; a network without BatchNorm ignores it.
      **overrides: other attributes of the module; None keeps its default.

    Returns:
      A linen module: `init(key, x)` gives `params` and, for StarNet, `batch_stats`;
      `apply(variables, x, train=...)` gives logits.

    Raises:
      BadInput: an unknown name, setting or value; the message names the nearest right one.
    """
    base, suffix_op = _split_operation(name)
    op = op or suffix_op or "star"
    module, arguments, stages = _architecture(base)
    stage_ops = (op,) * stages if stage_ops is None else tuple(stage_ops)
    if len(stage_ops) != stages:
        raise BadInput(f"model.stage_ops: {name} has {stages} stages, not {len(stage_ops)}")
    _check("op", op, OPS)
    for value in stage_ops:
        _check("stage_ops", value, OPS)
    _check("dtype", dtype, DTYPES)

    overrides = {key: value for key, value in overrides.items() if value is not None}
    known = {field.name for field in dataclasses.fields(module)} - {"name", "parent"}
    for key in overrides.keys() - (known - arguments.keys()):
        raise BadInput(f"model: unknown setting {key!r}{nearest(key, known - arguments.keys())}")
    _check("activation", overrides.get("activation", "identity"), ACTIVATIONS)
    _check("activation_placement", overrides.get("activation_placement", "first"), PLACEMENTS)
    if "bn_groups" in known:
        overrides["bn_groups"] = bn_groups
    return module(**arguments, stage_ops=stage_ops, dtype=DTYPES[dtype], **overrides)


def reduction(name: str) -> int:
    """Image pixels per side that become one pixel of the last feature map; 0 for `demonet_2d`."""
    module, _, _ = _architecture(_split_operation(name)[0])
    return {StarNet: 32, DemoNet: PATCH, DemoNet2D: 0}[module]


def has_batch_norm(name: str) -> bool:
    """Whether the model keeps batch statistics."""
    return _architecture(_split_operation(name)[0])[0] is StarNet


def _split_operation(name: str) -> tuple[str, str | None]:
    """Name and operation; the authors' own spelling, DemoNet_d12_w192_mul, is understood."""
    base, _, suffix = name.lower().rpartition("_")
    op = "star" if suffix == "mul" else suffix
    return (base, op) if base and op in OPS else (name.lower(), None)


def _architecture(base: str) -> tuple[type[nn.Module], dict, int]:
    """The class, its fixed arguments, and how many operations `stage_ops` holds."""
    if base in STARNETS:
        return StarNet, STARNETS[base], 4
    if match := _DEMONET.fullmatch(base):
        return DemoNet, dict(width=int(match["width"])), int(match["depth"])
    if base == "demonet_2d":
        return DemoNet2D, {}, 4
    if base.startswith("demonet"):
        raise BadInput(
            f"model.name: no model {base!r}; DemoNet's names are demonet_d<depth>_w<width> "
            "(demonet_d12_w192) and demonet_2d"
        )
    raise BadInput(f"model.name: no model {base!r}{nearest(base, model_names())}")


def _check(key: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise BadInput(f"model.{key}: unknown value {value!r}{nearest(value, choices)}")
