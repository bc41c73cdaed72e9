"""The two-sided form in four kernels (DERIVATION.md, sections 5 and 8), for one scan with scalar decays.

    sweep      from either end of the sequence: the state and the key sum that each chunk receives from that side
    output     a chunk: its own keys, and both states
    queries    a chunk: dQ; the row normaliser's part of the gradient; what the keys' side needs of it
    sweep      again, with queries for keys and dY for V: the gradients that each chunk's own states receive
    keys       a chunk: dK and dV

All read `[batch, time, heads, size]` as it is. Of what lies between chunks, only the states reach device memory, in
bfloat16, as they enter the products.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from lion.attention.block import chunks
from lion.attention.decay import cumulative, rounded
from lion.attention.hopper.tiles import (
    BF16,
    F32,
    SIZE,
    SQUARE,
    TILE,
    TIME,
    Layout,
    accumulate,
    by_columns,
    by_side,
    call,
    compiled_once,
    copy_in,
    inverse,
    masks_between,
    numbers_of,
    of_head,
    own_tiles,
    padded,
    plus,
    shared_tiles,
    tokens_of,
)
from models.kernels import mosaic_gpu as mgpu
from models.kernels.mosaic_gpu import (
    Sum,
    along_rows,
    load,
    products,
    rows_of,
    scale_rows,
    scoped,
    tile,
    transposed,
)

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 128
LEFT, RIGHT = SIDES = (0, 1)
_WARPGROUPS = 1  # of a block, so that two blocks have registers on a multiprocessor: one computes, one copies
_STAGES = 3  # tiles of a sweep that are copied or in use
_WEIGHTS = 8  # the fewest columns of a product


def serves_chunk(chunk: int) -> bool:
    """Whether chunks of so many tokens are whole tiles and fit on the chip."""
    return chunk % TILE == 0 and chunk <= TIME


# The kernels.


@partial(jax.jit, static_argnames=("layout", "reverse"))
def _sweep_kernel(
    x: jax.Array,
    y: jax.Array,
    factors: jax.Array,
    gates: jax.Array,
    weights: jax.Array,
    layout: Layout,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """What each chunk receives from all chunks on the left, and from all on the right.

    A chunk's own is `sum_j f_j x_j y_j^T` and `sum_j f_j w_j x_j`; each chunk on the way multiplies by its gate.

    Args:
      x, y: `[batch, time, heads, SIZE]`.
      factors: f, `[sides, batch or 1, heads, whole chunks]`.
      gates: `[batch or 1, heads, chunks]`.
      weights: w, `[batch or 1, heads or 1, _WEIGHTS, whole chunks]`, bfloat16, as a sum.
      reverse: whether the first side is what comes from the right.

    Returns:
      `[sides, batch, heads, chunks, SIZE, SIZE]`, bfloat16, and `[sides, batch, heads, chunks, SIZE]`, float32.
    """
    count = gates.shape[-1]
    steps = count * layout.tiles
    gates = jnp.pad(gates, [(0, 0), (0, 0), (0, -count % 32)])  # copies are of whole 128 bytes

    def body(*refs: Any, x_s, y_s, weights_s, factors_s, gates_s, state_s, sum_s, loaded, gates_loaded) -> None:
        x_ref, y_ref, factors_ref, gates_ref, weights_ref, states_ref, sums_ref = refs
        b, h, side = (lax.axis_index(name) for name in ("batch", "heads", "sides"))
        ascending = (side == LEFT) != reverse

        def place(step: Any) -> Any:
            """The tile of a step."""
            return jnp.where(ascending, step, steps - 1 - step)

        def fetch(step: Any) -> None:
            slot, tokens = lax.rem(step, jnp.int32(_STAGES)), tokens_of(place(step))
            for source, target in (
                (x_ref.at[b, tokens, h], x_s),
                (y_ref.at[b, tokens, h], y_s),
                (of_head(factors_ref.at[side]).at[tokens], factors_s),
                (of_head(weights_ref).at[:, tokens], weights_s),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], loaded.at[slot])

        def leave(chunk: Any, state: jax.Array, total: jax.Array) -> None:
            """Stores what a chunk receives; what the one before received has left."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            state_s[...] = state.astype(BF16)
            sum_s[...] = total.sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_s, states_ref.at[side, b, h, chunk])
            plgpu.copy_smem_to_gmem(sum_s, sums_ref.at[side, b, h, chunk])

        def run(step: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            state, total = carry
            slot, chunk = lax.rem(step, jnp.int32(_STAGES)), lax.div(place(step), jnp.int32(layout.tiles))
            enters = lax.rem(step, jnp.int32(layout.tiles)) == 0
            pl.when(enters)(lambda: leave(chunk, state, total))
            plgpu.barrier_wait(loaded.at[slot])
            x_t = x_s.at[slot]
            x_t[...] = scale_rows(load(x_t), along_rows(factors_s.at[slot])).astype(BF16)
            plgpu.commit_smem()

            # All warps have met since the products of the step before were waited for, so that its slot is free.
            @pl.when((step > 0) & (step - 1 + _STAGES < steps))
            def _() -> None:
                fetch(step - 1 + _STAGES)

            gate = jnp.where(enters, gates_s[chunk], 1.0)

            def main(state_sum: Any, total_sum: Any) -> tuple[jax.Array, jax.Array]:
                sums = Sum(state_sum, state * gate, layout.interpret), Sum(total_sum, total * gate, layout.interpret)
                for after, right in zip(sums, (y_s.at[slot], transposed(weights_s.at[slot])), strict=True):
                    after.issue((transposed(x_t), right))
                return tuple(after.load(0) for after in sums)

            return scoped(main, (SIZE, SIZE), (SIZE, _WEIGHTS))

        plgpu.copy_gmem_to_smem(of_head(gates_ref), gates_s, gates_loaded)
        for step in range(min(_STAGES, steps)):
            fetch(jnp.int32(step))
        plgpu.barrier_wait(gates_loaded)
        nothing = (
            plgpu.layout_cast(jnp.zeros((SIZE, columns), F32), plgpu.Layout.WGMMA) for columns in (SIZE, _WEIGHTS)
        )
        lax.fori_loop(0, steps, run, tuple(nothing))
        plgpu.wait_smem_to_gmem(0)

    shape = (len(SIDES), layout.batch, layout.heads, count, SIZE)
    return mgpu.kernel(
        body,
        "lion_attention_sweep",
        layout.interpret,
        out_type=(jax.ShapeDtypeStruct((*shape, SIZE), BF16), jax.ShapeDtypeStruct(shape, F32)),
        grid=(layout.batch, layout.heads, len(SIDES)),
        grid_names=("batch", "heads", "sides"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types={
            "x_s": tile(_STAGES, TILE, SIZE),
            "y_s": tile(_STAGES, TILE, SIZE),
            "weights_s": tile(_STAGES, _WEIGHTS, TILE),
            "factors_s": plgpu.SMEM((_STAGES, TILE), F32),
            "gates_s": plgpu.SMEM((gates.shape[-1],), F32),
            "state_s": tile(SIZE, SIZE),
            "sum_s": plgpu.SMEM((SIZE,), F32),
            "loaded": plgpu.Barrier(num_arrivals=4, num_barriers=_STAGES),
            "gates_loaded": plgpu.Barrier(num_arrivals=1),
        },
    )(x, y, factors, gates, weights)


def _query_factor(rows: Any, i: Any, side: int, layout: Layout) -> jax.Array:
    """With which queries of a tile read a side's state, along rows."""
    if side == LEFT:
        return jnp.exp2(along_rows(rows.at[0, tokens_of(i)]))
    return jnp.exp2(rows[1, layout.time - 1] - along_rows(rows.at[1, tokens_of(i)]))


def _key_factor(rows: Any, j: Any, side: int, layout: Layout) -> jax.Array:
    """With which keys of a tile enter the state that comes from the left, or from the right, of later queries."""
    if side == LEFT:
        return jnp.exp2(rows[1, layout.time - 1] - along_rows(rows.at[0, tokens_of(j)]))
    return jnp.exp2(along_rows(rows.at[1, tokens_of(j)]))


def _read(tile_s: Any, vector: Any) -> jax.Array:
    """The product of a tile's rows with a vector in shared memory, float32, along rows."""
    return (load(tile_s) * by_columns(vector)).sum(axis=1)


def _of_sides(array: Any, target: Any) -> list[tuple[Any, Any]]:
    """A chunk's part of an array `[sides, batch, heads, chunks, ...]`, and where to copy it."""
    b, h, n = (lax.axis_index(name) for name in ("batch", "heads", "chunks"))
    return [(array.at[side, b, h, n], target.at[side]) for side in SIDES]


def _store(x: jax.Array, tile_s: Any, target: Any) -> None:
    """Stores a tile by way of one in shared memory, which products may have read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    tile_s[...] = x.astype(BF16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile_s, target)


def _along_rows(number: float) -> jax.Array:
    """A vector `[TILE]` of equal numbers that lies along rows."""
    return plgpu.layout_cast(jnp.full((TILE,), number, F32), plgpu.Layout.WGMMA.reduce(1))


def _shared_states() -> Any:
    return tile(len(SIDES), SIZE, SIZE)


def _shared_sums() -> Any:
    return plgpu.SMEM((len(SIDES), SIZE), F32)


@compiled_once
def _output_kernel(
    q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array, states: jax.Array, sums: jax.Array, layout: Layout
) -> jax.Array:
    """The output, like `v`."""

    def body(*refs: Any, q_s, k_s, v_s, rows_s, states_s, sums_s, loaded, left_s) -> None:
        *arrays, rows_ref, states_ref, sums_ref, output_ref = refs
        b, h, n = (lax.axis_index(name) for name in ("batch", "heads", "chunks"))
        others = [(of_head(rows_ref).at[n], rows_s), *_of_sides(states_ref, states_s), *_of_sides(sums_ref, sums_s)]
        copy_in(tuple(zip(arrays, (q_s, k_s, v_s), strict=True)), others, layout, loaded, n * layout.tiles)

        def run(i: Any, warpgroup: Any) -> None:
            query_t, from_states, from_sums = q_s.at[i], None, None
            reads, _ = products(*((query_t, states_s.at[side]) for side in SIDES))
            for side, read in zip(SIDES, reads, strict=True):
                factor = _query_factor(rows_s, i, side, layout)
                from_states = plus(from_states, scale_rows(read, factor))
                from_sums = plus(from_sums, factor * _read(query_t, sums_s.at[side]))

            def main(accumulator: Any) -> tuple[jax.Array, jax.Array]:
                numerator, row_sum = Sum(accumulator, from_states, layout.interpret), from_sums
                for offset in range(layout.tiles):
                    j = layout.other(i, offset)
                    mask = partial(masks_between, rows_s, i, j, layout, diagonal=not offset)
                    (scores,), (mask,) = products((query_t, transposed(k_s.at[j])), meanwhile=mask)
                    scores = scores * mask
                    row_sum += scores.sum(axis=1)
                    accumulate(accumulator, scores, v_s.at[j], left_s, warpgroup)
                return numerator.load(0), row_sum

            output, row_sum = scoped(main, SQUARE)
            if layout.normalize:
                output = scale_rows(output, inverse(row_sum))
            _store(output, query_t, output_ref.at[b, tokens_of(n * layout.tiles + i), h])

        own_tiles(layout, run)
        plgpu.wait_smem_to_gmem(0)

    scratch = {
        **shared_tiles(layout, "q_s", "k_s", "v_s"),
        "rows_s": plgpu.SMEM((layout.rows, layout.time), F32),
        "states_s": _shared_states(),
        "sums_s": _shared_sums(),
        "loaded": plgpu.Barrier(num_arrivals=3 * layout.tiles + 1 + 2 * len(SIDES)),
    }
    grid = {**layout.grid, "chunks": states.shape[3]}
    out_type = jax.ShapeDtypeStruct(v.shape, BF16)
    return call(body, "output", layout, grid, out_type, scratch, q, k, v, rows, states, sums)


@compiled_once
def _queries_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_output: jax.Array,
    rows: jax.Array,
    states: jax.Array,
    sums: jax.Array,
    layout: Layout,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dQ; `scale` and `shift` in `dP = scale (dY V^T + shift)`; and the queries' part of the decays' gradients.

    Returns:
      dQ like `q`; `[2, batch, heads, whole chunks]`; and `[3, batch, heads, whole chunks]`, the gradients of before,
      of through, and of the exponents of the factors that read the right state.
    """

    def body(*refs: Any, q_s, k_s, v_s, d_s, rows_s, states_s, sums_s, scaling_s, parts_s, loaded, left_s) -> None:
        *arrays, rows_ref, states_ref, sums_ref, d_query_ref, scaling_ref, parts_ref = refs
        b, h, n = (lax.axis_index(name) for name in ("batch", "heads", "chunks"))
        others = [(of_head(rows_ref).at[n], rows_s), *_of_sides(states_ref, states_s), *_of_sides(sums_ref, sums_s)]
        copy_in(tuple(zip(arrays, (q_s, k_s, v_s, d_s), strict=True)), others, layout, loaded, n * layout.tiles)

        def run(i: Any, warpgroup: Any) -> None:
            tokens, query_t, d_t = tokens_of(i), q_s.at[i], d_s.at[i]

            def entries(offset: int) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
                """`Q K^T`, `dY V^T` and the mask with a tile of keys, and which tile that is."""
                j = layout.other(i, offset)
                pairs = (query_t, transposed(k_s.at[j])), (d_t, transposed(v_s.at[j]))
                mask = partial(masks_between, rows_s, i, j, layout, diagonal=not offset)
                (scores, d_masked), (mask,) = products(*pairs, meanwhile=mask)
                return scores, d_masked, mask, j

            factors = [_query_factor(rows_s, i, side, layout) for side in SIDES]
            # Of each side: what its state adds to the row sum and to `sum_j P_ij (dY V^T)_ij`.
            row_sums, inners, from_states = [], [], None
            d_reads, _ = products(*((d_t, transposed(states_s.at[side])) for side in SIDES))
            for side, factor, d_read in zip(SIDES, factors, d_reads, strict=True):
                row_sums.append(factor * _read(query_t, sums_s.at[side]))
                d_read = scale_rows(d_read, factor)
                inners.append((load(query_t) * d_read).sum(axis=1))
                from_states = plus(from_states, d_read)
            scale, shift = (_along_rows(x) for x in (1.0, 0.0))
            if layout.normalize:
                row_sum, inner = sum(row_sums[1:], row_sums[0]), sum(inners[1:], inners[0])
                for offset in range(layout.tiles):
                    scores, d_masked, mask, _ = entries(offset)
                    scores = scores * mask
                    row_sum += scores.sum(axis=1)
                    inner += (scores * d_masked).sum(axis=1)
                scale = inverse(row_sum)
                shift = -inner * scale
            for side, factor in zip(SIDES, factors, strict=True):
                from_states += scale_rows(by_columns(sums_s.at[side]), shift * factor)

            def main(accumulator: Any) -> tuple[jax.Array, list[jax.Array]]:
                d_query, sides = Sum(accumulator, from_states, layout.interpret), [None, None]
                for offset in range(layout.tiles):
                    scores, d_masked, mask, j = entries(offset)
                    d_score = (d_masked + rows_of(shift, SQUARE)) * mask
                    accumulate(accumulator, d_score, k_s.at[j], left_s, warpgroup)
                    by_sides = by_side(
                        d_score * scores, rows_s, 0, i, j, layout, diagonal=not offset, keys_in_rows=False
                    )
                    sides = [plus(x, y) for x, y in zip(sides, by_sides, strict=True)]
                return d_query.load(0), sides

            d_query, (below, above) = scoped(main, SQUARE)
            left, right = (inner + shift * row_sum for inner, row_sum in zip(inners, row_sums, strict=True))
            for ref, x in (
                (scaling_s.at[0], scale),
                (scaling_s.at[1], shift),
                (parts_s.at[0], scale * (below + left)),
                (parts_s.at[1], -scale * (above + right)),
                (parts_s.at[2], scale * right),
            ):
                ref.at[tokens][...] = x
            in_time = tokens_of(n * layout.tiles + i)
            _store(scale_rows(d_query, scale), query_t, d_query_ref.at[b, in_time, h])
            for source, target in ((scaling_s, scaling_ref), (parts_s, parts_ref)):
                for row in range(source.shape[0]):
                    plgpu.copy_smem_to_gmem(source.at[row, tokens], target.at[row, b, h, in_time])

        own_tiles(layout, run)
        plgpu.wait_smem_to_gmem(0)

    count = states.shape[3]
    of_tokens = (layout.batch, layout.heads, count * layout.time)
    scratch = {
        **shared_tiles(layout, "q_s", "k_s", "v_s", "d_s"),
        "rows_s": plgpu.SMEM((layout.rows, layout.time), F32),
        "states_s": _shared_states(),
        "sums_s": _shared_sums(),
        "scaling_s": plgpu.SMEM((2, layout.time), F32),
        "parts_s": plgpu.SMEM((3, layout.time), F32),
        "loaded": plgpu.Barrier(num_arrivals=4 * layout.tiles + 1 + 2 * len(SIDES)),
    }
    out_type = (
        jax.ShapeDtypeStruct(q.shape, BF16),
        jax.ShapeDtypeStruct((2, *of_tokens), F32),
        jax.ShapeDtypeStruct((3, *of_tokens), F32),
    )
    grid = {**layout.grid, "chunks": count}
    return call(body, "queries", layout, grid, out_type, scratch, q, k, v, d_output, rows, states, sums)


@compiled_once
def _keys_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_output: jax.Array,
    rows: jax.Array,
    scaling: jax.Array,
    received: Sequence[jax.Array],
    gradients: Sequence[jax.Array],
    layout: Layout,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """dK and dV, and the keys' part of the decays' gradients.

    Args:
      received: what `_sweep_kernel` returns for the keys, and
      gradients: for the queries: those towards each chunk's own states and key sums.

    Returns:
      dK and dV like `k` and `v`; `[3, batch, heads, whole chunks]`, the gradients of before, of through, and of the
      exponents of the factors with which keys enter the left state; and `[sides, batch, heads, chunks, SIZE]`, whose
      sums over the last axis are the gradients of the gates on either way.
    """
    operands = (q, k, v, d_output, rows, scaling, *received, *gradients)

    def body(*refs: Any, q_s, k_s, v_s, d_s, rows_s, scaling_s, parts_s, gates_s, states_s, sums_s, **rest) -> None:
        *arrays, rows_ref, scaling_ref, states_ref, sums_ref, d_states_ref, d_sums_ref = refs[: len(operands)]
        d_key_ref, d_value_ref, parts_ref, gates_ref = refs[len(operands) :]
        d_states_s, d_sums_s, loaded, left_s = (rest[x] for x in ("d_states_s", "d_sums_s", "loaded", "left_s"))
        b, h, n = (lax.axis_index(name) for name in ("batch", "heads", "chunks"))
        others = [(of_head(rows_ref).at[n], rows_s)]
        in_chunk = pl.ds(n * layout.time, layout.time)
        others += [(scaling_ref.at[row, b, h, in_chunk], scaling_s.at[row]) for row in range(2)]
        for source, target in (
            (states_ref, states_s),
            (sums_ref, sums_s),
            (d_states_ref, d_states_s),
            (d_sums_ref, d_sums_s),
        ):
            others += _of_sides(source, target)
        copy_in(tuple(zip(arrays, (q_s, k_s, v_s, d_s), strict=True)), others, layout, loaded, n * layout.tiles)

        def run(j: Any, warpgroup: Any) -> None:
            tokens, key_t, value_t = tokens_of(j), k_s.at[j], v_s.at[j]
            of_factors = []  # the gradients of the exponents of each side's
            key_start, value_start = None, None
            for side in SIDES:
                factor, d_state = _key_factor(rows_s, j, side, layout), d_states_s.at[side]
                (of_value, of_key), _ = products((value_t, transposed(d_state)), (key_t, d_state))
                d_entering = scale_rows(of_value + by_columns(d_sums_s.at[side]), factor)
                of_factors.append((load(key_t) * d_entering).sum(axis=1))
                key_start = plus(key_start, d_entering)
                value_start = plus(value_start, scale_rows(of_key, factor))
            left, right = of_factors

            def main(d_key: Any, d_value: Any) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
                starts = ((d_key, key_start), (d_value, value_start))
                sums, sides = [Sum(*start, layout.interpret) for start in starts], [None, None]
                for offset in range(layout.tiles):
                    i, diagonal = layout.other(j, offset), not offset
                    scale, shift = (by_columns(scaling_s.at[row, tokens_of(i)]) for row in range(2))
                    mask = partial(masks_between, rows_s, i, j, layout, diagonal=diagonal, keys_in_rows=True)
                    pairs = (value_t, transposed(d_s.at[i])), (key_t, transposed(q_s.at[i]))
                    (d_masked, scores), (mask,) = products(*pairs, meanwhile=mask)
                    factor = mask * scale
                    d_score = (d_masked + shift) * factor
                    accumulate(d_key, d_score, q_s.at[i], left_s, warpgroup)
                    accumulate(d_value, scores * factor, d_s.at[i], left_s, warpgroup)
                    by_sides = by_side(d_score * scores, rows_s, 0, i, j, layout, diagonal=diagonal, keys_in_rows=True)
                    sides = [plus(x, y) for x, y in zip(sides, by_sides, strict=True)]
                return *(x.load(0) for x in sums), sides

            d_key, d_value, (below, above) = scoped(main, SQUARE, SQUARE)
            for row, x in enumerate((-below - left, above + right, left)):
                parts_s.at[row, tokens][...] = x
            in_time = tokens_of(n * layout.tiles + j)
            _store(d_key, key_t, d_key_ref.at[b, in_time, h])
            _store(d_value, value_t, d_value_ref.at[b, in_time, h])
            for row in range(3):
                plgpu.copy_smem_to_gmem(parts_s.at[row, tokens], parts_ref.at[row, b, h, in_time])

        own_tiles(layout, run)

        for side in SIDES:

            @pl.when(lax.axis_index("warpgroup") == side % layout.warpgroups)
            def _(side: int = side) -> None:
                of_sums = along_rows(sums_s.at[side]) * along_rows(d_sums_s.at[side])
                of_states = load(states_s.at[side]) * load(d_states_s.at[side])
                gates_s.at[side][...] = of_states.sum(axis=1) + of_sums
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(gates_s.at[side], gates_ref.at[side, b, h, n])

        plgpu.wait_smem_to_gmem(0)

    count = received[0].shape[3]
    of_heads = (layout.batch, layout.heads, count)
    scratch = {
        **shared_tiles(layout, "q_s", "k_s", "v_s", "d_s"),
        "rows_s": plgpu.SMEM((layout.rows, layout.time), F32),
        "scaling_s": plgpu.SMEM((2, layout.time), F32),
        "parts_s": plgpu.SMEM((3, layout.time), F32),
        "gates_s": _shared_sums(),
        "states_s": _shared_states(),
        "sums_s": _shared_sums(),
        "d_states_s": _shared_states(),
        "d_sums_s": _shared_sums(),
        "loaded": plgpu.Barrier(num_arrivals=4 * layout.tiles + 3 + 4 * len(SIDES)),
    }
    out_type = (
        jax.ShapeDtypeStruct(k.shape, BF16),
        jax.ShapeDtypeStruct(v.shape, BF16),
        jax.ShapeDtypeStruct((3, *of_heads[:2], count * layout.time), F32),
        jax.ShapeDtypeStruct((len(SIDES), *of_heads, SIZE), F32),
    )
    return call(body, "keys", layout, {**layout.grid, "chunks": count}, out_type, scratch, *operands)


# The differentiable function.


class Static(NamedTuple):
    """What does not change with the data."""

    normalize: bool
    interpret: Any


def two_sided(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    chunk: int,
    *,
    normalize: bool,
    interpret: Any = False,
) -> jax.Array:
    """The output, in both directions, of one scan in the order of the tokens.

    Args:
      q, k, v: `[batch, time, heads, size]`, bfloat16; sizes up to `SIZE`.
      log_decay: `[batch or 1, heads, time, 1]`, float32.
      chunk: tokens of a chunk; see `serves_chunk`.
      normalize: whether to divide by the row sums. Where one is zero, as that of a padded token, the output is zero.
      interpret: a `plgpu.InterpretGPUParams`, to run without a GPU.

    Returns:
      Like `v`.
    """
    time, value_dim = q.shape[1], v.shape[-1]
    q, k, v = padded(q, k, v)
    before, through = (x.value()[..., 0] for x in cumulative(chunks(log_decay, chunk)))
    return _two_sided(q, k, v, before, through, Static(normalize, interpret))[:, :time, :, :value_dim]


def _layout(q: jax.Array, before: jax.Array, static: Static) -> Layout:
    """That of a chunk."""
    batch, _, heads, _ = q.shape
    shared = before.shape[0] == 1 and batch > 1
    return Layout(batch, before.shape[-1], heads, 1, True, shared, static.normalize, _WARPGROUPS, static.interpret)


def _rows(before: jax.Array, through: jax.Array, layout: Layout) -> jax.Array:
    """The numbers per token, `[batch or 1, heads, chunks, rows, chunk]`."""
    merged = (x.reshape(x.shape[0], -1, 1, layout.time) for x in (before, through))
    rows = numbers_of(*merged, np.zeros((0, layout.time)), layout)
    return rows.reshape(*before.shape[:3], *rows.shape[2:])


def _factors(of_sides: Sequence[jax.Array]) -> jax.Array:
    """From exponents `[..., chunks, chunk]` of each side, `[sides, ..., whole chunks]`."""
    factors = jnp.exp(jnp.stack(of_sides))
    return factors.reshape(*factors.shape[:-2], -1)


def _weights(x: jax.Array) -> jax.Array:
    """Weights `[..., time]` as a sum of bfloat16 numbers, `[..., _WEIGHTS, time]`."""
    high = rounded(x, BF16)
    parts = jnp.stack([high, x - high], -2).astype(BF16)
    return jnp.pad(parts, [(0, 0)] * (x.ndim - 1) + [(0, _WEIGHTS - 2), (0, 0)])


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _two_sided(
    q: jax.Array, k: jax.Array, v: jax.Array, before: jax.Array, through: jax.Array, static: Static
) -> jax.Array:
    """`two_sided` for whole groups of 8 tokens; before and through, `[batch or 1, heads, chunks, chunk]`, are sums
    from the start of each chunk.
    """
    return _forward(q, k, v, before, through, static)[0]


def _forward(q, k, v, before, through, static):
    layout, whole = _layout(q, before, static), through[..., -1:]
    factors = _factors([whole - before, through])
    ones = _weights(jnp.ones((1, 1, factors.shape[-1]), F32))
    states, sums = _sweep_kernel(k, v, factors, jnp.exp(whole[..., 0]), ones, layout=layout, reverse=False)
    output = _output_kernel(q, k, v, _rows(before, through, layout), states, sums, layout=layout)
    return output, (q, k, v, before, through, states, sums)


def _backward(static, residuals, d_output):
    q, k, v, before, through, *received = residuals
    layout, whole = _layout(q, before, static), through[..., -1:]
    gates, rows = jnp.exp(whole[..., 0]), _rows(before, through, layout)
    d_q, scaling, of_queries = _queries_kernel(q, k, v, d_output, rows, *received, layout=layout)
    scale, shift = scaling
    factors = scale * _factors([before, whole - through])
    gradients = _sweep_kernel(q, d_output, factors, gates, _weights(shift), layout=layout, reverse=True)
    d_k, d_v, of_keys, of_gates = _keys_kernel(q, k, v, d_output, rows, scaling, received, gradients, layout=layout)
    d_before, d_through, d_whole = (of_queries + of_keys).reshape(3, *q.shape[:1], *through.shape[1:])
    d_whole = d_whole.sum(-1) + gates * of_gates.sum((0, -1))
    d_through = d_through.at[..., -1].add(d_whole)
    if layout.shared:
        d_before, d_through = (x.sum(0, keepdims=True) for x in (d_before, d_through))
    return d_q, d_k, d_v, d_before, d_through


_two_sided.defvjp(_forward, _backward)
