"""Linear attention over chunks, in plain XLA and without a loop over time.

Inside a chunk the scores are a masked matrix; the states between chunks are a product of the chunks' own contributions
with a triangular matrix of decays (the state passing of Mamba-2, arXiv:2405.21060 section 6). With a decay for each
channel the scores do not factor into a product of two matrices without exponentials that overflow; a ladder of
midpoints, `_channel_scores`, gives them exactly, from exponents that are never positive.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Chunks(NamedTuple):
    """Arguments cut into chunks, [batch, heads, chunks, chunk, ...].

    Attributes:
      g: the inclusive sum of the log-decay from the chunk's first token on, [..., chunk, dim or 1], or None.
      starts: how many segments have started in the chunk up to each token, [batch, 1, chunks, chunk], or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    starts: jax.Array | None


def chunked_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    starts: jax.Array | None,
    state: jax.Array,
    scale: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention over chunks.

    Args:
      q: [batch, time, heads, dim]; `time` is a multiple of `chunk`, a power of two.
      k: like `q`.
      v: [batch, time, heads, value_dim].
      g: log-decay, [batch, time, heads, dim or 1], float32 at least, or None.
      starts: [batch, time], 1 where a segment starts with a fresh state, else 0; or None.
      state: [batch, heads, dim, value_dim], before the first token.
      scale: of the queries.
      chunk: tokens in a chunk.

    Returns:
      Output like `v`, and the final state in the dtype of `state`.
    """
    c = _chunks(q, k, v, g, starts, chunk)
    states = _states(c, state)
    scores = scale * _scores(c)
    entry, _ = _ends(c)
    read = c.q if entry is None else c.q * entry.astype(c.q.dtype)
    output = _dot("bhncd,bhndv->bhncv", read, states[:, :, :-1].astype(c.q.dtype)) * scale
    output = output + _dot("bhnij,bhnjv->bhniv", scores.astype(c.v.dtype), c.v)
    output = jnp.moveaxis(output.astype(v.dtype), 1, 3).reshape(v.shape)
    return output, states[:, :, -1].astype(state.dtype)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product that adds up in float32 at least; of float32 operands without the rounding of accelerators."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if jnp.finfo(a.dtype).bits >= 32 else lax.Precision.DEFAULT
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=dtype)


def _chunks(q, k, v, g, starts, chunk) -> Chunks:
    def cut(x):
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 3, 1)

    g = None if g is None else jnp.cumsum(cut(g), 3)
    starts = None if starts is None else jnp.cumsum(cut(starts[:, :, None]), 3)
    return Chunks(cut(q), cut(k), cut(v), g, starts)


def _ends(c: Chunks) -> tuple[jax.Array | None, jax.Array | None]:
    """Factors from the state before the chunk to each token, and from each token to the state after the chunk."""
    if c.g is None and c.starts is None:
        return None, None
    entry = leaving = jnp.zeros((), jnp.promote_types(c.q.dtype, jnp.float32))
    if c.g is not None:
        entry, leaving = c.g, c.g[..., -1:, :] - c.g
    if c.starts is not None:
        count = c.starts[..., None]
        entry = jnp.where(count == 0, entry, -jnp.inf)
        leaving = jnp.where(count == count[..., -1:, :], leaving, -jnp.inf)
    return jnp.exp(entry), jnp.exp(leaving)


def _scores(c: Chunks) -> jax.Array:
    """Products of queries and decayed keys inside each chunk, [batch, heads, chunks, chunk, chunk], lower triangle."""
    size = c.q.shape[-2]
    reaches = jnp.tril(jnp.ones((size, size), bool))
    if c.starts is not None:
        reaches = reaches & (c.starts[..., :, None] == c.starts[..., None, :])
    if c.g is None or c.g.shape[-1] == 1:
        scores = _dot("bhnid,bhnjd->bhnij", c.q, c.k)
        if c.g is not None:
            # The mask comes before the exponential: above the diagonal the difference is positive and could overflow.
            scores *= jnp.exp(jnp.where(reaches, c.g - jnp.swapaxes(c.g, -1, -2), -jnp.inf))
        return jnp.where(reaches, scores, 0)
    return jnp.where(reaches, _channel_scores(c.q, c.k, c.g), 0)


def _channel_scores(q: jax.Array, k: jax.Array, g: jax.Array) -> jax.Array:
    """`sum_d q_id k_jd exp(g_id - g_jd)` for i >= j, [..., chunk, chunk]; g falls along the chunk.

    A pair of tokens is in two halves of exactly one of the blocks of 2, 4, ..., chunk tokens. There the sum of the
    log-decay at the end of the first half lies between the two, so that both factors of
    `exp(g_i - middle) exp(middle - g_j)` are at most 1.
    """
    size = q.shape[-2]
    index = jnp.arange(size)
    scores = jnp.where(index[:, None] == index, (q * k).sum(-1, dtype=g.dtype)[..., None], 0)
    half = size // 2
    while half:
        block = index // (2 * half)
        second = (index // half) % 2 == 1
        middle = g[..., half - 1 :: 2 * half, :].repeat(2 * half, axis=-2)
        down = jnp.exp(jnp.where(second[:, None], g - middle, -jnp.inf))
        up = jnp.exp(jnp.where(second[:, None], -jnp.inf, middle - g))
        pairs = _dot("...id,...jd->...ij", q * down.astype(q.dtype), k * up.astype(k.dtype))
        scores += jnp.where(block[:, None] == block, pairs, 0)
        half //= 2
    return scores


def _states(c: Chunks, state: jax.Array) -> jax.Array:
    """The states before each chunk and after the last, [batch, heads, chunks + 1, dim, value_dim]."""
    _, leaving = _ends(c)
    k = c.k if leaving is None else c.k * leaving.astype(c.k.dtype)
    added = _dot("bhncd,bhncv->bhndv", k, c.v)
    added = jnp.concatenate([state[:, :, None].astype(added.dtype), added], 2)
    if c.g is None and c.starts is None:
        return jnp.cumsum(added, 2)
    return _dot("bhdnm,bhmdv->bhndv", _transitions(c, added.dtype), added)


def _transitions(c: Chunks, dtype: jnp.dtype) -> jax.Array:
    """Factors from what was added at m to the state n >= m, [batch or 1, heads or 1, dim or 1, chunks + 1, chunks + 1].

    What is added at 0 is the first state; at m, the m-th chunk's own.
    """
    count = c.q.shape[2] + 1
    reaches = jnp.tril(jnp.ones((count, count), bool))
    exponent = jnp.zeros((), dtype)
    if c.g is not None:
        total = jnp.pad(jnp.cumsum(c.g[..., -1, :], 2), ((0, 0), (0, 0), (1, 0), (0, 0)))
        total = jnp.swapaxes(total, 2, 3)
        exponent = total[..., :, None] - total[..., None, :]
    if c.starts is not None:
        seen = jnp.pad(jnp.cumsum(c.starts[..., -1], 2), ((0, 0), (0, 0), (1, 0)))[:, :, None]
        reaches = reaches & (seen[..., :, None] == seen[..., None, :])
    return jnp.exp(jnp.where(reaches, exponent, -jnp.inf)).astype(dtype)
