"""The full form, Eq. 8: all scores at once, for training and for short sequences.

The gradient is written out (DERIVATION.md, section 2), because differentiating the forward pass would keep the scores,
the mask and their product of every layer: here the backward pass makes them again from q, k, v and the decays.
"""

from functools import partial

import jax
import jax.numpy as jnp

from lion.attention.block import within
from lion.attention.decay import Cumulative, Sum, accumulator, cumulative, dot, mask, rounded, scan_sums, triangles

Decays = tuple[jax.Array, ...]


def full(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    direction: str = "both",
) -> tuple[jax.Array, jax.Array]:
    """Numerators `[batch, heads, time, value_dim]` and row sums `[batch, heads, time]`.

    Args:
      q, k: `[batch, heads, time, dim]`.
      v: `[batch, heads, time, value_dim]`.
      log_decay: `[batch or 1, heads, time, dim or 1]`, or None for no decay.
      direction: "both", "forward" or "backward".
    """
    if log_decay is not None and log_decay.shape[-1] > 1:
        return within(q, k, v, cumulative(log_decay), direction)
    if log_decay is None:
        if direction == "both":
            return full_over_scans(q, k, v, (), (), direction)
        log_decay = jnp.zeros((1, 1, q.shape[2], 1), accumulator(q.dtype))
    return full_over_scans(q, k, v, (log_decay,), (jnp.arange(q.shape[2]),), direction)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def full_over_scans(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decays: Decays, positions: tuple[jax.Array, ...], direction: str
) -> tuple[jax.Array, jax.Array]:
    """The same with the mean of the masks of several scans (section 4.3 of the spec: one row sum for all of them).

    Args:
      q, k, v: as in `full`.
      log_decays: one scalar decay per scan, `[batch or 1, heads or 1, time, 1]`, in the order of the tokens.
      positions: the place of each token in each scan, `[time]`.
      direction: "both", "forward" or "backward".
    """
    scores = dot("bhid,bhjd->bhij", q, k)
    if log_decays:
        scores *= sum(_masks(log_decays, positions, direction)) / len(log_decays)
    return dot("bhij,bhjv->bhiv", scores, v), rounded(scores, v.dtype).sum(-1)


def _forward(q, k, v, log_decays, positions, direction):
    return full_over_scans(q, k, v, log_decays, positions, direction), (q, k, v, log_decays, positions)


def _backward(direction, residuals, cotangents):
    # Without the barrier the compiler finds these scores equal to those of the forward pass, and keeps those instead.
    (q, k, v, log_decays, positions), (d_numerator, d_row_sum) = jax.lax.optimization_barrier((residuals, cotangents))
    d_numerator = d_numerator.astype(v.dtype)
    scores = dot("bhid,bhjd->bhij", q, k)
    d_masked = dot("bhiv,bhjv->bhij", d_numerator, v) + d_row_sum[..., None]
    masks = _masks(log_decays, positions, direction)
    mean = sum(masks) / len(masks) if masks else 1
    d_v = dot("bhij,bhiv->bhjv", scores * mean, d_numerator)
    d_scores = (d_masked * mean).astype(q.dtype)
    d_q, d_k = dot("bhij,bhjd->bhid", d_scores, k), dot("bhij,bhid->bhjd", d_scores, q)
    d_mask = d_masked * scores / max(len(masks), 1)
    d_decays = tuple(
        _decay_gradient(one, position, d_mask * m)
        for one, position, m in zip(log_decays, positions, masks, strict=True)
    )
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), d_decays, (None,) * len(positions)


full_over_scans.defvjp(_forward, _backward)


def _masks(log_decays: Decays, positions: tuple[jax.Array, ...], direction: str) -> list[jax.Array]:
    masks = []
    for log_decay, position in zip(log_decays, positions, strict=True):
        sums = scan_sums(log_decay, position)
        masks.append(mask(sums, sums, position, position, direction))
    return masks


def _decay_gradient(log_decay: jax.Array, position: jax.Array, d_exponent: jax.Array) -> jax.Array:
    """From the gradient of all exponents of the mask, `[batch, heads, time, time]`, to that of the log-decays."""
    axes = [axis for axis in (0, 1) if log_decay.shape[axis] == 1 and d_exponent.shape[axis] > 1]
    d_exponent = d_exponent.sum(axes, keepdims=True)
    below, above = triangles(position, position)
    below, above = jnp.where(below, d_exponent, 0), jnp.where(above, d_exponent, 0)
    d_before = (below.sum(-1) - below.sum(-2))[..., None]
    d_through = (above.sum(-2) - above.sum(-1))[..., None]
    _, pull = jax.vjp(lambda a: scan_sums(a, position), log_decay)
    zeros = jnp.zeros_like(d_before)
    # Only the fine parts of the sums depend on the log-decays.
    return pull(Cumulative(Sum(zeros, d_before), Sum(zeros, d_through)))[0]
