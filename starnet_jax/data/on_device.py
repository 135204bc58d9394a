"""What happens to a batch on the device, inside the jitted step.

Every draw is a function of the key and the position in the global batch, never of the mesh.
"""

import jax
import jax.numpy as jnp
import numpy as np

from starnet_jax.config import Augment

# ImageNet's statistics, for every dataset, as the authors and timm do.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

MIX_GROUP = 256  # positions that share one mixing weight: the authors' batch per worker
ERASE_AREA = (0.02, 1 / 3)  # of the image
ERASE_ASPECT = (0.3, 1 / 0.3)  # height over width, log-uniform


def train_inputs(
    key: jax.Array, image_BHWC: jax.Array, label_B: jax.Array, num_classes: int, augment: Augment
) -> tuple[jax.Array, jax.Array]:
    """Mixes, normalises and erases, in the order of the authors' loader.

    Args:
      key: the randomness of this step.
      image_BHWC: uint8.
      label_B: int32.
      num_classes: K.
      augment: the settings `mixup`, `cutmix`, `mix_switch`, `mix_prob`, `erase_prob` and
        `label_smoothing`.

    Returns:
      float32 images [B,H,W,C] and soft targets [B,K].
    """
    mix_key, erase_key = jax.random.split(key)
    target_BK = soft_labels(label_B, num_classes, augment.label_smoothing)
    if augment.mixup or augment.cutmix:
        image_BHWC, target_BK = mix(mix_key, image_BHWC, target_BK, augment)
    image_BHWC = normalize(image_BHWC)
    if augment.erase_prob:
        image_BHWC = erase(erase_key, image_BHWC, augment.erase_prob)
    return image_BHWC, target_BK


def normalize(image_BHWC: jax.Array) -> jax.Array:
    """uint8 [B,H,W,3] to float32 with ImageNet's mean and deviation taken out."""
    return (image_BHWC.astype(jnp.float32) / 255 - MEAN) / STD


def soft_labels(label_B: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """int32 [B] to float32 [B,num_classes]: smoothing/K everywhere, the rest on the label."""
    one_hot = jax.nn.one_hot(label_B, num_classes)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def mix(
    key: jax.Array, image_BHWC: jax.Array, target_BK: jax.Array, augment: Augment
) -> tuple[jax.Array, jax.Array]:
    """Mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) on uint8, as timm 0.6.13 mixes.

    Each run of `MIX_GROUP` consecutive positions draws one weight and one kind; the partner of an
    image is its mirror position in the run. A shorter last run is a group of its own.
    """
    batch = image_BHWC.shape[0]
    whole = batch // MIX_GROUP * MIX_GROUP
    parts = []
    for start, stop in ((0, whole), (whole, batch)):
        if start < stop:
            size = min(MIX_GROUP, stop - start)
            groups = (stop - start) // size
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(groups))
            image = image_BHWC[start:stop].reshape(groups, size, *image_BHWC.shape[1:])
            target = target_BK[start:stop].reshape(groups, size, -1)
            image, target = jax.vmap(_mix_group, (0, 0, 0, None))(keys, image, target, augment)
            parts.append((image.reshape(-1, *image.shape[2:]), target.reshape(-1, target.shape[2])))
    images, targets = zip(*parts, strict=True)
    return jnp.concatenate(images), jnp.concatenate(targets)


def _mix_group(key, image_NHWC, target_NK, augment):
    apply_key, kind_key, weight_key, box_key = jax.random.split(key, 4)
    cut_share = (
        augment.mix_switch if augment.mixup and augment.cutmix else float(augment.cutmix > 0)
    )
    cut = jax.random.uniform(kind_key) < cut_share
    alpha = jnp.where(cut, augment.cutmix or 1.0, augment.mixup or 1.0)
    weight = jax.random.beta(weight_key, alpha, alpha)
    inside_HW, kept = cut_box(box_key, *image_NHWC.shape[1:3], weight)
    weight = jnp.where(cut, kept, weight)
    applied = jax.random.uniform(apply_key) < augment.mix_prob
    weight = jnp.where(applied, weight, 1.0)

    partner_NHWC, partner_NK = image_NHWC[::-1], target_NK[::-1]
    blend = image_NHWC.astype(jnp.float32) * weight + partner_NHWC * (1 - weight)
    pasted = jnp.where(inside_HW[..., None], partner_NHWC, image_NHWC)
    mixed = jnp.where(cut, pasted, jnp.round(blend).astype(jnp.uint8))
    mixed = jnp.where(applied, mixed, image_NHWC)
    return mixed, target_NK * weight + partner_NK * (1 - weight)


def cut_box(
    key: jax.Array, height: int, width: int, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws CutMix's box for the mixing weight `weight`, float32 [].

    Returns:
      Which pixels lie inside, bool [H,W], and the share outside, which replaces the weight: the box
      loses what the border cuts off.
    """
    ratio = jnp.sqrt(1 - weight)
    keys = jax.random.split(key)
    inside = []
    for axis_key, size in zip(keys, (height, width), strict=True):
        half = (size * ratio).astype(jnp.int32) // 2
        centre = jax.random.randint(axis_key, (), 0, size)
        place = jnp.arange(size)
        inside.append((place >= centre - half) & (place < centre + half))
    inside_HW = inside[0][:, None] & inside[1]
    return inside_HW, 1 - inside_HW.mean(dtype=jnp.float32)


def erase(key: jax.Array, image_BHWC: jax.Array, probability: float) -> jax.Array:
    """Random erasing (Zhong et al., 2020), pixel mode: normal noise in one box of some images."""
    batch, height, width, _ = image_BHWC.shape
    apply_key, box_key, noise_key = jax.random.split(key, 3)
    applied_B = jax.random.uniform(apply_key, (batch,)) < probability
    box_keys = jax.random.split(box_key, batch)
    inside_BHW = jax.vmap(erase_box, (0, None, None))(box_keys, height, width)
    noise_BHWC = jax.random.normal(noise_key, image_BHWC.shape, image_BHWC.dtype)
    erased_BHW = inside_BHW & applied_B[:, None, None]
    return jnp.where(erased_BHW[..., None], noise_BHWC, image_BHWC)


def erase_box(key: jax.Array, height: int, width: int) -> jax.Array:
    """Draws one box, bool [H,W]: the first of ten tries that fits, else none, as timm 0.6.13."""
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    tries = (10,)
    area = jax.random.uniform(area_key, tries, minval=ERASE_AREA[0], maxval=ERASE_AREA[1])
    area = area * height * width
    low, high = np.log(ERASE_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits)
    h, w, fits = h[first], w[first], fits[first]
    top = jax.random.randint(top_key, (), 0, jnp.maximum(height - h, 0) + 1)
    left = jax.random.randint(left_key, (), 0, jnp.maximum(width - w, 0) + 1)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (row >= top) & (row < top + h) & (column >= left) & (column < left + w)
    return inside & fits
