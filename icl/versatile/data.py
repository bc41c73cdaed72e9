"""Noisy regression prompts, drawn as what a linear transformer sees of them (Vladymyrov et al. 2024, section 2.2).

A prompt has a task vector `w ~ N(0, I)`, a noise level sigma, examples `x_i ~ N(0, I)` with labels
`y_i = <w, x_i> + sigma xi_i`, and a query without noise. sigma is a standard deviation, although the paper's axes call
it a variance: its baselines come out only that way. Second moments here are sums over the examples, not means: the
paper's attention has no factor 1/n. The batch of prompts is the last axis.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from icl.linear_attention import product
from training.errors import UserError

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def intervals(problem: str) -> tuple[tuple[float, float], ...]:
    """The distribution of sigma that a text such as `"uniform:5"`, `"levels:1,3"` or `"fixed:2"` names.

    Returns:
      Pairs `(low, high)`: sigma is uniform on one of these intervals, all equally likely. `uniform:5` is U(0, 5).

    Raises:
      UserError: a text of another form, or a negative level.
    """
    kind, _, numbers = problem.partition(":")
    try:
        levels = [float(text) for text in numbers.split(",")]
    except ValueError:
        levels = []
    if not levels or min(levels) < 0 or kind not in ("uniform", "levels", "fixed") or (kind != "levels" and levels[1:]):
        raise UserError(f"noise problem {problem!r}: write 'uniform:5', 'levels:1,3' or 'fixed:2', levels at least 0")
    return ((0.0, levels[0]),) if kind == "uniform" else tuple((level, level) for level in levels)


def interval_table(problems: Sequence[str]) -> np.ndarray:
    """The intervals of several problems, each repeated up to one common number of them, [problems, intervals, 2]."""
    found = [intervals(problem) for problem in problems]
    count = math.lcm(*map(len, found))
    return np.array([each * (count // len(each)) for each in found], np.float32)


def mean_square(problem: str) -> float:
    """`E sigma^2`."""
    return float(np.mean([(low**2 + low * high + high**2) / 3 for low, high in intervals(problem)]))


class Sequences(NamedTuple):
    """A batch of prompts.

    Attributes:
      gram: `sum_i e_i e_i^T` over the example tokens `e_i = (x_i, y_i)`, [d + 1, d + 1, batch].
      w: task vectors, [d, batch].
      sigma: noise levels, [batch].
    """

    gram: jax.Array
    w: jax.Array
    sigma: jax.Array


@partial(jax.jit, static_argnames=("examples", "dimension", "batch"))
def sample_sequences(
    key: jax.Array, sigma_intervals: jax.Array, examples: int, dimension: int, batch: int
) -> Sequences:
    """Prompts whose sigma is uniform on one of the intervals [intervals, 2], in their dtype.

    The tokens are `R (x_i, xi_i)` with `R = [[I, 0], [w^T, sigma]]`, so `G = (R F)(R F)^T` with F a factor of a
    Wishart matrix, and no example need be drawn.

    Raises:
      ValueError: fewer examples than d + 1, for which this factor does not exist.
    """
    dtype = sigma_intervals.dtype
    key_w, key_interval, key_sigma, key_factor = jax.random.split(key, 4)
    w = jax.random.normal(key_w, (dimension, batch), dtype)
    low, high = sigma_intervals[jax.random.randint(key_interval, (batch,), 0, len(sigma_intervals))].T
    sigma = low + (high - low) * jax.random.uniform(key_sigma, (batch,), dtype)
    factor = wishart_factor(key_factor, dimension + 1, examples, batch, dtype)
    labels = _einsum("jb,jkb->kb", w, factor[:-1]) + sigma * factor[-1]
    tokens = jnp.concatenate([factor[:-1], labels[None]])
    return Sequences(product(tokens, jnp.swapaxes(tokens, 0, 1)), w, sigma)


def wishart_factor(key: jax.Array, d: int, n: int, batch: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Lower triangular F, [d, d, batch], such that `F F^T` has the law of `Z Z^T`, Z a d x n matrix of normals.

    Bartlett: below the diagonal are normals, and the square of diagonal entry i is chi-square with n - i degrees of
    freedom. That is twice a sum of (n - i) // 2 exponentials, and a squared normal more where n - i is odd.

    Raises:
      ValueError: n < d.
    """
    if n < d:
        raise ValueError(f"a Wishart matrix of size {d} needs at least as many samples, not {n}")
    key_normal, key_uniform = jax.random.split(key)
    odd = [(n - i) % 2 for i in range(d)]
    normals = jax.random.normal(key_normal, (d * (d - 1) // 2 + sum(odd), batch), dtype)
    pairs = (n - jnp.arange(d)) // 2
    uniforms = jax.random.uniform(key_uniform, (n // 2, d, batch), dtype, minval=jnp.finfo(dtype).tiny)
    used = jnp.arange(n // 2)[:, None, None] < pairs[:, None]
    squares = -2 * jnp.where(used, jnp.log(uniforms), 0).sum(0)
    rows, taken = [], 0
    for i in range(d):
        below, taken = normals[taken : taken + i], taken + i
        square = squares[i : i + 1]
        if odd[i]:
            square, taken = square + jnp.square(normals[taken]), taken + 1
        rows.append(jnp.concatenate([below, jnp.sqrt(square), jnp.zeros((d - 1 - i, batch), dtype)]))
    return jnp.stack(rows)
