import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from starnet_jax.data import order


@given(st.integers(0, 5), st.integers(0, 3), st.integers(1, 60), st.integers(1, 20))
def test_an_epoch_visits_every_example_at_most_once_and_drops_the_last_partial_batch(
    seed, epoch, num_examples, batch_size
):
    per_epoch = num_examples // batch_size
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    seen = [i for s in steps for i in order.step_indices(seed, s, batch_size, num_examples)]
    assert len(seen) == per_epoch * batch_size
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(num_examples))


def test_order_depends_on_seed_and_epoch():
    orders = {tuple(order.epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_same_step_gives_the_same_examples_whatever_was_asked_before():
    alone = order.step_indices(7, 123, 16, 100)
    for step in (0, 5, 600, 12):
        order.step_indices(7, step, 16, 100)
    np.testing.assert_array_equal(order.step_indices(7, 123, 16, 100), alone)


def test_augmentation_differs_between_places_steps_and_seeds():
    draws = {
        order.example_rng(seed, step, position).integers(1 << 62)
        for seed in range(3)
        for step in range(3)
        for position in range(3)
    }
    assert len(draws) == 27
