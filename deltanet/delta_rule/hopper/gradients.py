"""The gradients of every chunk by itself."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

from deltanet.delta_rule.hopper import decay
from deltanet.delta_rule.hopper.layout import BF16, CHUNK, COLUMNS, F32, Layout, in_roles, kernel
from models.kernels.mosaic_gpu import (
    Sum,
    along_rows,
    issue,
    load,
    parts_of,
    product,
    row_and_column,
    scale_rows,
    scoped,
    store_split,
    tile,
    transposed,
)

_PIECE = 64  # key columns of a warpgroup
# Numbers per token that a warpgroup adds up over its key columns: the gradient of beta; of the cumulative log-decay;
# what the token's decay to the end of the chunk contributes to its last entry; and, per key column instead of per
# token, the product of the state and its gradient.
_PARTS = 4


class _Work(NamedTuple):
    """How the gradients of all chunks are shared out.

    A block treats one item after another: a chunk of a head and up to two pieces of its key columns, a warpgroup each;
    or, with a single piece, two items at a time, a warpgroup each. What warpgroups share is called a stream.
    """

    pieces: int  # of a stream
    streams: int
    units: int  # items of a chunk
    groups: int  # of value columns
    items: int
    blocks: int

    @property
    def warpgroups(self) -> int:
        return self.pieces * self.streams

    @property
    def slots(self) -> int:
        """Of a stream, for the copies of a group."""
        return 2 // self.streams

    def slot(self, turn: jax.Array, group: int) -> Any:
        """Where a group of a stream's item is; an integer wherever it can be, for addresses in registers are slow."""
        if self.groups % self.slots == 0:
            return group % self.slots
        return lax.rem(turn * self.groups + group, jnp.int32(self.slots))

    @property
    def turns(self) -> int:
        """Items that a stream of a block may have."""
        return -(-self.items // (self.blocks * self.streams))


def _work(layout: Layout) -> _Work:
    all_pieces = layout.dim // _PIECE
    pieces = min(2, all_pieces)
    units = all_pieces // pieces
    items = layout.batch * layout.heads * layout.chunks * units
    streams = 2 // pieces
    blocks = min(layout.multiprocessors, -(-items // streams))
    return _Work(pieces, streams, units, layout.value_dim // COLUMNS, items, blocks)


def gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout: Layout):
    """dQ, dK, dV like the arguments, and the parts of the numbers per token, [pieces, 1 or 4, batch, heads, time]."""
    work = _work(layout)
    parts = _PARTS if layout.gated else 1
    width = work.pieces * _PIECE  # key columns of an item

    def body(*refs, **memory):
        inputs, outputs = refs[:9], refs[9:]

        def place(stream, turn):
            """Which item it is: batch, head, chunk, unit and a zero; and whether there is such an item."""
            item = (turn * work.blocks + lax.axis_index("blocks")) * work.streams + stream
            unit, rest = lax.rem(item, jnp.int32(work.units)), lax.div(item, jnp.int32(work.units))
            h, rest = lax.rem(rest, jnp.int32(layout.heads)), lax.div(rest, jnp.int32(layout.heads))
            b, n = lax.rem(rest, jnp.int32(layout.batch)), lax.div(rest, jnp.int32(layout.batch))
            # A zero that the compiler does not know: else it keeps the addresses of all tiles in registers.
            zero = lax.div(item + lax.axis_index("warpgroup"), jnp.int32(work.items + work.warpgroups))
            return (b, h, n, unit, zero), item < work.items

        def compute(warpgroup):
            stream, piece = (0, warpgroup) if work.pieces > 1 else (warpgroup, 0)

            @pl.loop(0, work.turns)
            def _(turn):
                at, there = place(stream, turn)
                pl.when(there)(lambda: _treat_item(at, turn, stream, piece, outputs, memory, layout, work))

            if work.pieces > 1:
                pl.when(place(stream, jnp.int32(0))[1])(lambda: plgpu.barrier_wait(memory["spent"].at[stream]))
            plgpu.wait_smem_to_gmem(0)

        in_roles(work.warpgroups, lambda: _copy_items(inputs, memory, place, layout, work), compute)

    shapes = [jax.ShapeDtypeStruct(x.shape, BF16) for x in (q, k, v)]
    parts_shape = (layout.dim // _PIECE, parts, layout.batch, layout.heads, layout.time)
    slots, streams, warpgroups = (work.streams, work.slots), work.streams, work.warpgroups
    return kernel(
        body,
        "gradients",
        layout,
        out_type=(*shapes, jax.ShapeDtypeStruct(parts_shape, F32)),
        grid=(work.blocks,),
        grid_names=("blocks",),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        scratch_types={
            # Of a group of value columns; filled again as soon as all warpgroups of the stream are done with it.
            "outer_s": tile(*slots, 2, CHUNK, COLUMNS),  # dO and R
            "n_s": tile(*slots, 2, CHUNK, COLUMNS),
            "v_s": tile(*slots, CHUNK, COLUMNS),
            "before_s": tile(*slots, width, COLUMNS),
            "after_s": tile(*slots, width, COLUMNS),
            "beta_s": plgpu.SMEM((*slots, CHUNK), F32),
            "full": plgpu.Barrier(num_arrivals=8, num_barriers=work.streams * work.slots),
            "empty": plgpu.Barrier(num_arrivals=work.pieces, num_barriers=work.streams * work.slots),
            # Of a warpgroup.
            "q_s": tile(warpgroups, CHUNK, _PIECE),
            "k_s": tile(warpgroups, CHUNK, _PIECE),
            "rows_s": plgpu.SMEM((warpgroups, layout.rows, CHUNK), F32),
            "parts_s": plgpu.SMEM((warpgroups, parts, CHUNK), F32),
            "loaded": plgpu.Barrier(num_arrivals=2 + layout.rows, num_barriers=warpgroups),
            "left": plgpu.Barrier(num_barriers=warpgroups),
            # Shared by a stream, whose warpgroups make one each: D and Y, split, and beta Y where there is room.
            "d_and_y_s": tile(streams, 2, 2, CHUNK, CHUNK),
            **({"beta_y_s": tile(streams, CHUNK, CHUNK)} if work.pieces > 1 else {}),
            "made": plgpu.Barrier(num_arrivals=work.pieces, num_barriers=streams),
            "spent": plgpu.Barrier(num_arrivals=work.pieces, num_barriers=streams),
        },
    )(q, k, v, d_output, pseudo, r, before, after, rows)


def _copy_items(inputs, memory, place, layout: Layout, work: _Work) -> None:
    """The copying warpgroup of `gradients`."""
    q_ref, k_ref, v_ref, d_output_ref, pseudo_ref, r_ref, before_ref, after_ref, rows_ref = inputs
    width = work.pieces * _PIECE

    def copy(stream, turn, at):
        b, h, n, unit, _ = at
        tokens = pl.ds(n * CHUNK, CHUNK)
        for group in range(work.groups):
            columns, step = pl.ds(group * COLUMNS, COLUMNS), turn * work.groups + group
            slot = work.slot(turn, group)
            barrier = memory["full"].at[stream * work.slots + slot]
            pl.when(step >= work.slots)(
                lambda slot=slot: plgpu.barrier_wait(memory["empty"].at[stream * work.slots + slot])
            )
            plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, h, columns], memory["v_s"].at[stream, slot], barrier)
            for part, ref in enumerate((d_output_ref, r_ref)):
                target = memory["outer_s"].at[stream, slot, part]
                plgpu.copy_gmem_to_smem(ref.at[b, tokens, h, columns], target, barrier)
                source = pseudo_ref.at[part, b, tokens, h, columns]
                plgpu.copy_gmem_to_smem(source, memory["n_s"].at[stream, slot, part], barrier)
            for ref, name in ((before_ref, "before_s"), (after_ref, "after_s")):
                source = ref.at[b, h, n, pl.ds(unit * width, width), columns]
                plgpu.copy_gmem_to_smem(source, memory[name].at[stream, slot], barrier)
            plgpu.copy_gmem_to_smem(rows_ref.at[0, b, h, tokens], memory["beta_s"].at[stream, slot], barrier)
        for piece in range(work.pieces):
            w, columns = stream * work.pieces + piece, pl.ds(unit * width + piece * _PIECE, _PIECE)
            pl.when(turn > 0)(lambda w=w: plgpu.barrier_wait(memory["left"].at[w]))
            barrier = memory["loaded"].at[w]
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, columns], memory["q_s"].at[w], barrier)
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h, columns], memory["k_s"].at[w], barrier)
            for row in range(layout.rows):
                plgpu.copy_gmem_to_smem(rows_ref.at[row, b, h, tokens], memory["rows_s"].at[w, row], barrier)

    @pl.loop(0, work.turns)
    def _(turn):
        for stream in range(work.streams):
            at, there = place(stream, turn)
            pl.when(there)(partial(copy, stream, turn, at))

    # What has been released and not been waited for: the last slots, and the last queries and keys.
    for stream in range(work.streams):
        turns = work.turns - 1 + jnp.where(place(stream, jnp.int32(work.turns - 1))[1], 1, 0)
        steps = turns * work.groups

        @pl.when(turns > 0)
        def _(stream=stream, steps=steps):
            for back in range(work.slots):
                step = steps - 1 - back

                @pl.when(step >= 0)
                def _(step=step):
                    slot = lax.rem(step, jnp.int32(work.slots))
                    plgpu.barrier_wait(memory["empty"].at[stream * work.slots + slot])

            for piece in range(work.pieces):
                plgpu.barrier_wait(memory["left"].at[stream * work.pieces + piece])


def _treat_item(at, turn, stream, piece, outputs, memory, layout: Layout, work: _Work) -> None:
    """A warpgroup's part of an item: `piece` of its key columns, and some of its value columns."""
    d_q_ref, d_k_ref, d_v_ref, parts_ref = outputs
    b, h, n, unit, zero = at
    own = stream + zero
    tokens, w = pl.ds(n * CHUNK, CHUNK), own * work.pieces + piece
    own_keys = pl.ds(piece * _PIECE, _PIECE)
    q_t, k_t, rows_t, parts_t = (memory[name].at[w] for name in ("q_s", "k_s", "rows_s", "parts_s"))
    d_t, y_t = (parts_of(memory["d_and_y_s"].at[own, which + zero]) for which in range(2))
    # With one piece in the place of D, as far as that is spent; both parts where the log-decay's gradient needs them.
    beta_y = (memory["beta_y_s"].at[own],) if work.pieces > 1 else d_t[::-1][: 1 + layout.gated]
    square = (CHUNK, CHUNK)

    def over_values(from_state, prediction, to_state, *squares):
        """What sums over value columns: F, H, E; and dP, -dM or both."""
        d_beta = kept = plgpu.layout_cast(jnp.zeros(CHUNK, F32), plgpu.Layout.WGMMA.reduce(1))
        for group in range(work.groups):
            slot = work.slot(turn, group) + zero
            value_t, before_t, after_t = (memory[name].at[own, slot] for name in ("v_s", "before_s", "after_s"))
            before_t, after_t = before_t.at[own_keys], after_t.at[own_keys]
            d_output_t, r_t = parts_of(memory["outer_s"].at[own, slot])
            n_t = parts_of(memory["n_s"].at[own, slot])
            plgpu.barrier_wait(memory["full"].at[stream * work.slots + slot])
            for which, accumulator in enumerate(squares):
                outer_t = memory["outer_s"].at[own, slot, piece if work.pieces > 1 else which]
                issue(accumulator, *((outer_t, transposed(x)) for x in n_t))
            issue(from_state, (d_output_t, transposed(before_t)))
            issue(prediction, (r_t, transposed(before_t)))
            issue(to_state, *((x, transposed(after_t)) for x in n_t[: 1 + layout.gated]))
            if layout.gated:
                kept += (load(before_t) * load(after_t)).sum(axis=1)

            def values(d_beta, slot=slot, group=group, r_t=r_t, value_t=value_t):
                own_r = load(r_t)
                d_beta += (own_r * load(value_t)).sum(axis=1)
                value_t[...] = scale_rows(own_r, along_rows(memory["beta_s"].at[own, slot])).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(value_t, d_v_ref.at[b, tokens, h, pl.ds(group * COLUMNS, COLUMNS)])
                return d_beta

            # The gradient of this group's values is made by one warpgroup of one unit.
            mine = (unit == group % work.units) & (piece == group // work.units % work.pieces)
            d_beta = lax.cond(mine, values, lambda d_beta: d_beta, d_beta)
            plgpu.wgmma_wait(0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()  # what was read here is read before it is overwritten
            plgpu.barrier_arrive(memory["empty"].at[stream * work.slots + slot])
        sums = [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in (from_state, prediction, to_state, *squares)]
        return d_beta, kept, *sums

    results = scoped(over_values, *((CHUNK, _PIECE),) * 3, *(square,) * (3 - work.pieces))
    d_beta, kept, from_state, prediction, to_state, *squares = results
    if work.pieces > 1:
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(memory["spent"].at[stream]))
    plgpu.barrier_wait(memory["loaded"].at[w])
    beta = along_rows(rows_t.at[0])
    i, j = row_and_column(square)
    pairs = decay.pairs(rows_t, layout) if layout.gated else None

    def make(which, summed):
        """D from dP, or Y from -dM; what is on the diagonal belongs to D alone."""
        x = jnp.where(i >= j + which, summed * jnp.where(which == 0, layout.scale, -1.0), 0.0)
        x = x * pairs if layout.gated else x
        store_split(parts_of(memory["d_and_y_s"].at[own, which + zero]), x)
        return x

    if work.pieces > 1:
        x = make(piece, squares[0])

        @pl.when(piece == 1)
        def _():
            beta_y[0][...] = scale_rows(x, beta).astype(BF16)

    else:
        _, y = (make(which, summed) for which, summed in enumerate(squares))
    plgpu.commit_smem()
    if work.pieces > 1:
        plgpu.barrier_arrive(memory["made"].at[stream])
        plgpu.barrier_wait(memory["made"].at[stream])
    if layout.gated:
        entry, leave = decay.entry(rows_t, layout), decay.exit(rows_t, layout)
        from_state, prediction = scale_rows(from_state, entry), scale_rows(prediction, entry)
        to_state = scale_rows(to_state, leave)
        predicted = beta * (prediction * load(k_t)).sum(axis=1)
        parts_t.at[2][...] = (to_state * load(k_t)).sum(axis=1)
        parts_t.at[3][...] = kept

    def over_tokens(d_queries, through_keys, d_keys):
        d_queries = Sum(d_queries, layout.scale * from_state, layout.interpret)
        # A sum of its own for X: beta may be zero, and the gradient of beta needs X itself.
        through_keys = Sum(through_keys, -prediction, layout.interpret)
        d_keys = Sum(d_keys, to_state, layout.interpret)
        through_keys.issue(*((x, k_t) for x in y_t))
        d_queries.issue(*((x, k_t) for x in d_t))
        # The gradient of the log-decay needs the same D here as in dQ.
        writes = [(transposed(x), q_t) for x in d_t[: 1 + layout.gated]]
        scaled = [(transposed(x), k_t) for x in beta_y]
        if work.pieces > 1:
            writes += scaled
        d_keys.issue(*writes)
        through = through_keys.load(len(d_t) + len(writes))
        summed = (through * load(k_t)).sum(axis=1)
        d_q = d_queries.load(len(writes) if len(beta_y) == 1 else 0)
        if work.pieces == 1:
            plgpu.commit_smem()
            if len(beta_y) == 1:
                beta_y[0][...] = scale_rows(y, beta).astype(BF16)
            else:
                store_split(beta_y, scale_rows(y, beta))
            plgpu.commit_smem()
            d_keys.issue(*scaled)
        d_k = d_keys.load(0)
        if layout.gated:
            # What each token reads less what it writes. Between the tokens of the chunk most of it cancels, so that
            # both sums have the same rounded numbers in them. (Sums over the rows and the columns of these products
            # would need memory that the warpgroups share.)
            inside = (product(*((x, k_t) for x in beta_y)) * load(k_t)).sum(axis=1)
            reads = (d_q * load(q_t)).sum(axis=1) + inside - predicted
            parts_t.at[1][...] = reads - (d_k * load(k_t)).sum(axis=1)
        return d_q, d_k + scale_rows(through, beta), summed

    d_q, d_k, through = scoped(over_tokens, *((CHUNK, _PIECE),) * 3)
    plgpu.commit_smem()
    if work.pieces > 1:
        plgpu.barrier_arrive(memory["spent"].at[stream])
    q_t[...], k_t[...] = d_q.astype(BF16), d_k.astype(BF16)
    parts_t.at[0][...] = d_beta + through
    plgpu.commit_smem()
    columns = pl.ds((unit * work.pieces + piece) * _PIECE, _PIECE)
    plgpu.copy_smem_to_gmem(q_t, d_q_ref.at[b, tokens, h, columns])
    plgpu.copy_smem_to_gmem(k_t, d_k_ref.at[b, tokens, h, columns])
    for part in range(parts_t.shape[0]):
        plgpu.copy_smem_to_gmem(parts_t.at[part], parts_ref.at[unit * work.pieces + piece, part, b, h, tokens])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(memory["left"].at[w])
