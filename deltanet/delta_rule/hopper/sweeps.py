"""The chunks in order, or in reverse order, with the state or its gradient in registers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

from deltanet.delta_rule.hopper import decay
from deltanet.delta_rule.hopper.layout import BF16, CHUNK, F32, SHARED_MEMORY, Layout, in_roles, kernel
from models.kernels.mosaic_gpu import (
    Sum,
    along_rows,
    issue,
    load,
    parts_of,
    row_and_column,
    scale_rows,
    scoped,
    split,
    store_split,
    tile,
    transposed,
)

_STAGES = 2  # slots of the copies, where shared memory holds so many


class _Tiles(NamedTuple):
    """What a sweep copies for each chunk, with as many slots as stages."""

    keys: Sequence[Any]  # references to [batch, time, heads, dim]
    value: Any  # reference to [batch, time, heads, value_dim], of which each warpgroup gets its columns
    squares: Sequence[Any]  # references to [batch, heads, time, chunk]
    rows: Any


def _tile(layout: Layout, *shape: int) -> Any:
    """A tile of a sweep, with lines that its value columns fill."""
    return tile(*shape, line=2 * layout.columns)


def _stages(layout: Layout, keys: int, squares: int, fixed: int) -> int:
    """Slots of the copies, of what `fixed` bytes leave of shared memory."""
    slot = (
        2 * CHUNK * (keys * layout.dim + layout.warpgroups * layout.columns + squares * CHUNK) + 4 * layout.rows * CHUNK
    )
    fit = (SHARED_MEMORY - fixed) // slot
    if fit < 1:
        raise ValueError(f"shared memory has no room for a chunk's {slot} bytes beside {fixed}: {layout}")
    return min(_STAGES, layout.chunks, fit)


def _slots(layout: Layout, stages: int, keys: int, squares: int) -> dict[str, Any]:
    """Shared memory of the copies of a sweep, and the barriers between who copies and who computes."""
    copies = keys + layout.warpgroups + squares + layout.rows
    return {
        "keys_s": [_tile(layout, stages, CHUNK, layout.dim) for _ in range(keys)],
        "value_s": _tile(layout, stages, layout.warpgroups, CHUNK, layout.columns),
        "squares_s": [_tile(layout, stages, CHUNK, CHUNK) for _ in range(squares)],
        "rows_s": plgpu.SMEM((stages, layout.rows, CHUNK), F32),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=layout.warpgroups, num_barriers=stages),
    }


def _first_column(layout: Layout, warpgroup: int) -> Any:
    """Of the state's columns of a warpgroup."""
    return (lax.axis_index("slices") * layout.warpgroups + warpgroup) * layout.columns


def _columns(layout: Layout, warpgroup: int, skipped: int = 0) -> Any:
    """The value columns of a warpgroup. The state may have columns before them, `skipped`; whose owner gets any."""
    first = _first_column(layout, warpgroup)
    return pl.ds(lax.max(first - skipped, jnp.int32(0)) if skipped else first, layout.columns)


def _copy_chunks(
    tiles: _Tiles, slots: dict[str, Any], layout: Layout, stages: int, *, backwards: bool, skipped: int = 0
) -> None:
    """The copying warpgroup of a sweep: fills the slots, each as soon as all warpgroups have released it."""
    b, h = lax.axis_index("batch"), lax.axis_index("heads")
    full, empty = slots["full"], slots["empty"]

    def fetch(step, slot):
        chunk = layout.chunks - 1 - step if backwards else step
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        copies = [(ref.at[b, tokens, h], s.at[slot]) for ref, s in zip(tiles.keys, slots["keys_s"], strict=True)]
        squares = zip(tiles.squares, slots["squares_s"], strict=True)
        copies += [(ref.at[b, h, tokens], s.at[slot]) for ref, s in squares]
        copies += [
            (tiles.value.at[b, tokens, h, _columns(layout, w, skipped)], slots["value_s"].at[slot, w])
            for w in range(layout.warpgroups)
        ]
        copies += [(tiles.rows.at[row, b, h, tokens], slots["rows_s"].at[slot, row]) for row in range(layout.rows)]
        for source, target in copies:
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    for step in range(stages):
        fetch(step, step)

    @pl.loop(0, layout.chunks - stages)
    def _(step):
        slot = lax.rem(step, jnp.int32(stages))
        plgpu.barrier_wait(empty.at[slot])
        fetch(step + stages, slot)

    @pl.loop(layout.chunks - stages, layout.chunks)
    def _(step):
        plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])


def _sweep_options(layout: Layout) -> dict[str, Any]:
    return {
        "grid": (layout.batch, layout.heads, layout.slices),
        "grid_names": ("batch", "heads", "slices"),
        "num_threads": layout.warpgroups + 1,
        "thread_name": "warpgroup",
    }


def output(q, k, v, writers, readers, rows, state, layout: Layout):
    """The chunks in order: the output like `v`, and the final state."""
    wg = layout.warpgroups
    stages = _stages(layout, 3, 1, 2 * wg * layout.columns * (layout.dim + 2 * CHUNK))

    def body(*refs, state_s, y_s, output_s, **slots):
        q_ref, k_ref, writers_ref, value_ref, readers_ref, rows_ref, initial_ref, output_ref, final_ref = refs
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        full, empty = slots["full"], slots["empty"]

        def compute(w):
            columns = _columns(layout, w)
            state_t, y_t, output_t = state_s.at[w], y_s.at[w], output_s.at[w]

            def leave(n, output):
                """Stores the output of a chunk; the one before has left."""
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                output_t[...] = output
                plgpu.commit_smem()

                @pl.when(n >= 0)
                def _():
                    plgpu.copy_smem_to_gmem(output_t, output_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, columns])

            def step(n, carry):
                state, output_before = carry
                slot = lax.rem(n, jnp.int32(stages))
                query_t, key_t, writer_t = (s.at[slot] for s in slots["keys_s"])
                reader_t, rows_t = slots["squares_s"][0].at[slot], slots["rows_s"].at[slot]
                plgpu.barrier_wait(full.at[slot])

                def main(predicted, updated, read, inside):
                    issue(predicted, (key_t, state_t))
                    issue(read, (query_t, state_t))
                    leave(n - 1, output_before)  # while these products run
                    entry = decay.entry(rows_t, layout) if layout.gated else None
                    prediction = plgpu.wgmma_accumulator_load(predicted, wait_n=1)
                    y_t[...] = _right_side(slots["value_s"].at[slot, w], prediction, rows_t, layout).astype(BF16)
                    plgpu.commit_smem()
                    after = _written(updated, state, writer_t, y_t, rows_t, layout)
                    issue(inside, (reader_t, y_t))
                    new_state = after.load(1)
                    plgpu.commit_smem()
                    state_t[...] = new_state.astype(BF16)
                    plgpu.commit_smem()
                    before = plgpu.wgmma_accumulator_load(read, wait_n=1)
                    if layout.gated:
                        before = scale_rows(before, entry)
                    output = layout.scale * before + plgpu.wgmma_accumulator_load(inside, wait_n=0)
                    return new_state, output.astype(BF16)

                of_tokens = (CHUNK, layout.columns)
                carry = scoped(main, of_tokens, (layout.dim, layout.columns), of_tokens, of_tokens)
                plgpu.barrier_arrive(empty.at[slot])
                return carry

            initial = plgpu.load(initial_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            state_t[...] = initial.astype(BF16)
            plgpu.commit_smem()
            nothing = plgpu.layout_cast(jnp.zeros((CHUNK, layout.columns), BF16), plgpu.Layout.WGMMA)
            final, output = lax.fori_loop(0, layout.chunks, step, (initial, nothing))
            leave(layout.chunks - 1, output)
            final_ref.at[b, h, :, columns][...] = final
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles((q_ref, k_ref, writers_ref), value_ref, (readers_ref,), rows_ref)
        in_roles(layout.warpgroups, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=False), compute)

    return kernel(
        body,
        "output",
        layout,
        out_type=(jax.ShapeDtypeStruct(v.shape, BF16), jax.ShapeDtypeStruct(state.shape, F32)),
        scratch_types={
            "state_s": _tile(layout, wg, layout.dim, layout.columns),
            "y_s": _tile(layout, wg, CHUNK, layout.columns),
            "output_s": _tile(layout, wg, CHUNK, layout.columns),
            **_slots(layout, stages, 3, 1),
        },
        **_sweep_options(layout),
    )(q, k, writers, v, readers, rows, state)


def _right_side(value_t: Any, prediction: jax.Array, rows: Any, layout: Layout, there: Any = True) -> jax.Array:
    """Y, [chunk, columns], from K S; of values zero unless they are `there`."""
    if layout.gated:
        prediction = scale_rows(prediction, decay.entry(rows, layout))
    value = load(value_t)
    if there is not True:
        value = jnp.where(there, value, 0.0)
    return scale_rows(value - prediction, along_rows(rows.at[0]))


def _written(updated: Any, state: jax.Array, writer_t: Any, y_t: Any, rows: Any, layout: Layout) -> Sum:
    """Starts to add J^T Y to the decayed state."""
    after = Sum(updated, state * decay.whole(rows, layout) if layout.gated else state, layout.interpret)
    after.issue((transposed(writer_t), y_t))
    return after


def maps(k, v, writers, rows, layout: Layout):
    """The chunks in order, from the state [I | 0] with the values [0 | V]: what they do to any state, S -> T S + b.

    T is [batch, heads, dim, dim], b is [batch, heads, dim, value_dim], float32.
    """
    wide = layout._replace(value_dim=layout.dim + layout.value_dim)
    wg = wide.warpgroups
    stages = _stages(wide, 2, 0, 2 * wg * wide.columns * (layout.dim + CHUNK))

    def body(*refs, state_s, y_s, **slots):
        k_ref, writers_ref, value_ref, rows_ref, linear_ref, constant_ref = refs
        b, h = lax.axis_index("batch"), lax.axis_index("heads")

        def compute(w):
            state_t, y_t = state_s.at[w], y_s.at[w]
            first = _first_column(wide, w)
            of_values = first >= layout.dim

            def step(n, state):
                slot = lax.rem(n, jnp.int32(stages))
                key_t, writer_t = (s.at[slot] for s in slots["keys_s"])
                value_t, rows_t = slots["value_s"].at[slot, w], slots["rows_s"].at[slot]
                plgpu.barrier_wait(slots["full"].at[slot])

                def main(predicted, updated):
                    issue(predicted, (key_t, state_t))
                    prediction = plgpu.wgmma_accumulator_load(predicted, wait_n=0)
                    y_t[...] = _right_side(value_t, prediction, rows_t, layout, of_values).astype(BF16)
                    plgpu.commit_smem()
                    after = _written(updated, state, writer_t, y_t, rows_t, layout).load(0)
                    state_t[...] = after.astype(BF16)
                    plgpu.commit_smem()
                    return after

                state = scoped(main, (CHUNK, wide.columns), (layout.dim, wide.columns))
                plgpu.barrier_arrive(slots["empty"].at[slot])
                return state

            i, j = row_and_column((layout.dim, wide.columns))
            initial = jnp.where(i == j + first, 1.0, 0.0)  # the columns of b are beyond every row
            state_t[...] = initial.astype(BF16)
            plgpu.commit_smem()
            final = lax.fori_loop(0, layout.chunks, step, initial)

            @pl.when(of_values)
            def _():
                constant_ref.at[b, h, :, _columns(wide, w, layout.dim)][...] = final

            @pl.when(jnp.logical_not(of_values))
            def _():
                linear_ref.at[b, h, :, _columns(wide, w)][...] = final

        def copy():
            tiles = _Tiles((k_ref, writers_ref), value_ref, (), rows_ref)
            _copy_chunks(tiles, slots, wide, stages, backwards=False, skipped=layout.dim)

        in_roles(wg, copy, compute)

    heads = (layout.batch, layout.heads, layout.dim)
    return kernel(
        body,
        "maps",
        wide,
        out_type=tuple(jax.ShapeDtypeStruct((*heads, columns), F32) for columns in (layout.dim, layout.value_dim)),
        scratch_types={
            "state_s": _tile(wide, wg, layout.dim, wide.columns),
            "y_s": _tile(wide, wg, CHUNK, wide.columns),
            **_slots(wide, stages, 2, 0),
        },
        **_sweep_options(wide),
    )(k, writers, v, rows)


def states(k, v, writers, inverse, rows, state, layout: Layout):
    """The chunks in order: the state before each [batch, heads, chunks, dim, value_dim], and N split, [2, ...] like
    `v`, bfloat16.
    """
    wg = layout.warpgroups
    stages = _stages(layout, 2, 2, 2 * wg * layout.columns * (layout.dim + 3 * CHUNK))

    def body(*refs, state_s, y_s, n_s, **slots):
        k_ref, writers_ref, value_ref, inverse_ref, rows_ref, initial_ref, before_ref, pseudo_ref = refs
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        full, empty = slots["full"], slots["empty"]

        def compute(w):
            columns = _columns(layout, w)
            state_t, y_t, n_t = state_s.at[w], y_s.at[w], parts_of(n_s.at[w])

            def step(n, state):
                slot, tokens = lax.rem(n, jnp.int32(stages)), pl.ds(n * CHUNK, CHUNK)
                key_t, writer_t = (s.at[slot] for s in slots["keys_s"])
                rows_t = slots["rows_s"].at[slot]
                plgpu.barrier_wait(full.at[slot])

                def main(predicted, updated, found):
                    issue(predicted, (key_t, state_t))
                    prediction = plgpu.wgmma_accumulator_load(predicted, wait_n=0)
                    y_t[...] = _right_side(slots["value_s"].at[slot, w], prediction, rows_t, layout).astype(BF16)
                    plgpu.commit_smem()
                    after = _written(updated, state, writer_t, y_t, rows_t, layout)
                    issue(found, *((s.at[slot], y_t) for s in slots["squares_s"]))
                    new_state = after.load(2)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the state and N; and the warps meet
                    state_t[...] = new_state.astype(BF16)
                    store_split(n_t, plgpu.wgmma_accumulator_load(found, wait_n=0))
                    plgpu.commit_smem()
                    return new_state

                state = scoped(main, (CHUNK, layout.columns), (layout.dim, layout.columns), (CHUNK, layout.columns))
                for part in range(2):
                    plgpu.copy_smem_to_gmem(n_t[part], pseudo_ref.at[part, b, tokens, h, columns])

                @pl.when(n + 1 < layout.chunks)
                def _():
                    plgpu.copy_smem_to_gmem(state_t, before_ref.at[b, h, n + 1, :, columns])

                plgpu.barrier_arrive(empty.at[slot])
                return state

            initial = plgpu.load(initial_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            state_t[...] = initial.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_t, before_ref.at[b, h, 0, :, columns])
            lax.fori_loop(0, layout.chunks, step, initial)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles((k_ref, writers_ref), value_ref, parts_of(inverse_ref), rows_ref)
        in_roles(layout.warpgroups, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=False), compute)

    before_shape = (*state.shape[:2], layout.chunks, *state.shape[2:])
    return kernel(
        body,
        "states",
        layout,
        out_type=(jax.ShapeDtypeStruct(before_shape, BF16), jax.ShapeDtypeStruct((2, *v.shape), BF16)),
        scratch_types={
            "state_s": _tile(layout, wg, layout.dim, layout.columns),
            "y_s": _tile(layout, wg, CHUNK, layout.columns),
            "n_s": _tile(layout, wg, 2, CHUNK, layout.columns),
            **_slots(layout, stages, 2, 2),
        },
        **_sweep_options(layout),
    )(k, writers, v, inverse, rows, state)


def reverse(q, k, d_output, writers, readers, rows, d_final, layout: Layout, *, keep: bool = True):
    """The chunks in reverse order: the gradient of the state after each chunk, and R like the values, unless these are
    not to be kept; and, last, the gradient of the initial state.
    """
    wg = layout.warpgroups
    state_shape = jax.ShapeDtypeStruct(d_final.shape, F32)
    after_shape = jax.ShapeDtypeStruct((*d_final.shape[:2], layout.chunks, *d_final.shape[2:]), BF16)
    groups = layout.dim // CHUNK
    stages = _stages(layout, 3, 1, 2 * wg * layout.columns * (layout.dim + (1 + max(groups, 2)) * CHUNK))

    def body(*refs, d_state_s, r_s, low_s, **slots):
        (*key_refs, d_output_ref, readers_ref, rows_ref, d_final_ref), (*kept_refs, d_initial_ref) = refs[:7], refs[7:]
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        full, empty = slots["full"], slots["empty"]

        def compute(w):
            columns = _columns(layout, w)
            d_state_t, r_t = d_state_s.at[w], r_s.at[w]
            # What the state's gradient loses by rounding; while the next is made, what leaves it, split.
            low_t = [low_s.at[w, group] for group in range(groups)]
            leaving_t = parts_of(low_s.at[w])

            def store(d_state):
                d_state_t[...], low = split(d_state)
                for group in range(groups):
                    low_t[group][...] = lax.slice(low, (group * CHUNK, 0), ((group + 1) * CHUNK, layout.columns))
                plgpu.commit_smem()

            def step(i, d_state):
                slot, n = lax.rem(i, jnp.int32(stages)), layout.chunks - 1 - i
                query_t, key_t, writer_t = (s.at[slot] for s in slots["keys_s"])
                reader_t, rows_t = slots["squares_s"][0].at[slot], slots["rows_s"].at[slot]
                d_output_t = slots["value_s"].at[slot, w]
                plgpu.barrier_wait(full.at[slot])

                def main(found, updated):
                    issue(found, (writer_t, d_state_t), (transposed(reader_t), d_output_t))
                    for group in range(groups):
                        issue(found, (writer_t.at[:, pl.ds(group * CHUNK, CHUNK)], low_t[group]))
                    scaled, after = load(d_output_t) * layout.scale, d_state
                    if layout.gated:
                        scaled = scale_rows(scaled, decay.entry(rows_t, layout))
                        after = d_state * decay.whole(rows_t, layout)
                    r = plgpu.wgmma_accumulator_load(found, wait_n=0)
                    # Of the chunk before, the copies of R and of the state's gradient; and the warps meet.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    d_output_t[...] = scaled.astype(BF16)
                    if keep:
                        r_t[...] = r.astype(BF16)
                    leaving = scale_rows(-r, along_rows(rows_t.at[0]))
                    if layout.gated:
                        leaving = scale_rows(leaving, decay.entry(rows_t, layout))
                    store_split(leaving_t, leaving)
                    plgpu.commit_smem()
                    before = Sum(updated, after, layout.interpret)
                    before.issue((transposed(query_t), d_output_t), *((transposed(key_t), x) for x in leaving_t))
                    if keep:
                        plgpu.copy_smem_to_gmem(r_t, kept_refs[1].at[b, pl.ds(n * CHUNK, CHUNK), h, columns])
                    d_new = before.load(0)
                    plgpu.commit_smem()
                    store(d_new)
                    return d_new

                d_state = scoped(main, (CHUNK, layout.columns), (layout.dim, layout.columns))

                if keep:
                    pl.when(n > 0)(lambda: plgpu.copy_smem_to_gmem(d_state_t, kept_refs[0].at[b, h, n - 1, :, columns]))

                plgpu.barrier_arrive(empty.at[slot])
                return d_state

            d_final = plgpu.load(d_final_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            store(d_final)
            if keep:
                plgpu.copy_smem_to_gmem(d_state_t, kept_refs[0].at[b, h, layout.chunks - 1, :, columns])
            d_initial_ref.at[b, h, :, columns][...] = lax.fori_loop(0, layout.chunks, step, d_final)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles(key_refs, d_output_ref, (readers_ref,), rows_ref)
        in_roles(layout.warpgroups, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=True), compute)

    return kernel(
        body,
        "reverse",
        layout,
        out_type=(*((after_shape, jax.ShapeDtypeStruct(d_output.shape, BF16)) if keep else ()), state_shape),
        scratch_types={
            "d_state_s": _tile(layout, wg, layout.dim, layout.columns),
            "r_s": _tile(layout, wg, CHUNK, layout.columns),
            "low_s": _tile(layout, wg, max(groups, 2), CHUNK, layout.columns),
            **_slots(layout, stages, 3, 1),
        },
        **_sweep_options(layout),
    )(q, k, writers, d_output, readers, rows, d_final)
