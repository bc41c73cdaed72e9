"""How accurately the mask of Eq. 9 can be built: four constructions against float64 (section 1.6 of the spec, E2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lion.attention.decay import cumulative, mask

BAND = 8  # errors are taken within this distance of the diagonal, where the entries are largest


def _op(a: jax.Array) -> jax.Array:
    sums, position = cumulative(a[:, None]), jnp.arange(len(a))
    return mask(sums, sums, position, position, "forward")


def _differences(a: jax.Array) -> jax.Array:
    c = jnp.cumsum(a)
    before = c - a
    lower = jnp.tri(len(a), dtype=bool)
    return jnp.where(lower, jnp.exp(jnp.where(lower, before[:, None] - before[None, :], 0)), 0)


def _ratio(a: jax.Array, epsilon: float) -> jax.Array:
    product = jnp.exp(jnp.cumsum(a) - a)
    return jnp.tril(product[:, None] * (1 / (product[None, :] + epsilon)))


CONSTRUCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "this op, float32": _op,
    "difference of sums, float32": _differences,
    "difference of sums, bfloat16": lambda a: _differences(a.astype(jnp.bfloat16)),
    "ratio of products, float32": lambda a: _ratio(a, 0.0),
    "ratio with 1e-7 added, float32": lambda a: _ratio(a, 1e-7),
}
"""Lower triangles `[time, time]` from log-decays `[time]`, key side (Eq. 9); the last two are listings of the paper."""


def measure(time: int, mean_decay: float, seed: int = 0) -> dict[str, dict[str, float]]:
    """For each construction the largest error near the diagonal, and how many entries of the gradient are not finite.

    Args:
      time: tokens.
      mean_decay: decays are the sigmoid of logits that spread with standard deviation 0.5 around the logit of this.
      seed: of the decays.

    Returns:
      Construction -> `error` (infinite or not a number where the mask is) and `bad_gradients` (of the sum of the mask
      towards the log-decays, out of `time`).
    """
    logits = np.log(mean_decay / (1 - mean_decay)) + 0.5 * np.random.default_rng(seed).normal(size=time)
    a = (-np.log1p(np.exp(-logits))).astype(np.float32)
    before = np.concatenate([[0], np.cumsum(a.astype(np.float64))[:-1]])
    distance = np.subtract.outer(np.arange(time), np.arange(time))
    near = (distance >= 0) & (distance <= BAND)
    exact = np.exp(np.where(near, np.subtract.outer(before, before), 0))
    table = {}
    for name, build in CONSTRUCTIONS.items():
        built, pull = jax.vjp(jax.jit(build), jnp.asarray(a))
        with np.errstate(invalid="ignore"):
            error = np.abs(np.asarray(built, np.float64) - exact)[near].max()
        bad = np.sum(~np.isfinite(np.asarray(pull(jnp.ones_like(built))[0], np.float64)))
        table[name] = {"error": float(error), "bad_gradients": int(bad)}
    return table
