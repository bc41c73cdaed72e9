"""The theorems of Vladymyrov et al. 2024 (arXiv:2402.14180) as functions: sections 4 and 5, for one prompt.

Second moments are sums over the examples. A prompt is its token Gram matrix `G = [[Sigma, alpha], [alpha^T, lambda]]`;
`map` the functions over a batch where one is needed. Everything works in the dtype of its arguments.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icl.versatile.data import mean_square


class LinearView(NamedTuple):
    """What a token is after some layers, as a function of what it was (Theorem 4.1 and Lemma 4.3).

    An example `(x, y)` has become `(m x + y u, a y - <w, x>)`, and the query `(x, 0)` has become `(m x, -<w, x>)`:
    every layer holds a linear model with weights w.

    Attributes:
      m: [d, d].
      u: [d].
      a: a scalar.
      w: [d].
    """

    m: jax.Array
    u: jax.Array
    a: jax.Array
    w: jax.Array

    @property
    def token_map(self) -> jax.Array:
        """The matrix that takes the input tokens here, [d + 1, d + 1]."""
        top = jnp.concatenate([self.m, self.u[:, None]], axis=1)
        return jnp.concatenate([top, jnp.append(-self.w, self.a)[None]])


def initial_view(dimension: int, dtype: jnp.dtype) -> LinearView:
    """The view before the first layer."""
    zero = jnp.zeros(dimension, dtype)
    return LinearView(jnp.eye(dimension, dtype=dtype), zero, jnp.ones((), dtype), zero)


def linear_views(gram: jax.Array, p: jax.Array, q: jax.Array) -> Iterator[LinearView]:
    """The view after each layer by the recursion of Lemma 4.3, for dense P and Q.

    With `[[A, b], [c^T, d]] = sum_k P_k G Q_k`:

        m <- (I + A) m - b w^T,   u <- (I + A) u + a b,   a <- (1 + d) a + <c, u>,   w <- (1 + d) w - m^T c.

    Args:
      gram: G of the input, [d + 1, d + 1].
      p: [layers, heads, d + 1, d + 1].
      q: as `p`.
    """
    view = initial_view(len(gram) - 1, gram.dtype)
    for p_heads, q_heads in zip(p, q, strict=True):
        t = view.token_map
        k = jnp.einsum("hij,jk,hkl->il", p_heads, t @ gram @ t.T, q_heads)
        a_block, b, c, d = k[:-1, :-1], k[:-1, -1], k[-1, :-1], k[-1, -1]
        m, u, a, w = view
        view = LinearView(
            m + a_block @ m - jnp.outer(b, w), u + a_block @ u + a * b, (1 + d) * a + c @ u, (1 + d) * w - m.T @ c
        )
        yield view


class DiagonalTerms(NamedTuple):
    """The terms of one diagonal layer's update of w and u (Lemma A.1).

    Attributes:
      gradient: `g = Sigma (a w* - w)`, half the negative gradient of `sum_i (a y_i - <w, x_i>)^2`, [d].
      rescale: `s = omega_yy lambda^l`, a scalar: w is multiplied by 1 + s.
      step: `Pi g`, taken from w, [d].
      momentum: `Phi u`, taken from w, [d].
      decay: `Lambda u`, taken from u, [d].
      refill: `Gamma g`, added to u, [d].
    """

    gradient: jax.Array
    rescale: jax.Array
    step: jax.Array
    momentum: jax.Array
    decay: jax.Array
    refill: jax.Array


def diagonal_views(gram: jax.Array, omegas: Mapping[str, jax.Array]) -> Iterator[tuple[LinearView, DiagonalTerms]]:
    """View and terms of each layer of the diagonal model, by the recurrences of Lemma 4.4 and A.1.

        u <- u - Lambda u + Gamma g,      w <- (1 + s) w - Pi g - Phi u,

    with `Lambda = -omega_xy a^2 rho I - omega_xx Sigma^l`, `Gamma = a omega_xy (m + u w*^T)`,
    `Pi = omega_yx m^T (m + u w*^T)` and `Phi = a rho omega_yx m^T`. w* and rho are the least-squares solution and its
    squared residuals. (The appendix prints `m + a u w*^T`, with which the identity fails.)

    Args:
      gram: G of the input, [d + 1, d + 1].
      omegas: `xx`, `xy`, `yx`, `yy`, each [layers].
    """
    sigma, alpha = gram[:-1, :-1], gram[:-1, -1]
    least_squares = jnp.linalg.solve(sigma, alpha)
    rho = gram[-1, -1] - alpha @ least_squares
    view = initial_view(len(alpha), gram.dtype)
    for xx, xy, yx, yy in zip(*(omegas[name] for name in ("xx", "xy", "yx", "yy")), strict=True):
        m, u, a, w = view
        t = view.token_map
        moments = t @ gram @ t.T
        sigma_l, alpha_l, lambda_l = moments[:-1, :-1], moments[:-1, -1], moments[-1, -1]
        g = sigma @ (a * least_squares - w)
        mixed = m @ g + u * (least_squares @ g)
        terms = DiagonalTerms(
            gradient=g,
            rescale=yy * lambda_l,
            step=yx * m.T @ mixed,
            momentum=a * rho * yx * m.T @ u,
            decay=-xy * a**2 * rho * u - xx * sigma_l @ u,
            refill=a * xy * mixed,
        )
        view = LinearView(
            m=m + xx * sigma_l @ m - xy * jnp.outer(alpha_l, w),
            u=u - terms.decay + terms.refill,
            a=(1 + terms.rescale) * a + yx * alpha_l @ u,
            w=(1 + terms.rescale) * w - terms.step - terms.momentum,
        )
        yield view, terms


def one_layer_step(problem: str, examples: int, dimension: int) -> float:
    """The best omega_yx of a single layer, for every model; the other entries do not matter."""
    return -1 / (examples + dimension + 1 + mean_square(problem))


def one_layer_loss(problem: str, examples: int, dimension: int) -> float:
    """Half the mean squared error of the best single layer."""
    rest = dimension + 1 + mean_square(problem)
    return 0.5 * dimension * rest / (examples + rest)


def next_condition_number(kappa: np.ndarray | float) -> np.ndarray | float:
    """The condition number of Sigma after a GD++ layer with `omega_xx = -1 / (3 s_max)` (Theorem 5.1)."""
    return kappa * (4 / 9) / (1 - 1 / (3 * kappa)) ** 2


def newton_like_weights(sigma: np.ndarray, alpha: np.ndarray, layers: int) -> np.ndarray:
    """w of the GD++ model of Theorem 5.1's proof: layers that only condition the covariates, then a step to read out.

    Args:
      sigma: [d, d].
      alpha: [d].
      layers: all layers together; the last one has `omega_yx = -1 / s_min`.

    Returns:
      [d].
    """
    m = np.eye(len(sigma))
    for _ in range(layers - 1):
        conditioned = m @ sigma @ m.T
        m = m - conditioned @ m / (3 * np.linalg.eigvalsh(conditioned)[-1])
    return m.T @ (m @ alpha) / np.linalg.eigvalsh(m @ sigma @ m.T)[0]


def two_level_constants(first: float, second: float) -> tuple[float, float]:
    """`-omega_yx` and `n omega_yy` with which two layers reach ridge regression for both noise levels (Theorem 5.2).

    For `x_i ~ N(0, I / n)` and n to infinity: layer 1 has omega_yx only, layer 2 omega_yy only.
    """
    a, b = first**2, second**2
    return (1 + a + b) / ((1 + a) * (1 + b)), -1 / (1 + a + b)


def adaptive_step(label_square: jax.Array, xy: float, yx: float) -> jax.Array:
    """The step along alpha of two layers, the first with omega_xy only, the second with omega_yx only (section 5.3).

    `label_square` is lambda, the sum of the squared labels; the paper's text has the residuals in its place, which is
    an approximation. With both constants negative, the step becomes smaller as the noise grows.
    """
    return -yx * (1 + xy * label_square)
