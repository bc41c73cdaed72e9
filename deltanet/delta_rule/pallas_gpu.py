"""The chunkwise delta rule as Mosaic GPU kernels for NVIDIA Hopper GPUs, forward and backward, in bfloat16.

    prepare    every chunk by itself: A = (I + M)^-1, and with it J = A^T K and L = Q K^T A (decay aside)
    output     the chunks in order, the state in registers: the output
    states     the same for the backward: the state before every chunk, and N
    reverse    the chunks in reverse order, the state's gradient dS in registers: dS of every chunk, and R = A^T dN
    gradients  every chunk by itself: dQ, dK, dV, and those of the numbers per token

The chains over the chunks give each head a block of their own. One warpgroup of it copies tiles from device memory
ahead of time; the others own 64 value columns of the state each and never exchange anything. The symbols are those of
DERIVATION.md.

Where keys are alike, sums over the tokens of a chunk cancel, and rounding decides what is left. What enters such a sum
is therefore in float16, or split into two bfloat16 matrices, the number and what its rounding lost. J and L have such
sums behind them and are plain bfloat16.

A kernel needs an operand's rows to be whole swizzled lines of 64 numbers, so head sizes are 64, 128 and 256.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

from deltanet.delta_rule.chunked import d_chunk_log_decay
from models.kernels import mosaic_gpu as mgpu
from models.kernels.mosaic_gpu import (
    Sum,
    along_columns,
    along_rows,
    issue,
    load,
    parts_of,
    product,
    row_and_column,
    scale_rows,
    scoped,
    split,
    store_split,
    tile,
    transposed,
)

CHUNK = 64  # also the smallest number of rows of the matrix unit
COLUMNS = 64  # value columns of a warpgroup, where there are heads enough
SIZES = (64, 128, 256)
_BLOCK_SHARED_MEMORY = 227 * 1024
_MULTIPROCESSORS = 132
_SLOTS = 2  # chunks of a warpgroup of `prepare` in shared memory
_PREPARING = 3  # warpgroups of a block of `prepare`; more would need more registers than there are
_STAGES = 2  # slots of the copies of a sweep, where shared memory holds so many
_F32, _BF16, _F16 = jnp.float32, jnp.bfloat16, jnp.float16


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


class Layout(NamedTuple):
    """Sizes and static choices of a problem."""

    batch: int
    time: int
    heads: int
    dim: int
    value_dim: int
    rows: int  # numbers per token: 1 for beta, 2 with the log-decay, 3 with the starts of segments
    scale: float
    interpret: Any

    @property
    def chunks(self) -> int:
        return self.time // CHUNK

    @property
    def gated(self) -> bool:
        return self.rows > 1

    @property
    def packed(self) -> bool:
        return self.rows > 2

    @property
    def columns(self) -> int:
        """Value columns of a warpgroup of a sweep: with few heads fewer, so that more multiprocessors work."""
        return 32 if 2 * self.batch * self.heads * self.value_dim // COLUMNS <= _MULTIPROCESSORS else COLUMNS

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute, in a block of a sweep; with few heads, one."""
        groups = self.value_dim // COLUMNS
        return 2 if groups > 1 and self.batch * self.heads * groups > _MULTIPROCESSORS else 1

    @property
    def slices(self) -> int:
        """Blocks that share the value columns of a head."""
        return self.value_dim // (self.columns * self.warpgroups)


# Decay. `rows` is a reference to the numbers per token of a chunk, [1 to 3, chunk] in shared memory.


def _pairs(rows: Any, layout: Layout) -> jax.Array:
    """Gamma, [chunk, chunk]: ones on and below the diagonal where there is no decay."""
    i, j = row_and_column((CHUNK, CHUNK))
    reaches = i >= j
    if not layout.gated:
        return jnp.where(reaches, 1.0, 0.0)

    def difference(ref):
        row = lax.broadcast_in_dim(along_rows(ref), (CHUNK, CHUNK), [0])
        column = lax.broadcast_in_dim(along_columns(ref), (CHUNK, CHUNK), [1])
        return row - column

    if layout.packed:
        reaches = reaches & (difference(rows.at[2]) == 0)
    # The mask comes before the exponential, which could overflow above the diagonal.
    return jnp.exp(jnp.where(reaches, difference(rows.at[1]), -jnp.inf))


def _entry(rows: Any, layout: Layout) -> jax.Array:
    """gamma, [chunk], along rows."""
    factor = jnp.exp(along_rows(rows.at[1]))
    return jnp.where(along_rows(rows.at[2]) == 0, factor, 0.0) if layout.packed else factor


def _exit(rows: Any, layout: Layout) -> jax.Array:
    """lambda, [chunk], along rows."""
    factor = jnp.exp(rows[1, CHUNK - 1] - along_rows(rows.at[1]))
    return jnp.where(along_rows(rows.at[2]) == rows[2, CHUNK - 1], factor, 0.0) if layout.packed else factor


def _whole(rows: Any, layout: Layout) -> jax.Array:
    """The decay of the state over the chunk, a number."""
    factor = jnp.exp(rows[1, CHUNK - 1])
    return jnp.where(rows[2, CHUNK - 1] == 0, factor, 0.0) if layout.packed else factor


def _kernel(body: Callable, name: str, layout: Layout, **options) -> Callable:
    return mgpu.kernel(body, f"delta_rule_{name}", layout.interpret, **options)


# Kernel 1: what is known of a chunk without the state.


def _levels() -> np.ndarray:
    """For each size of blocks, 1 to 32, ones where joining the pairs of them adds entries, [6, chunk, chunk]."""
    i, j = np.indices((CHUNK, CHUNK))
    return np.stack([(i // size == j // size + 1) & (j // size % 2 == 0) for size in (1, 2, 4, 8, 16, 32)]).astype(_F16)


def prepare(q: jax.Array, k: jax.Array, rows: jax.Array, layout: Layout, *, keep: bool):
    """J of every chunk like `k` and L, [batch, heads, time, chunk], bfloat16; and A as a sum of two, [2, like L],
    which only the backward needs, or None.

    The blocks of the diagonal of A double, as in `pallas_tpu.masked_inverse`, with float16 operands. What A is
    multiplied with is float16 too, which keeps its digits: keys as they are, rows of P divided by their largest number.

    Every warpgroup works by itself, on one chunk after another: while one waits, others compute.
    """
    columns = min(layout.dim, 128)  # of a product with the keys: more would need more registers than there are
    groups = layout.dim // 64
    bytes_of_one = 2 * CHUNK * (2 * _SLOTS * layout.dim + 2 * CHUNK) + 4 * _SLOTS * layout.rows * CHUNK
    levels = _levels()
    # The interpreter takes the whole of a union for one, and the warpgroups' parts of it for a race.
    warpgroups = (
        1 if layout.interpret else min(_PREPARING, (_BLOCK_SHARED_MEMORY - 1024 - levels.nbytes) // bytes_of_one)
    )
    chains = layout.batch * layout.heads
    total = chains * layout.chunks
    blocks = min(_MULTIPROCESSORS, -(-total // warpgroups))
    stride = blocks * warpgroups

    def body(q_ref, k_ref, rows_ref, levels_ref, *refs, q_s, k_s, x_s, y_s, rows_s, levels_s, loaded, ready, m_s=None):
        j_ref, l_ref, *inverse_ref = refs
        w = lax.axis_index("warpgroup")
        first = lax.axis_index("blocks") * warpgroups + w
        # The same memory twice: as bfloat16 numbers that come or go, and as float16 numbers of the products here.
        (high_t, x_t), (low_t, y_t) = ([x.at[w] for x in union] for union in (x_s, y_s))
        pl.when(w == 0)(lambda: plgpu.copy_gmem_to_smem(levels_ref, levels_s, ready))
        plgpu.barrier_wait(ready)

        def place(item):
            # The last chunks come first: what the sweep reads first is then still in the cache.
            turn, head = lax.div(item, jnp.int32(chains)), lax.rem(item, jnp.int32(chains))
            b, h = lax.div(head, jnp.int32(layout.heads)), lax.rem(head, jnp.int32(layout.heads))
            return b, h, pl.ds((layout.chunks - 1 - turn) * CHUNK, CHUNK)

        def fetch(item, slot):
            b, h, tokens = place(item)
            barrier = loaded.at[w * _SLOTS + slot]
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h], k_s[0].at[w, slot], barrier)
            for group in range(groups):
                plgpu.copy_gmem_to_smem(
                    q_ref.at[b, tokens, h, pl.ds(group * 64, 64)], q_s[0].at[w, slot, group], barrier
                )
            for row in range(layout.rows):
                plgpu.copy_gmem_to_smem(rows_ref.at[row, b, h, tokens], rows_s.at[w, slot, row], barrier)

        def step(turn, item):
            (b, h, tokens), slot = place(item), lax.rem(turn, jnp.int32(_SLOTS))
            (q_t, p_t), (k_t, key16_t) = ([x.at[w, slot] for x in union] for union in (q_s, k_s))
            p_t, reads_t, rows_t = p_t.at[0], q_t.at[0], rows_s.at[w, slot]
            key_parts = [pl.ds(group * 64, 64) for group in range(groups)]
            plgpu.barrier_wait(loaded.at[w * _SLOTS + slot])

            def indices(salt):
                """Rows and columns, with zeros added that the compiler doesn't know: else it computes all masks once
                and keeps them in registers, which are too few.
                """
                i, j = row_and_column((CHUNK, CHUNK))
                return i + lax.div(item, jnp.int32(total + salt)), j

            def half(ref):
                return plgpu.load(ref, layout=plgpu.Layout.WGMMA)

            def similarities(of_keys, of_queries):
                issue(of_keys, (k_t, transposed(k_t)))
                issue(of_queries, *((q_t.at[i], transposed(k_t.at[:, part])) for i, part in enumerate(key_parts)))
                m = plgpu.wgmma_accumulator_load(of_keys, wait_n=groups)
                return m, plgpu.wgmma_accumulator_load(of_queries, wait_n=0)

            m, score = scoped(similarities, (CHUNK, CHUNK), (CHUNK, CHUNK))
            plgpu.commit_smem()
            i, j = indices(0)
            pairs = _pairs(rows_t, layout) if layout.gated else None
            p = layout.scale * (score * pairs if layout.gated else jnp.where(i >= j, score, 0.0))
            largest = jnp.maximum(jnp.abs(p).max(axis=1), 1e-30)
            p_t[...] = scale_rows(p, 1 / largest).astype(_F16)  # the queries are spent
            m = scale_rows(m, -along_rows(rows_t.at[0]))
            m = (m * pairs if layout.gated else m).astype(_F16)
            i, j = indices(1)
            leaves = _exit(rows_t, layout) if layout.gated else None
            x = jnp.where(i == j, 1.0, (m * half(levels_s.at[0])).astype(_F32))
            keys = [half(k_t.at[:, part]) for part in key_parts]
            for part, key in zip(key_parts, keys, strict=True):
                key = key.astype(_F32)
                key16_t.at[:, part][...] = (scale_rows(key, leaves) if layout.gated else key).astype(_F16)
            # What the chunk before left is gone, and its tiles are free for the next.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            pl.when(item + stride < total)(lambda: fetch(item + stride, lax.rem(turn + 1, jnp.int32(_SLOTS))))
            if layout.interpret:  # it takes no operand from registers
                m_s.at[w][...] = m
                m = m_s.at[w]

            def join(level, x):
                """The blocks of X double."""
                x16 = x.astype(_F16)
                x_t[...] = x16
                plgpu.commit_smem()
                # X has no entries outside the blocks that are done, so the mask may come last.
                y_t[...] = product((m, x_t)).astype(_F16) * half(levels_s.at[level])
                plgpu.commit_smem()

                def doubled(accumulator):
                    total = Sum(accumulator, x, layout.interpret)
                    total.issue((x_t if layout.interpret else x16, y_t))
                    return total.load(0)

                larger = scoped(doubled, (CHUNK, CHUNK))
                if layout.interpret:
                    plgpu.commit_smem()
                return larger

            for level in range(1, len(levels)):
                x = join(level, x)
            x_t[...] = x.astype(_F16)
            plgpu.commit_smem()

            def main(inside, *updates):
                issue(inside, (p_t, x_t))
                for group, update in enumerate(updates):
                    issue(update, (transposed(x_t), key16_t.at[:, pl.ds(group * columns, columns)]))
                reads = plgpu.wgmma_accumulator_load(inside, wait_n=len(updates))
                writes = [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in updates]
                plgpu.commit_smem()
                reads_t[...] = scale_rows(reads, largest).astype(_BF16)
                for group, write in enumerate(writes):
                    k_t.at[:, pl.ds(group * columns, columns)][...] = write.astype(_BF16)

            scoped(main, (CHUNK, CHUNK), *((CHUNK, columns),) * (layout.dim // columns))
            if keep:
                store_split((high_t, low_t), load(x_t))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(reads_t, l_ref.at[b, h, tokens])
            plgpu.copy_smem_to_gmem(k_t, j_ref.at[b, tokens, h])
            if keep:
                plgpu.copy_smem_to_gmem(high_t, inverse_ref[0].at[0, b, h, tokens])
                plgpu.copy_smem_to_gmem(low_t, inverse_ref[0].at[1, b, h, tokens])
            if layout.interpret:  # it takes both slots of a union for one
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pl.when(first < total)(lambda: fetch(first, jnp.int32(0)))

        @pl.loop(0, -(-total // stride))
        def _(turn):
            item = first + turn * stride
            pl.when(item < total)(partial(step, turn, item))

        plgpu.wait_smem_to_gmem(0)

    l_shape = (layout.batch, layout.heads, layout.time, CHUNK)
    shapes = [jax.ShapeDtypeStruct(k.shape, _BF16), jax.ShapeDtypeStruct(l_shape, _BF16)]
    shapes += [jax.ShapeDtypeStruct((2, *l_shape), _BF16)] * keep
    square, keys = (warpgroups, CHUNK, CHUNK), (warpgroups, _SLOTS, CHUNK, layout.dim)
    queries = (warpgroups, _SLOTS, groups, CHUNK, 64)
    results = _kernel(
        body,
        "prepare",
        layout,
        out_type=tuple(shapes),
        grid=(blocks,),
        grid_names=("blocks",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "q_s": plgpu.RefUnion(tile(*queries), tile(*queries, dtype=_F16)),
            "k_s": plgpu.RefUnion(tile(*keys), tile(*keys, dtype=_F16)),
            "x_s": plgpu.RefUnion(tile(*square), tile(*square, dtype=_F16)),
            "y_s": plgpu.RefUnion(tile(*square), tile(*square, dtype=_F16)),
            "rows_s": plgpu.SMEM((warpgroups, _SLOTS, layout.rows, CHUNK), _F32),
            "levels_s": tile(*levels.shape, dtype=_F16),
            "loaded": plgpu.Barrier(num_arrivals=1 + groups + layout.rows, num_barriers=warpgroups * _SLOTS),
            "ready": plgpu.Barrier(),
            **({"m_s": tile(*square, dtype=_F16)} if layout.interpret else {}),
        },
    )(q, k, rows, levels)
    return (*results, None)[:3]


# Kernels 2 and 3: the sweeps.


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
    """Slots of the copies."""
    slot = (
        2 * CHUNK * (keys * layout.dim + layout.warpgroups * layout.columns + squares * CHUNK) + 4 * layout.rows * CHUNK
    )
    return min(_STAGES, layout.chunks, (_BLOCK_SHARED_MEMORY - 1024 - fixed) // slot)


def _slots(layout: Layout, stages: int, keys: int, squares: int) -> dict[str, Any]:
    """Shared memory of the copies of a sweep, and the barriers between who copies and who computes."""
    copies = keys + layout.warpgroups + squares + layout.rows
    return {
        "keys_s": [_tile(layout, stages, CHUNK, layout.dim) for _ in range(keys)],
        "value_s": _tile(layout, stages, layout.warpgroups, CHUNK, layout.columns),
        "squares_s": [_tile(layout, stages, CHUNK, CHUNK) for _ in range(squares)],
        "rows_s": plgpu.SMEM((stages, layout.rows, CHUNK), _F32),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=layout.warpgroups, num_barriers=stages),
    }


def _columns(layout: Layout, warpgroup: int) -> Any:
    """The value columns of a warpgroup."""
    return pl.ds((lax.axis_index("slices") * layout.warpgroups + warpgroup) * layout.columns, layout.columns)


def _copy_chunks(tiles: _Tiles, slots: dict[str, Any], layout: Layout, stages: int, *, backwards: bool) -> None:
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
            (tiles.value.at[b, tokens, h, _columns(layout, w)], slots["value_s"].at[slot, w])
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


def _in_roles(layout: Layout, copy: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """Splits the warpgroups of a block: the last copies, the others compute and get the registers that it leaves."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == layout.warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        copy()

    @pl.when(warpgroup < layout.warpgroups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)


def _sweep_options(layout: Layout) -> dict[str, Any]:
    return {
        "grid": (layout.batch, layout.heads, layout.slices),
        "grid_names": ("batch", "heads", "slices"),
        "num_threads": layout.warpgroups + 1,
        "thread_name": "warpgroup",
    }


def _output(q, k, v, writers, readers, rows, state, layout: Layout):
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
                    entry = _entry(rows_t, layout) if layout.gated else None
                    prediction = plgpu.wgmma_accumulator_load(predicted, wait_n=1)
                    y_t[...] = _right_side(slots["value_s"].at[slot, w], prediction, rows_t, layout).astype(_BF16)
                    plgpu.commit_smem()
                    after = Sum(updated, state * _whole(rows_t, layout) if layout.gated else state, layout.interpret)
                    after.issue((transposed(writer_t), y_t))
                    issue(inside, (reader_t, y_t))
                    new_state = after.load(1)
                    plgpu.commit_smem()
                    state_t[...] = new_state.astype(_BF16)
                    plgpu.commit_smem()
                    before = plgpu.wgmma_accumulator_load(read, wait_n=1)
                    if layout.gated:
                        before = scale_rows(before, entry)
                    output = layout.scale * before + plgpu.wgmma_accumulator_load(inside, wait_n=0)
                    return new_state, output.astype(_BF16)

                of_tokens = (CHUNK, layout.columns)
                carry = scoped(main, of_tokens, (layout.dim, layout.columns), of_tokens, of_tokens)
                plgpu.barrier_arrive(empty.at[slot])
                return carry

            initial = plgpu.load(initial_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            state_t[...] = initial.astype(_BF16)
            plgpu.commit_smem()
            nothing = plgpu.layout_cast(jnp.zeros((CHUNK, layout.columns), _BF16), plgpu.Layout.WGMMA)
            final, output = lax.fori_loop(0, layout.chunks, step, (initial, nothing))
            leave(layout.chunks - 1, output)
            final_ref.at[b, h, :, columns][...] = final
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles((q_ref, k_ref, writers_ref), value_ref, (readers_ref,), rows_ref)
        _in_roles(layout, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=False), compute)

    return _kernel(
        body,
        "output",
        layout,
        out_type=(jax.ShapeDtypeStruct(v.shape, _BF16), jax.ShapeDtypeStruct(state.shape, _F32)),
        scratch_types={
            "state_s": _tile(layout, wg, layout.dim, layout.columns),
            "y_s": _tile(layout, wg, CHUNK, layout.columns),
            "output_s": _tile(layout, wg, CHUNK, layout.columns),
            **_slots(layout, stages, 3, 1),
        },
        **_sweep_options(layout),
    )(q, k, writers, v, readers, rows, state)


def _right_side(value_t: Any, prediction: jax.Array, rows: Any, layout: Layout) -> jax.Array:
    """Y, [chunk, columns], from K S."""
    if layout.gated:
        prediction = scale_rows(prediction, _entry(rows, layout))
    return scale_rows(load(value_t) - prediction, along_rows(rows.at[0]))


def _states(k, v, writers, inverse, rows, state, layout: Layout):
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
                    y_t[...] = _right_side(slots["value_s"].at[slot, w], prediction, rows_t, layout).astype(_BF16)
                    plgpu.commit_smem()
                    after = Sum(updated, state * _whole(rows_t, layout) if layout.gated else state, layout.interpret)
                    after.issue((transposed(writer_t), y_t))
                    issue(found, *((s.at[slot], y_t) for s in slots["squares_s"]))
                    new_state = after.load(2)
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the state and N; and the warps meet
                    state_t[...] = new_state.astype(_BF16)
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
            state_t[...] = initial.astype(_BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(state_t, before_ref.at[b, h, 0, :, columns])
            lax.fori_loop(0, layout.chunks, step, initial)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles((k_ref, writers_ref), value_ref, parts_of(inverse_ref), rows_ref)
        _in_roles(layout, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=False), compute)

    before_shape = (*state.shape[:2], layout.chunks, *state.shape[2:])
    return _kernel(
        body,
        "states",
        layout,
        out_type=(jax.ShapeDtypeStruct(before_shape, _BF16), jax.ShapeDtypeStruct((2, *v.shape), _BF16)),
        scratch_types={
            "state_s": _tile(layout, wg, layout.dim, layout.columns),
            "y_s": _tile(layout, wg, CHUNK, layout.columns),
            "n_s": _tile(layout, wg, 2, CHUNK, layout.columns),
            **_slots(layout, stages, 2, 2),
        },
        **_sweep_options(layout),
    )(k, writers, v, inverse, rows, state)


def _reverse(q, k, d_output, writers, readers, rows, d_final, layout: Layout):
    """The chunks in reverse order: the gradient of the state after each chunk, R like the values, and the gradient of
    the initial state.
    """
    wg = layout.warpgroups
    state_shape = jax.ShapeDtypeStruct(d_final.shape, _F32)
    after_shape = jax.ShapeDtypeStruct((*d_final.shape[:2], layout.chunks, *d_final.shape[2:]), _BF16)
    groups = layout.dim // CHUNK
    stages = _stages(layout, 3, 1, 2 * wg * layout.columns * (layout.dim + (1 + max(groups, 2)) * CHUNK))

    def body(*refs, d_state_s, r_s, low_s, **slots):
        *key_refs, d_output_ref, readers_ref, rows_ref, d_final_ref, after_ref, r_ref, d_initial_ref = refs
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
                        scaled = scale_rows(scaled, _entry(rows_t, layout))
                        after = d_state * _whole(rows_t, layout)
                    r = plgpu.wgmma_accumulator_load(found, wait_n=0)
                    # Of the chunk before, the copies of R and of the state's gradient; and the warps meet.
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    d_output_t[...] = scaled.astype(_BF16)
                    r_t[...] = r.astype(_BF16)
                    leaving = scale_rows(-r, along_rows(rows_t.at[0]))
                    if layout.gated:
                        leaving = scale_rows(leaving, _entry(rows_t, layout))
                    store_split(leaving_t, leaving)
                    plgpu.commit_smem()
                    before = Sum(updated, after, layout.interpret)
                    before.issue((transposed(query_t), d_output_t), *((transposed(key_t), x) for x in leaving_t))
                    plgpu.copy_smem_to_gmem(r_t, r_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, columns])
                    d_new = before.load(0)
                    plgpu.commit_smem()
                    store(d_new)
                    return d_new

                d_state = scoped(main, (CHUNK, layout.columns), (layout.dim, layout.columns))

                @pl.when(n > 0)
                def _():
                    plgpu.copy_smem_to_gmem(d_state_t, after_ref.at[b, h, n - 1, :, columns])

                plgpu.barrier_arrive(empty.at[slot])
                return d_state

            d_final = plgpu.load(d_final_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            store(d_final)
            plgpu.copy_smem_to_gmem(d_state_t, after_ref.at[b, h, layout.chunks - 1, :, columns])
            d_initial_ref.at[b, h, :, columns][...] = lax.fori_loop(0, layout.chunks, step, d_final)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles(key_refs, d_output_ref, (readers_ref,), rows_ref)
        _in_roles(layout, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=True), compute)

    return _kernel(
        body,
        "reverse",
        layout,
        out_type=(after_shape, jax.ShapeDtypeStruct(d_output.shape, _BF16), state_shape),
        scratch_types={
            "d_state_s": _tile(layout, wg, layout.dim, layout.columns),
            "r_s": _tile(layout, wg, CHUNK, layout.columns),
            "low_s": _tile(layout, wg, max(groups, 2), CHUNK, layout.columns),
            **_slots(layout, stages, 3, 1),
        },
        **_sweep_options(layout),
    )(q, k, writers, d_output, readers, rows, d_final)


# Kernel 4: the gradients of a chunk.

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
    blocks = min(_MULTIPROCESSORS, -(-items // streams))
    return _Work(pieces, streams, units, layout.value_dim // COLUMNS, items, blocks)


def _gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout: Layout):
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

        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == work.warpgroups)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _copy_items(inputs, memory, place, layout, work)

        @pl.when(warpgroup < work.warpgroups)
        def _():
            plgpu.set_max_registers(232, action="increase")
            stream, piece = (0, warpgroup) if work.pieces > 1 else (warpgroup, 0)

            @pl.loop(0, work.turns)
            def _(turn):
                at, there = place(stream, turn)
                pl.when(there)(lambda: _treat_item(at, turn, stream, piece, outputs, memory, layout, work))

            if work.pieces > 1:
                pl.when(place(stream, jnp.int32(0))[1])(lambda: plgpu.barrier_wait(memory["spent"].at[stream]))
            plgpu.wait_smem_to_gmem(0)

    shapes = [jax.ShapeDtypeStruct(x.shape, _BF16) for x in (q, k, v)]
    parts_shape = (layout.dim // _PIECE, parts, layout.batch, layout.heads, layout.time)
    slots, streams, warpgroups = (work.streams, work.slots), work.streams, work.warpgroups
    return _kernel(
        body,
        "gradients",
        layout,
        out_type=(*shapes, jax.ShapeDtypeStruct(parts_shape, _F32)),
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
            "beta_s": plgpu.SMEM((*slots, CHUNK), _F32),
            "full": plgpu.Barrier(num_arrivals=8, num_barriers=work.streams * work.slots),
            "empty": plgpu.Barrier(num_arrivals=work.pieces, num_barriers=work.streams * work.slots),
            # Of a warpgroup.
            "q_s": tile(warpgroups, CHUNK, _PIECE),
            "k_s": tile(warpgroups, CHUNK, _PIECE),
            "rows_s": plgpu.SMEM((warpgroups, layout.rows, CHUNK), _F32),
            "parts_s": plgpu.SMEM((warpgroups, parts, CHUNK), _F32),
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
    """The copying warpgroup of `_gradients`."""
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
        d_beta = kept = plgpu.layout_cast(jnp.zeros(CHUNK, _F32), plgpu.Layout.WGMMA.reduce(1))
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
                value_t[...] = scale_rows(own_r, along_rows(memory["beta_s"].at[own, slot])).astype(_BF16)
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
    pairs = _pairs(rows_t, layout) if layout.gated else None

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
            beta_y[0][...] = scale_rows(x, beta).astype(_BF16)

    else:
        _, y = (make(which, summed) for which, summed in enumerate(squares))
    plgpu.commit_smem()
    if work.pieces > 1:
        plgpu.barrier_arrive(memory["made"].at[stream])
        plgpu.barrier_wait(memory["made"].at[stream])
    if layout.gated:
        entry, leave = _entry(rows_t, layout), _exit(rows_t, layout)
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
                beta_y[0][...] = scale_rows(y, beta).astype(_BF16)
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
    q_t[...], k_t[...] = d_q.astype(_BF16), d_k.astype(_BF16)
    parts_t.at[0][...] = d_beta + through
    plgpu.commit_smem()
    columns = pl.ds((unit * work.pieces + piece) * _PIECE, _PIECE)
    plgpu.copy_smem_to_gmem(q_t, d_q_ref.at[b, tokens, h, columns])
    plgpu.copy_smem_to_gmem(k_t, d_k_ref.at[b, tokens, h, columns])
    for part in range(parts_t.shape[0]):
        plgpu.copy_smem_to_gmem(parts_t.at[part], parts_ref.at[unit * work.pieces + piece, part, b, h, tokens])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(memory["left"].at[w])


# The differentiable function.


def _rows(beta: jax.Array, g: jax.Array | None, starts: jax.Array | None) -> jax.Array:
    """The numbers per token, [1 to 3, batch, heads, time], float32; the sums are those inside a chunk."""

    def in_chunks(x):
        return jnp.cumsum(x.reshape(*x.shape[:2], -1, CHUNK), axis=-1).reshape(x.shape)

    rows = [jnp.swapaxes(beta, 1, 2).astype(_F32)]
    if g is not None or starts is not None:
        rows.append(jnp.zeros_like(rows[0]) if g is None else in_chunks(jnp.swapaxes(g, 1, 2).astype(_F32)))
    if starts is not None:
        rows.append(in_chunks(jnp.broadcast_to(starts[:, None].astype(_F32), rows[0].shape)))
    return jnp.stack(rows)


def layout_of(q: jax.Array, v: jax.Array, rows: jax.Array, scale: float, interpret: Any) -> Layout:
    """The sizes of a problem with these arguments."""
    return Layout(*q.shape, v.shape[-1], rows.shape[0], float(scale), interpret)


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
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule on a Hopper GPU; arguments and results as in `chunked_delta_rule`, in bfloat16.

    `time` is a multiple of `CHUNK`, head sizes are among `SIZES`. `interpret`, a `plgpu.InterpretGPUParams`, runs the
    kernels without a GPU.
    """
    return _forward(q, k, v, beta, g, starts, state, scale, interpret, keep=False)[0]


def _forward(q, k, v, beta, g, starts, state, scale, interpret, *, keep=True):
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows, scale, interpret)
    chunk = prepare(q, k, rows, layout, keep=keep)
    output, final = _output(q, k, v, *chunk[:2], rows, state.astype(_F32), layout)
    return (output, final.astype(state.dtype)), (q, k, v, beta, g, starts, state, chunk)


def _backward(scale, interpret, residuals, cotangents):
    q, k, v, beta, g, starts, state, (writers, readers, inverse) = residuals
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows, scale, interpret)
    d_output = cotangents[0].astype(_BF16)
    before, pseudo = _states(k, v, writers, inverse, rows, state.astype(_F32), layout)
    after, r, d_state = _reverse(q, k, d_output, writers, readers, rows, cotangents[1].astype(_F32), layout)
    d_q, d_k, d_v, parts = _gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout)
    d_beta = jnp.swapaxes(parts[:, 0].sum(0), 1, 2).astype(beta.dtype)
    d_g = None if g is None else _d_log_decay(parts, rows, layout).astype(g.dtype)
    d_starts = None if starts is None else jnp.zeros_like(starts)
    return d_q, d_k, d_v, d_beta, d_g, d_starts, d_state.astype(state.dtype)


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
