"""The recursions against automatic differentiation, plain loops and linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.gradient_descent import gd_plus_plus, gradient_descent, least_squares
from icl.linear_attention import literal_transformer, prompt_gram
from icl.regression import diagonal_covariance, rotated_covariance, sample_prompts, token_matrices

VARIANCES = (1.0, 1.0, 0.25, 0.0625, 1.0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def paper_prompts(n, batch):
    covariance = rotated_covariance(jax.random.key(3), jnp.array(VARIANCES))
    return covariance, sample_prompts(jax.random.key(4), covariance, n, batch)


def test_gradient_descent_follows_the_gradient_of_the_loss():
    _, prompts = paper_prompts(20, 6)
    preconditioners = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 5)))

    def loss(w, x, y):
        return jnp.square(w @ x - y).sum() / (2 * 20)

    iterates = gradient_descent(prompt_gram(prompts.x, prompts.y), preconditioners)
    for prompt in range(6):
        w = jnp.zeros(5)
        for step, preconditioner in enumerate(preconditioners):
            w = w - preconditioner @ jax.grad(loss)(w, prompts.x[..., prompt], prompts.y[:, prompt])
            np.testing.assert_allclose(iterates[step, :, prompt], w, rtol=1e-10)


def test_gd_plus_plus_is_the_transformer_with_multiples_of_the_identity():
    covariance = diagonal_covariance(jnp.ones(5))
    prompts = sample_prompts(jax.random.key(0), covariance, 20, 6)
    a, b = jnp.array([-0.38, -2.4, -9.6]), jnp.array([0.9, 0.56, 0.0])
    corner = jnp.diag(jnp.array([1.0, 1, 1, 1, 1, 0]))
    p = b[:, None, None, None] * corner + jnp.eye(6) - corner
    q = a[:, None, None, None] * corner
    expected = literal_transformer(token_matrices(prompts), p, q)[:, -1, -1]
    np.testing.assert_allclose(gd_plus_plus(prompts.x, prompts.y, prompts.x_query, a, b), expected, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 3, 5, 20])
def test_least_squares_is_the_projection_in_whitened_coordinates(n):
    covariance, prompts = paper_prompts(n, 50)
    w = least_squares(prompts.x, prompts.y, covariance)
    for prompt in range(50):
        white = np.asarray(covariance.inverse_sqrt.T @ prompts.x[..., prompt])
        basis = np.linalg.svd(white, full_matrices=False)[0]
        projected = basis @ basis.T @ np.asarray(covariance.sqrt.T @ prompts.w[:, prompt])
        np.testing.assert_allclose(covariance.sqrt.T @ w[:, prompt], projected, atol=1e-9)


@pytest.mark.parametrize("n", [2, 4, 5])
def test_least_squares_loses_one_for_each_missing_example(n):
    covariance, prompts = paper_prompts(n, 20_000)
    difference = least_squares(prompts.x, prompts.y, covariance) - prompts.w
    squares = np.sum(np.asarray(covariance.sqrt.T @ difference) ** 2, axis=0)  # averaged over the query's covariate
    assert squares.mean() == pytest.approx(5 - n, abs=4 * squares.std() / np.sqrt(20_000) + 1e-6)
