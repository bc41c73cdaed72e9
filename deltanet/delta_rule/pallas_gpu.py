"""The chunkwise delta rule as Mosaic GPU kernels for NVIDIA Hopper GPUs, forward and backward, in bfloat16.

    invert     every chunk by itself: A = (I + M)^-1, kept for the backward as the sum of two bfloat16 matrices
    sweep      the chunks in order, the state in registers: the output; or, for the backward, states S and rows N
    reverse    the chunks in reverse order, the state's gradient dS in registers: dS of every chunk, and R = A^T dN
    gradients  every chunk and 64 columns of the keys by themselves: dQ, dK, dV, and those of the numbers per token

`sweep` and `reverse` give each head a block of their own. One warpgroup of it copies tiles from device memory ahead of
time; the others own 64 value columns of the state each and never exchange anything. The symbols are those of
DERIVATION.md.

Where keys are alike, sums over the tokens of a chunk cancel, and rounding decides what is left. What enters such a sum
is therefore split into two bfloat16 matrices, the number and what its rounding lost; the state, dO and R need not be.

A kernel needs an operand's rows to be whole swizzled lines of 64 numbers, so head sizes are 64, 128 and 256.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    split_product,
    store_split,
    tile,
    transposed,
)

CHUNK = 64  # also the smallest number of rows of the matrix unit
COLUMNS = 64  # value columns of a warpgroup
SIZES = (64, 128, 256)
_BLOCK_SHARED_MEMORY = 227 * 1024
_MULTIPROCESSORS = 132
_INVERSES = 4  # chunks in a block of `invert`, each by a warpgroup; more would need more registers than there are
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
    def warpgroups(self) -> int:
        """Warpgroups that compute, in a block of a sweep: with few heads, one, so that more multiprocessors work."""
        groups = self.value_dim // COLUMNS
        return 2 if groups > 1 and self.batch * self.heads * groups > _MULTIPROCESSORS else 1

    @property
    def slices(self) -> int:
        """Blocks that share the value columns of a head."""
        return self.value_dim // (COLUMNS * self.warpgroups)


# Decay. `rows` is a reference to the numbers per token of a chunk, [1 to 3, chunk] in shared memory.


def _pairs(rows: Any, layout: Layout, *, swapped: bool = False) -> jax.Array:
    """Gamma, [chunk, chunk]: ones on and below the diagonal where there is no decay."""
    i, j = row_and_column((CHUNK, CHUNK))
    if swapped:
        i, j = j, i
    reaches = i >= j
    if not layout.gated:
        return jnp.where(reaches, 1.0, 0.0)

    def difference(ref):
        row = lax.broadcast_in_dim(along_rows(ref), (CHUNK, CHUNK), [0])
        column = lax.broadcast_in_dim(along_columns(ref), (CHUNK, CHUNK), [1])
        return column - row if swapped else row - column

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


# Kernel 1: the inverse.


def invert(k: jax.Array, rows: jax.Array, layout: Layout) -> jax.Array:
    """A of every chunk as a sum of two: [2, batch, heads, time, chunk], bfloat16.

    The blocks of the diagonal double, as in `pallas_tpu.masked_inverse`, with float16 operands; what that leaves, one
    step of Newton's iteration with a residual of twice the digits removes.
    """

    groups = layout.dim // 64
    bytes_of_one = 2 * CHUNK * 64 * (max(groups, 2) + 5) + 4 * layout.rows * CHUNK
    warpgroups = min(_INVERSES, layout.chunks, (_BLOCK_SHARED_MEMORY - 512) // bytes_of_one)

    def body(k_ref, rows_ref, inverse_ref, *, k_s, rows_s, x_s, y_s, m_s, loaded):
        b, h, block, w = (lax.axis_index(name) for name in ("batch", "heads", "blocks", "warpgroup"))
        n = block * warpgroups + w
        tokens = pl.ds(n * CHUNK, CHUNK)
        k_t, rows_t, x_t, y_t, m_t = k_s.at[w], rows_s.at[w], x_s.at[w], y_s.at[w], m_s.at[w]

        @pl.when(n < layout.chunks)
        def _():
            for group in range(groups):
                columns = pl.ds(group * 64, 64)
                plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h, columns], k_t.at[group], loaded.at[w])
            for row in range(layout.rows):
                plgpu.copy_gmem_to_smem(rows_ref.at[row, b, h, tokens], rows_t.at[row], loaded.at[w])
            plgpu.barrier_wait(loaded.at[w])
            i, j = row_and_column((CHUNK, CHUNK))
            differs = i ^ j
            unit = jnp.where(i == j, 1.0, 0.0)
            m = product(*((k_t.at[group], transposed(k_t.at[group])) for group in range(groups)))
            m = scale_rows(m, along_rows(rows_t.at[0]))
            if layout.gated:
                m = m * _pairs(rows_t, layout)
            m = jnp.where(i > j, m, 0.0)
            x = unit - jnp.where(differs == 1, m, 0.0)
            level_t, high_t, low_t = m_t.at[0], m_t.at[1], m_t.at[2]
            high = m.astype(_F16)
            high_t[...] = high
            low_t[...] = (m - high.astype(_F32)).astype(_F16)
            size = 2
            while size < CHUNK:
                x_t[...] = x.astype(_F16)
                # M comes back from shared memory each time: registers are what limits the chunks at work at once.
                level_t[...] = jnp.where((differs >= size) & (differs < 2 * size), load(high_t), 0.0).astype(_F16)
                plgpu.commit_smem()
                y_t[...] = product((level_t, x_t)).astype(_F16)
                plgpu.commit_smem()
                x = x - product((x_t, y_t))
                plgpu.commit_smem()
                size *= 2
            x_t[...] = x.astype(_F16)
            plgpu.commit_smem()
            residual = unit - load(x_t) - product((high_t, x_t), (low_t, x_t))
            y_t[...] = residual.astype(_F16)
            plgpu.commit_smem()
            out = parts_of(k_t)  # the keys are spent
            store_split(out, load(x_t) + product((x_t, y_t)))
            plgpu.commit_smem()
            for part in range(2):
                plgpu.copy_smem_to_gmem(out[part], inverse_ref.at[part, b, h, tokens])
            plgpu.wait_smem_to_gmem(0)

    return _kernel(
        body,
        "invert",
        layout,
        out_type=jax.ShapeDtypeStruct((2, layout.batch, layout.heads, layout.time, CHUNK), _BF16),
        grid=(layout.batch, layout.heads, -(-layout.chunks // warpgroups)),
        grid_names=("batch", "heads", "blocks"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "k_s": tile(warpgroups, max(groups, 2), CHUNK, 64),
            "rows_s": plgpu.SMEM((warpgroups, layout.rows, CHUNK), _F32),
            "x_s": tile(warpgroups, CHUNK, CHUNK, dtype=_F16),
            "y_s": tile(warpgroups, CHUNK, CHUNK, dtype=_F16),
            "m_s": tile(warpgroups, 3, CHUNK, CHUNK, dtype=_F16),
            "loaded": plgpu.Barrier(num_arrivals=groups + layout.rows, num_barriers=warpgroups),
        },
    )(k, rows)


# Kernels 2 and 3: the sweeps.


class _Tiles(NamedTuple):
    """What a sweep copies for each chunk, with as many slots as stages."""

    keys: Sequence[Any]  # references to [batch, time, heads, dim]
    value: Any  # reference to [batch, time, heads, value_dim], of which each warpgroup gets its columns
    inverse: Any
    rows: Any


def _stages(layout: Layout, keys: int, fixed: int) -> int:
    """Slots of the copies."""
    slot = 2 * CHUNK * (keys * layout.dim + layout.warpgroups * COLUMNS + 2 * CHUNK) + 4 * layout.rows * CHUNK
    return min(_STAGES, layout.chunks, (_BLOCK_SHARED_MEMORY - 1024 - fixed) // slot)


def _slots(layout: Layout, stages: int, keys: int) -> dict[str, Any]:
    """Shared memory of the copies of a sweep, and the barriers between who copies and who computes."""
    return {
        "keys_s": [tile(stages, CHUNK, layout.dim) for _ in range(keys)],
        "value_s": tile(stages, layout.warpgroups, CHUNK, COLUMNS),
        "inverse_s": tile(stages, 2, CHUNK, CHUNK),
        "rows_s": plgpu.SMEM((stages, layout.rows, CHUNK), _F32),
        "full": plgpu.Barrier(num_arrivals=keys + layout.warpgroups + 2 + layout.rows, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=layout.warpgroups, num_barriers=stages),
    }


def _columns(layout: Layout, warpgroup: int) -> Any:
    """The value columns of a warpgroup."""
    return pl.ds((lax.axis_index("slices") * layout.warpgroups + warpgroup) * COLUMNS, COLUMNS)


def _copy_chunks(tiles: _Tiles, slots: dict[str, Any], layout: Layout, stages: int, *, backwards: bool) -> None:
    """The copying warpgroup of a sweep: fills the slots, each as soon as all warpgroups have released it."""
    b, h = lax.axis_index("batch"), lax.axis_index("heads")
    full, empty = slots["full"], slots["empty"]

    def fetch(step, slot):
        chunk = layout.chunks - 1 - step if backwards else step
        tokens = pl.ds(chunk * CHUNK, CHUNK)
        copies = [(ref.at[b, tokens, h], s.at[slot]) for ref, s in zip(tiles.keys, slots["keys_s"], strict=True)]
        copies += [
            (tiles.value.at[b, tokens, h, _columns(layout, w)], slots["value_s"].at[slot, w])
            for w in range(layout.warpgroups)
        ]
        copies += [(tiles.inverse.at[part, b, h, tokens], slots["inverse_s"].at[slot, part]) for part in range(2)]
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


def _in_roles(layout: Layout, copy: Callable[[], None], compute: Callable[[int], None]) -> None:
    """Splits the warpgroups of a block: the last copies, the others compute and get the registers that it leaves."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == layout.warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        copy()

    # A branch each: with a constant index, the addresses of tiles are constants too and leave registers alone.
    for w in range(layout.warpgroups):

        @pl.when(warpgroup == w)
        def _(w=w):
            plgpu.set_max_registers(232, action="increase")
            compute(w)


def _sweep_options(layout: Layout) -> dict[str, Any]:
    return {
        "grid": (layout.batch, layout.heads, layout.slices),
        "grid_names": ("batch", "heads", "slices"),
        "num_threads": layout.warpgroups + 1,
        "thread_name": "warpgroup",
    }


def _sweep(q, k, v, inverse, rows, state, layout: Layout):
    """The chunks in order. With `q` the output like `v`; without, the state before each chunk [batch, heads, chunks,
    dim, value_dim], and N split, [2, ...] like `v`; all bfloat16. Always the final state last.
    """
    outputs = q is not None
    operands = (q, k) if outputs else (k,)
    state_shape = jax.ShapeDtypeStruct(state.shape, _F32)
    v_shape, split_shape = jax.ShapeDtypeStruct(v.shape, _BF16), jax.ShapeDtypeStruct((2, *v.shape), _BF16)
    before_shape = jax.ShapeDtypeStruct((*state.shape[:2], layout.chunks, *state.shape[2:]), _BF16)
    wg = layout.warpgroups
    tiles = 4 if outputs else 2  # of a warpgroup: N and, for the output, the scores, both split
    stages = _stages(layout, len(operands), 2 * wg * COLUMNS * (layout.dim + tiles * CHUNK))

    def body(*refs, state_s, n_s, scores_s=None, **slots):
        *key_refs, value_ref, inverse_ref, rows_ref, initial_ref = refs[: len(operands) + 4]
        *out_refs, final_ref = refs[len(operands) + 4 :]
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        full, empty = slots["full"], slots["empty"]

        def compute(w):
            columns = _columns(layout, w)
            state_t, n_t = state_s.at[w], parts_of(n_s.at[w])
            scores_t = parts_of(scores_s.at[w]) if outputs else None

            def step(n, state):
                slot, tokens = lax.rem(n, jnp.int32(stages)), pl.ds(n * CHUNK, CHUNK)
                key_t, rows_t = slots["keys_s"][-1].at[slot], slots["rows_s"].at[slot]
                query_t = slots["keys_s"][0].at[slot]
                inverse_t = parts_of(slots["inverse_s"].at[slot])
                plgpu.barrier_wait(full.at[slot])

                def main(predicted, found, updated, scores=None, read=None, decayed=None):
                    issue(predicted, (key_t, state_t))
                    if outputs:
                        issue(scores, (query_t, transposed(key_t)))
                    prediction = plgpu.wgmma_accumulator_load(predicted, wait_n=1 if outputs else 0)
                    if layout.gated:
                        prediction = scale_rows(prediction, _entry(rows_t, layout))
                    error = scale_rows(load(slots["value_s"].at[slot, w]) - prediction, along_rows(rows_t.at[0]))
                    if not outputs:  # of the three of the chunk before, all but the state's: N was in these tiles
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    store_split(n_t, error)
                    plgpu.commit_smem()
                    issue(found, *split_product(inverse_t, n_t))
                    if outputs:
                        issue(read, (query_t, state_t))
                        score = plgpu.wgmma_accumulator_load(scores, wait_n=4)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output before was in these tiles
                        store_split(scores_t, score * _pairs(rows_t, layout))
                    pseudo = plgpu.wgmma_accumulator_load(found, wait_n=1 if outputs else 0)
                    if outputs:
                        plgpu.commit_smem()
                    else:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the state before
                    if layout.gated:
                        after = Sum(updated, state * _whole(rows_t, layout), layout.interpret)
                        store_split(n_t, scale_rows(pseudo, _exit(rows_t, layout)))
                        plgpu.commit_smem()
                        after.issue(*((transposed(key_t), x) for x in n_t))
                        new_state = after.load(0)
                        if outputs:
                            before = plgpu.wgmma_accumulator_load(read, wait_n=0)
                            output = Sum(decayed, scale_rows(before, _entry(rows_t, layout)), layout.interpret)
                        plgpu.commit_smem()
                    else:
                        after = Sum(updated, state, layout.interpret)
                    # Without decay the state takes the same N as all else.
                    store_split(n_t, pseudo)
                    plgpu.commit_smem()
                    if not layout.gated:
                        after.issue(*((transposed(key_t), x) for x in n_t))
                    if outputs and layout.gated:
                        output.issue(*split_product(scores_t, n_t))
                    elif outputs:
                        issue(read, *split_product(scores_t, n_t))
                    else:
                        for part in range(2):
                            plgpu.copy_smem_to_gmem(n_t[part], out_refs[1].at[part, b, tokens, h, columns])
                    if not layout.gated:
                        new_state = after.load(3 if outputs else 0)
                    state_t[...] = new_state.astype(_BF16)
                    if outputs:
                        total = output.load(0) if layout.gated else plgpu.wgmma_accumulator_load(read, wait_n=0)
                        plgpu.commit_smem()
                        scores_t[0][...] = (layout.scale * total).astype(_BF16)  # over the scores, which are spent
                    plgpu.commit_smem()
                    return new_state

                shapes = [(CHUNK, COLUMNS), (CHUNK, COLUMNS), (layout.dim, COLUMNS)]
                if outputs:
                    shapes += [(CHUNK, CHUNK), *[(CHUNK, COLUMNS)] * (1 + layout.gated)]
                state = scoped(main, *shapes)
                if outputs:
                    plgpu.copy_smem_to_gmem(scores_t[0], out_refs[0].at[b, tokens, h, columns])
                else:

                    @pl.when(n + 1 < layout.chunks)
                    def _():
                        plgpu.copy_smem_to_gmem(state_t, out_refs[0].at[b, h, n + 1, :, columns])

                plgpu.barrier_arrive(empty.at[slot])
                return state

            initial = plgpu.load(initial_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            state_t[...] = initial.astype(_BF16)
            plgpu.commit_smem()
            if not outputs:
                plgpu.copy_smem_to_gmem(state_t, out_refs[0].at[b, h, 0, :, columns])
            final_ref.at[b, h, :, columns][...] = lax.fori_loop(0, layout.chunks, step, initial)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles(key_refs, value_ref, inverse_ref, rows_ref)
        _in_roles(layout, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=False), compute)

    scratch = {"state_s": tile(wg, layout.dim, COLUMNS), "n_s": tile(wg, 2, CHUNK, COLUMNS)}
    if outputs:
        scratch["scores_s"] = tile(wg, 2, CHUNK, CHUNK)
    return _kernel(
        body,
        "output" if outputs else "states",
        layout,
        out_type=(v_shape, state_shape) if outputs else (before_shape, split_shape, state_shape),
        scratch_types=scratch | _slots(layout, stages, len(operands)),
        **_sweep_options(layout),
    )(*operands, v, inverse, rows, state)


def _reverse(q, k, d_output, inverse, rows, d_final, layout: Layout):
    """The chunks in reverse order: the gradient of the state after each chunk, R like the values, and the gradient of
    the initial state.
    """
    wg = layout.warpgroups
    state_shape = jax.ShapeDtypeStruct(d_final.shape, _F32)
    after_shape = jax.ShapeDtypeStruct((*d_final.shape[:2], layout.chunks, *d_final.shape[2:]), _BF16)
    stages = _stages(layout, 2, 2 * wg * COLUMNS * (layout.dim + 4 * CHUNK))

    def body(*refs, d_state_s, n_s, r_s, scaled_s, **slots):
        q_ref, k_ref, d_output_ref, inverse_ref, rows_ref, d_final_ref, after_ref, r_ref, d_initial_ref = refs
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        full, empty = slots["full"], slots["empty"]

        def compute(w):
            columns = _columns(layout, w)
            d_state_t, n_t, r_t = d_state_s.at[w], parts_of(n_s.at[w]), r_s.at[w]

            def step(i, d_state):
                slot, n = lax.rem(i, jnp.int32(stages)), layout.chunks - 1 - i
                query_t, key_t = (slots["keys_s"][x].at[slot] for x in (0, 1))
                d_output_t, rows_t = slots["value_s"].at[slot, w], slots["rows_s"].at[slot]
                inverse_t = tuple(transposed(part) for part in parts_of(slots["inverse_s"].at[slot]))
                plgpu.barrier_wait(full.at[slot])

                def main(scores, kept, d_pseudo, found, updated):
                    issue(scores, (key_t, transposed(query_t)))
                    issue(kept, (key_t, d_state_t))
                    score = plgpu.wgmma_accumulator_load(scores, wait_n=1)
                    score = score * (layout.scale * _pairs(rows_t, layout, swapped=True))
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # of the two of the chunk before, R's
                    r_t[...] = score.astype(_BF16)
                    plgpu.commit_smem()
                    from_after = plgpu.wgmma_accumulator_load(kept, wait_n=0)
                    scaled, after = load(d_output_t) * layout.scale, d_state
                    if layout.gated:
                        from_after = scale_rows(from_after, _exit(rows_t, layout))
                        scaled = scale_rows(scaled, _entry(rows_t, layout))
                        after = d_state * _whole(rows_t, layout)
                    total = Sum(d_pseudo, from_after, layout.interpret)
                    total.issue((r_t, d_output_t))
                    scaled_s.at[w][...] = scaled.astype(_BF16)
                    store_split(n_t, total.load(0))
                    plgpu.commit_smem()
                    before = Sum(updated, after, layout.interpret)
                    issue(found, *split_product(inverse_t, n_t))
                    before.issue((transposed(query_t), scaled_s.at[w]))
                    r = plgpu.wgmma_accumulator_load(found, wait_n=1)
                    r_t[...] = r.astype(_BF16)  # over the scores, which are spent
                    leaving = scale_rows(-r, along_rows(rows_t.at[0]))
                    if layout.gated:
                        leaving = scale_rows(leaving, _entry(rows_t, layout))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the copy of the state's gradient
                    store_split(n_t, leaving)
                    plgpu.commit_smem()
                    before.issue(*((transposed(key_t), x) for x in n_t))
                    plgpu.copy_smem_to_gmem(r_t, r_ref.at[b, pl.ds(n * CHUNK, CHUNK), h, columns])
                    d_new = before.load(0)
                    d_state_t[...] = d_new.astype(_BF16)
                    plgpu.commit_smem()
                    return d_new

                shapes = ((CHUNK, CHUNK), *((CHUNK, COLUMNS),) * 3, (layout.dim, COLUMNS))
                d_state = scoped(main, *shapes)

                @pl.when(n > 0)
                def _():
                    plgpu.copy_smem_to_gmem(d_state_t, after_ref.at[b, h, n - 1, :, columns])

                plgpu.barrier_arrive(empty.at[slot])
                return d_state

            d_final = plgpu.load(d_final_ref.at[b, h, :, columns], layout=plgpu.Layout.WGMMA, optimized=False)
            d_state_t[...] = d_final.astype(_BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(d_state_t, after_ref.at[b, h, layout.chunks - 1, :, columns])
            d_initial_ref.at[b, h, :, columns][...] = lax.fori_loop(0, layout.chunks, step, d_final)
            plgpu.wait_smem_to_gmem(0)

        tiles = _Tiles((q_ref, k_ref), d_output_ref, inverse_ref, rows_ref)
        _in_roles(layout, lambda: _copy_chunks(tiles, slots, layout, stages, backwards=True), compute)

    return _kernel(
        body,
        "reverse",
        layout,
        out_type=(after_shape, jax.ShapeDtypeStruct(d_output.shape, _BF16), state_shape),
        scratch_types={
            "d_state_s": tile(wg, layout.dim, COLUMNS),
            "n_s": tile(wg, 2, CHUNK, COLUMNS),
            "r_s": tile(wg, CHUNK, COLUMNS),
            "scaled_s": tile(wg, CHUNK, COLUMNS),
            **_slots(layout, stages, 2),
        },
        **_sweep_options(layout),
    )(q, k, d_output, inverse, rows, d_final)


# Kernel 4: the gradients of a chunk.

_SLICE = 64  # key columns of a block
# Numbers per token that a block adds up over its key columns: the gradient of beta; of the cumulative log-decay, in a
# part along rows and one along columns; what the tokens' decay to the end of the chunk contributes to its last entry;
# and, per key column instead of per token, the product of the state and its gradient.
_PARTS = 5


def _gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout: Layout):
    """dQ, dK, dV like the arguments, and the parts of the numbers per token, [slices, 1 or 5, batch, heads, time]."""
    slices, groups = layout.dim // _SLICE, layout.value_dim // COLUMNS
    own_groups = max(1, groups // slices)  # groups of value columns whose dV a block writes
    width = own_groups * COLUMNS
    parts = _PARTS if layout.gated else 1

    def body(
        q_ref, k_ref, v_ref, d_output_ref, pseudo_ref, r_ref, before_ref, after_ref, rows_ref,
        d_q_ref, d_k_ref, d_v_ref, parts_ref,
        *, q_s, k_s, d_output_s, n_s, r_s, before_s, after_s, rows_s, parts_s, wide, kept, narrow, values,
    ):  # fmt: skip
        b, h, n, piece = (lax.axis_index(name) for name in ("batch", "heads", "chunks", "slices"))
        tokens, key_columns = pl.ds(n * CHUNK, CHUNK), pl.ds(piece * _SLICE, _SLICE)
        own = piece * width < layout.value_dim
        # A block without value columns of its own loads the first; nothing that it makes of them is used.
        first = jnp.where(own, piece * width, 0)
        n_t = parts_of(n_s)
        for group in range(groups):
            columns = pl.ds(group * COLUMNS, COLUMNS)
            plgpu.copy_gmem_to_smem(d_output_ref.at[b, tokens, h, columns], d_output_s.at[group], wide)
            plgpu.copy_gmem_to_smem(r_ref.at[b, tokens, h, columns], r_s.at[group], wide)
            for part in range(2):
                plgpu.copy_gmem_to_smem(pseudo_ref.at[part, b, tokens, h, columns], n_t[part].at[group], wide)
            for ref, s in ((before_ref, before_s), (after_ref, after_s)):
                plgpu.copy_gmem_to_smem(ref.at[b, h, n, key_columns, columns], s.at[group], kept)
        plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h, key_columns], q_s, narrow)
        plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h, key_columns], k_s, narrow)
        for row in range(layout.rows):
            plgpu.copy_gmem_to_smem(rows_ref.at[row, b, h, tokens], rows_s.at[row], narrow)

        def over_values(a, *b):
            """`a b^T`, summed over the groups of value columns, and over split `b`."""
            return product(*((a.at[group], transposed(x.at[group])) for x in b for group in range(groups)))

        plgpu.barrier_wait(wide)
        d_scores = over_values(d_output_s, *n_t)
        d_m = -over_values(r_s, *n_t)
        plgpu.barrier_wait(kept)
        from_state = over_values(d_output_s, before_s)
        prediction = over_values(r_s, before_s)
        to_state = over_values(n_t[0], after_s)
        plgpu.commit_smem()
        # From here on these tiles but R's are spent. The values come to where dO was, group by group of columns.
        value_t = d_output_s.at[0]
        plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, h, pl.ds(first, COLUMNS)], value_t, values)
        plgpu.barrier_wait(narrow)
        beta = along_rows(rows_s.at[0])
        i, j = row_and_column((CHUNK, CHUNK))
        d_m = jnp.where(i > j, d_m, 0.0)
        pairs = _pairs(rows_s, layout)
        if layout.gated:
            # The scores and M of these key columns alone: what is made of them is summed over the blocks.
            scores = product((q_s, transposed(k_s))) * (layout.scale * pairs)
            m = scale_rows(product((k_s, transposed(k_s))) * pairs, beta)
            both = d_scores * scores + d_m * m
            entry, leave = _entry(rows_s, layout), _exit(rows_s, layout)
            leaving = leave * (to_state * load(k_s)).sum(axis=1)
            through = (from_state * load(q_s)).sum(axis=1) * layout.scale
            through -= beta * (prediction * load(k_s)).sum(axis=1)
            parts_s.at[1][...] = both.sum(axis=1) - leaving + entry * through
            parts_s.at[2][...] = -both.sum(axis=0)
            parts_s.at[3][...] = leaving
            states = (load(before_s.at[group]) * load(after_s.at[group]) for group in range(groups))
            parts_s.at[4][...] = sum(states).sum(axis=1)
            from_state, prediction = scale_rows(from_state, entry), scale_rows(prediction, entry)
            to_state = scale_rows(to_state, leave)
        d_t, y_t = (before_s.at[0], n_t[0].at[0]), (after_s.at[0], n_t[1].at[0])
        store_split(d_t, layout.scale * d_scores * pairs)
        y = d_m * pairs
        store_split(y_t, y)
        plgpu.commit_smem()
        d_q = layout.scale * from_state + product(*((x, k_s) for x in d_t))
        # A product of its own for X: beta may be zero, and the gradient of beta needs X itself.
        through_k = product(*((x, k_s) for x in y_t)) - prediction
        d_k = to_state + scale_rows(through_k, beta) + product((transposed(d_t[0]), q_s))
        plgpu.commit_smem()
        y_t[0][...] = scale_rows(y, beta).astype(_BF16)
        plgpu.commit_smem()
        d_k += product((transposed(y_t[0]), k_s))
        d_beta = (through_k * load(k_s)).sum(axis=1)
        plgpu.commit_smem()
        q_s[...], k_s[...] = d_q.astype(_BF16), d_k.astype(_BF16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s, d_q_ref.at[b, tokens, h, key_columns])
        plgpu.copy_smem_to_gmem(k_s, d_k_ref.at[b, tokens, h, key_columns])
        counts = jnp.where(own, 1.0, 0.0)
        for group in range(own_groups):
            columns = pl.ds(first + group * COLUMNS, COLUMNS)
            if group:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, h, columns], value_t, values)
            plgpu.barrier_wait(values)
            own_r = load(r_s.at[lax.div(first, COLUMNS) + group])
            d_beta += counts * (own_r * load(value_t)).sum(axis=1)
            value_t[...] = scale_rows(own_r, beta).astype(_BF16)
            plgpu.commit_smem()

            @pl.when(own)
            def _(columns=columns):
                plgpu.copy_smem_to_gmem(value_t, d_v_ref.at[b, tokens, h, columns])

        parts_s.at[0][...] = d_beta
        plgpu.commit_smem()
        for part in range(parts):
            plgpu.copy_smem_to_gmem(parts_s.at[part], parts_ref.at[piece, part, b, h, tokens])
        plgpu.wait_smem_to_gmem(0)

    shapes = [jax.ShapeDtypeStruct(x.shape, _BF16) for x in (q, k, v)]
    parts_shape = jax.ShapeDtypeStruct((slices, parts, layout.batch, layout.heads, layout.time), _F32)
    return _kernel(
        body,
        "gradients",
        layout,
        out_type=(*shapes, parts_shape),
        grid=(layout.batch, layout.heads, layout.chunks, slices),
        grid_names=("batch", "heads", "chunks", "slices"),
        scratch_types={
            "q_s": tile(CHUNK, _SLICE),
            "k_s": tile(CHUNK, _SLICE),
            "d_output_s": tile(groups, CHUNK, COLUMNS),
            "n_s": tile(2, groups, CHUNK, COLUMNS),
            "r_s": tile(groups, CHUNK, COLUMNS),
            "before_s": tile(groups, _SLICE, COLUMNS),
            "after_s": tile(groups, _SLICE, COLUMNS),
            "rows_s": plgpu.SMEM((layout.rows, CHUNK), _F32),
            "parts_s": plgpu.SMEM((parts, CHUNK), _F32),
            "wide": plgpu.Barrier(num_arrivals=4 * groups),
            "kept": plgpu.Barrier(num_arrivals=2 * groups),
            "narrow": plgpu.Barrier(num_arrivals=2 + layout.rows),
            "values": plgpu.Barrier(),
        },
    )(q, k, v, d_output, pseudo, r, before, after, rows)


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
    return _forward(q, k, v, beta, g, starts, state, scale, interpret)[0]


def _forward(q, k, v, beta, g, starts, state, scale, interpret):
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows, scale, interpret)
    inverse = invert(k, rows, layout)
    output, final = _sweep(q, k, v, inverse, rows, state.astype(_F32), layout)
    return (output, final.astype(state.dtype)), (q, k, v, beta, g, starts, state, inverse)


def _backward(scale, interpret, residuals, cotangents):
    q, k, v, beta, g, starts, state, inverse = residuals
    rows = _rows(beta, g, starts)
    layout = layout_of(q, v, rows, scale, interpret)
    d_output = cotangents[0].astype(_BF16)
    before, pseudo, _ = _sweep(None, k, v, inverse, rows, state.astype(_F32), layout)
    after, r, d_state = _reverse(q, k, d_output, inverse, rows, cotangents[1].astype(_F32), layout)
    d_q, d_k, d_v, parts = _gradients(q, k, v, d_output, pseudo, r, before, after, rows, layout)
    d_beta = jnp.swapaxes(parts[:, 0].sum(0), 1, 2).astype(beta.dtype)
    d_g = None if g is None else _d_log_decay(parts, rows, layout).astype(g.dtype)
    d_starts = None if starts is None else jnp.zeros_like(starts)
    return d_q, d_k, d_v, d_beta, d_g, d_starts, d_state.astype(state.dtype)


def _d_log_decay(parts: jax.Array, rows: jax.Array, layout: Layout) -> jax.Array:
    """The gradient of the log-decay, [batch, time, heads], from its parts."""

    def in_chunks(x):
        return x.reshape(*x.shape[:-1], layout.chunks, CHUNK)

    column, row, leaving = (in_chunks(parts[:, part].sum(0)) for part in (1, 2, 3))
    whole = jnp.exp(in_chunks(rows[1])[..., -1])
    if layout.packed:
        whole = jnp.where(in_chunks(rows[2])[..., -1] == 0, whole, 0)
    at_end = leaving.sum(-1) + whole * in_chunks(parts[:, 4]).sum((0, -1))
    d_log_decay = (column + row).at[..., -1].add(at_end)
    return jnp.swapaxes(d_chunk_log_decay(d_log_decay).reshape(rows.shape[1:]), 1, 2)


pallas_delta_rule.defvjp(_forward, _backward)
