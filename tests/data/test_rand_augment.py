"""Every operation against Pillow's own, with the arguments that timm gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from data.rand_augment import NONE, OPERATIONS, apply, rand_augment

FAST_COMPILE = {"xla_backend_optimization_level": 0}
FILL = (124, 116, 104)
HEIGHT, WIDTH = 40, 32


def photo(channels=3, seed=0):
    """A smooth image with some noise, not square, whose channels have different ranges."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 10
    waves = np.stack([np.sin(x + 2 * y), np.cos(2 * x - y), np.sin(x * y / 2)], -1)[..., :channels]
    noisy = 120 + np.array([60, 90, 30])[:channels] * waves + rng.normal(0, 8, waves.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def affine(image, *coefficients):
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=FILL)


def with_pillow(image, operation, level, sign):
    """What timm's `rand-m9-mstd0.5-inc1` does to an image; `level` is the magnitude divided by ten."""
    signed = sign * level
    enhanced = {"color": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    if operation in enhanced:
        return getattr(ImageEnhance, enhanced[operation])(image).enhance(1 + 0.9 * signed)
    add = int(level * 110)
    return {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: image.point([v & ~(2 ** (8 - (4 - int(level * 4))) - 1) for v in range(256)] * 3),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level * 256)),
        "solarize_add": lambda: image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3),
        "rotate": lambda: image.rotate(30 * signed, Image.Resampling.BILINEAR, fillcolor=FILL),
        "shear_x": lambda: affine(image, 1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda: affine(image, 1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda: affine(image, 1, 0, 0.45 * signed * WIDTH, 0, 1, 0),
        "translate_y": lambda: affine(image, 1, 0, 0, 0, 1, 0.45 * signed * HEIGHT),
    }[operation]()


@pytest.fixture(scope="module")
def compiled():
    return jax.jit(apply, compiler_options=FAST_COMPILE)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("level", "sign"), [(0.93, 1.0), (0.35, -1.0)])
def test_against_pillow(compiled, operation, level, sign):
    image = photo()
    got = np.asarray(compiled(image.astype(np.float32), OPERATIONS.index(operation), level, sign, jnp.array(FILL)))
    wanted = np.asarray(with_pillow(Image.fromarray(image), operation, level, sign), np.float32)
    off = np.abs(got - wanted)
    assert off.max() <= 1 or (operation in ("rotate", "shear_x", "shear_y") and np.mean(off > 1) < 0.01)
    assert off.mean() < 0.2
    assert not np.array_equal(got, image)


def test_an_image_of_one_value_stays_as_it_is(compiled):
    flat = np.full((HEIGHT, WIDTH, 3), 77, np.float32)
    for operation in ("auto_contrast", "equalize", "color", "contrast", "sharpness"):
        np.testing.assert_array_equal(compiled(flat, OPERATIONS.index(operation), 0.9, 1.0, jnp.array(FILL)), flat)


def test_none_changes_nothing(compiled):
    image = photo().astype(np.float32)
    np.testing.assert_array_equal(compiled(image, NONE, 0.9, 1.0, jnp.array(FILL)), image)


def test_a_batch():
    images = np.stack([photo(seed=seed) for seed in range(64)])
    run = jax.jit(rand_augment, static_argnames="layers", compiler_options=FAST_COMPILE)
    got = run(jax.random.key(0), images)
    assert got.shape == images.shape
    assert ((got >= 0) & (got <= 255) & (got == jnp.round(got))).all()
    same = (got == images).all((1, 2, 3))
    assert 6 <= same.sum() <= 30  # a quarter gets no operation in either layer
    np.testing.assert_array_equal(got, run(jax.random.key(0), images))
    assert not np.array_equal(got, run(jax.random.key(1), images))


def test_grey_images():
    images = np.stack([photo(channels=1, seed=seed) for seed in range(8)])
    got = jax.jit(rand_augment, compiler_options=FAST_COMPILE)(jax.random.key(2), images)
    assert got.shape == images.shape
    assert ((got >= 0) & (got <= 255)).all()
