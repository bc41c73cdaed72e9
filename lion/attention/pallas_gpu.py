"""The full form as Mosaic GPU kernels for NVIDIA Hopper GPUs, forward and backward, in bfloat16.

    forward    a block for each head: Q, K and V on the chip, the scores and the mask tile by tile in registers
    backward   a block for each head: dQ, then dK and dV, and the gradients of the cumulative log-decays

Neither the scores nor the mask nor the row sums ever reach device memory, and nothing but the arguments is kept for the
backward. A warpgroup owns tiles of 64 rows. With one scan in the order of the tokens, only tiles on the diagonal need
an exponential for each entry: elsewhere the mask is a product of a row and a column, both at most 1 (DERIVATION.md,
section 7). With scans in other orders the mask is `exp(min(before_i - before_j, through_j - through_i))`.

All of a head has to fit on a chip: 256 tokens of head size 64. Longer sequences run in chunks: one scan with decays in
the kernels of `hopper.two_sided`, and others in these, with what lies between chunks in `lion.attention.two_sided`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from lion.attention.decay import Cumulative, one_sided_min
from lion.attention.hopper.tiles import (
    BF16,
    COPY,
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
    mean,
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
    along_rows,
    product,
    rows_of,
    scale_rows,
    tile,
    transposed,
)

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

_WARPGROUPS = 2


def refusal(dtype: jnp.dtype, time: int, dim: int, value_dim: int) -> str | None:
    """Why the kernels do not serve these arguments here, or None; `time` is that of a chunk."""
    if reason := mgpu.refusal():
        return reason
    if dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16, not {dtype}"
    if max(dim, value_dim) > SIZE:
        return f"the GPU kernels take head sizes up to {SIZE}, not {max(dim, value_dim)}"
    if time > TIME:
        return f"the GPU kernels hold up to {TIME} tokens on the chip, not {time}"
    return None


@compiled_once
def _forward_kernel(q: jax.Array, k: jax.Array, v: jax.Array, rows: jax.Array | None, layout: Layout) -> Any:
    """The normalised output, like `v`; or numerators in float32 and row sums `[batch, heads, whole tiles]`."""
    whole = layout.tiles * TILE
    decayed = rows is not None

    def body(*refs: Any, q_s, k_s, v_s, rows_s, sums_s, parts_s, loaded, left_s) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        outputs = refs[3 + decayed :]
        vectors = [(of_head(refs[3]), rows_s)] if decayed else []
        copy_in(tuple(zip(refs[:3], (q_s, k_s, v_s), strict=True)), vectors, layout, loaded)

        def run(i: Any, warpgroup: Any) -> None:
            query_t = q_s.at[i]

            def main(accumulator: Any) -> tuple[jax.Array, jax.Array]:
                row_sum = None
                for offset in range(layout.tiles):
                    j = layout.other(i, offset)
                    scores = product((query_t, transposed(k_s.at[j])))
                    if decayed:
                        scores = scores * mean(masks_between(rows_s, i, j, layout, diagonal=not offset))
                    # What the product sums, so that a query that sees itself alone gives its value: outside of this
                    # kernel a gradient is the difference of the two. Inside, neither is rounded.
                    summed = scores if layout.normalize else scores.astype(BF16).astype(F32)
                    row_sum = plus(row_sum, summed.sum(axis=1))
                    accumulate(accumulator, scores, v_s.at[j], left_s, warpgroup)
                return accumulator[...], row_sum

            numerator, row_sum = pl.run_scoped(main, plgpu.ACC(SQUARE, F32))
            if layout.normalize:
                query_t[...] = scale_rows(numerator, inverse(row_sum)).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query_t, outputs[0].at[b, tokens_of(i), h])
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                parts_s.at[warpgroup][...] = numerator
                sums_s.at[tokens_of(i)][...] = row_sum
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(parts_s.at[warpgroup], outputs[0].at[b, tokens_of(i), h])
                plgpu.copy_smem_to_gmem(sums_s.at[tokens_of(i)], outputs[1].at[b, h, tokens_of(i)])

        own_tiles(layout, run)
        plgpu.wait_smem_to_gmem(0)

    if layout.normalize:
        out_type = jax.ShapeDtypeStruct(v.shape, BF16)
    else:
        sums = jax.ShapeDtypeStruct((layout.batch, layout.heads, whole), F32)
        out_type = (jax.ShapeDtypeStruct(v.shape, F32), sums)
    scratch = {
        **shared_tiles(layout, "q_s", "k_s", "v_s"),
        "rows_s": plgpu.SMEM((layout.rows if decayed else 1, whole), F32),
        "sums_s": plgpu.SMEM((whole,), F32),
        "parts_s": None if layout.normalize else tile(layout.warpgroups, *SQUARE, dtype=F32),
        "loaded": plgpu.Barrier(num_arrivals=3 * layout.tiles + decayed),
    }
    return call(body, "forward", layout, layout.grid, out_type, scratch, q, k, v, *([rows] if decayed else []))


@compiled_once
def _backward_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array | None,
    d_output: jax.Array,
    d_row_sum: jax.Array | None,
    layout: Layout,
) -> Any:
    """dQ, dK and dV like the arguments, and with decays those of before and through, `[scans * 2, batch, heads, time]`.

    `d_output` is the gradient of the normalised output, or that of the numerators beside `d_row_sum`, that of the row
    sums, `[batch, heads, whole tiles]`.
    """
    whole = layout.tiles * TILE
    decayed = rows is not None
    operands = [q, k, v, d_output, *([rows] if decayed else []), *([] if layout.normalize else [d_row_sum])]

    def body(*refs: Any, q_s, k_s, v_s, d_s, rows_s, queries_s, parts_s, out_s, loaded, met, left_s) -> None:
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        outputs = refs[len(operands) :]
        scale_s, shift_s = queries_s.at[0], queries_s.at[1]
        vectors = [(of_head(refs[4]), rows_s)] if decayed else []
        if not layout.normalize:
            vectors.append((refs[len(operands) - 1].at[b, h], shift_s))
        copy_in(tuple(zip(refs[:4], (q_s, k_s, v_s, d_s), strict=True)), vectors, layout, loaded)

        def store(x: jax.Array, target: Any, index: Any, warpgroup: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_s.at[warpgroup][...] = x.astype(BF16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_s.at[warpgroup], target.at[b, tokens_of(index), h])

        def queries(i: Any, warpgroup: Any) -> None:
            """A tile of dQ; for all of the head, `dP = scale (dO V^T + shift)`."""
            tokens = tokens_of(i)
            query_t, d_t = q_s.at[i], d_s.at[i]
            d_scores, row_sum, inner = [], None, None
            for offset in range(layout.tiles):
                j = layout.other(i, offset)
                d_scores.append(product((d_t, transposed(v_s.at[j]))))
                if layout.normalize:
                    scores = product((query_t, transposed(k_s.at[j])))
                    if decayed:
                        scores = scores * mean(masks_between(rows_s, i, j, layout, diagonal=not offset))
                    row_sum = plus(row_sum, scores.sum(axis=1))
                    inner = plus(inner, (scores * d_scores[-1]).sum(axis=1))
            if layout.normalize:
                scale = inverse(row_sum)
                shift = -inner * scale
                scale_s.at[tokens][...] = scale
                shift_s.at[tokens][...] = shift
            else:
                shift = along_rows(shift_s.at[tokens])

            def main(accumulator: Any) -> tuple[jax.Array, list]:
                sums = [[None, None] for _ in range(layout.scans)]
                for offset in range(layout.tiles):
                    j, diagonal = layout.other(i, offset), not offset
                    d_masked = d_scores[offset] + rows_of(shift, SQUARE)
                    masks = masks_between(rows_s, i, j, layout, diagonal=diagonal) if decayed else []
                    d_score = d_masked * mean(masks) if decayed else d_masked
                    accumulate(accumulator, d_score, k_s.at[j], left_s, warpgroup)
                    if decayed:
                        scores = product((query_t, transposed(k_s.at[j])))
                    for n, mask in enumerate(masks):
                        entry = d_score if layout.scans == 1 else d_masked * mask * (1 / layout.scans)
                        sides = by_side(entry * scores, rows_s, n, i, j, layout, diagonal=diagonal, keys_in_rows=False)
                        sums[n] = [plus(x, y) for x, y in zip(sums[n], sides, strict=True)]
                return accumulator[...], sums

            d_query, sums = pl.run_scoped(main, plgpu.ACC(SQUARE, F32))
            if layout.normalize:
                d_query = scale_rows(d_query, scale)
                sums = [[x * scale for x in sides] for sides in sums]
            store(d_query, outputs[0], i, warpgroup)
            for n, (below, above) in enumerate(sums):
                parts_s.at[2 * n, tokens][...] = below
                parts_s.at[2 * n + 1, tokens][...] = -above

        def keys(j: Any, warpgroup: Any) -> None:
            """A tile of dK and dV, with keys in the rows of all matrices."""
            tokens = tokens_of(j)
            key_t, value_t = k_s.at[j], v_s.at[j]

            def main(d_key: Any, d_value: Any) -> tuple[jax.Array, jax.Array, list]:
                sums = [[None, None] for _ in range(layout.scans)]
                for offset in range(layout.tiles):
                    i, diagonal = layout.other(j, offset), not offset
                    others = tokens_of(i)
                    scores = product((key_t, transposed(q_s.at[i])))
                    masks = masks_between(rows_s, i, j, layout, diagonal=diagonal, keys_in_rows=True) if decayed else []
                    factor = mean(masks) if decayed else None
                    if layout.normalize:
                        scale = by_columns(scale_s.at[others])
                        factor = factor * scale if decayed else scale
                    masked = scores if factor is None else scores * factor
                    accumulate(d_value, masked, d_s.at[i], left_s, warpgroup)
                    d_masked = product((value_t, transposed(d_s.at[i])))
                    d_masked = d_masked + by_columns(shift_s.at[others])
                    d_score = d_masked if factor is None else d_masked * factor
                    accumulate(d_key, d_score, q_s.at[i], left_s, warpgroup)
                    for n, mask in enumerate(masks):
                        entry = d_score
                        if layout.scans > 1:
                            entry = d_masked * mask * (1 / layout.scans)
                            entry = entry * scale if layout.normalize else entry
                        sides = by_side(entry * scores, rows_s, n, i, j, layout, diagonal=diagonal, keys_in_rows=True)
                        sums[n] = [plus(x, y) for x, y in zip(sums[n], sides, strict=True)]
                return d_key[...], d_value[...], sums

            d_key, d_value, sums = pl.run_scoped(main, plgpu.ACC(SQUARE, F32), plgpu.ACC(SQUARE, F32))
            store(d_key, outputs[1], j, warpgroup)
            store(d_value, outputs[2], j, warpgroup)
            for n, (below, above) in enumerate(sums):
                for part, x in ((2 * n, -below), (2 * n + 1, above)):
                    ref = parts_s.at[part, tokens]
                    ref[...] = along_rows(ref) + x
            if decayed:
                plgpu.commit_smem()
            for part in range(2 * layout.scans if decayed else 0):
                plgpu.copy_smem_to_gmem(parts_s.at[part, tokens], outputs[3].at[part, b, h, tokens])

        own_tiles(layout, queries)
        plgpu.barrier_arrive(met)
        plgpu.barrier_wait(met)
        own_tiles(layout, keys)
        plgpu.wait_smem_to_gmem(0)

    out_type = [jax.ShapeDtypeStruct(x.shape, BF16) for x in (q, k, v)]
    if decayed:
        out_type.append(jax.ShapeDtypeStruct((2 * layout.scans, layout.batch, layout.heads, whole), F32))
    scratch = {
        **shared_tiles(layout, "q_s", "k_s", "v_s", "d_s"),
        "rows_s": plgpu.SMEM((layout.rows if decayed else 1, whole), F32),
        "queries_s": plgpu.SMEM((2, whole), F32),
        "parts_s": plgpu.SMEM((2 * layout.scans if decayed else 1, whole), F32),
        "out_s": tile(layout.warpgroups, *SQUARE),
        "loaded": plgpu.Barrier(num_arrivals=4 * layout.tiles + len(operands) - 4),
        "met": plgpu.Barrier(num_arrivals=layout.warpgroups),
    }
    return call(body, "backward", layout, layout.grid, tuple(out_type), scratch, *operands)


# The differentiable function.


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scans: Sequence[Cumulative],
    positions: Sequence[np.ndarray],
    direction: str,
    *,
    normalize: bool,
    interpret: Any = False,
) -> Any:
    """The full form on a Hopper GPU.

    Args:
      q, k, v: `[batch, time, heads, size]`, bfloat16; at most `TIME` tokens and sizes up to `SIZE`.
      scans: cumulative log-decays of each scan, `[batch or 1, heads or 1, time, 1]`, in the order of the tokens; none
        for no decay.
      positions: the place of each token in each scan, `[time]`; without decay, those of one scan.
      direction: "both", "forward" or "backward".
      normalize: whether to return the normalised output.
      interpret: a `plgpu.InterpretGPUParams`, to run without a GPU.

    Returns:
      The normalised output, like `v`; or numerators like `v` and row sums `[batch, heads, time]`, both float32. Where a
      row sum is zero, as that of a padded token, the output is zero.
    """
    time, heads, value_dim = *q.shape[1:3], v.shape[-1]
    before, through = one_sided_min(scans, positions, direction, heads)
    in_order = len(positions) == 1 and direction == "both" and np.array_equal(positions[0], np.arange(time))
    places = np.zeros((0, time), int) if before is None else np.stack(positions)
    q, k, v = padded(q, k, v)
    fill = (0, -time % COPY)
    if before is not None:
        before, through = (jnp.pad(x, [(0, 0)] * 3 + [fill], mode="edge") for x in (before, through))
    places = np.pad(places, ((0, 0), fill), constant_values=time)
    static = Static(tuple(map(tuple, places.tolist())), in_order and before is not None, normalize, interpret)
    result = _attention(q, k, v, before, through, static)
    if normalize:
        return result[:, :time, :, :value_dim]
    return result[0][:, :time, :, :value_dim], result[1][:, :, :time]


class Static(NamedTuple):
    """What does not change with the data."""

    positions: tuple[tuple[int, ...], ...]
    in_order: bool
    normalize: bool
    interpret: Any


def _layout(q: jax.Array, before: jax.Array | None, static: Static) -> Layout:
    batch, time, heads, _ = q.shape
    scans = 0 if before is None else before.shape[2]
    shared = before is not None and before.shape[0] == 1 and batch > 1
    return Layout(batch, time, heads, scans, static.in_order, shared, static.normalize, _WARPGROUPS, static.interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, before: jax.Array | None, through: jax.Array | None, static: Static
) -> Any:
    """`attention` for whole groups of 8 tokens; before and through are `[batch or 1, heads, scans, time]`, float32."""
    return _forward(q, k, v, before, through, static)[0]


def _forward(q, k, v, before, through, static):
    layout = _layout(q, before, static)
    rows = None if before is None else numbers_of(before, through, np.array(static.positions), layout)
    return _forward_kernel(q, k, v, rows, layout=layout), (q, k, v, before, through)


def _backward(static, residuals, cotangents):
    q, k, v, before, through = residuals
    layout = _layout(q, before, static)
    rows = None if before is None else numbers_of(before, through, np.array(static.positions), layout)
    d_output, d_row_sum = (cotangents, None) if static.normalize else cotangents
    d_q, d_k, d_v, *parts = _backward_kernel(q, k, v, rows, d_output.astype(BF16), d_row_sum, layout=layout)
    if before is None:
        return d_q, d_k, d_v, None, None
    parts = parts[0].reshape(layout.scans, 2, layout.batch, layout.heads, -1)[..., : layout.time]
    d_before, d_through = jnp.moveaxis(parts, (1, 0), (0, 3))
    if layout.shared:
        d_before, d_through = (x.sum(0, keepdims=True) for x in (d_before, d_through))
    return d_q, d_k, d_v, d_before, d_through


_attention.defvjp(_forward, _backward)
