"""Augmentation of batches of images on the device: pure functions of a key.

Images are `[batch, height, width, channels]`, scaled to zero mean and unit variance. The ranges are those of DeiT
(Touvron et al. 2021), as timm implements them.
"""

import jax
import jax.numpy as jnp


def crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Cuts each image out of its mirrored surroundings, up to `padding` pixels off its place."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def one(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(one)(padded, offsets)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors half of the images, left to right."""
    return jnp.where(jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1)), images[:, :, ::-1], images)


def jitter(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and (of colour images) saturation of each image by up to `strength`."""
    factors = jax.random.uniform(key, (3, len(images), 1, 1, 1), images.dtype, -strength, strength)
    images = images + factors[0]  # in units of the standard deviation of the data
    mean = images.mean((1, 2, 3), keepdims=True)
    images = mean + (1 + factors[1]) * (images - mean)
    grey = images.mean(-1, keepdims=True)
    return grey + (1 + factors[2]) * (images - grey)


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills a random rectangle of some of the images with noise, a pixel at a time.

    The rectangle has 2 % to 33 % of the area and a ratio of its sides of 0.3 to 3.3; it is cut at the border.
    """
    chosen, area, ratio, place, noise = jax.random.split(key, 5)
    batch, height, width = images.shape[:3]
    pixels = jax.random.uniform(area, (batch,), minval=0.02, maxval=0.33) * height * width
    sides = jnp.exp(jax.random.uniform(ratio, (batch,), minval=jnp.log(0.3), maxval=jnp.log(3.3)) / 2)
    half = jnp.stack([jnp.sqrt(pixels) * sides, jnp.sqrt(pixels) / sides], -1) / 2
    centre = jax.random.uniform(place, (batch, 2)) * jnp.array([height, width])
    inside = _rectangle(centre, half, height, width)
    inside &= jax.random.bernoulli(chosen, probability, (batch, 1, 1))
    return jnp.where(inside[..., None], jax.random.normal(noise, images.shape, images.dtype), images)


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each image with its mirror image in the batch, by mixup or, as often, by cutmix; one share for the batch.

    Args:
      key: of the share, the choice and the place.
      images: a batch.
      targets: probabilities `[batch, classes]`, mixed in the same proportion.
      mixup: parameter of the symmetric Beta distribution of mixup's share; 0 leaves mixup out.
      cutmix: likewise; 0 leaves cutmix out.
    """
    if not (mixup or cutmix):
        return images, targets
    choice, share, place = jax.random.split(key, 3)
    cut = jax.random.bernoulli(choice, 0.5) if mixup and cutmix else jnp.bool_(cutmix > 0)
    alpha = jnp.where(cut, cutmix or mixup, mixup or cutmix)
    kept = jax.random.beta(share, alpha, alpha)
    height, width = images.shape[1:3]
    size = jnp.array([height, width])
    half = jnp.sqrt(1 - kept) * size / 2
    inside = _rectangle((jax.random.uniform(place, (2,)) * size)[None], half[None], height, width)[..., None]
    blended = kept.astype(images.dtype) * images + (1 - kept).astype(images.dtype) * images[::-1]
    mixed = jnp.where(cut, jnp.where(inside, images[::-1], images), blended)
    kept = jnp.where(cut, 1 - inside.mean(), kept)
    return mixed, (kept * targets + (1 - kept) * targets[::-1]).astype(targets.dtype)


def _rectangle(centre: jax.Array, half: jax.Array, height: int, width: int) -> jax.Array:
    """Where pixels lie inside, `[batch, height, width]`, for centres and half sides `[batch, 2]` in pixels."""
    rows = jnp.abs(jnp.arange(height) + 0.5 - centre[:, :1]) < half[:, :1]
    columns = jnp.abs(jnp.arange(width) + 0.5 - centre[:, 1:]) < half[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
