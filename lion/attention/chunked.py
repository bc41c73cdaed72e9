"""LION-chunk, Theorem 3.2: all queries meet the keys chunk by chunk. Quadratic work, memory of time x chunk.

There is no state between chunks, only sums of outputs; every query sees every key, so all chunks are of one kind.
"""

import jax
import jax.numpy as jnp

from lion.attention.block import chunks, within
from lion.attention.decay import Cumulative, accumulator, cumulative, dot, mask, rounded


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, direction: str, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Numerators and row sums; other arguments and results as in `lion.attention.full.full`.

    The backward pass computes the scores of each chunk again, so that it too needs no more than time x chunk.
    """
    time, acc = q.shape[2], accumulator(q.dtype)
    if log_decay is None:
        log_decay = jnp.zeros((1, 1, time, 1), acc)
    count = -(-time // chunk_size)
    q, k, v, log_decay = (_flat(chunks(x, chunk_size)) for x in (q, k, v, log_decay))
    q = q.astype(acc)  # its gradient is a sum over chunks, and would be rounded after each of them
    position = jnp.arange(count * chunk_size)
    sums = cumulative(log_decay)
    by_chunk = jax.tree.map(lambda x: _leading_chunks(x, chunk_size), (k, v, sums))
    columns = (*by_chunk, position.reshape(count, chunk_size))
    part = _scalar_part if log_decay.shape[-1] == 1 else _diagonal_part

    @jax.checkpoint
    def contribution(columns: tuple) -> tuple[jax.Array, jax.Array]:
        return part(q, sums, position, *columns, direction)

    def add(totals: tuple[jax.Array, jax.Array], columns: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        return jax.tree.map(jnp.add, totals, contribution(columns)), None

    totals = jnp.zeros((*q.shape[:3], v.shape[-1]), acc), jnp.zeros(q.shape[:3], acc)
    (numerator, row_sum), _ = jax.lax.scan(add, totals, columns)
    return numerator[:, :, :time], row_sum[:, :, :time]


def _scalar_part(
    q: jax.Array,
    sums: Cumulative,
    position: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_sums: Cumulative,
    key_position: jax.Array,
    direction: str,
) -> tuple[jax.Array, jax.Array]:
    """What one chunk of keys adds to all queries: `A_[j] V_[j]` and the row sums of `A_[j]`, Eq. 21."""
    scores = dot("bhid,bhjd->bhij", q, k) * mask(sums, key_sums, position, key_position, direction)
    return dot("bhij,bhjv->bhiv", scores, v), rounded(scores, v.dtype).sum(-1)


def _diagonal_part(
    q: jax.Array,
    sums: Cumulative,
    position: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_sums: Cumulative,
    key_position: jax.Array,
    direction: str,
) -> tuple[jax.Array, jax.Array]:
    """The same for diagonal decays: queries outside the chunk see it across its nearer end, those inside directly."""
    start, size = key_position[0], k.shape[2]
    end = key_sums.through.at((..., slice(-1, None), slice(None)))
    begin = key_sums.before.at((..., slice(0, 1), slice(None)))
    outside = {
        "forward": (position >= start + size, sums.before.minus(end), end.minus(key_sums.before)),
        "backward": (position < start, begin.minus(sums.through), key_sums.through.minus(begin)),
    }
    inside = jax.lax.dynamic_slice_in_dim(q, start, size, 2)
    numerator, row_sum = within(inside, k, v, key_sums, direction)
    numerator = _place(numerator, start, q.shape[2])
    row_sum = _place(row_sum, start, q.shape[2])
    for way, (seen, to_end, from_end) in outside.items():
        if direction in ("both", way):
            queries = q * jnp.exp(jnp.where(seen[:, None], to_end, -jnp.inf))
            keys = k * jnp.exp(from_end)
            scores = dot("bhid,bhjd->bhij", queries.astype(q.dtype), keys.astype(k.dtype))
            numerator += dot("bhij,bhjv->bhiv", scores, v)
            row_sum += rounded(scores, v.dtype).sum(-1)
    return numerator, row_sum


def _place(x: jax.Array, start: jax.Array, time: int) -> jax.Array:
    """Zeros of `time` tokens (axis 2) with `x` from `start` on."""
    zeros = jnp.zeros((*x.shape[:2], time, *x.shape[3:]), x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, x, start, 2)


def _flat(x: jax.Array) -> jax.Array:
    """`[batch, heads, chunks, size, dim]` back to a time axis, whole chunks long."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _leading_chunks(x: jax.Array, chunk_size: int) -> jax.Array:
    """The chunks of `[batch, heads, time, dim]` on a leading axis, for a scan."""
    return jnp.moveaxis(chunks(x, chunk_size), 2, 0)
