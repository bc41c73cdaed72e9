import jax
import jax.numpy as jnp
import numpy as np

from data import augment

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


def test_erase_leaves_the_rest():
    x = jnp.zeros((400, 32, 32, 1))
    erased = np.asarray(jax.jit(augment.erase)(KEY, x, 0.25) != 0)[..., 0]
    share = erased.mean((1, 2))
    assert 70 < (share > 0).sum() < 130
    assert share.max() < 0.36
    assert not np.asarray(augment.erase(KEY, x, 0.0)).any()


def test_mix():
    targets = jax.nn.one_hot(jnp.arange(64), 64)
    run = jax.jit(augment.mix, static_argnums=(3, 4))
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
