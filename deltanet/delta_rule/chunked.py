"""The chunkwise delta rule in plain XLA, with its own backward. Runs everywhere.

The symbols are those of DERIVATION.md. `forward_chunk` and `backward_chunk` treat one chunk and any leading axes; the
TPU kernels call them too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Precision(NamedTuple):
    """Precision of the matrix products.

    Attributes:
      state: of the products whose result is carried from chunk to chunk, and of the inverse. Errors there grow where
        keys are alike.
      output: of the products that only lead to an output or to a gradient.
    """

    state: lax.Precision
    output: lax.Precision


class Decay(NamedTuple):
    """What decay and segment starts do inside a chunk. All factors are in [0, 1] where the log-decay is not positive.

    Attributes:
      pairs: Gamma, from token j to token i >= j, [..., chunk, chunk]; zero above the diagonal and between segments.
      entry: gamma, from the state before the chunk to each token, [..., chunk, 1].
      exit: lambda, from each token to the end of the chunk, [..., chunk, 1].
      whole: from the state before the chunk to its end, [..., 1, 1].
    """

    pairs: jax.Array
    entry: jax.Array
    exit: jax.Array
    whole: jax.Array


class ChunkGradients(NamedTuple):
    """Gradients of one chunk; of the cumulative log-decay in two parts, `log_decay_column + log_decay_row^T`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array  # [..., chunk, 1]
    log_decay_column: jax.Array  # [..., chunk, 1]
    log_decay_row: jax.Array  # [..., 1, chunk]
    state: jax.Array


def matmul(a: jax.Array, b: jax.Array, precision: lax.Precision, *, ta: bool = False, tb: bool = False) -> jax.Array:
    """`a @ b` over the last two axes, either one transposed first; leading axes are a batch. In the wider dtype."""
    batch = tuple(range(a.ndim - 2))
    contract = ((a.ndim - 2 if ta else a.ndim - 1,), (b.ndim - 1 if tb else b.ndim - 2,))
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (contract, (batch, batch)), precision=precision, preferred_element_type=dtype)


def _iota(shape: tuple[int, ...], from_end: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, len(shape) - from_end)


def decay_factors(
    log_decay: tuple[jax.Array, jax.Array] | None,
    starts: tuple[jax.Array, jax.Array] | None,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> Decay:
    """The factors of a chunk.

    Args:
      log_decay: G, the inclusive sum of the log-decay from the chunk's first token on, as a column [..., chunk, 1] and
        as a row [..., 1, chunk]; None is no decay.
      starts: how many segments have started in the chunk up to and including each token, likewise; None is none.
      shape: of the chunk's keys, [..., chunk, dim].
      dtype: of the factors.
    """
    shape = (*shape[:-1], shape[-2])
    reaches = _iota(shape, 2) >= _iota(shape, 1)
    pairs, entry = jnp.zeros(shape, dtype), jnp.zeros((*shape[:-1], 1), dtype)
    exit_, whole = entry, entry[..., -1:, :]
    if log_decay is not None:
        column, row = log_decay
        last = column[..., -1:, :]
        pairs, entry, exit_, whole = column - row, column, last - column, last
    if starts is not None:
        column, row = starts
        last = column[..., -1:, :]
        reaches &= column == row
        entry = jnp.where(column == 0, entry, -jnp.inf)
        exit_ = jnp.where(column == last, exit_, -jnp.inf)
        whole = jnp.where(last == 0, whole, -jnp.inf)
    # The mask comes before the exponential: above the diagonal the difference is positive and could overflow.
    return Decay(jnp.exp(jnp.where(reaches, pairs, -jnp.inf)), jnp.exp(entry), jnp.exp(exit_), jnp.exp(whole))


def interaction(k: jax.Array, beta: jax.Array, decay: Decay, precision: Precision) -> jax.Array:
    """M, the strictly lower triangle of `B K K^T * Gamma`, [..., chunk, chunk]; `beta` is a column."""
    m = matmul(k, k, precision.state, tb=True) * beta * decay.pairs
    return jnp.where(_iota(m.shape, 2) > _iota(m.shape, 1), m, 0)


def unit_lower_inverse(m: jax.Array, precision: lax.Precision) -> jax.Array:
    """`(I + m)^-1` of strictly lower triangular `m` [..., n, n], any n.

    Diagonal blocks are inverted first and merged in pairs. Every intermediate is an inverse of a block or its product
    with a block, so nothing grows; powers of `m`, which the Neumann series needs, overflow where keys are alike.
    """
    size = m.shape[-1]
    padded = 1 << (size - 1).bit_length()
    m = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, padded - size)] * 2)
    blocks = jnp.ones((*m.shape[:-2], padded, 1, 1), m.dtype)
    while (width := blocks.shape[-1]) < padded:
        count = padded // (2 * width)
        tiles = m.reshape(*m.shape[:-2], count, 2, width, count, 2, width)
        below = jnp.moveaxis(jnp.diagonal(tiles[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        first, second = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
        corner = -matmul(second, matmul(below, first, precision), precision)
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        blocks = jnp.concatenate([top, jnp.concatenate([corner, second], -1)], -2)
    return blocks[..., 0, :size, :size]


def pseudo_values(k, v, beta, decay, inverse, state, precision):
    """N, the rows that the chunk adds to the state with its keys: `A B (V - gamma K S)`, [..., chunk, value_dim]."""
    prediction = decay.entry * matmul(k, state, precision.state)
    return matmul(inverse, beta * (v - prediction), precision.state)


def forward_chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    decay: Decay,
    inverse: jax.Array,
    state: jax.Array,
    scale: float,
    precision: Precision,
) -> tuple[jax.Array, jax.Array]:
    """Output [..., chunk, value_dim] of a chunk and the state after it.

    Args:
      q: [..., chunk, dim]. Arrays are float32 or float64.
      k: like `q`.
      v: [..., chunk, value_dim].
      beta: [..., chunk, 1].
      decay: the chunk's factors.
      inverse: A, [..., chunk, chunk].
      state: before the chunk, [..., dim, value_dim].
      scale: of the queries.
      precision: of the products.
    """
    n = pseudo_values(k, v, beta, decay, inverse, state, precision)
    scores = scale * decay.pairs * matmul(q, k, precision.output, tb=True)
    output = scale * decay.entry * matmul(q, state, precision.output) + matmul(scores, n, precision.output)
    return output, decay.whole * state + matmul(decay.exit * k, n, precision.state, ta=True)


def backward_chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    decay: Decay,
    inverse: jax.Array,
    state: jax.Array,
    d_output: jax.Array,
    d_state: jax.Array,
    scale: float,
    precision: Precision,
) -> ChunkGradients:
    """Gradients of a chunk, given those of its output and of the state after it; arguments as in `forward_chunk`.

    One product with `inverse^T` stands for the derivative of the whole triangular solve.
    """
    fine, coarse = precision
    shape = (*k.shape[:-1], k.shape[-2])
    strictly = _iota(shape, 2) > _iota(shape, 1)
    n = pseudo_values(k, v, beta, decay, inverse, state, precision)
    scores = scale * decay.pairs * matmul(q, k, fine, tb=True)
    m = interaction(k, beta, decay, precision)
    d_n = matmul(scores, d_output, fine, ta=True) + decay.exit * matmul(k, d_state, fine)
    r = matmul(inverse, d_n, fine, ta=True)  # gradient of B (V - gamma K S)
    d_scores = matmul(d_output, n, coarse, tb=True)
    d = scale * d_scores * decay.pairs
    d_m = jnp.where(strictly, -matmul(r, n, coarse, tb=True), 0)
    y = d_m * decay.pairs
    x = matmul(y, k, coarse)
    from_state = matmul(d_output, state, coarse, tb=True)
    prediction = matmul(r, state, coarse, tb=True)
    to_state = matmul(n, d_state, coarse, tb=True)
    d_q = scale * decay.entry * from_state + matmul(d, k, coarse)
    d_k = decay.exit * to_state + matmul(d, q, coarse, ta=True) + matmul(y, beta * k, coarse, ta=True)
    d_k += beta * (x - decay.entry * prediction)
    d_beta = (r * v).sum(-1, keepdims=True) + ((x - decay.entry * prediction) * k).sum(-1, keepdims=True)
    pairs = d_scores * scores + d_m * m
    leaving = decay.exit * (to_state * k).sum(-1, keepdims=True)
    column = pairs.sum(-1, keepdims=True) - leaving
    column += decay.entry * ((scale * from_state * q - beta * prediction * k).sum(-1, keepdims=True))
    at_end = decay.whole * (state * d_state).sum((-2, -1), keepdims=True) + leaving.sum(-2, keepdims=True)
    column += jnp.where(_iota(column.shape, 2) == k.shape[-2] - 1, at_end, 0)
    d_state = decay.whole * d_state + scale * matmul(decay.entry * q, d_output, fine, ta=True)
    d_state -= matmul(beta * decay.entry * k, r, fine, ta=True)
    return ChunkGradients(d_q, d_k, beta * r, d_beta, column, -pairs.sum(-2, keepdims=True), d_state)


def chunk_log_decay(g: jax.Array) -> jax.Array:
    """G, the inclusive sum of the log-decay inside each chunk; chunks are the last axis."""
    return jnp.cumsum(g, axis=-1)


def d_chunk_log_decay(d_log_decay: jax.Array) -> jax.Array:
    """The gradient of the log-decay, from that of its sum inside the chunk; chunks are the last axis."""
    return lax.cumsum(d_log_decay, axis=d_log_decay.ndim - 1, reverse=True)


class _Chunks(NamedTuple):
    """The arguments cut into chunks, [chunks, batch, heads, chunk, ...]; `beta` is a column."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    decay: Decay


def _cut(x: jax.Array, size: int) -> jax.Array:
    """[batch, time, heads, ...] to [chunks, batch, heads, size, ...]."""
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.swapaxes(jnp.moveaxis(x, 1, 0), 2, 3)


def _join(x: jax.Array) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(jnp.swapaxes(x, 2, 3), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunks(q, k, v, beta, g, starts, size) -> _Chunks:
    dtype = _wide(q)

    def column_and_row(x):
        return x[..., None], x[..., None, :]

    log_decay = None if g is None else column_and_row(chunk_log_decay(_cut(g.astype(dtype), size)))
    counts = None if starts is None else column_and_row(jnp.cumsum(_cut(starts[..., None], size), axis=-1))
    q, k, v, beta = (_cut(x, size) for x in (q, k, v, beta.astype(dtype)))
    return _Chunks(q, k, v, beta[..., None], decay_factors(log_decay, counts, q.shape, dtype))


def _wide(x: jax.Array) -> jnp.dtype:
    """The dtype of the computation."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _widen(chunk: _Chunks) -> _Chunks:
    return chunk._replace(
        q=chunk.q.astype(_wide(chunk.q)), k=chunk.k.astype(_wide(chunk.k)), v=chunk.v.astype(_wide(chunk.v))
    )


def _precision(dtype: jnp.dtype) -> Precision:
    low = jnp.finfo(dtype).bits < 32
    return Precision(lax.Precision.HIGHEST, lax.Precision.DEFAULT if low else lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def chunked_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    starts: jax.Array | None,
    state: jax.Array,
    scale: float,
    chunk_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule over chunks, section 3 of arXiv:2406.06484.

    Args:
      q: [batch, time, heads, dim]; `time` is a multiple of `chunk_size`.
      k: like `q`.
      v: [batch, time, heads, value_dim].
      beta: [batch, time, heads].
      g: log-decay, like `beta`, or None.
      starts: [batch, time], float32, 1 where a segment starts with a fresh state, else 0; or None.
      state: [batch, heads, dim, value_dim], before the first token.
      scale: of the queries.
      chunk_size: tokens in a chunk; any number.

    Returns:
      Output like `v`, and the final state in the dtype of `state`.
    """
    return _forward(q, k, v, beta, g, starts, state, scale, chunk_size)[0]


def _forward(q, k, v, beta, g, starts, state, scale, chunk_size):
    precision = _precision(q.dtype)
    chunks = _chunks(q, k, v, beta, g, starts, chunk_size)
    inverse = unit_lower_inverse(interaction(chunks.k, chunks.beta, chunks.decay, precision), precision.state)

    def step(carry, inputs):
        output, carry = forward_chunk(*_widen(inputs[0]), inputs[1], carry, scale, precision)
        return carry, output.astype(v.dtype)

    final, output = lax.scan(step, state.astype(_wide(q)), (chunks, inverse))
    return (_join(output), final.astype(state.dtype)), (q, k, v, beta, g, starts, state, inverse)


def _backward(scale, chunk_size, residuals, cotangents):
    q, k, v, beta, g, starts, state, inverse = residuals
    precision = _precision(q.dtype)
    chunks = _chunks(q, k, v, beta, g, starts, chunk_size)
    dtype = _wide(q)

    def replay(carry, inputs):
        (_, k, v, beta, decay), inverse = _widen(inputs[0]), inputs[1]
        n = pseudo_values(k, v, beta, decay, inverse, carry, precision)
        return decay.whole * carry + matmul(decay.exit * k, n, precision.state, ta=True), carry

    _, states = lax.scan(replay, state.astype(dtype), (chunks, inverse))

    def step(carry, inputs):
        chunk, inverse, state, d_output = inputs
        chunk, d_output = _widen(chunk), d_output.astype(dtype)
        gradients = backward_chunk(*chunk, inverse, state, d_output, carry, scale, precision)
        return gradients.state, gradients._replace(
            q=gradients.q.astype(q.dtype), k=gradients.k.astype(k.dtype), v=gradients.v.astype(v.dtype), state=None
        )

    inputs = (chunks, inverse, states, _cut(cotangents[0], chunk_size))
    d_state, gradients = lax.scan(step, cotangents[1].astype(dtype), inputs, reverse=True)
    d_g = None
    if g is not None:
        d_log_decay = gradients.log_decay_column[..., 0] + gradients.log_decay_row[..., 0, :]
        d_g = _join(d_chunk_log_decay(d_log_decay)).astype(g.dtype)
    d_beta = _join(gradients.beta[..., 0]).astype(beta.dtype)
    d_starts = None if starts is None else jnp.zeros_like(starts)
    d_q, d_k, d_v = _join(gradients.q), _join(gradients.k), _join(gradients.v)
    return d_q, d_k, d_v, d_beta, d_g, d_starts, d_state.astype(state.dtype)


chunked_delta_rule.defvjp(_forward, _backward)
