"""The chunkwise delta rule as Mosaic GPU kernels for NVIDIA Hopper GPUs, forward and backward, in bfloat16.

    prepare    every chunk by itself: A = (I + M)^-1, and with it J = A^T K and L = Q K^T A (decay aside)
    output     the chunks in order, the state in registers: the output
    states     the same for the backward: the state before every chunk, and N
    reverse    the chunks in reverse order, the state's gradient dS in registers: dS of every chunk, and R = A^T dN
    gradients  every chunk by itself: dQ, dK, dV, and those of the numbers per token
    maps       of long sequences of few heads, in segments that run side by side: what each does to a state

The chains over the chunks give each head a block of their own. One warpgroup of it copies tiles from device memory
ahead of time; the others own 64 value columns of the state each and never exchange anything. The symbols are those of
DERIVATION.md.

Where keys are alike, sums over the tokens of a chunk cancel, and rounding decides what is left. What enters such a sum
is therefore in float16, or split into two bfloat16 matrices, the number and what its rounding lost. J and L have such
sums behind them and are plain bfloat16.

A kernel needs an operand's rows to be whole swizzled lines of 64 numbers, so head sizes are 64, 128 and 256.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from deltanet.delta_rule.chunked import d_chunk_log_decay
from deltanet.delta_rule.hopper import segments, sweeps
from deltanet.delta_rule.hopper.gradients import gradients
from deltanet.delta_rule.hopper.layout import BF16, CHUNK, F32, Layout
from deltanet.delta_rule.hopper.prepare import prepare

SIZES = (64, 128, 256)


def padded_size(dim: int) -> int:
    """The head size that the kernels run for `dim`."""
    return next(size for size in SIZES if size >= dim)


def refusal(dtype: jnp.dtype, dim: int, value_dim: int) -> str | None:
    """Why these arguments are not served, or None."""
    if jax.__version_info__ < (0, 11):
        return f"the GPU kernels need JAX 0.11; this is {jax.__version__}"
    if dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16, not {dtype}"
    if max(dim, value_dim) > SIZES[-1]:
        return f"the GPU kernels take head sizes up to {SIZES[-1]}, not {max(dim, value_dim)}"
    return None


def _rows(beta: jax.Array, g: jax.Array | None, starts: jax.Array | None) -> jax.Array:
    """The numbers per token, [1 to 3, batch, heads, time], float32; the sums are those inside a chunk."""

    def in_chunks(x):
        return jnp.cumsum(x.reshape(*x.shape[:2], -1, CHUNK), axis=-1).reshape(x.shape)

    rows = [jnp.swapaxes(beta, 1, 2).astype(F32)]
    if g is not None or starts is not None:
        rows.append(jnp.zeros_like(rows[0]) if g is None else in_chunks(jnp.swapaxes(g, 1, 2).astype(F32)))
    if starts is not None:
        rows.append(in_chunks(jnp.broadcast_to(starts[:, None].astype(F32), rows[0].shape)))
    return jnp.stack(rows)


def layout_of(q: jax.Array, v: jax.Array, rows: int, scale: float, interpret: Any) -> Layout:
    """The sizes of a problem with these arguments and so many numbers per token."""
    return Layout(*q.shape, v.shape[-1], rows, float(scale), interpret)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def pallas_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    starts: jax.Array | None,
    state: jax.Array,
    scale: float,
    interpret: Any = False,
    count: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule on a Hopper GPU; arguments and results as in `chunked_delta_rule`, in bfloat16.

    `time` is a multiple of `CHUNK`, head sizes are among `SIZES`. `interpret`, a `plgpu.InterpretGPUParams`, runs the
    kernels without a GPU. `count` is of the segments that run side by side, a divisor of the number of chunks; None
    chooses.
    """
    return _forward(q, k, v, beta, g, starts, state, scale, interpret, count, keep=False)[0]


def _forward(q, k, v, beta, g, starts, state, scale, interpret, count, *, keep=True):
    whole = (q, k, v, beta, g, starts)
    if count is None:
        count = segments.choose(layout_of(q, v, 1, scale, interpret), backward=keep)
    q, k, v, beta, g, starts = (segments.fold(x, count) for x in whole)
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows.shape[0], scale, interpret)
    chunk = prepare(q, k, rows, layout, keep=keep)
    before, linear = segments.states_before(k, v, chunk[0], rows, state.astype(F32), layout)
    output, after = sweeps.output(q, k, v, *chunk[:2], rows, before, layout)
    final = after.reshape(state.shape[0], count, *state.shape[1:])[:, -1].astype(state.dtype)
    return (output.reshape(whole[2].shape), final), (*whole, state, before, linear, chunk)


def _backward(scale, interpret, _, residuals, cotangents):
    *whole, state, before, linear, (writers, readers, inverse) = residuals
    batch, count = state.shape[0], before.shape[0] // state.shape[0]
    q, k, v, beta, g, starts = (segments.fold(x, count) for x in whole)
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows.shape[0], scale, interpret)
    d_output, d_final = segments.fold(cotangents[0].astype(BF16), count), cotangents[1].astype(F32)
    before, pseudo = sweeps.states(k, v, writers, inverse, rows, before, layout)
    chains = (q, k, d_output, writers, readers, rows)
    d_after = segments.d_states_after(*chains, linear, d_final, layout)
    after, r, d_before = sweeps.reverse(*chains, d_after, layout)
    d_q, d_k, d_v, parts = gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout)
    d_beta = jnp.swapaxes(parts[:, 0].sum(0), 1, 2).astype(beta.dtype)
    d_g = None if g is None else _d_log_decay(parts, rows, layout).astype(g.dtype)
    d_starts = None if starts is None else jnp.zeros_like(starts)
    d_state = d_before.reshape(batch, count, *state.shape[1:])[:, 0].astype(state.dtype)
    d_whole = (d_q, d_k, d_v, d_beta, d_g, d_starts)
    shaped = (None if x is None else d.reshape(x.shape) for d, x in zip(d_whole, whole, strict=True))
    return *shaped, d_state


def _d_log_decay(parts: jax.Array, rows: jax.Array, layout: Layout) -> jax.Array:
    """The gradient of the log-decay, [batch, time, heads], from its parts."""

    def in_chunks(x):
        return x.reshape(*x.shape[:-1], layout.chunks, CHUNK)

    own, leaving = (in_chunks(parts[:, part].sum(0)) for part in (1, 2))
    whole = jnp.exp(in_chunks(rows[1])[..., -1])
    if layout.packed:
        whole = jnp.where(in_chunks(rows[2])[..., -1] == 0, whole, 0)
    at_end = leaving.sum(-1) + whole * in_chunks(parts[:, 3]).sum((0, -1))
    d_log_decay = own.at[..., -1].add(at_end)
    return jnp.swapaxes(d_chunk_log_decay(d_log_decay).reshape(rows.shape[1:]), 1, 2)


pallas_delta_rule.defvjp(_forward, _backward)
