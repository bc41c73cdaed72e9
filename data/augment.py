"""Augmentation of batches of images on the device: pure functions of a key.

Images are `[batch, height, width, channels]`, scaled to zero mean and unit variance where nothing else is said. The
ranges are those of DeiT (Touvron et al. 2021), as timm implements them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from data.rand_augment import rand_augment


class Moments(NamedTuple):
    """Mean and standard deviation of each channel over a training set, in units of a pixel's values, 0 to 255."""

    mean: jax.Array
    deviation: jax.Array

    def scaled(self, images: jax.Array) -> jax.Array:
        """Images with zero mean and unit variance, in float32."""
        return (images.astype(jnp.float32) - self.mean) / self.deviation


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What happens to a training batch, in this order; zeros leave a step out.

    Args:
      crop: pixels by which a crop may be off its place.
      resized_crop: least share of the area that a crop keeps; it is scaled back to the size of the image.
      flip: whether half of the images are mirrored, left to right.
      rand_layers: operations of RandAugment.
      rand_magnitude: their mean strength, of ten.
      rand_deviation: its standard deviation.
      jitter: of brightness, contrast and saturation. DeiT leaves it out where there is RandAugment.
      erase: the share of images in which a rectangle is erased.
      mixup: parameter of mixup's Beta distribution.
      cutmix: parameter of cutmix's.
      smoothing: of the labels.
    """

    crop: int = 0
    resized_crop: float = 0.0
    flip: bool = True
    rand_layers: int = 0
    rand_magnitude: float = 9.0
    rand_deviation: float = 0.5
    jitter: float = 0.0
    erase: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    smoothing: float = 0.1

    def apply(
        self, key: jax.Array, images: jax.Array, labels: jax.Array, classes: int, moments: Moments, dtype: jnp.dtype
    ) -> tuple[jax.Array, jax.Array]:
        """A training batch of images as the model sees them, and the probabilities of the classes it should give.

        Args:
          key: of all draws.
          images: `[batch, height, width, channels]`, uint8.
          labels: `[batch]`.
          classes: how many there are.
          moments: of the training set.
          dtype: of the images that are returned.

        Returns:
          Images of the same shape, scaled, and float32 targets `[batch, classes]`.
        """
        steps = ("crop", "resize", "flip", "rand", "jitter", "erase", "mix")
        keys = dict(zip(steps, jax.random.split(key, len(steps)), strict=True))
        images = crop(keys["crop"], images, self.crop) if self.crop else images
        images = resized_crop(keys["resize"], images, self.resized_crop) if self.resized_crop else images
        images = flip(keys["flip"], images) if self.flip else images
        if self.rand_layers:
            strength = self.rand_magnitude, self.rand_deviation
            images = rand_augment(keys["rand"], images, self.rand_layers, *strength, fill=moments.mean)
        images = moments.scaled(images).astype(dtype)
        images = jitter(keys["jitter"], images, self.jitter) if self.jitter else images
        images = erase(keys["erase"], images, self.erase) if self.erase else images
        targets = jax.nn.one_hot(labels, classes) * (1 - self.smoothing) + self.smoothing / classes
        return mix(keys["mix"], images, targets, self.mixup, self.cutmix)


def crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Cuts each image out of its mirrored surroundings, up to `padding` pixels off its place."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def one(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(one)(padded, offsets)


def resized_crop(key: jax.Array, images: jax.Array, least: float) -> jax.Array:
    """A random part of each image, scaled to the size of the whole, with cubic interpolation.

    The part has a share of the area between `least` and 1 and a ratio of its sides between 3/4 and 4/3. Of ten draws
    the first that lies inside the image is taken; if there is none, the whole image.

    Args:
      key: of the draws.
      images: values from 0 to 255, any dtype.
      least: share of the area.

    Returns:
      float32, whole values from 0 to 255.
    """
    height, width = images.shape[1:3]

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        size, place = jax.random.split(key)
        sides, fits = _rectangles(size, (10,), (height, width), (least, 1.0), (3 / 4, 4 / 3))
        first = sides[jnp.argmax(fits)]
        part = jnp.where(fits.any(), first, jnp.array([height, width]))
        start = jnp.floor(jax.random.uniform(place, (2,)) * (jnp.array([height, width]) - part + 1))
        scale = jnp.array([height, width]) / part
        move = -start * scale
        resized = jax.image.scale_and_translate(image, image.shape, (0, 1), scale, move, "cubic")
        return jnp.round(jnp.clip(resized, 0, 255))

    return jax.vmap(one)(jax.random.split(key, len(images)), images.astype(jnp.float32))


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

    The rectangle has 2 % to a third of the area and a ratio of its sides of 0.3 to 3.3. Of ten draws the first that is
    smaller than the image is taken; if there is none, the image stays as it is.
    """
    chosen, size, place, noise = jax.random.split(key, 4)
    batch, height, width = images.shape[:3]
    bounds = jnp.array([height, width])
    drawn, fits = _rectangles(size, (batch, 10), (height, width), (0.02, 1 / 3), (0.3, 1 / 0.3))
    fits &= (drawn < bounds).all(-1)
    sides = jnp.take_along_axis(drawn, jnp.argmax(fits, 1)[:, None, None], 1)[:, 0]
    start = jnp.floor(jax.random.uniform(place, (batch, 2)) * (bounds - sides + 1))
    inside = _rectangle(start + sides / 2, sides / 2, height, width) & fits.any(1)[:, None, None]
    inside &= jax.random.bernoulli(chosen, probability, (batch, 1, 1))
    return jnp.where(inside[..., None], jax.random.normal(noise, images.shape, images.dtype), images)


def _rectangles(
    key: jax.Array,
    shape: tuple[int, ...],
    size: tuple[int, int],
    area: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Sides of random rectangles in whole pixels, `[*shape, 2]`, and which of them fit into an image of that size.

    Args:
      key: of the draws.
      shape: of the array of rectangles.
      size: height and width of the image.
      area: bounds of the share of the image's area, which is uniform.
      ratio: bounds of width by height, whose logarithm is uniform.
    """
    of_area, of_ratio = jax.random.split(key)
    pixels = jax.random.uniform(of_area, shape, minval=area[0], maxval=area[1]) * size[0] * size[1]
    logs = jax.random.uniform(of_ratio, shape, minval=jnp.log(ratio[0]), maxval=jnp.log(ratio[1]))
    root = jnp.exp(logs / 2)
    sides = jnp.round(jnp.stack([jnp.sqrt(pixels) / root, jnp.sqrt(pixels) * root], -1))
    return sides, ((sides >= 1) & (sides <= jnp.array(size))).all(-1)


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
