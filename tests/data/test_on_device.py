import jax
import jax.numpy as jnp
import numpy as np
import pytest

from starnet_jax.config import Augment
from starnet_jax.data import on_device

MIXUP = Augment(mixup=0.8, label_smoothing=0.0)
CUTMIX = Augment(cutmix=1.0, label_smoothing=0.0)
BOTH = Augment(mixup=0.8, cutmix=0.2, label_smoothing=0.0)


def mixed(augment, batch, seed=0, side=8):
    """A mixed batch whose image i is flat and whose target i is one-hot, and the original."""
    rng = np.random.default_rng(seed)
    image = rng.integers(256, size=(batch, side, side, 3), dtype=np.uint8)
    target = np.eye(batch, dtype=np.float32)
    out = jax.jit(on_device.mix, static_argnums=3)(jax.random.key(seed), image, target, augment)
    return image, *map(np.asarray, out)


def partners(batch):
    """The mirror position in each run of 256, the last run shorter."""
    starts = np.arange(batch) // 256 * 256
    return starts + np.minimum(starts + 256, batch) - 1 - np.arange(batch)


@pytest.mark.parametrize("batch", [64, 300, 512])
def test_mixup_blends_mirror_positions_with_one_weight_per_256(batch):
    image, got_image, target = mixed(MIXUP, batch)
    partner = partners(batch)
    weight = target[np.arange(batch), np.arange(batch)]
    np.testing.assert_allclose(target[np.arange(batch), partner], 1 - weight, atol=1e-6)
    for start in range(0, batch, 256):
        assert len(set(weight[start : start + 256])) == 1
    if batch == 512:
        assert weight[0] != weight[256]
    exact = image * weight[:, None, None, None] + image[partner] * (1 - weight)[:, None, None, None]
    assert np.abs(got_image - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_one_box_and_weighs_by_its_area(seed):
    image, got_image, target = mixed(CUTMIX, 6, seed)
    partner = partners(6)
    inside = (got_image != image).any(-1)
    pasted = np.where(inside[..., None], image[partner], image)
    np.testing.assert_array_equal(got_image, pasted)
    rows, columns = inside.any((0, 2)), inside.any((0, 1))
    box = rows[:, None] & columns
    assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1
    np.testing.assert_allclose(np.diag(target), 1 - box.mean(), atol=1e-6)


def test_without_mixing_nothing_changes():
    image, got_image, target = mixed(Augment(mixup=0.8, mix_prob=0.0, label_smoothing=0.0), 64)
    np.testing.assert_array_equal(got_image, image)
    np.testing.assert_array_equal(target, np.eye(64))


def test_mixing_weights_follow_the_recipe():
    """Half of the groups cut; weights are Beta distributed: mean 1/2, variance 1/(4(2a+1))."""
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    image, target = jnp.zeros((2, 64, 64, 3), jnp.uint8).at[0].set(255), jnp.eye(2)

    def draw(key):
        mixed, target_2K = on_device._mix_group(key, image, target, BOTH)
        blended = ((mixed > 0) & (mixed < 255)).any()
        return target_2K[0, 0], blended

    weight, blended = map(np.asarray, jax.jit(jax.vmap(draw))(keys))
    assert abs(blended.mean() - 0.5) < 0.03
    assert abs(weight[blended].mean() - 0.5) < 0.02
    assert abs(weight[blended].var() - 1 / (4 * 2.6)) < 0.01
    # cutmix with alpha 0.2 is nearly all or nothing, and the border takes from the box
    assert weight[~blended].mean() > 0.5


def test_erasing_boxes_follow_the_recipe():
    keys = jax.random.split(jax.random.key(1), 4000)
    inside = np.asarray(jax.jit(jax.vmap(lambda k: on_device.erase_box(k, 64, 64)))(keys))
    area = inside.mean((1, 2))
    height, width = inside.any(2).sum(1), inside.any(1).sum(1)
    drawn = area > 0
    assert drawn.mean() > 0.99
    np.testing.assert_array_equal(inside.sum((1, 2)), height * width)
    assert area[drawn].min() > 0.015 and area.max() < 0.345
    assert abs(area[drawn].mean() - (0.02 + 1 / 3) / 2) < 0.01
    aspect = np.log(height[drawn] / width[drawn])
    assert abs(aspect.mean()) < 0.05
    assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.2


def test_erasing_puts_normal_noise_into_a_quarter_of_the_images():
    image = jnp.full((2000, 16, 16, 3), 9.0)
    erased = np.asarray(jax.jit(on_device.erase, static_argnums=2)(jax.random.key(2), image, 0.25))
    changed = erased != 9.0
    share = changed.any((1, 2, 3)).mean()
    assert abs(share - 0.25) < 0.03
    noise = erased[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_plain_recipe_only_normalises_and_smooths():
    image = np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    label = np.array([0, 3, 1, 2], np.int32)
    got, target = on_device.train_inputs(jax.random.key(0), image, label, 5, Augment())
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    np.testing.assert_allclose(got, (image / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(target, 0.9 * np.eye(5)[label] + 0.02, atol=1e-6)
