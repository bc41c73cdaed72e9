"""Attention inside a block of tokens, for scalar and for diagonal decays."""

import jax
import jax.numpy as jnp

from lion.attention.decay import Cumulative, accumulator, dot, mask, rounded


def within(q: jax.Array, k: jax.Array, v: jax.Array, sums: Cumulative, direction: str) -> tuple[jax.Array, jax.Array]:
    """Numerators `[..., time, value_dim]` and row sums `[..., time]` of the attention inside each block.

    Args:
      q, k: `[..., time, dim]`.
      v: `[..., time, value_dim]`.
      sums: cumulative log-decays of the same blocks, `[..., time, dim or 1]`.
      direction: "both", "forward" or "backward".
    """
    if sums.through.fine.shape[-1] > 1:
        return _dyadic(q, k, v, sums, direction)
    position = jnp.arange(q.shape[-2])
    scores = dot("...id,...jd->...ij", q, k) * mask(sums, sums, position, position, direction)
    return dot("...ij,...jv->...iv", scores, v), rounded(scores, v.dtype).sum(-1)


def _dyadic(q: jax.Array, k: jax.Array, v: jax.Array, sums: Cumulative, direction: str) -> tuple[jax.Array, jax.Array]:
    """Diagonal decays: the two halves of the block attend to each other, then those of each half, and so on.

    Any two tokens are parted by exactly one of these halvings. The decay between them is then the product of the decay
    from the key to the border and that from the border to the query, neither of which can overflow, and which turn the
    scores of two halves into one matrix product. The work is that of the unmasked scores.
    """
    time = q.shape[-2]
    size = 1 << (time - 1).bit_length()
    q, k, v = (_extend(x, size) for x in (q, k, v))
    sums = Cumulative(
        *(jax.tree.map(lambda x, last: _extend_with(x, last[..., -1:, :], size), s, sums.through) for s in sums)
    )
    acc = accumulator(q.dtype)
    row_sum = jnp.sum(q.astype(acc) * k.astype(acc), -1)  # the diagonal, where the mask is 1
    numerator = row_sum[..., None] * v.astype(acc)
    kept = {"both": (1, 1), "forward": (0, 1), "backward": (1, 0)}[direction]  # queries of the left and right half
    kept = jnp.array(kept, acc)[:, None, None]
    half = size // 2
    while half:

        def halves(x: jax.Array, half: int = half) -> jax.Array:
            return x.reshape(*x.shape[:-2], size // (2 * half), 2, half, x.shape[-1])

        before, through = jax.tree.map(halves, sums)
        border = before.at((..., slice(1, 2), slice(0, 1), slice(None)))
        left, right = (..., slice(0, 1), slice(None), slice(None)), (..., slice(1, 2), slice(None), slice(None))
        to_border = jnp.concatenate([border.minus(through.at(left)), before.at(right).minus(border)], -3)
        from_border = jnp.concatenate([border.minus(before.at(left)), through.at(right).minus(border)], -3)
        queries = (halves(q) * jnp.exp(to_border) * kept).astype(q.dtype)
        keys = (halves(k) * jnp.exp(from_border)).astype(k.dtype)
        scores = _product("nid,njd->nij", queries, jnp.flip(keys, -3))
        part = _product("nij,njv->niv", scores, jnp.flip(halves(v), -3))
        numerator += part.reshape(numerator.shape)
        row_sum += rounded(scores, v.dtype).sum(-1).reshape(row_sum.shape)
        half //= 2
    return numerator[..., :time, :], row_sum[..., :time]


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Products of matrices with their leading axes merged: XLA for CPUs aborts on products with eight axes."""
    result = dot(subscripts, *(z.reshape(-1, *z.shape[-2:]) for z in (x, y)))
    return result.reshape(*x.shape[:-2], *result.shape[-2:])


def _extend(x: jax.Array, size: int) -> jax.Array:
    """Fills the last axis but one up to `size` with zeros."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])


def _extend_with(x: jax.Array, row: jax.Array, size: int) -> jax.Array:
    """Fills the last axis but one up to `size` with copies of `row`, `[..., 1, dim]`."""
    shape = (*x.shape[:-2], size - x.shape[-2], x.shape[-1])
    return jnp.concatenate([x, jnp.broadcast_to(row, shape)], -2)


def chunks(x: jax.Array, size: int) -> jax.Array:
    """Cuts `[..., time, dim]` into `[..., chunks, size, dim]`, the last one filled up with zeros."""
    count = -(-x.shape[-2] // size)
    return _extend(x, count * size).reshape(*x.shape[:-2], count, size, x.shape[-1])


def unchunk(x: jax.Array, time: int) -> jax.Array:
    """The inverse of `chunks`, for `[..., chunks, size, dim]` and the original length."""
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])[..., :time, :]
