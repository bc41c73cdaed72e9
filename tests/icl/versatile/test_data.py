"""The sampler has the law of drawn examples; the noise problems are what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from icl.versatile.data import interval_table, intervals, mean_square, sample_sequences, wishart_factor
from training.errors import UserError

N, D, BATCH = 7, 3, 40_000


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def sample(problem, seed=0):
    levels = jnp.asarray(interval_table([problem])[0], jnp.float64)
    return sample_sequences(jax.random.key(seed), levels, N, D, BATCH)


def test_problems():
    assert intervals("uniform:5") == ((0, 5),)
    assert intervals("levels:1,3") == ((1, 1), (3, 3))
    assert intervals("fixed:2") == ((2, 2),)
    assert mean_square("uniform:3") == pytest.approx(3)
    assert mean_square("levels:1,3,5") == pytest.approx(35 / 3)
    table = interval_table(["uniform:5", "levels:1,3", "levels:1,3,5"])
    assert table.shape == (3, 6, 2)
    assert [np.sum(table[2, :, 0] == level) for level in (1, 3, 5)] == [2, 2, 2]


@pytest.mark.parametrize("problem", ["", "uniform", "uniform:a", "uniform:1,2", "fixed:1,2", "levels:-1,2", "normal:1"])
def test_other_texts_are_errors(problem):
    with pytest.raises(UserError, match="write 'uniform:5'"):
        intervals(problem)


@pytest.mark.parametrize("problem", ["uniform:5", "levels:1,3", "fixed:2"])
def test_noise_levels(problem):
    sigma = np.asarray(sample(problem).sigma)
    if problem == "uniform:5":
        assert stats.kstest(sigma / 5, "uniform").pvalue > 1e-3
    else:
        levels = np.unique([low for low, _ in intervals(problem)])
        np.testing.assert_array_equal(np.unique(sigma), levels)
        assert np.allclose([np.mean(sigma == level) for level in levels], 1 / len(levels), atol=0.01)


def test_moments_are_those_of_drawn_examples():
    """Means and mean squares of every entry of G, and its dependence on w and sigma."""
    ours = sample("levels:1,3")
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(D, N, BATCH)), rng.normal(size=(D, BATCH))
    sigma = rng.choice([1.0, 3.0], BATCH)
    y = np.einsum("ib,inb->nb", w, x) + sigma * rng.normal(size=(N, BATCH))
    tokens = np.concatenate([x, y[None]])
    gram = np.einsum("inb,jnb->ijb", tokens, tokens)

    def statistics(g, w, sigma):
        g, w, sigma = map(np.asarray, (g, w, sigma))
        return np.concatenate([g, g**2, g * w[0] * w[1], g * sigma, g * w[0] * g[0, -1]]).reshape(-1, BATCH)

    first, second = statistics(*ours), statistics(gram, w, sigma)
    spread = np.sqrt((first.var(1) + second.var(1)) / BATCH)
    assert np.abs((first.mean(1) - second.mean(1)) / spread).max() < 4.5


@pytest.mark.parametrize(("d", "n"), [(3, 3), (3, 8), (1, 5)])
def test_wishart_factor(d, n):
    factor = np.asarray(wishart_factor(jax.random.key(2), d, n, BATCH, jnp.float64))
    assert np.all(factor[np.triu_indices(d, 1)] == 0)
    for i in range(d):
        assert stats.kstest(factor[i, i] ** 2, stats.chi2(n - i).cdf).pvalue > 1e-3
        for j in range(i):
            assert stats.kstest(factor[i, j], stats.norm.cdf).pvalue > 1e-3


def test_too_few_samples_are_an_error():
    with pytest.raises(ValueError, match="at least as many"):
        wishart_factor(jax.random.key(0), 3, 2, 1)
