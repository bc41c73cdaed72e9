"""Closed forms of Ahn et al. 2023 (arXiv:2306.00297) and exact moments, in float64.

The stationary families of Theorems 3 and 4 are in `icl.preconditioned_gd.stationary`.
"""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np


def dist_to_identity(matrix: jax.Array) -> jax.Array:
    """`min_alpha ||M - alpha I||_F / ||M||_F` of matrices [..., d, d] (section 4.3)."""
    d = matrix.shape[-1]
    alpha = jnp.trace(matrix, axis1=-2, axis2=-1) / d
    rest = matrix - alpha[..., None, None] * jnp.eye(d, dtype=matrix.dtype)
    return jnp.linalg.norm(rest, axis=(-2, -1)) / jnp.linalg.norm(matrix, axis=(-2, -1))


def second_moment_of_gram(covariance: np.ndarray, n: int) -> np.ndarray:
    """`E S^2` for the Gram matrix `S = (1/n) sum_i x_i x_i^T`, x_i ~ N(0, covariance); [d, d]."""
    return (n + 1) / n * covariance @ covariance + np.trace(covariance) / n * covariance


def theorem1_optimum(covariance: np.ndarray, n: int) -> np.ndarray:
    """The block A of the best single layer, `P = e e^T`, `Q = [[A, 0], [0, 0]]`, for w ~ N(0, I); eq. (6), [d, d]."""
    d = len(covariance)
    return -np.linalg.inv((n + 1) / n * covariance + np.trace(covariance) / n * np.eye(d))


def theorem1_loss(a: np.ndarray, covariance: np.ndarray, n: int) -> float:
    """The in-context loss of one layer with `P = e e^T`, `Q = [[a, 0], [0, 0]]`, for w ~ N(0, I)."""
    linear = 2 * np.trace(covariance @ a @ covariance)
    quadratic = np.trace(a @ covariance @ a.T @ second_moment_of_gram(covariance, n))
    return float(np.trace(covariance) + linear + quadratic)


def theorem1_minimum(covariance: np.ndarray, n: int) -> float:
    """The least in-context loss of one layer, for w ~ N(0, I)."""
    variances = np.linalg.eigvalsh(covariance)
    total = variances.sum()
    return float(np.sum(variances * (variances + total) / ((n + 1) * variances + total)))


def theorem5_step(n: int, d: int) -> float:
    """The c of the best single layer of ReLU attention, `Q = -c [[I, 0], [0, 0]]`, isotropic covariates (Theorem 5)."""
    return 2 * n / (n - 1 + 2 * (d + 2))


def theorem5_loss(a: np.ndarray, n: int) -> float:
    """The in-context loss of one layer of ReLU attention, `P = e e^T`, `Q = [[a, 0], [0, 0]]`, isotropic covariates."""
    d = len(a)
    return float(d + np.trace(a) + ((n - 1) / (4 * n) + (d + 2) / (2 * n)) * np.sum(a**2))


def wishart_moments(n: int, d: int, highest: int) -> list[Fraction]:
    """`E tr S^k` for k = 0 .. highest and `S = X X^T / n`, X a d x n matrix of independent standard normals.

    By Stein's lemma on products of power sums p_k = tr S^k: with F a product of p_m,

        n E[p_k F] = E[(n + k - 1) p_{k-1} F + sum_{0 <= s <= k-2} p_{s+1} p_{k-2-s} F + sum_m 2 m p_{k+m-1} F / p_m].
    """

    @functools.cache
    def expectation(orders: tuple[int, ...]) -> Fraction:
        """`E prod p_k` over the orders, which are sorted and positive."""
        if not orders:
            return Fraction(1)
        *others, k = orders
        total = (n + k - 1) * product(k - 1, *others)
        total += sum(product(s + 1, k - 2 - s, *others) for s in range(k - 1))
        for i, m in enumerate(others):
            total += 2 * m * product(k + m - 1, *others[:i], *others[i + 1 :])
        return total / n

    def product(*orders: int) -> Fraction:
        return d ** orders.count(0) * expectation(tuple(sorted(order for order in orders if order)))

    return [product(k) for k in range(highest + 1)]
