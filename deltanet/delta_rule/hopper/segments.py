"""Long sequences of few heads in segments that run side by side (DERIVATION.md, "Segments of a long sequence").

A segment is a row of the batch, [batch * count, time / count, ...], which costs nothing: it only is another shape. What
is left to do is to find the state before each segment, and the gradient of the state after each. (Segments of packed
sequences are another matter: they may start anywhere.)
"""

import jax
import jax.numpy as jnp
from jax import lax

from deltanet.delta_rule.chunked import matmul
from deltanet.delta_rule.hopper import sweeps
from deltanet.delta_rule.hopper.layout import CHUNK, F32, MULTIPROCESSORS, Layout

_LARGEST = 8  # number of segments
_SHORTEST = 16  # chunks of a segment
_GAIN = 0.9  # of the time without segments, which the estimate must stay below
# Estimates for an H200. Microseconds that a sweep takes for a chunk, by the columns of the state that a block has;
# bytes a microsecond that come from memory and go there; microseconds of a product that joins two segments.
_STEP = {32: 1.1, 64: 1.2, 128: 1.6}
_BYTES = 4.0e6
_JOIN = 8.0


def choose(layout: Layout, *, backward: bool) -> int:
    """The number of segments that is estimated to take least time, forward or both ways; 1 where little is gained."""
    counts = [n for n in range(2, _LARGEST + 1) if layout.chunks % n == 0 and layout.chunks // n >= _SHORTEST]
    best = min(counts, key=lambda count: _microseconds(layout, count, backward), default=1)
    gains = _microseconds(layout, best, backward) < _GAIN * _microseconds(layout, 1, backward)
    return best if gains else 1


def _microseconds(layout: Layout, count: int, backward: bool) -> float:
    """An estimate for sweeps and joins; what treats every chunk by itself takes as long with segments as without."""
    split = layout._replace(batch=layout.batch * count, time=layout.time // count)
    wide = split._replace(value_dim=layout.dim + layout.value_dim)
    keys, values, square, state = CHUNK * layout.dim, CHUNK * layout.value_dim, CHUNK**2, layout.dim * layout.value_dim
    output = _sweep_microseconds(split, 3 * keys + 2 * values + square)
    maps = _sweep_microseconds(wide, 2 * keys + values)
    states = _sweep_microseconds(split, 2 * keys + 3 * values + 2 * square + state)
    reverse = _sweep_microseconds(split, 3 * keys + 2 * values + square + state)
    reverse_maps = _sweep_microseconds(split, 3 * keys + values + square)
    joins = (count - 1) * _JOIN
    forward = output if count == 1 else output + maps + joins
    if not backward:
        return forward
    return forward + states + reverse + (0 if count == 1 else reverse_maps + joins)


def _sweep_microseconds(layout: Layout, numbers: int) -> float:
    """An estimate for a sweep that moves so many bfloat16 numbers for each chunk of a head."""
    chains = layout.batch * layout.heads
    # A multiprocessor has registers for one block.
    rounds = -(-chains * layout.slices // MULTIPROCESSORS)
    steps = rounds * layout.chunks * _STEP[layout.columns * layout.warpgroups]
    return max(steps, 2 * numbers * chains * layout.chunks / _BYTES)


def fold(x: jax.Array | None, count: int) -> jax.Array | None:
    """[batch, time, ...] to [batch * count, time / count, ...]."""
    return None if x is None else x.reshape(x.shape[0] * count, x.shape[1] // count, *x.shape[2:])


def states_before(k, v, writers, rows, state, layout: Layout) -> tuple[jax.Array, jax.Array | None]:
    """The state before each segment, [batch * count, heads, dim, value_dim], and the matrix T that each multiplies it
    with, or None for a single segment.

    All arguments but `state`, which is that before the first, are of segments.
    """
    if state.shape[0] == layout.batch:
        return state, None
    linear, constant = sweeps.maps(k, v, writers, rows, layout)
    maps = [_by_segment(x, state.shape[0]) for x in (linear, constant)]
    states = [state]
    for t, b in zip(*(x[:-1] for x in maps), strict=True):
        states.append(_times(t, states[-1]) + b)
    return jnp.stack(states, 1).reshape(constant.shape), linear


def d_states_after(q, k, d_output, writers, readers, rows, linear, d_final, layout: Layout) -> jax.Array:
    """The gradient of the state after each segment, from that after the last; arguments as in `sweeps.reverse`, and T
    of each segment.
    """
    batch = d_final.shape[0]
    if batch == layout.batch:
        return d_final
    nothing = jnp.zeros((layout.batch, *d_final.shape[1:]), F32)
    (constant,) = sweeps.reverse(q, k, d_output, writers, readers, rows, nothing, layout, keep=False)
    maps = [_by_segment(x, batch) for x in (linear, constant)]
    d_states = [d_final]
    for t, d in zip(*(x[:0:-1] for x in maps), strict=True):
        d_states.append(_times(t, d_states[-1], transposed=True) + d)
    return jnp.stack(d_states[::-1], 1).reshape(constant.shape)


def _by_segment(x: jax.Array, batch: int) -> list[jax.Array]:
    """[batch * count, ...] to `count` arrays [batch, ...]."""
    x = x.reshape(batch, -1, *x.shape[1:])
    return [x[:, n] for n in range(x.shape[1])]


def _times(t: jax.Array, state: jax.Array, *, transposed: bool = False) -> jax.Array:
    return matmul(t, state, lax.Precision.HIGHEST, ta=transposed)
