"""The chunkwise delta rule as Pallas kernels for TPUs, forward and backward.

The grid runs over groups of heads and, innermost and in order, over chunks; the state (backward: its gradient) stays in
VMEM from chunk to chunk. The mathematics of a chunk is that of `chunked`, on several heads at once, because batched
products keep the matrix unit busier than one head's. What differs is the inverse, which may not slice, and the way of
the numbers per token: they travel as rows, and a diagonal mask turns rows into columns.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deltanet.delta_rule.chunked import (
    Decay,
    Precision,
    backward_chunk,
    chunk_log_decay,
    d_chunk_log_decay,
    decay_factors,
    forward_chunk,
    interaction,
    matmul,
)

CHUNK = 64
_ROWS = ("beta", "log_decay", "starts")  # the numbers per token, [heads, chunks, 3, chunk]
_GROUP_WIDTH = 512  # heads in a group times their size; more gains little and fills VMEM


def padded_size(dim: int) -> int:
    """The head size that the kernels run for `dim`: whole groups of 8 sublanes."""
    return -(-dim // 8) * 8


def refusal(dtype: jnp.dtype, dim: int, value_dim: int) -> str | None:
    """Why these arguments are not served, or None."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, not {dtype}"
    if max(dim, value_dim) > 256:
        return f"the TPU kernels take head sizes up to 256, not {max(dim, value_dim)}"
    return None


def _precision(dtype: jnp.dtype) -> Precision:
    """Three bfloat16 passes for what is carried on; six where the caller holds float32."""
    if dtype == jnp.float32:
        return Precision(lax.Precision.HIGHEST, lax.Precision.HIGHEST)
    # Before JAX 0.11 kernels know one pass and six, not three.
    return Precision(
        lax.Precision.HIGH if jax.__version_info__ >= (0, 11) else lax.Precision.HIGHEST, lax.Precision.DEFAULT
    )


def masked_inverse(m: jax.Array, precision: lax.Precision) -> jax.Array:
    """`(I + m)^-1` of strictly lower triangular `m` [..., n, n], n a power of two, by products of whole matrices.

    The blocks double as in `chunked.unit_lower_inverse`, but masks instead of slices pick them.
    """
    size = m.shape[-1]
    row, column = (lax.broadcasted_iota(jnp.int32, m.shape, m.ndim - axis) for axis in (2, 1))
    inverse = jnp.where(row == column, 1.0, 0.0)
    for level in range(size.bit_length() - 1):
        pair = (row >> (level + 1)) == (column >> (level + 1))
        below = jnp.where(pair & ((row >> level) > (column >> level)), m, 0)
        if level == 0:  # the blocks are single ones
            inverse = inverse - below
        else:
            inverse = inverse - matmul(inverse, matmul(below, inverse, precision), precision)
    return inverse


def _diagonal(shape: tuple[int, ...]) -> jax.Array:
    row, column = (lax.broadcasted_iota(jnp.int32, shape, len(shape) - axis) for axis in (2, 1))
    return row == column


def _to_column(row: jax.Array) -> jax.Array:
    """[heads, 1, chunk] to [heads, chunk, 1]."""
    square = (row.shape[0], row.shape[-1], row.shape[-1])
    return jnp.where(_diagonal(square), row, 0).sum(-1, keepdims=True)


def _to_row(column: jax.Array) -> jax.Array:
    """[heads, chunk, 1] to [heads, 1, chunk]."""
    square = (column.shape[0], column.shape[1], column.shape[1])
    return jnp.where(_diagonal(square), column, 0).sum(-2, keepdims=True)


def _tokens(rows_ref, shape: tuple[int, ...], *, decayed: bool, packed: bool) -> tuple[jax.Array, Decay]:
    """The step sizes as a column, and the factors of the decay."""
    rows = [rows_ref[:, 0, i : i + 1, :] for i in range(len(_ROWS))]
    log_decay = (_to_column(rows[1]), rows[1]) if decayed else None
    starts = (_to_column(rows[2]), rows[2]) if packed else None
    return _to_column(rows[0]), decay_factors(log_decay, starts, shape, jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, rows_ref, initial_ref, *refs, scale, decayed, packed, keep):
    """One chunk of a group of heads; `keep` also writes what the backward needs."""
    kept, (output_ref, final_ref, state_ref) = (refs[:2], refs[2:]) if keep else ((), refs)
    precision = _precision(q_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        state_ref[...] = initial_ref[...]

    q, k, v = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref))
    beta, decay = _tokens(rows_ref, k.shape, decayed=decayed, packed=packed)
    inverse = masked_inverse(interaction(k, beta, decay, precision), precision.state)
    state = state_ref[...]
    if keep:
        kept[0][:, 0] = inverse
        kept[1][:, 0] = state.astype(kept[1].dtype)
    output, state = forward_chunk(q, k, v, beta, decay, inverse, state, scale, precision)
    output_ref[...] = output.astype(output_ref.dtype)
    state_ref[...] = state

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        final_ref[...] = state


def _backward_kernel(
    q_ref, k_ref, v_ref, rows_ref, inverse_ref, before_ref, d_output_ref, d_final_ref,
    d_q_ref, d_k_ref, d_v_ref, d_rows_ref, d_initial_ref, d_state_ref, *, scale, decayed, packed,
):  # fmt: skip
    """One chunk of a group of heads, the last chunk first."""
    precision = _precision(q_ref.dtype)

    @pl.when(pl.program_id(1) == 0)
    def _():
        d_state_ref[...] = d_final_ref[...]

    q, k, v, d_output = (ref[...].astype(jnp.float32) for ref in (q_ref, k_ref, v_ref, d_output_ref))
    beta, decay = _tokens(rows_ref, k.shape, decayed=decayed, packed=packed)
    before = before_ref[:, 0].astype(jnp.float32)
    gradients = backward_chunk(
        q, k, v, beta, decay, inverse_ref[:, 0], before, d_output, d_state_ref[...], scale, precision
    )
    for ref, gradient in ((d_q_ref, gradients.q), (d_k_ref, gradients.k), (d_v_ref, gradients.v)):
        ref[...] = gradient.astype(ref.dtype)
    d_rows_ref[:, 0, 0:1, :] = _to_row(gradients.beta)
    d_rows_ref[:, 0, 1:2, :] = _to_row(gradients.log_decay_column) + gradients.log_decay_row
    d_state_ref[...] = gradients.state

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _():
        d_initial_ref[...] = gradients.state


def _fold(x: jax.Array) -> jax.Array:
    """[batch, time, heads, ...] to [batch * heads, time, ...]: a block holds whole tiles of its last two axes."""
    x = jnp.swapaxes(x, 1, 2)
    return x.reshape(-1, *x.shape[2:])


def _unfold(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_fold`."""
    return jnp.swapaxes(x.reshape(-1, heads, *x.shape[1:]), 1, 2)


def _rows(beta: jax.Array, g: jax.Array | None, starts: jax.Array | None) -> jax.Array:
    """The numbers per token, [batch * heads, chunks, 3, chunk], float32; the sums are those inside a chunk."""
    heads = beta.shape[-1]
    zeros = jnp.zeros_like(beta, dtype=jnp.float32)
    starts = zeros if starts is None else jnp.repeat(starts[..., None], heads, axis=-1)
    rows = (beta.astype(jnp.float32), zeros if g is None else g.astype(jnp.float32), starts)
    beta, g, starts = (_fold(x).reshape(-1, x.shape[1] // CHUNK, CHUNK) for x in rows)
    return jnp.stack([beta, chunk_log_decay(g), chunk_log_decay(starts)], axis=2)


def _group(heads: int, width: int) -> int:
    """Heads in a grid step: the largest divisor of their number within the width."""
    most = max(1, _GROUP_WIDTH // width)
    return max(n for n in range(1, most + 1) if heads % n == 0)


def _specs(group: int, chunk_of: Callable[[jax.Array], jax.Array]) -> tuple[Callable, Callable, Callable]:
    """Block specs of arrays per token, per chunk and per head; `chunk_of` maps a step to the chunk it treats."""

    def token(width):
        return pl.BlockSpec((group, CHUNK, width), lambda i, n: (i, chunk_of(n), 0))

    def chunk(*shape):
        return pl.BlockSpec((group, 1, *shape), lambda i, n: (i, chunk_of(n), 0, 0))

    def head(*shape):
        return pl.BlockSpec((group, *shape), lambda i, n: (i, 0, 0))

    return token, chunk, head


def _shape(shape: tuple[int, ...], dtype: jnp.dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output's shape; it varies over the mesh axes that the argument `like` varies over."""
    return jax.eval_shape(lambda x: jnp.zeros_like(x, shape=shape, dtype=dtype), like)


_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def _cost(inputs: tuple[jax.Array, ...], outputs: list[jax.ShapeDtypeStruct], flops: int) -> pl.CostEstimate:
    """What the compiler should expect: every argument read and every result written once."""
    moved = sum(x.size * jnp.dtype(x.dtype).itemsize for x in (*inputs, *outputs))
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)


def _inverse_flops(tokens: int) -> int:
    """Of `masked_inverse`: two products of whole matrices for each level but the first."""
    return tokens * 4 * CHUNK**2 * (CHUNK.bit_length() - 2)


def _call_forward(q, k, v, rows, state, scale, decayed, packed, keep, interpret):
    heads, time, dim = q.shape
    value_dim, chunks = v.shape[-1], time // CHUNK
    group = _group(heads, max(dim, value_dim))
    token, chunk, head = _specs(group, lambda n: n)
    out = [(token(value_dim), _shape(v.shape, v.dtype, q)), (head(dim, value_dim), _shape(state.shape, jnp.float32, q))]
    if keep:
        out = [
            (chunk(CHUNK, CHUNK), _shape((heads, chunks, CHUNK, CHUNK), jnp.float32, q)),
            (chunk(dim, value_dim), _shape((heads, chunks, dim, value_dim), q.dtype, q)),
            *out,
        ]
    specs, shapes = zip(*out, strict=True)
    arguments = (q, k, v, rows, state)
    flops = heads * time * (6 * dim * value_dim + 4 * CHUNK * (dim + value_dim)) + _inverse_flops(heads * time)
    return pl.pallas_call(
        partial(_forward_kernel, scale=scale, decayed=decayed, packed=packed, keep=keep),
        name="delta_rule_forward",
        grid=(heads // group, chunks),
        in_specs=[token(dim), token(dim), token(value_dim), chunk(len(_ROWS), CHUNK), head(dim, value_dim)],
        out_specs=specs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((group, dim, value_dim), jnp.float32)],
        compiler_params=_ORDER,
        cost_estimate=_cost(arguments, shapes, flops),
        interpret=interpret,
    )(*arguments)


def _call_backward(q, k, v, rows, inverse, before, d_output, d_final, scale, decayed, packed, interpret):
    heads, time, dim = q.shape
    value_dim, chunks = v.shape[-1], time // CHUNK
    group = _group(heads, max(dim, value_dim))
    token, chunk, head = _specs(group, lambda n: chunks - 1 - n)
    out_shapes = [*(_shape(x.shape, x.dtype, q) for x in (q, k, v)), _shape((heads, chunks, 2, CHUNK), jnp.float32, q)]
    out_shapes.append(_shape(d_final.shape, jnp.float32, q))
    arguments = (q, k, v, rows, inverse, before, d_output, d_final)
    flops = heads * time * (14 * dim * value_dim + 12 * CHUNK * dim + 10 * CHUNK * value_dim)
    return pl.pallas_call(
        partial(_backward_kernel, scale=scale, decayed=decayed, packed=packed),
        name="delta_rule_backward",
        grid=(heads // group, chunks),
        in_specs=[
            *(token(x.shape[-1]) for x in (q, k, v)),
            chunk(len(_ROWS), CHUNK),
            chunk(CHUNK, CHUNK),
            chunk(dim, value_dim),
            token(value_dim),
            head(dim, value_dim),
        ],
        out_specs=[token(dim), token(dim), token(value_dim), chunk(2, CHUNK), head(dim, value_dim)],
        out_shape=out_shapes,
        scratch_shapes=[pltpu.VMEM((group, dim, value_dim), jnp.float32)],
        compiler_params=_ORDER,
        cost_estimate=_cost(arguments, out_shapes, flops),
        interpret=interpret,
    )(*arguments)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def pallas_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    starts: jax.Array | None,
    state: jax.Array,
    scale: float,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule on a TPU; arguments and results as in `chunked_delta_rule`, float32 or bfloat16.

    `time` is a multiple of `CHUNK`, head sizes are multiples of 8. `interpret` runs the kernels without a TPU.
    """
    return _run(q, k, v, beta, g, starts, state, scale, interpret, keep=False)[-1]


def _run(q, k, v, beta, g, starts, state, scale, interpret, *, keep):
    """What the backward needs, if it is kept, and the results."""
    flags = {"decayed": g is not None, "packed": starts is not None}
    folded = (*map(_fold, (q, k, v)), _rows(beta, g, starts))
    initial = state.astype(jnp.float32).reshape(-1, *state.shape[2:])
    *kept, output, final = _call_forward(*folded, initial, scale, **flags, keep=keep, interpret=interpret)
    return *kept, (_unfold(output, q.shape[2]), final.reshape(state.shape).astype(state.dtype))


def _forward(q, k, v, beta, g, starts, state, scale, interpret):
    inverse, before, results = _run(q, k, v, beta, g, starts, state, scale, interpret, keep=True)
    # The backward needs only the dtype of the initial state.
    return results, (q, k, v, beta, g, starts, jnp.zeros_like(state, shape=(0,)), inverse, before)


def _backward(scale, interpret, residuals, cotangents):
    q, k, v, beta, g, starts, state, inverse, before = residuals
    flags = {"decayed": g is not None, "packed": starts is not None}
    folded = (*map(_fold, (q, k, v)), _rows(beta, g, starts), inverse, before, _fold(cotangents[0]))
    d_final = cotangents[1].astype(jnp.float32).reshape(-1, *cotangents[1].shape[2:])
    gradients = _call_backward(*folded, d_final, scale, **flags, interpret=interpret)
    d_q, d_k, d_v = (_unfold(x, q.shape[2]) for x in gradients[:3])

    def per_token(rows):
        return _unfold(rows.reshape(rows.shape[0], -1), q.shape[2])

    d_beta = per_token(gradients[3][:, :, 0]).astype(beta.dtype)
    d_g = None if g is None else per_token(d_chunk_log_decay(gradients[3][:, :, 1])).astype(g.dtype)
    d_starts = None if starts is None else jnp.zeros_like(starts)
    d_state = gradients[4].reshape(cotangents[1].shape).astype(state.dtype)
    return d_q, d_k, d_v, d_beta, d_g, d_starts, d_state


pallas_delta_rule.defvjp(_forward, _backward)
