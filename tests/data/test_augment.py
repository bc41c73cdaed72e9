from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from data import augment

FAST_COMPILE = {"xla_backend_optimization_level": 0}
KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (64, 8, 6, 3))


def test_crop_moves_an_image_by_at_most_the_padding():
    x = jnp.zeros((32, 9, 9, 1)).at[:, 4, 4].set(1)
    rows, columns = np.nonzero(np.asarray(jax.jit(augment.crop, static_argnums=2)(KEY, x, 2)).sum((0, 3)))
    assert set(rows) | set(columns) == {2, 3, 4, 5, 6}
    np.testing.assert_array_equal(augment.crop(KEY, IMAGES, 0), IMAGES)


def test_flip_mirrors_about_half():
    y = np.asarray(augment.flip(KEY, IMAGES))
    kept = (y == IMAGES).all((1, 2, 3))
    assert 16 < kept.sum() < 48
    np.testing.assert_array_equal(y[~kept], np.asarray(IMAGES[:, :, ::-1])[~kept])


def test_jitter_of_no_strength_changes_nothing():
    np.testing.assert_allclose(augment.jitter(KEY, IMAGES, 0.0), IMAGES, atol=1e-6)
    assert jnp.abs(augment.jitter(KEY, IMAGES, 0.3) - IMAGES).mean() > 0.05


def test_erase_fills_one_rectangle_inside_some_images():
    x = jnp.zeros((400, 32, 24, 1))
    run = jax.jit(augment.erase, compiler_options=FAST_COMPILE)
    erased = np.asarray(run(KEY, x, 0.25) != 0)[..., 0]
    share = erased.mean((1, 2))
    assert 70 < (share > 0).sum() < 130
    assert share[share > 0].min() > 0.01
    assert share.max() < 0.36
    for one in erased[share > 0]:
        rows, columns = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.2 < len(columns) / len(rows) < 5
    assert not np.asarray(run(KEY, x, 0.0)).any()


def test_a_resized_crop_is_a_part_of_the_image():
    y, x = np.mgrid[:24, :32].astype(np.float32)
    ramps = jnp.asarray(np.stack([8 * x, 8 * y], -1)).repeat(50, 0).reshape(24, 50, 32, 2).transpose(1, 0, 2, 3)
    got = np.asarray(jax.jit(augment.resized_crop, static_argnums=2, compiler_options=FAST_COMPILE)(KEY, ramps, 0.08))
    assert got.shape == ramps.shape
    across = (got[:, 12, 24, 0] - got[:, 12, 8, 0]) / 16 / 8  # a crop stretches: the slope is its share of the width
    down = (got[:, 18, 16, 1] - got[:, 6, 16, 1]) / 12 / 8
    assert ((across > 0.1) & (across <= 1.02) & (down > 0.1) & (down <= 1.02)).all()
    area = across * down
    assert area.min() < 0.3 < 0.6 < area.max()
    ratio = across * 32 / (down * 24)
    assert 0.6 < ratio.min() < 0.9 < 1.1 < ratio.max() < 1.5
    np.testing.assert_allclose(got[:, 5, 7, 1], got[:, 5, 20, 1], atol=1)  # no rotation


def test_a_recipe_of_nothing_only_scales():
    nothing = augment.Recipe(flip=False, erase=0, mixup=0, cutmix=0, smoothing=0)
    images = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.uint8).reshape(2, 4, 4, 3)
    moments = augment.Moments(jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 4.0, 8.0]))
    got, targets = nothing.apply(KEY, images, jnp.array([1, 0]), 3, moments, jnp.float32)
    np.testing.assert_allclose(got, (images.astype(jnp.float32) - moments.mean) / moments.deviation)
    np.testing.assert_array_equal(targets, [[0, 1, 0], [1, 0, 0]])


def test_deits_recipe_gives_probabilities_and_images_of_every_kind():
    recipe = augment.Recipe(resized_crop=0.08, rand_layers=2)
    images = jax.random.randint(KEY, (16, 16, 16, 3), 0, 256).astype(jnp.uint8)
    moments = augment.Moments(jnp.full(3, 128.0), jnp.full(3, 64.0))

    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(key):
        return recipe.apply(key, images, jnp.arange(16) % 4, 4, moments, jnp.bfloat16)

    got, targets = run(KEY)
    assert got.shape == images.shape
    assert got.dtype == jnp.bfloat16
    assert jnp.isfinite(got).all()
    np.testing.assert_allclose(targets.sum(-1), 1, atol=1e-6)
    assert targets.min() >= 0.1 / 4 - 1e-6
    assert not jnp.array_equal(got, run(jax.random.key(5))[0])


def test_mix():
    targets = jax.nn.one_hot(jnp.arange(64), 64)
    run = jax.jit(augment.mix, static_argnums=(3, 4), compiler_options=FAST_COMPILE)
    blended, shares = run(KEY, IMAGES, targets, 0.8, 0.0)
    kept = shares[0, 0]
    np.testing.assert_allclose(blended, kept * IMAGES + (1 - kept) * IMAGES[::-1], atol=1e-5)
    cut, shares = run(KEY, IMAGES, targets, 0.0, 1.0)
    unchanged = (cut == IMAGES).all(-1)
    np.testing.assert_allclose(unchanged.mean((1, 2)), shares[0, 0], atol=1e-6)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-6)
    same, same_targets = run(KEY, IMAGES, targets, 0.0, 0.0)
    np.testing.assert_array_equal(same, IMAGES)
    np.testing.assert_array_equal(same_targets, targets)
