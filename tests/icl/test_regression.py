"""Prompts have the distributions that they are named after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from icl.regression import (
    COVARIATES,
    TASK_PRIORS,
    Covariance,
    diagonal_covariance,
    haar_orthogonal,
    rotated_covariance,
    sample_prompts,
    token_matrices,
)

VARIANCES = (1.0, 1.0, 0.25, 0.0625, 1.0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def paper_covariance() -> Covariance:
    return rotated_covariance(jax.random.key(5), jnp.array(VARIANCES))


def z_scores(samples, mean):
    """How many standard errors the averages over the last axis are from `mean`."""
    return (samples.mean(-1) - mean) / (samples.std(-1) / np.sqrt(samples.shape[-1]))


def test_haar_matrices_are_orthogonal_and_uniform():
    count = 20_000
    rotations = jax.vmap(lambda key: haar_orthogonal(key, 3, jnp.float64))(jax.random.split(jax.random.key(0), count))
    np.testing.assert_allclose(rotations @ rotations.mT, np.broadcast_to(np.eye(3), rotations.shape), atol=1e-14)
    entries = np.asarray(rotations).reshape(count, 9).T
    assert np.abs(z_scores(entries, 0)).max() < 4  # fails without the sign fix
    for entry in entries:  # a coordinate of a uniform point on the 2-sphere is uniform on [-1, 1]
        assert stats.kstest(entry, stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert np.linalg.det(rotations).mean() == pytest.approx(0, abs=4 / np.sqrt(count))


def test_covariance_roots():
    covariance = paper_covariance()
    u = covariance.rotation
    np.testing.assert_allclose(covariance.matrix, u @ np.diag(VARIANCES) @ u.T, atol=1e-14)
    np.testing.assert_allclose(covariance.matrix @ covariance.inverse, np.eye(5), atol=1e-14)
    np.testing.assert_allclose(covariance.sqrt.T @ covariance.inverse_sqrt, np.eye(5), atol=1e-14)
    np.testing.assert_array_equal(diagonal_covariance(jnp.array([4.0, 9.0])).matrix, np.diag([4.0, 9.0]))


def test_covariances_stack_along_leading_axes():
    keys = jax.random.split(jax.random.key(0), 3)
    stacked = jax.vmap(rotated_covariance, (0, None))(keys, jnp.array(VARIANCES))
    for i, key in enumerate(keys):
        np.testing.assert_allclose(
            stacked.inverse[i], rotated_covariance(key, jnp.array(VARIANCES)).inverse, atol=1e-12
        )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("covariates", COVARIATES)
def test_shapes_dtypes_and_labels(covariates, dtype):
    covariance = diagonal_covariance(jnp.array(VARIANCES, dtype))
    prompts = sample_prompts(jax.random.key(0), covariance, 4, 6, covariates)
    assert [leaf.shape for leaf in prompts] == [(5, 4, 6), (4, 6), (5, 6), (5, 6)]
    assert {leaf.dtype for leaf in prompts} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(prompts.y, np.einsum("ib,inb->nb", prompts.w, prompts.x), rtol=1e-4)
    np.testing.assert_allclose(prompts.y_query, np.einsum("ib,ib->b", prompts.w, prompts.x_query), rtol=1e-4)
    np.testing.assert_array_equal(prompts.x, sample_prompts(jax.random.key(0), covariance, 4, 6, covariates).x)


@pytest.mark.parametrize("task_prior", TASK_PRIORS)
def test_second_moments(task_prior):
    covariance = paper_covariance()
    prompts = sample_prompts(jax.random.key(1), covariance, 3, 20_000, task_prior=task_prior)
    task_covariance = covariance.inverse if task_prior == "inverse_covariance" else jnp.eye(5)
    for samples, expected in (
        (prompts.x[:, 0], covariance.matrix),
        (prompts.x_query, covariance.matrix),
        (prompts.w, task_covariance),
    ):
        assert np.abs(z_scores(samples[:, None] * samples, expected)).max() < 4
    for other in (prompts.x[:, 1], prompts.x_query, prompts.w):  # independent of each other
        assert np.abs(z_scores(prompts.x[:, 0, None] * other, 0)).max() < 4


def squared_latent_norms(covariates, gamma_shape=2.5):
    covariance = paper_covariance()
    prompts = sample_prompts(jax.random.key(2), covariance, 1, 20_000, covariates, gamma_shape)
    latent = covariance.inverse_sqrt.T @ prompts.x[:, 0]
    return np.asarray(latent), np.asarray((latent**2).sum(0))


def test_spherical_covariates_have_norm_one_before_the_covariance():
    _, norms = squared_latent_norms("sphere")
    np.testing.assert_allclose(norms, 1, rtol=1e-12)


@pytest.mark.parametrize("shape", [0.1, 2.5, 10.0])
def test_gamma_covariates(shape):
    latent, norms = squared_latent_norms("gamma", shape)
    assert stats.kstest(norms, stats.gamma(shape, scale=np.sqrt(10 / shape)).cdf).pvalue > 1e-3
    coordinate = latent[0] / np.sqrt(norms)
    assert stats.kstest(coordinate**2, stats.beta(0.5, 2).cdf).pvalue > 1e-3  # a uniform direction in five dimensions


def test_gamma_of_shape_five_halves_is_the_normal_in_five_dimensions():
    latent, _ = squared_latent_norms("gamma")
    for coordinate in latent:
        assert stats.kstest(coordinate, stats.norm.cdf).pvalue > 1e-3


def test_unknown_names_are_errors_that_list_the_known_ones():
    covariance = paper_covariance()
    with pytest.raises(ValueError, match=r"'uniform'.*normal, sphere, gamma"):
        sample_prompts(jax.random.key(0), covariance, 1, 1, covariates="uniform")
    with pytest.raises(ValueError, match=r"'flat'.*inverse_covariance, identity"):
        sample_prompts(jax.random.key(0), covariance, 1, 1, task_prior="flat")


def test_token_matrices_hold_examples_then_the_query_without_its_label():
    prompts = sample_prompts(jax.random.key(0), paper_covariance(), 3, 2)
    tokens = token_matrices(prompts)
    assert tokens.shape == (2, 6, 4)
    for prompt in range(2):
        for example in range(3):
            np.testing.assert_array_equal(tokens[prompt, :5, example], prompts.x[:, example, prompt])
            assert tokens[prompt, 5, example] == prompts.y[example, prompt]
        np.testing.assert_array_equal(tokens[prompt, :5, 3], prompts.x_query[:, prompt])
        assert tokens[prompt, 5, 3] == 0
