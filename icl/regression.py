"""In-context linear regression: prompts of noise-free examples, one query, and one task vector per prompt.

The distributions are those of Ahn et al. (arXiv:2306.00297), section 2 and the experiments of sections 4 and 5. All
arrays keep the batch of prompts on the last axis, as `icl.linear_attention` wants them.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

COVARIATES = ("normal", "sphere", "gamma")
TASK_PRIORS = ("inverse_covariance", "identity")

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Covariance(NamedTuple):
    """`Sigma = U D U^T`, kept as its factors.

    Attributes:
      rotation: orthogonal U, [..., d, d].
      scales: square roots of the diagonal of D, [..., d].
    """

    rotation: jax.Array
    scales: jax.Array

    @property
    def sqrt(self) -> jax.Array:
        """`U D^(1/2)`, [..., d, d]: maps white noise to covariates. It is not symmetric."""
        return self.rotation * self.scales[..., None, :]

    @property
    def inverse_sqrt(self) -> jax.Array:
        """`U D^(-1/2)`, [..., d, d]: maps white noise to N(0, Sigma^-1); its transpose inverts `sqrt`."""
        return self.rotation / self.scales[..., None, :]

    @property
    def matrix(self) -> jax.Array:
        """Sigma, [..., d, d]."""
        return self.sqrt @ self.sqrt.mT

    @property
    def inverse(self) -> jax.Array:
        """Sigma^-1, [..., d, d]."""
        return self.inverse_sqrt @ self.inverse_sqrt.mT


def diagonal_covariance(variances: jax.Array) -> Covariance:
    """The covariance with the given variances [d] and no rotation; ones give the identity."""
    variances = jnp.asarray(variances)
    return Covariance(jnp.eye(variances.shape[0], dtype=variances.dtype), jnp.sqrt(variances))


def rotated_covariance(key: jax.Array, variances: jax.Array) -> Covariance:
    """The covariance with the given variances [d] along the axes of a Haar random rotation."""
    variances = jnp.asarray(variances)
    return Covariance(haar_orthogonal(key, variances.shape[0], variances.dtype), jnp.sqrt(variances))


def haar_orthogonal(key: jax.Array, d: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """A uniformly random orthogonal matrix, [d, d].

    The Q of a Gaussian matrix is uniform once the signs that QR leaves open are fixed, here by a positive diagonal of
    R. The authors' code takes the singular vectors of a uniform matrix instead, which is not the Haar measure.
    """
    q, r = jnp.linalg.qr(jax.random.normal(key, (d, d), dtype))
    return q * jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(dtype)


class Prompts(NamedTuple):
    """A batch of prompts.

    Attributes:
      x: covariates of the examples, [d, n, batch].
      y: labels of the examples `<w, x>`, [n, batch].
      x_query: covariate of the query, [d, batch].
      w: task vectors, [d, batch].
    """

    x: jax.Array
    y: jax.Array
    x_query: jax.Array
    w: jax.Array

    @property
    def y_query(self) -> jax.Array:
        """The true label of the query, [batch]."""
        return (self.w * self.x_query).sum(0)


def sample_prompts(
    key: jax.Array,
    covariance: Covariance,
    n: int,
    batch: int,
    covariates: str = "normal",
    gamma_shape: float = 2.5,
    task_prior: str = "inverse_covariance",
) -> Prompts:
    """Prompts with `n` examples each, in the dtype of the covariance.

    Covariates are `Sigma^(1/2) g` with a latent g that has a uniform direction and, by the name in `covariates`,

    * normal: the norm of a standard normal vector, as in the paper;
    * sphere: norm one;
    * gamma: the squared norm Gamma(k, scale sqrt(10 / k)), k = `gamma_shape`, of the authors' code. Its variance is 10
      for every k; k = 5/2 and d = 5 is the standard normal again.

    Task vectors are normal with covariance Sigma^-1 (Theorems 3 and 4, all experiments) or I (Theorem 1), by
    `task_prior`. The random numbers are as cheap as the key's implementation makes them: pass an `rbg` key where the
    sampling matters.
    """
    if covariates not in COVARIATES:
        raise ValueError(f"unknown covariates {covariates!r}; there are {', '.join(COVARIATES)}")
    if task_prior not in TASK_PRIORS:
        raise ValueError(f"unknown task prior {task_prior!r}; there are {', '.join(TASK_PRIORS)}")
    dtype = covariance.scales.dtype
    d = covariance.scales.shape[0]
    key_x, key_norm, key_w = jax.random.split(key, 3)

    latent = jax.random.normal(key_x, (d, n + 1, batch), dtype)
    if covariates != "normal":
        latent = latent / jnp.linalg.norm(latent, axis=0)
    if covariates == "gamma":
        squared_norm = jax.random.gamma(key_norm, gamma_shape, (n + 1, batch), dtype) * (10 / gamma_shape) ** 0.5
        latent = latent * jnp.sqrt(squared_norm)
    x = _einsum("ij,jnb->inb", covariance.sqrt, latent)

    w = jax.random.normal(key_w, (d, batch), dtype)
    if task_prior == "inverse_covariance":
        w = _einsum("ij,jb->ib", covariance.inverse_sqrt, w)
    return Prompts(x=x[:, :n], y=(w[:, None] * x[:, :n]).sum(0), x_query=x[:, n], w=w)


def token_matrices(prompts: Prompts) -> jax.Array:
    """Token matrices with the query's label entry 0, eq. (1), [batch, d + 1, n + 1]."""
    x = jnp.concatenate([prompts.x, prompts.x_query[:, None]], axis=1)
    y = jnp.concatenate([prompts.y, jnp.zeros_like(prompts.y[:1])], axis=0)
    return jnp.moveaxis(jnp.concatenate([x, y[None]], axis=0), -1, 0)
