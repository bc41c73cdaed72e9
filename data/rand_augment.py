"""RandAugment (Cubuk et al. 2020) on the device, with the operations and ranges of timm's `rand-m9-mstd0.5-inc1`.

That is the recipe of DeiT (Touvron et al. 2021): of each image, `layers` times, one of `OPERATIONS` drawn at random is
applied with probability one half, at a strength near `magnitude` out of ten. Images are `[height, width, channels]`
with whole values from 0 to 255, in float32; each operation does what Pillow's does, to the rounding.

An image gets one of fifteen operations, and under `vmap` all of them would be computed. They are therefore put in three
families, each computed once for all its members: tables of the 256 values, mixtures with a degenerate image, and affine
maps of the plane (here with linear interpolation; timm draws between that and cubic).
"""

import jax
import jax.numpy as jnp

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
NONE = len(OPERATIONS)
"""The number of the operation that changes nothing."""

_TABLES, _MIXTURES, _MAPS = OPERATIONS[:6], OPERATIONS[6:10], OPERATIONS[10:]
_VALUES = 256


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    layers: int = 2,
    magnitude: float = 9.0,
    deviation: float = 0.5,
    fill: jax.Array | float = 128.0,
) -> jax.Array:
    """Images `[batch, height, width, channels]`, each changed in its own way.

    Args:
      key: of the draws.
      images: whole values from 0 to 255, any dtype.
      layers: operations that an image may get.
      magnitude: mean strength, of ten.
      deviation: of the strength.
      fill: value, or values of the channels, of what an affine map brings in from outside.

    Returns:
      float32, whole values from 0 to 255.
    """

    def layer(image: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        which, skip, strength, sign = jax.random.split(key, 4)
        operation = jnp.where(jax.random.bernoulli(skip), NONE, jax.random.randint(which, (), 0, NONE))
        level = jnp.clip(magnitude + deviation * jax.random.normal(strength), 0, 10) / 10
        return apply(image, operation, level, jax.random.rademacher(sign, (), jnp.float32), fill), None

    def one(key: jax.Array, image: jax.Array) -> jax.Array:
        return jax.lax.scan(layer, image, jax.random.split(key, layers))[0]

    return jax.vmap(one)(jax.random.split(key, len(images)), images.astype(jnp.float32))


def apply(
    image: jax.Array, operation: jax.Array, level: jax.Array, sign: jax.Array, fill: jax.Array | float
) -> jax.Array:
    """The image after operation number `operation`, at a strength `level` from 0 to 1 in the direction of `sign`."""
    image = _looked_up(image, operation, level)
    image = _mixed(image, operation - len(_TABLES), 1 + 0.9 * sign * level)
    return _warped(image, operation - len(_TABLES) - len(_MIXTURES), sign * level, fill)


def _looked_up(image: jax.Array, operation: jax.Array, level: jax.Array) -> jax.Array:
    """Operations that replace each value by another; operations of other families leave the image as it is."""
    values, channels = jnp.arange(_VALUES, dtype=jnp.float32), image.shape[-1]
    whole = image.astype(jnp.int32)
    counts = jax.vmap(lambda x: jnp.zeros(_VALUES, jnp.int32).at[x].add(1), in_axes=-1)(whole.reshape(-1, channels))
    step = 2.0 ** (8 - (4 - jnp.floor(level * 4)))  # posterizing keeps this many bits: fewer at higher strength
    threshold = 256 - jnp.floor(level * 256)
    added = jnp.minimum(values + jnp.floor(level * 110), 255)
    shared = (
        255 - values,
        jnp.floor(values / step) * step,
        jnp.where(values < threshold, values, 255 - values),
        jnp.where(values < 128, added, values),
        values,
    )
    tables = jnp.concatenate(
        [_auto_contrast(counts, values)[None], _equalize(counts, values)[None]]
        + [jnp.broadcast_to(table, (1, channels, _VALUES)) for table in shared]
    )
    table = tables[jnp.minimum(operation, len(_TABLES))]
    return jnp.stack([table[channel][whole[..., channel]] for channel in range(channels)], -1)


def _auto_contrast(counts: jax.Array, values: jax.Array) -> jax.Array:
    """Tables `[channels, 256]` that stretch each channel to the full range."""
    seen = counts > 0
    low = jnp.min(jnp.where(seen, values, _VALUES), -1, keepdims=True)
    high = jnp.max(jnp.where(seen, values, -1), -1, keepdims=True)
    scale = 255 / jnp.maximum(high - low, 1)
    return jnp.where(high > low, jnp.clip(jnp.floor(values * scale - low * scale), 0, 255), values)


def _equalize(counts: jax.Array, values: jax.Array) -> jax.Array:
    """Tables `[channels, 256]` that give each channel an even distribution of values."""
    last = jnp.max(jnp.where(counts > 0, values, -1), -1).astype(jnp.int32)
    of_last = jnp.take_along_axis(counts, last[:, None], -1)
    step = (counts.sum(-1, keepdims=True) - of_last) // 255
    before = jnp.cumsum(counts, -1) - counts
    table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, table, values)


def _mixed(image: jax.Array, operation: jax.Array, factor: jax.Array) -> jax.Array:
    """Operations that move an image away from a degenerate one, or towards it; others leave it as it is."""
    if image.shape[-1] == 3:  # the luma of ITU-R 601, in whole thousandths
        grey = jnp.floor((image @ jnp.array([299.0, 587.0, 114.0]) + 500) / 1000)[..., None]
    else:
        grey = image
    degenerate = jnp.stack(
        [
            jnp.broadcast_to(grey, image.shape),
            jnp.broadcast_to(jnp.floor(grey.mean() + 0.5), image.shape),
            jnp.zeros_like(image),
            _smooth(image),
        ]
    )[jnp.clip(operation, 0, len(_MIXTURES) - 1)]
    mixed = jnp.floor(jnp.clip(degenerate + factor * (image - degenerate), 0, 255))
    return jnp.where((operation >= 0) & (operation < len(_MIXTURES)), mixed, image)


def _smooth(image: jax.Array) -> jax.Array:
    """A mean over each pixel's neighbourhood, the pixel itself five times; the image's border stays as it is."""
    height, width = image.shape[:2]
    rows = image[:-2] + image[1:-1] + image[2:]
    inner = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * image[1:-1, 1:-1]
    return image.at[1 : height - 1, 1 : width - 1].set(jnp.floor(inner / 13 + 0.5))


def _warped(image: jax.Array, operation: jax.Array, amount: jax.Array, fill: jax.Array | float) -> jax.Array:
    """Operations that move pixels; others leave the image as it is.

    `matrix` and `shift` map the place of a pixel, from the centre of the image, to where its value comes from.
    """
    height, width, channels = image.shape
    angle = amount * jnp.pi * 30 / 180
    zero, shear, moved = jnp.zeros_like(amount), 0.3 * amount, 0.45 * amount
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    parameters = jnp.array(  # of x and y: what x counts, what y counts, shift
        [
            [cos, -sin, zero, sin, cos, zero],
            [1, shear, shear * height / 2, 0, 1, 0],  # shears keep the first row, or column, where it is
            [1, 0, 0, shear, 1, shear * width / 2],
            [1, 0, moved * width, 0, 1, 0],
            [1, 0, 0, 0, 1, moved * height],
        ]
    )[jnp.clip(operation, 0, len(_MAPS) - 1)]
    x = jnp.arange(width) + 0.5 - width / 2
    y = (jnp.arange(height) + 0.5 - height / 2)[:, None]
    from_x = parameters[0] * x + parameters[1] * y + parameters[2] + width / 2
    from_y = parameters[3] * x + parameters[4] * y + parameters[5] + height / 2
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
    right_share, bottom_share = (from_x - 0.5 - left)[..., None], (from_y - 0.5 - top)[..., None]

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        rows, columns = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
        return image[rows.astype(jnp.int32), columns.astype(jnp.int32)]

    upper = (1 - right_share) * at(top, left) + right_share * at(top, left + 1)
    lower = (1 - right_share) * at(top + 1, left) + right_share * at(top + 1, left + 1)
    found = jnp.floor((1 - bottom_share) * upper + bottom_share * lower + 1e-3)  # whole values lose nothing to rounding
    outside = jnp.round(jnp.broadcast_to(jnp.asarray(fill, jnp.float32), (channels,)))
    moves = (operation >= 0) & (operation < len(_MAPS))
    return jnp.where(moves, jnp.where(inside[..., None], found, outside), image)
