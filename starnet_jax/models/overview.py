"""A short table of where a model's parameters are."""

from collections.abc import Mapping

import jax


def overview(params: Mapping) -> str:
    """One line per part and block: its name, parameters, and share of the whole.

    Args:
      params: the `params` of a model's variables, arrays or shapes.
    """
    sizes: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys = [key.key for key in path]
        depth = 2 if keys[0].startswith("stages") else 1
        name = "/".join(keys[:depth])
        sizes[name] = sizes.get(name, 0) + leaf.size
    total = sum(sizes.values())
    rows = [f"  {name:<24} {size:>12,} {size / total:7.1%}" for name, size in sizes.items()]
    return "\n".join([*rows, f"  {'all parameters':<24} {total:>12,}"])
