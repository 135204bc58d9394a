"""Which training example stands at which place of which step: arithmetic, no state."""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """The permutation of all examples that epoch `epoch` visits, int64 [num_examples]."""
    return np.random.default_rng([seed, epoch]).permutation(num_examples)


def step_indices(seed: int, step: int, batch_size: int, num_examples: int) -> np.ndarray:
    """The examples of the global batch of step `step`, int64 [batch_size].

    A function of the arguments alone: hosts, prefetching and restarts do not enter. Every epoch
    visits every example at most once; its last partial batch is dropped, as the authors do.
    """
    steps_per_epoch = num_examples // batch_size
    epoch, position = divmod(step, steps_per_epoch)
    start = position * batch_size
    return epoch_order(seed, epoch, num_examples)[start : start + batch_size]


def example_rng(seed: int, step: int, position: int) -> np.random.Generator:
    """The random stream of the augmentation at one place of one step."""
    return np.random.default_rng([seed, step, position, 1])
