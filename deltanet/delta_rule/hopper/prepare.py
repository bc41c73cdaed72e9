"""What is known of a chunk without the state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

from deltanet.delta_rule.hopper import decay
from deltanet.delta_rule.hopper.layout import BF16, CHUNK, F16, F32, SHARED_MEMORY, Layout, kernel
from models.kernels.mosaic_gpu import (
    Sum,
    along_rows,
    issue,
    load,
    product,
    row_and_column,
    scale_rows,
    scoped,
    store_split,
    tile,
    transposed,
)

_SLOTS = 2  # chunks of a warpgroup in shared memory
_WARPGROUPS = 3  # of a block; more would need more registers than there are


def _levels() -> np.ndarray:
    """For each size of blocks, 1 to 32, ones where joining the pairs of them adds entries, [6, chunk, chunk]."""
    i, j = np.indices((CHUNK, CHUNK))
    return np.stack([(i // size == j // size + 1) & (j // size % 2 == 0) for size in (1, 2, 4, 8, 16, 32)]).astype(F16)


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
    warpgroups = 1 if layout.interpret else min(_WARPGROUPS, (SHARED_MEMORY - levels.nbytes) // bytes_of_one)
    chains = layout.batch * layout.heads
    total = chains * layout.chunks
    blocks = min(layout.multiprocessors, -(-total // warpgroups))
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
            pairs = decay.pairs(rows_t, layout) if layout.gated else None
            p = layout.scale * (score * pairs if layout.gated else jnp.where(i >= j, score, 0.0))
            largest = jnp.maximum(jnp.abs(p).max(axis=1), 1e-30)
            p_t[...] = scale_rows(p, 1 / largest).astype(F16)  # the queries are spent
            m = scale_rows(m, -along_rows(rows_t.at[0]))
            m = (m * pairs if layout.gated else m).astype(F16)
            i, j = indices(1)
            leaves = decay.exit(rows_t, layout) if layout.gated else None
            x = jnp.where(i == j, 1.0, (m * half(levels_s.at[0])).astype(F32))
            keys = [half(k_t.at[:, part]) for part in key_parts]
            for part, key in zip(key_parts, keys, strict=True):
                key = key.astype(F32)
                key16_t.at[:, part][...] = (scale_rows(key, leaves) if layout.gated else key).astype(F16)
            # What the chunk before left is gone, and its tiles are free for the next.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.commit_smem()
            pl.when(item + stride < total)(lambda: fetch(item + stride, lax.rem(turn + 1, jnp.int32(_SLOTS))))
            if layout.interpret:  # it takes no operand from registers
                m_s.at[w][...] = m
                m = m_s.at[w]

            def join(level, x):
                """The blocks of X double."""
                x16 = x.astype(F16)
                x_t[...] = x16
                plgpu.commit_smem()
                # X has no entries outside the blocks that are done, so the mask may come last.
                y_t[...] = product((m, x_t)).astype(F16) * half(levels_s.at[level])
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
            x_t[...] = x.astype(F16)
            plgpu.commit_smem()

            def main(inside, *updates):
                issue(inside, (p_t, x_t))
                for group, update in enumerate(updates):
                    issue(update, (transposed(x_t), key16_t.at[:, pl.ds(group * columns, columns)]))
                reads = plgpu.wgmma_accumulator_load(inside, wait_n=len(updates))
                writes = [plgpu.wgmma_accumulator_load(x, wait_n=0) for x in updates]
                plgpu.commit_smem()
                reads_t[...] = scale_rows(reads, largest).astype(BF16)
                for group, write in enumerate(writes):
                    k_t.at[:, pl.ds(group * columns, columns)][...] = write.astype(BF16)

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
    shapes = [jax.ShapeDtypeStruct(k.shape, BF16), jax.ShapeDtypeStruct(l_shape, BF16)]
    shapes += [jax.ShapeDtypeStruct((2, *l_shape), BF16)] * keep
    square, keys = (warpgroups, CHUNK, CHUNK), (warpgroups, _SLOTS, CHUNK, layout.dim)
    queries = (warpgroups, _SLOTS, groups, CHUNK, 64)
    results = kernel(
        body,
        "prepare",
        layout,
        out_type=tuple(shapes),
        grid=(blocks,),
        grid_names=("blocks",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "q_s": plgpu.RefUnion(tile(*queries), tile(*queries, dtype=F16)),
            "k_s": plgpu.RefUnion(tile(*keys), tile(*keys, dtype=F16)),
            "x_s": plgpu.RefUnion(tile(*square), tile(*square, dtype=F16)),
            "y_s": plgpu.RefUnion(tile(*square), tile(*square, dtype=F16)),
            "rows_s": plgpu.SMEM((warpgroups, _SLOTS, layout.rows, CHUNK), F32),
            "levels_s": tile(*levels.shape, dtype=F16),
            "loaded": plgpu.Barrier(num_arrivals=1 + groups + layout.rows, num_barriers=warpgroups * _SLOTS),
            "ready": plgpu.Barrier(),
            **({"m_s": tile(*square, dtype=F16)} if layout.interpret else {}),
        },
    )(q, k, rows, levels)
    return (*results, None)[:3]
