"""The authors' PyTorch state dicts to Flax variables and back, exactly; needs no PyTorch."""

import re
from collections.abc import Mapping

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np

from starnet_jax.errors import BadInput
from starnet_jax.models import create_model, reduction

# The last part of a name, Flax to PyTorch.
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "gamma": "gamma",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # PyTorch counts BatchNorm's updates; nothing here reads it


def from_torch(name: str, state_dict: Mapping[str, np.ndarray]) -> dict:
    """Turns a PyTorch state dict into the variables of the model `name`.

    Args:
      name: as in `create_model`; the number of classes is read from `head.weight`.
      state_dict: arrays (or CPU tensors) under the authors' keys.

    Returns:
      `{"params": ..., "batch_stats": ...}` in float32 NumPy; without `batch_stats` where the model
      has no BatchNorm.

    Raises:
      BadInput: missing, unknown or misshapen entries; one line that names the first few.
    """
    arrays = {k: np.asarray(v) for k, v in state_dict.items() if not k.endswith(_COUNTER)}
    num_classes = arrays["head.bias"].size if "head.bias" in arrays else None
    template = _template(name, num_classes)
    keys = {path: torch_key(path) for path in template}
    _check(name, template, keys, arrays)
    flat = {path: _to_flax(arrays[keys[path]], leaf.ndim) for path, leaf in template.items()}
    return traverse.unflatten_dict(flat)


def to_torch(name: str, variables: Mapping) -> dict[str, np.ndarray]:
    """Turns the variables of the model `name` into a PyTorch state dict of NumPy arrays.

    The keys are the authors', BatchNorm counters (int64 zeros) included; `from_torch` of the result
    gives the same bits.
    """
    flat = traverse.flatten_dict(dict(variables))
    flat = {path: np.asarray(leaf) for path, leaf in flat.items()}
    template = _template(name, flat[("params", "head", "bias")].size)
    state_dict = {}
    for path in template:
        key = torch_key(path)
        state_dict[key] = _to_torch(flat[path], pointwise=_is_pointwise(path))
        if path[-1] == "var":
            state_dict[key.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return state_dict


def torch_key(path: tuple[str, ...]) -> str:
    """`(params, stages_0, blocks_1, f1, conv, kernel)` to `stages.0.2.f1.conv.weight`."""
    parts = []
    for part in path[1:-1]:
        index = re.fullmatch(r"(stages|blocks)_(\d+)", part)
        if part == "stem" and path[2] in ("conv", "bn"):
            parts += ["stem", "0"]
        elif part == "downsample":
            parts.append("0")
        elif index and index[1] == "blocks" and "stages" in path[1]:
            parts.append(str(int(index[2]) + 1))  # the downsampler is the stage's entry 0
        elif index:
            parts += [index[1], index[2]]
        else:
            parts.append(part)
    return ".".join([*parts, _LEAVES[path[-1]]])


def _template(name: str, num_classes: int | None) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    side = reduction(name)
    x = jnp.zeros((1, side, side, 3) if side else (1, 2))
    model = create_model(name, num_classes=num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return traverse.flatten_dict(variables)


def _check(name, template, keys, arrays) -> None:
    missing = [key for key in keys.values() if key not in arrays]
    unknown = [key for key in arrays if key not in keys.values()]
    misshapen = []
    for path, leaf in template.items():
        if keys[path] in arrays:
            shape = arrays[keys[path]].shape
            expected = _torch_shape(path, leaf.shape)
            if shape != expected:
                misshapen.append(f"{keys[path]} {list(shape)} for {list(expected)}")
    problems = dict(missing=missing, unknown=unknown, misshapen=misshapen)
    found = [
        f"{len(v)} {kind} ({', '.join(v[:3])}{', ...' if v[3:] else ''})"
        for kind, v in problems.items()
        if v
    ]
    if found:
        raise BadInput(f"the weights do not fit {name}: {'; '.join(found)}")


def _is_pointwise(path: tuple[str, ...]) -> bool:
    return path[-3:] in [(block, "conv", "kernel") for block in ("f1", "f2", "g")]


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch(np.broadcast_to(np.float32(0), shape), _is_pointwise(path)).shape


def _to_flax(array: np.ndarray, ndim: int) -> np.ndarray:
    """[out,in,kh,kw] to [kh,kw,in,out], [out,in(,1,1)] to [in,out]; vectors stay."""
    if ndim == 4:
        array = array.transpose(2, 3, 1, 0)
    elif ndim == 2:
        array = array.reshape(array.shape[:2]).T
    return np.ascontiguousarray(array, np.float32)


def _to_torch(array: np.ndarray, pointwise: bool) -> np.ndarray:
    """The inverse of `_to_flax`; a pointwise kernel [in,out] becomes [out,in,1,1]."""
    if array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    if array.ndim == 2:
        return np.ascontiguousarray(array.T[:, :, None, None] if pointwise else array.T)
    return array
