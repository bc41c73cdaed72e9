"""The optimum of GD++ found directly: in the eigenbasis of Sigma its layers act on each coordinate alone.

A layer multiplies a coordinate's covariates by `1 + omega_xx s` and adds `omega_yx alpha x` to the labels (eq. 11 of
Vladymyrov et al. 2024), with s the coordinate's eigenvalue and alpha its covariance with the labels. So the loss over
many prompts is a smooth function of `2 L - 1` numbers, cheap enough for a quasi-Newton method in float64.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from icl.versatile.baselines import Spectral


class Optimum(NamedTuple):
    """GD++ after training to convergence on a fixed set of prompts.

    Attributes:
      yx: [layers].
      xx: [layers - 1]; the last layer's does not matter.
      loss: mean half squared error on that set.
    """

    yx: np.ndarray
    xx: np.ndarray
    loss: float


def losses(prompts: Spectral, yx: jax.Array, xx: jax.Array) -> jax.Array:
    """Half squared errors, [batch].

    A coordinate's covariates are `m` times the original ones throughout, and its label vector is the original one minus
    `w` times the original covariates, so `s <- m^2 s` and `alpha = m (c - s w)`.
    """
    s, w, m = prompts.s, jnp.zeros_like(prompts.c), jnp.ones_like(prompts.s)
    for layer, step in enumerate(yx):
        w = w - step * m * m * (prompts.c - s * w)
        if layer < len(xx):
            m = m * (1 + xx[layer] * m * m * s)
    return 0.5 * jnp.square(w - prompts.w).sum(0)


def optimum(prompts: Spectral, layers: int) -> Optimum:
    """The best of a few starts of BFGS on the logarithm of the loss, in the dtype of the prompts (float64 is advised).

    The starts span one to several condition-number steps; from far above the largest stable step nothing converges.
    """
    mean_s = float(prompts.s.mean())

    @functools.partial(jax.jit)
    def objective(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(
            lambda v: jnp.log(losses(prompts, -jnp.exp(v[:layers]), -jnp.exp(v[layers:])).mean())
        )(numbers)

    def run(shift: float) -> optimize.OptimizeResult:
        steps = -np.log(mean_s) + np.linspace(-0.5, 1.5, layers) + shift
        start = np.concatenate([steps, np.full(layers - 1, -np.log(mean_s) - 1.2 + shift)])
        return optimize.minimize(lambda v: tuple(map(np.asarray, objective(v))), start, jac=True, method="BFGS")

    best = min((run(shift) for shift in (-1.0, -0.5, 0.0)), key=lambda found: found.fun)
    return Optimum(-np.exp(best.x[:layers]), -np.exp(best.x[layers:]), float(np.exp(best.fun)))
