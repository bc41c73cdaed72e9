"""Multi-step gradient descent on classification prompts: optima, hijacked iterates and errors (Li et al. 2025, v1).

The linear transformer of proposition 4.1 does L steps of `w <- w - alpha grad`, of the *sum* of squares
`sum_i (<w, x_i> - y_i)^2 / 2`, from `c beta`. Its clean risk is `E ||w_L - SIGN_MEAN w||^2 + 1 - 2/pi` (Lemma C.1); the
first term is the excess. Everything is float64 numpy; S and b are `sum x x^T` and `sum y x`.

Misprints of v1 are corrected where they matter: the equivalence needs the transpose of Gamma, Lemma B.1 the elementary
symmetric polynomials, the optimal c is `SIGN_MEAN m` and not SIGN_MEAN, and Lemma E.6's variance is `1 - <w, beta>^2`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from icl.hijacking.data import clean_gram, mean_direction, sample_tasks

KAPPA = 2 / math.pi
SIGN_MEAN = math.sqrt(KAPPA)


def closed_form(s: np.ndarray, b: np.ndarray, start: np.ndarray, rates: Sequence[float]) -> np.ndarray:
    """The last iterate for one prompt, by elementary symmetric polynomials of the rates (Lemma B.1, corrected).

    `w_L = prod_k (I - alpha_k S) w_0 + sum_k e_k(alpha) (-S)^(k-1) b`.

    Args:
      s: S, [d, d].
      b: [d].
      start: w_0, [d].
      rates: alpha of each step; their order does not matter.
    """
    identity = np.eye(len(s))
    polynomials = np.poly(-np.asarray(rates, float))  # of prod (z + alpha_k): the coefficients are e_0, e_1, ...
    kept = np.linalg.multi_dot([*(identity - rate * s for rate in rates), start]) if len(rates) else start
    return kept + sum(polynomials[k] * np.linalg.matrix_power(-s, k - 1) @ b for k in range(1, len(polynomials)))


class Spectra(NamedTuple):
    """Clean prompts in the eigenbases of their S: one decomposition serves every step size and depth.

    Attributes:
      eigenvalues: [d, batch].
      b, w, beta: rotated, [d, batch].
    """

    eigenvalues: np.ndarray
    b: np.ndarray
    w: np.ndarray
    beta: np.ndarray


def sample_spectra(seed: int, dimension: int, spread: float, examples: int, prompts: int) -> Spectra:
    """Clean prompts; the same seed gives common random numbers to every depth and step size."""
    parts, chunk = [], max(1, min(prompts, 2**21 // (dimension * examples)))
    with jax.enable_x64(True):
        beta = np.asarray(mean_direction(dimension, jnp.float64))
        for key in jax.random.split(jax.random.key(seed), -(-prompts // chunk)):
            key_w, key_x = jax.random.split(key)
            w = sample_tasks(key_w, dimension, spread, chunk, jnp.float64)
            parts.append((np.asarray(w), np.asarray(_clean_gram(key_x, w, examples))))
    w, gram = (np.concatenate(part, axis=-1)[..., :prompts] for part in zip(*parts, strict=True))
    eigenvalues, u = np.linalg.eigh(np.moveaxis(gram[:-1, :-1], -1, 0))
    rotate = lambda vectors: np.einsum("bji,jb->ib", u, np.broadcast_to(vectors, w.shape))  # noqa: E731
    return Spectra(np.maximum(eigenvalues.T, 0), rotate(gram[-1, :-1]), rotate(w), rotate(beta[:, None]))


_clean_gram = jax.jit(clean_gram, static_argnames="examples")


class Optimum(NamedTuple):
    """The best equal step size and start for a depth: w_0 = c beta."""

    alpha: float
    c: float
    excess: float


def best_start(spectra: Spectra, alpha: float, layers: int) -> Optimum:
    """The best c for a step size, in closed form: the excess is a quadratic in it."""
    kept = (1 - alpha * spectra.eigenvalues) ** layers
    with np.errstate(invalid="ignore", divide="ignore"):
        gained = (1 - kept) / spectra.eigenvalues
    gained = np.where(spectra.eigenvalues > 1e-9, gained, alpha * layers)
    memory, rest = kept * spectra.beta, gained * spectra.b - SIGN_MEAN * spectra.w
    square, cross = (memory**2).sum(0).mean(), (memory * rest).sum(0).mean()
    return Optimum(alpha, -cross / square, (rest**2).sum(0).mean() - cross**2 / square)


def optimum(spectra: Spectra, layers: int, examples: int) -> Optimum:
    """The best step size, searched up to `alpha n = 0.9`: beyond it the start is forgotten and c means nothing."""
    found = optimize.minimize_scalar(
        lambda log_alpha: best_start(spectra, math.exp(log_alpha), layers).excess,
        bounds=(math.log(1e-5 / layers), math.log(0.9 / examples)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return best_start(spectra, math.exp(found.x), layers)


def searched_rate(seed: int, dimension: int, spread: float, examples: int, prompts: int) -> float:
    """The one-step size that minimises the raw error on single queries, in closed form; c at `SIGN_MEAN m`.

    It shows how noisy a search on the paper's own objective is.
    """
    rng = np.random.default_rng(seed)
    spectra = sample_spectra(seed, dimension, spread, examples, prompts)
    query = rng.normal(size=spectra.w.shape)
    c = SIGN_MEAN * float((spectra.w * spectra.beta).sum(0).mean())
    move = ((spectra.b - c * spectra.eigenvalues * spectra.beta) * query).sum(0)
    missing = np.sign((spectra.w * query).sum(0)) - c * (spectra.beta * query).sum(0)
    return float((move * missing).sum() / (move**2).sum())


class Prior(NamedTuple):
    """Constants of the prior: `m = E <w, beta>`, `v = kappa (1 - m^2)`, `d = dimension (1 - kappa m^2)`."""

    m: float
    v: float
    d: float


def prior(dimension: int, spread: float, draws: int = 300_000) -> Prior:
    """The constants, by sampling."""
    rng = np.random.default_rng(0)
    g = 1 + spread * rng.normal(size=(draws, dimension))
    m = float((g.sum(1) / np.linalg.norm(g, axis=1)).mean() / math.sqrt(dimension))
    return Prior(m, KAPPA * (1 - m**2), dimension * (1 - KAPPA * m**2))


def one_step_excess(alpha: float, c: float, n: int, dimension: int, m: float) -> float:
    """The excess of a single step, exactly."""
    start = c**2 * (1 - 2 * alpha * n + alpha**2 * n * (n + dimension + 1))
    data = alpha**2 * (n * dimension + n * (n - 1) * KAPPA) + KAPPA - 2 * alpha * KAPPA * n
    cross = 2 * SIGN_MEAN * c * m * (2 * alpha * n - 1) - 2 * alpha**2 * SIGN_MEAN * c * m * n * (n + dimension)
    return start + data + cross


def one_step_start(alpha: float, n: int, dimension: int, m: float) -> float:
    """The best c of a single step, exactly; near `SIGN_MEAN m`."""
    quadratic = 1 - 2 * alpha * n + alpha**2 * n * (n + dimension + 1)
    return SIGN_MEAN * m * (1 - 2 * alpha * n + alpha**2 * n * (n + dimension)) / quadratic


def one_step_optimum(n: int, dimension: int, m: float) -> Optimum:
    """The exact optimum of a single step."""
    objective = lambda a: one_step_excess(a, one_step_start(a, n, dimension, m), n, dimension, m)  # noqa: E731
    alpha = optimize.minimize_scalar(objective, bounds=(0, 1 / n), method="bounded", options={"xatol": 1e-10}).x
    return Optimum(alpha, one_step_start(alpha, n, dimension, m), objective(alpha))


def one_step_rate(n: int, constants: Prior) -> float:
    """The same step size, nearly: `V / (D + V (n - 1))`; independent of n where n is far below D / V."""
    return constants.v / (constants.d + constants.v * (n - 1))


def anisotropic_optimum(spectra: Spectra) -> tuple[float, float, float]:
    """One step with different rates along beta and across it: `(rate along, rate across, excess)`, c at its best.

    The prior has no first-order spread along beta, so the best step hardly moves along it; trained models find this.
    """
    beta, b, w = spectra.beta, spectra.b, spectra.w
    gradient_memory, gradient_data = spectra.eigenvalues * beta, b

    def split(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        along = (v * beta).sum(0) * beta
        return along, v - along

    memory, data = split(gradient_memory), split(gradient_data)
    # w_1 = c beta - c (r0 memory_0 + r1 memory_1) + r0 data_0 + r1 data_1; alternate between c and the rates
    c = SIGN_MEAN * float((w * beta).sum(0).mean())
    for _ in range(50):
        features = [data[i] - c * memory[i] for i in (0, 1)]
        target = SIGN_MEAN * w - c * beta
        matrix = [[(f * g).sum(0).mean() for g in features] for f in features]
        rates = np.linalg.solve(matrix, [(f * target).sum(0).mean() for f in features])
        kept = beta - rates[0] * memory[0] - rates[1] * memory[1]
        rest = rates[0] * data[0] + rates[1] * data[1] - SIGN_MEAN * w
        c = -float((kept * rest).sum(0).mean() / (kept**2).sum(0).mean())
    return float(rates[0]), float(rates[1]), float(((c * kept + rest) ** 2).sum(0).mean())


def kept_memory(r: np.ndarray | float, alpha: float, count: float, layers: int) -> np.ndarray | float:
    """`t = (1 - alpha N r)^L`, the share of the memory that N hijacking tokens of squared norm r leave."""
    return (1 - alpha * count * r) ** layers


class Geometry(NamedTuple):
    """What the score of a hijacked prompt depends on, each [batch].

    Attributes:
      r: `||x_token||^2`.
      zeta: `<x_token, beta>`.
      aligned: `<w, beta>`.
    """

    r: np.ndarray
    zeta: np.ndarray
    aligned: np.ndarray


def sample_geometry(seed: int, dimension: int, spread: float, prompts: int) -> Geometry:
    """Draws of r, zeta and `<w, beta>` by their laws (Lemma E.6, corrected).

    Given `<w, beta> = a`, zeta is normal with variance `1 - a^2`, and r is zeta^2 / (1 - a^2) plus an independent
    chi-square with d - 2 degrees of freedom.
    """
    rng = np.random.default_rng(seed)
    g = 1 + spread * rng.normal(size=(prompts, dimension))
    aligned = g.sum(1) / np.linalg.norm(g, axis=1) / math.sqrt(dimension)
    normal = rng.normal(size=prompts)
    r = normal**2 + rng.chisquare(dimension - 2, size=prompts)
    return Geometry(r, np.sqrt(np.maximum(1 - aligned**2, 0)) * normal, aligned)


def hijacked_score(
    geometry: Geometry, sigma: np.ndarray | float, best: Optimum, count: float, layers: int
) -> np.ndarray:
    """`<w_L, x_query>` of a hijacked prompt, [batch] (Lemma D.1): its sign is the answer.

    `c sigma <w, beta> - y + t (y + c zeta)`, y the sign of sigma.
    """
    y = np.sign(sigma)
    t = kept_memory(geometry.r, best.alpha, count, layers)
    return best.c * sigma * geometry.aligned - y + t * (y + best.c * geometry.zeta)


def robust_accuracy(geometry: Geometry, sigma: float, best: Optimum, count: float, layers: int) -> float:
    """The share of hijacked prompts that are answered right, at a fixed distance sigma > 0 of the query."""
    return float((hijacked_score(geometry, sigma, best, count, layers) > 0).mean())


def error_formula(
    geometry: Geometry, cdf: Callable[[np.ndarray], np.ndarray], best: Optimum, count: float, layers: int
) -> float:
    """The robust error for a random distance with distribution function `cdf` (eq. D.3)."""
    t = kept_memory(geometry.r, best.alpha, count, layers)
    return float(cdf((1 - t * (1 + best.c * geometry.zeta)) / (best.c * geometry.aligned)).mean())


def tokens_to_flip(sigma: float, dimension: int, constants: Prior) -> tuple[float, float]:
    """The number of tokens that flips the median prompt where noise limits the step: for one step, for infinitely many.

    With `g = V / (1 - kappa m^2) (d - 1) / d` and `h = c sigma m`: h / g and -ln(1 - h) / g. Neither depends on n.
    """
    gain = constants.v / (1 - KAPPA * constants.m**2) * (dimension - 1) / dimension
    margin = SIGN_MEAN * constants.m * sigma * constants.m
    return margin / gain, -math.log(1 - margin) / gain


def equal_shrink(ratio: float, total: float, layers: int) -> float:
    """`t_L(rho)` at equal clean shrinkage `(1 - alpha n)^L = exp(-total)`; rho = N r / n.

    It rises with L for rho > 1 and falls for rho < 1: depth is robust only to many tokens.
    """
    return (1 - ratio * (1 - math.exp(-total / layers))) ** layers
