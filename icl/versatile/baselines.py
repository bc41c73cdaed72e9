"""Ridge regression with a constant, an estimated and a tuned noise level (Vladymyrov et al. 2024, section 6).

In the eigenbasis of `Sigma = sum_i x_i x_i^T` every ridge solution is a quotient of numbers, so a baseline is tuned on
many prompts at the cost of one eigendecomposition each. Losses are half squared errors with the query integrated out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from icl.versatile.data import Sequences


class Spectral(NamedTuple):
    """Prompts in the eigenbasis U of their Sigma.

    Attributes:
      s: eigenvalues, [d, batch].
      c: `U^T sum_i y_i x_i`, [d, batch].
      w: `U^T w`, [d, batch].
      rho: squared residuals of least squares, summed over the examples, [batch].
      sigma: noise levels, [batch].
    """

    s: jax.Array
    c: jax.Array
    w: jax.Array
    rho: jax.Array
    sigma: jax.Array


@jax.jit
def spectral(sequences: Sequences) -> Spectral:
    """Rotates prompts into the eigenbasis of their Sigma."""
    gram = jnp.moveaxis(sequences.gram, -1, 0)
    s, u = jnp.linalg.eigh(gram[:, :-1, :-1])
    c = jnp.einsum("bji,bj->ib", u, gram[:, -1, :-1])
    w = jnp.einsum("bji,jb->ib", u, sequences.w)
    rho = gram[:, -1, -1] - jnp.square(c / jnp.sqrt(s.T)).sum(0)
    return Spectral(s.T, c, w, jnp.maximum(rho, 0), sequences.sigma)


@jax.jit
def ridge_losses(prompts: Spectral, variance: jax.Array | float) -> jax.Array:
    """Half the expected squared error of ridge regression, [batch]; `variance` is a number or [batch].

    With `variance = sigma^2` it is the best predictor there is, since the prior of w is N(0, I) (eq. 5).
    """
    return 0.5 * jnp.square(prompts.c / (prompts.s + variance) - prompts.w).sum(0)


def oracle_losses(prompts: Spectral) -> jax.Array:
    """`ridge_losses` with each prompt's own noise variance, [batch]."""
    return ridge_losses(prompts, jnp.square(prompts.sigma))


def estimated_variance(prompts: Spectral, examples: int) -> jax.Array:
    """The unbiased estimate of sigma^2 from the residuals of least squares, [batch]; AdaRR's."""
    return prompts.rho / (examples - len(prompts.s))


class Tuned(NamedTuple):
    """The tuned constants of the baselines for one problem.

    Attributes:
      constant: ConstRR's variance.
      factor, threshold: of TunedRR, whose variance is `min(factor * estimate, threshold)`.
    """

    constant: float
    factor: float
    threshold: float


def tune(prompts: Spectral, examples: int) -> Tuned:
    """The constants of least mean loss on these prompts."""
    estimate = estimated_variance(prompts, examples)

    def mean_loss(variance: jax.Array | float) -> float:
        return float(ridge_losses(prompts, variance).mean())

    typical = float(jnp.square(prompts.sigma).mean())
    if typical == 0:
        return Tuned(0.0, 1.0, 0.0)
    log_constant = optimize.minimize_scalar(
        lambda v: mean_loss(typical * np.exp(v)), bounds=(-3, 3), method="bounded", options={"xatol": 1e-4}
    ).x
    found = optimize.minimize(
        lambda v: mean_loss(jnp.minimum(np.exp(v[0]) * estimate, typical * np.exp(v[1]))),
        x0=(0.25, 0.7),
        method="Nelder-Mead",
        options={"xatol": 1e-3, "fatol": 1e-7},
    ).x
    return Tuned(typical * np.exp(log_constant), float(np.exp(found[0])), typical * float(np.exp(found[1])))


def baseline_losses(prompts: Spectral, tuned: Tuned, examples: int) -> dict[str, jax.Array]:
    """Losses of ConstRR, AdaRR and TunedRR, each [batch]."""
    estimate = estimated_variance(prompts, examples)
    return {
        "ConstRR": ridge_losses(prompts, tuned.constant),
        "AdaRR": ridge_losses(prompts, estimate),
        "TunedRR": ridge_losses(prompts, jnp.minimum(tuned.factor * estimate, tuned.threshold)),
    }


def descent_losses(prompts: Spectral, variance: jax.Array, steps: int) -> jax.Array:
    """Losses of ridge regression by gradient descent from 0, after each step, [steps + 1, batch].

    A prompt's step size is `2 / (s_max + s_min + 2 variance)`, the best constant one for its own spectrum. In the
    eigenbasis the error shrinks by `1 - eta (s + variance)` a step.
    """
    curvature = prompts.s + variance
    rate = 1 - 2 * curvature / (curvature[0] + curvature[-1])  # eigenvalues are in ascending order
    target = prompts.c / curvature

    def after(step: jax.Array) -> jax.Array:
        return 0.5 * jnp.square(target * (1 - rate**step) - prompts.w).sum(0)

    return jax.lax.map(after, jnp.arange(steps + 1))
