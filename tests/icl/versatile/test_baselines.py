"""Spectral ridge regression against the normal equations, and the tuned constants against known ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.versatile import baselines
from icl.versatile.data import interval_table, sample_sequences

N, D = 20, 10


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def sample(problem, count, seed=0):
    levels = jnp.asarray(interval_table([problem])[0], jnp.float64)
    return sample_sequences(jax.random.key(seed), levels, N, D, count)


def test_losses_are_those_of_the_normal_equations():
    sequences = sample("uniform:5", 5)
    prompts = baselines.spectral(sequences)
    tuned = baselines.Tuned(8.0, 1.3, 18.0)
    found = baselines.baseline_losses(prompts, tuned, N) | {"oracle": baselines.oracle_losses(prompts)}
    for i in range(5):
        gram, w = np.asarray(sequences.gram[..., i]), np.asarray(sequences.w[:, i])
        sigma, alpha = gram[:-1, :-1], gram[:-1, -1]
        residual = gram[-1, -1] - alpha @ np.linalg.solve(sigma, alpha)
        estimate = residual / (N - D)
        variances = {
            "ConstRR": 8.0,
            "AdaRR": estimate,
            "TunedRR": min(1.3 * estimate, 18.0),
            "oracle": float(sequences.sigma[i]) ** 2,
        }
        for name, variance in variances.items():
            solution = np.linalg.solve(sigma + variance * np.eye(D), alpha)
            assert found[name][i] == pytest.approx(0.5 * np.sum((solution - w) ** 2), rel=1e-9)


def test_descent_converges_to_ridge_regression():
    sequences = sample("uniform:5", 4)
    prompts = baselines.spectral(sequences)
    variance = baselines.estimated_variance(prompts, N)
    path = baselines.descent_losses(prompts, variance, 3000)
    np.testing.assert_allclose(path[0], 0.5 * np.square(sequences.w).sum(0), rtol=1e-9)
    np.testing.assert_allclose(path[-1], baselines.ridge_losses(prompts, variance), rtol=1e-6)
    gram, w = np.asarray(sequences.gram[..., 0]), np.asarray(sequences.w[:, 0])
    curvature = gram[:-1, :-1] + float(variance[0]) * np.eye(D)
    ends = np.linalg.eigvalsh(curvature)[[0, -1]]
    iterate = np.zeros(D)
    for step in range(1, 4):
        iterate = iterate - 2 / ends.sum() * (curvature @ iterate - gram[:-1, -1])
        assert path[step, 0] == pytest.approx(0.5 * np.sum((iterate - w) ** 2), rel=1e-9)


@pytest.mark.parametrize(
    ("problem", "constant", "adjusted"),
    [
        ("uniform:5", 8.35, {"ConstRR": 0.3591, "AdaRR": 0.0694, "TunedRR": 0.0501}),
        ("levels:1,3", 5.02, {"ConstRR": 0.2194, "AdaRR": 0.0510, "TunedRR": 0.0215}),
    ],
)
def test_tuned_baselines(problem, constant, adjusted):
    """The values of an independent computation, at the sampling error of 2e4 prompts."""
    prompts = baselines.spectral(sample(problem, 20_000))
    tuned = baselines.tune(prompts, N)
    assert tuned.constant == pytest.approx(constant, rel=0.1)
    oracle = baselines.oracle_losses(prompts)
    for name, losses in baselines.baseline_losses(prompts, tuned, N).items():
        difference = np.asarray(losses - oracle)
        error = difference.std() / np.sqrt(difference.size)
        assert difference.mean() == pytest.approx(adjusted[name], abs=4 * error + 0.03 * adjusted[name])


def test_without_noise_all_are_least_squares():
    prompts = baselines.spectral(sample("uniform:0", 100))
    tuned = baselines.tune(prompts, N)
    for losses in baselines.baseline_losses(prompts, tuned, N).values():
        assert float(losses.max()) < 1e-20
