"""Chunks with a state from either side: work linear in time, which the paper's own chunk form does not have.

A query reads the keys of its own chunk directly, those of all earlier chunks from a state that comes from the left, and
those of all later chunks from a state that comes from the right (DERIVATION.md, section 5). No pair is counted twice,
so that there is no half diagonal to take off, and every exponent is at most zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lion.attention.block import chunks, unchunk, within
from lion.attention.decay import accumulator, cumulative, dot


def two_sided(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None,
    direction: str,
    chunk_size: int,
    within: Callable = within,
) -> tuple[jax.Array, jax.Array]:
    """Numerators and row sums; other arguments and results as in `lion.attention.full.full`.

    `within` computes the attention inside chunks, as `lion.attention.block.within` does.
    """
    time, acc = q.shape[2], accumulator(q.dtype)
    if log_decay is None:
        if direction == "both":
            return _without_decay(q, k, v)
        log_decay = jnp.zeros((1, 1, time, 1), acc)
    q, k, v, log_decay = (chunks(x, chunk_size) for x in (q, k, v, log_decay))
    sums = cumulative(log_decay)
    numerator, row_sum = within(q, k, v, sums, direction)
    if q.shape[2] > 1:
        whole = sums.through.at((..., slice(-1, None), slice(None)))
        left = sums.before.value(), whole.minus(sums.before)
        right = whole.minus(sums.through), sums.through.value()
        sides = {"both": (left, right), "forward": (left,), "backward": (right,)}[direction]
        queries, keys = (
            jnp.concatenate([(x * jnp.exp(side[i])).astype(x.dtype) for side in sides], -1)
            for i, x in enumerate((q, k))
        )
        states = dot("bhncd,bhncv->bhndv", keys, v)
        key_sums = keys.astype(acc).sum(-2)
        ways = {"both": ("forward", "backward")}.get(direction, (direction,))
        gate = jnp.exp(whole.value())[..., 0, :]
        states, key_sums = _carry(states, key_sums, gate, ways)
        numerator += dot("bhncd,bhndv->bhncv", queries, states)
        row_sum += dot("bhncd,bhnd->bhnc", queries.astype(acc), key_sums)
    return unchunk(numerator, time), unchunk(row_sum[..., None], time)[..., 0]


def _carry(
    states: jax.Array, key_sums: jax.Array, gate: jax.Array, ways: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """What each chunk receives from all chunks on the one side, and from all on the other.

    Args:
      states: each chunk's own, `[batch, heads, chunks, sides * dim, value_dim]`, the sides in the order of `ways`.
      key_sums: likewise, `[batch, heads, chunks, sides * dim]`.
      gate: the decay across each chunk, `[batch or 1, heads or 1, chunks, dim or 1]`.
      ways: the direction in which each side's state travels.
    """
    received = []
    for state, key_sum, way in zip(
        jnp.split(states, len(ways), -2), jnp.split(key_sums, len(ways), -1), ways, strict=True
    ):
        own = tuple(jnp.moveaxis(x, 2, 0) for x in (state, key_sum[..., None], gate[..., None]))

        def step(carry: tuple[jax.Array, jax.Array], chunk: tuple) -> tuple[tuple, tuple]:
            state, key_sum, gate = chunk
            return (gate * carry[0] + state, gate * carry[1] + key_sum), carry

        start = jnp.zeros_like(own[0][0]), jnp.zeros_like(own[1][0])
        _, carried = jax.lax.scan(step, start, own, reverse=way == "backward", unroll=4)
        received.append([jnp.moveaxis(x, 0, 2) for x in carried])
    states, key_sums = zip(*received, strict=True)
    return jnp.concatenate(states, -2), jnp.concatenate(key_sums, -2)[..., 0]


def _without_decay(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Every query reads the same state: `Q (K^T V)` and `Q (K^T 1)`."""
    acc = accumulator(q.dtype)
    state = dot("bhjd,bhjv->bhdv", k, v)
    key_sum = k.astype(acc).sum(2)
    return dot("bhid,bhdv->bhiv", q, state), dot("bhid,bhd->bhi", q.astype(acc), key_sum)
