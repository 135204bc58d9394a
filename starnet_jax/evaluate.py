"""Exact evaluation: every example counts once, whatever the batch and the number of hosts."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from starnet_jax import mesh as mesh_lib
from starnet_jax.data.source import Source


def evaluate(
    eval_step: Callable,
    weights: dict[str, dict],
    batches: Iterable,
    mesh: Mesh,
    source: Source,
    num_classes: int,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[str, float] | None:
    """Runs `eval_step` over all batches of `source`, for several sets of weights at once.

    Args:
      eval_step: `train_step.Steps.evaluate`.
      weights: prefix of the metrics' names to variables.
      batches: of `pipeline.eval_batches`.
      mesh: where they go.
      source: what they are made of.
      num_classes: of the model.
      go_on: asked after every batch.

    Returns:
      For each prefix `top1` and `top5` as fractions and mean `loss`; and `eval/count`. None if
      `go_on` said no.

    Raises:
      RuntimeError: not every example was counted exactly once.
    """
    classes_K = np.ones(num_classes, bool)
    if source.classes is not None:  # a test set of some of the classes: only these compete
        classes_K[:] = False
        classes_K[source.classes] = True
    sums = []
    for batch in batches:
        batch = mesh_lib.put(batch, mesh)
        sums.append({name: eval_step(v, batch, classes_K) for name, v in weights.items()})
        if not go_on():
            return None
    totals = jax.tree.map(
        lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(sums)
    )
    measured = {}
    for prefix, total in totals.items():
        count = round(total.pop("count"))
        if count != len(source):
            raise RuntimeError(f"evaluation counted {count} of {len(source)} examples")
        measured |= {prefix + key: value / count for key, value in total.items()}
    return measured | {"eval/count": len(source)}
