"""The stationary families of Theorems 3 and 4: exact losses and their optima.

On `A_l = a_l Sigma^-1`, `B_l = b_l I` everything commutes in whitened coordinates, and the in-context loss is a mean
over one eigenvalue s of the whitened Gram matrix, a Wishart matrix over n:

    s_0 = s,   s_{l+1} = s_l (1 + a_l b_l s_l)^2,   loss = E sum_j prod_l (1 + a_l s_l^(j))^2.

It depends on n, d and L, not on Sigma. The density of s is known in closed form, so the mean is a smooth integral.

The tails matter. With three layers the integrand has degree 26 in s, and at the point where training ends the mean over
all prompts is 0.058, nearly all of it from eigenvalues that one prompt in 1e8 has; no training sees them. What training
minimises is the mean over the prompts that it does see. `optimum` therefore takes the mean over the eigenvalues up to
the quantile that `tail` leaves out, and reports both.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

TAIL = 1e-7
"""Expected number of eigenvalues per prompt that are left out: a training of this paper draws 1e7 to 1e8 prompts."""


class Spectrum(NamedTuple):
    """A quadrature over the eigenvalues of a whitened Gram matrix: `sum(weights * g(nodes))` is `E sum_j g(s_j)`.

    Attributes:
      nodes: eigenvalues, increasing.
      weights: their density, times the quadrature's own weights.
      zeros: number of eigenvalues that are zero because there are fewer examples than dimensions.
    """

    nodes: np.ndarray
    weights: np.ndarray
    zeros: int


class Optimum(NamedTuple):
    """A minimum of a stationary family.

    Attributes:
      a: multiples of Sigma^-1, layer by layer; negative, as trained.
      b: multiples of I, layer by layer; the last one does not matter and is 0.
      loss: the in-context loss over the prompts that the tail leaves in.
      full_loss: the in-context loss over all prompts.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    loss: float
    full_loss: float


@functools.cache
def spectrum(n: int, d: int) -> Spectrum:
    """The eigenvalues of `X X^T / n` for a d x n matrix X of independent standard normals.

    The one-point density of the real Wishart ensemble by de Bruijn's Pfaffian. With the weight `w(t) = t^alpha e^-t` of
    the joint density in `t = n s / 2`, functions phi_j = t^j w and `eps_k(t) = int sgn(u - t) phi_k(u) du`, the density
    is `sum_jk (M^-1)_kj phi_j eps_k` with `M_jk = int phi_j eps_k`; for odd dimension M has a border of `int phi_j`.
    """
    size = min(n, d)
    powers = (max(n, d) - size - 1) / 2 + np.arange(size) + 1
    t, quadrature = _panels()
    phi = np.exp((powers[:, None] - 1) * np.log(t) - t - special.gammaln(powers)[:, None])
    eps = 1 - 2 * special.gammainc(powers[:, None], t)
    matrix = np.einsum("jt,kt,t->jk", phi, eps, quadrature)
    matrix = (matrix - matrix.T) / 2
    if size % 2:
        ones = np.ones((size, 1))  # phi_j integrates to one
        matrix = np.block([[matrix, ones], [-ones.T, np.zeros((1, 1))]])
        phi, eps = np.vstack([phi, np.zeros_like(t)]), np.vstack([eps, np.ones_like(t)])
    density = np.einsum("kj,jt,kt->t", np.linalg.inv(matrix), phi, eps)
    return Spectrum(2 * t / n, quadrature * density, d - size)


def _panels() -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on (0, 400), where `e^-t t^100` has come and gone.

    In the variable `sqrt(t)`, because the density may have the factor `t^-1/2`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges = np.linspace(0.0, 20.0, 101)
    half = np.diff(edges)[:, None] / 2
    root = (edges[:-1, None] + half + half * nodes).ravel()
    return root**2, (half * weights).ravel() * 2 * root


def residual(s: np.ndarray, a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """`prod_l (1 + a_l s_l)`: what the layers leave of the component of w along an eigenvector with eigenvalue s."""
    product = np.ones_like(s)
    for a_layer, b_layer in zip(a, b, strict=True):
        product = product * (1 + a_layer * s)
        s = s * (1 + a_layer * b_layer * s) ** 2
    return product


def family_loss(a: Sequence[float], b: Sequence[float], n: int, d: int, tail: float = 0.0) -> float:
    """The in-context loss, eq. (5), at a point of the stationary family; over the eigenvalues that `tail` leaves in."""
    spectrum_ = spectrum(n, d)
    kept = slice(None) if tail == 0 else slice(np.searchsorted(-_survival(spectrum_), -tail))
    squares = residual(spectrum_.nodes[kept], a, b) ** 2
    return float(spectrum_.weights[kept] @ squares) + spectrum_.zeros


def _survival(spectrum_: Spectrum) -> np.ndarray:
    """Expected number of eigenvalues from each node on."""
    return np.cumsum(spectrum_.weights[::-1])[::-1]


@functools.cache
def optima(layers: int, n: int, d: int, with_b: bool, tail: float = TAIL, starts: int = 60) -> tuple[Optimum, ...]:
    """The local minima that random starts find, best first.

    Args:
      layers: L.
      n: examples in the context.
      d: dimension.
      with_b: Theorem 4's family; otherwise Theorem 3's, where b is zero and the order of the a_l is immaterial.
      tail: expected number of eigenvalues per prompt to leave out, see the module's docstring.
      starts: number of random starts of BFGS on the logarithm of the loss.
    """
    rng = np.random.default_rng(0)
    found: list[Optimum] = []
    for _ in range(starts):
        start = np.concatenate([np.sort(rng.normal(0.4, 1.2, layers)), rng.uniform(-1.5, 0.0, (layers - 1) * with_b)])
        a, b = _unpack(optimize.minimize(_log_loss, start, (layers, n, d, tail), method="BFGS").x, layers)
        candidate = Optimum(a, b, family_loss(a, b, n, d, tail), family_loss(a, b, n, d))
        if all(abs(np.log(candidate.loss / other.loss)) > 1e-3 for other in found):
            found.append(candidate)
    return tuple(sorted(found, key=lambda optimum: optimum.loss))


def three_layer_basins(n: int, d: int) -> tuple[Optimum, Optimum]:
    """The two minima of three layers where training ends: the best, and the best of those with both b below 1/2."""
    found = optima(3, n, d, with_b=True)
    return found[0], next(optimum for optimum in found if max(optimum.b) < 0.5)


def _unpack(logarithms: np.ndarray, layers: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    b = np.exp(logarithms[layers:]) if len(logarithms) > layers else np.zeros(layers - 1)
    return tuple((-np.exp(logarithms[:layers])).tolist()), (*b.tolist(), 0.0)


def _log_loss(logarithms: np.ndarray, layers: int, n: int, d: int, tail: float) -> float:
    with np.errstate(over="ignore", invalid="ignore"):
        loss = family_loss(*_unpack(logarithms, layers), n, d, tail)
    return np.log(loss) if np.isfinite(loss) else 1e3
