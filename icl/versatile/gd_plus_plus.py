"""The optimum of GD++ found directly: in the eigenbasis of Sigma its layers act on each coordinate alone.

A layer multiplies a coordinate's covariates by `1 + omega_xx s` and adds `omega_yx alpha x` to the labels (eq. 11 of
Vladymyrov et al. 2024), with s the coordinate's eigenvalue and alpha its covariance with the labels. So the loss over
many prompts is a smooth function of `2 L - 1` numbers, cheap enough for a quasi-Newton method in float64.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from icl.versatile.baselines import Spectral

_SEARCH = 20_000  # prompts on which starts are compared


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
    """The best of nine starts of BFGS on the logarithm of the loss, in the dtype of the prompts (float64 is advised).

    There are several minima, so the starts span one to several condition-number steps and slow to fast rescaling; from
    far above the largest stable step nothing converges. They are compared on part of the prompts.
    """
    few = jax.tree.map(lambda x: x[..., :_SEARCH], prompts)
    best = min((_descend(few, start) for start in _starts(layers, float(prompts.s.mean()))), key=lambda r: r.fun)
    if few.s.shape != prompts.s.shape:
        best = _descend(prompts, best.x)
    return Optimum(-np.exp(best.x[:layers]), -np.exp(best.x[layers:]), float(np.exp(best.fun)))


def _starts(layers: int, mean_s: float) -> list[np.ndarray]:
    """Logarithms of the steps, then of the rescalings."""
    found = []
    for shift, rescaling in itertools.product((-1.0, -0.5, 0.0), (-2.0, -1.2, -0.6)):
        steps, rescalings = np.linspace(-0.5, 1.5, layers), np.full(layers - 1, rescaling)
        found.append(np.concatenate([steps, rescalings]) + shift - np.log(mean_s))
    return found


def _descend(prompts: Spectral, start: np.ndarray) -> optimize.OptimizeResult:
    def objective(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tuple(map(np.asarray, _log_loss(numbers, prompts)))

    return optimize.minimize(objective, start, jac=True, method="BFGS")


@jax.jit
@jax.value_and_grad
def _log_loss(numbers: jax.Array, prompts: Spectral) -> jax.Array:
    layers = len(numbers) // 2 + 1
    return jnp.log(losses(prompts, -jnp.exp(numbers[:layers]), -jnp.exp(numbers[layers:])).mean())
