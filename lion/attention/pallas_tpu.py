"""The full form as Pallas kernels for TPUs, forward and backward; scores and mask stay in VMEM.

A step of the grid holds one head. The mask is `exp(min(before_i - before_j, through_j - through_i))` (DERIVATION.md,
section 7); the numbers per token come along rows and along columns, because a TPU kernel does not turn one into the
other cheaply. Symbols as in DERIVATION.md, section 2.
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

TIME = 512
_LANES = 128
_F32 = jnp.float32


def refusal(dtype: jnp.dtype, time: int, dim: int, value_dim: int) -> str | None:
    """Why the kernels do not serve these arguments here, or None; `time` is that of a chunk."""
    platform = jax.devices()[0].platform
    if platform != "tpu":
        return f"it needs a TPU; this is {platform}"
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, not {dtype}"
    if max(dim, value_dim) > 256:
        return f"the TPU kernels take head sizes up to 256, not {max(dim, value_dim)}"
    if time > TIME:
        return f"the TPU kernels hold up to {TIME} tokens in VMEM, not {time}"
    return None


class Static(NamedTuple):
    """What does not change with the data."""

    positions: tuple[tuple[int, ...], ...]
    decayed: bool
    normalize: bool
    interpret: Any


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product of matrices; float32 only where both are."""
    contract = {"id,jd->ij": ((1,), (1,)), "ij,jd->id": ((1,), (0,)), "ij,id->jd": ((0,), (0,))}[subscripts]
    precision = lax.Precision.HIGHEST if x.dtype == _F32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, (contract, ((), ())), precision=precision, preferred_element_type=_F32)


def _masks(rows: Any, columns: Any, scans: int) -> list[jax.Array]:
    """The masks of the scans; `rows` are `[scans * 3, time]` and lie along keys, `columns` `[time, scans * 3]`."""

    def difference(place: int) -> jax.Array:
        return columns[0, :, place : place + 1] - rows[0, place : place + 1, :]

    return [jnp.exp(jnp.minimum(difference(3 * n), -difference(3 * n + 1))) for n in range(scans)]


def _forward_kernel(*refs: Any, scans: int, normalize: bool) -> None:
    q_ref, k_ref, v_ref, *vectors = refs[: 3 + 2 * (scans > 0)]
    outputs = refs[3 + len(vectors) :]
    masked = _dot("id,jd->ij", q_ref[0], k_ref[0])
    if scans:
        masked *= sum(_masks(*vectors, scans)) / scans
    value = v_ref[0]
    rounded = masked.astype(value.dtype)
    numerator = _dot("ij,jd->id", rounded, value)
    row_sum = rounded.astype(_F32).sum(-1, keepdims=True)
    if normalize:
        outputs[0][0] = (numerator / jnp.where(row_sum == 0, 1, row_sum)).astype(outputs[0].dtype)
    else:
        outputs[0][0], outputs[1][0] = numerator, row_sum


def _backward_kernel(*refs: Any, scans: int, normalize: bool) -> None:
    inputs = 4 + 2 * (scans > 0) + (not normalize)
    q, k, v, d_output = (ref[0] for ref in refs[:4])
    vectors, outputs = refs[4 : 4 + 2 * (scans > 0)], refs[inputs:]
    scores = _dot("id,jd->ij", q, k)
    masks = _masks(*vectors, scans) if scans else []
    mean = sum(masks) / scans if scans else 1
    masked = scores * mean
    d_masked = _dot("id,jd->ij", d_output, v)
    if normalize:
        row_sum = masked.sum(-1, keepdims=True)
        scale = 1 / jnp.where(row_sum == 0, 1, row_sum)
        d_masked = (d_masked - (masked * d_masked).sum(-1, keepdims=True) * scale) * scale
        masked = masked * scale
    else:
        d_masked = d_masked + refs[inputs - 1][0]
    outputs[2][0] = _dot("ij,id->jd", masked.astype(q.dtype), d_output).astype(q.dtype)
    d_scores = (d_masked * mean).astype(q.dtype)
    outputs[0][0] = _dot("ij,jd->id", d_scores, k).astype(q.dtype)
    outputs[1][0] = _dot("ij,id->jd", d_scores, q).astype(q.dtype)
    for n, mask in enumerate(masks):
        entry = d_masked * scores * mask / scans
        rows, columns = vectors
        place = 3 * n + 2
        apart = columns[0, :, place : place + 1] - rows[0, place : place + 1, :]
        below, above = jnp.where(apart > 0, entry, 0), jnp.where(apart < 0, entry, 0)
        outputs[3][0, 2 * n : 2 * n + 1, :] = -below.sum(0, keepdims=True)
        outputs[3][0, 2 * n + 1 : 2 * n + 2, :] = above.sum(0, keepdims=True)
        outputs[4][0, :, 2 * n : 2 * n + 1] = below.sum(1, keepdims=True)
        outputs[4][0, :, 2 * n + 1 : 2 * n + 2] = -above.sum(1, keepdims=True)


def _call(kernel: Any, static: Static, operands: Sequence[jax.Array], out_shapes: Sequence[Any], scans: int) -> Any:
    """Runs a kernel with one head, the leading axis, in each step of the grid; a single one is shared by all."""

    def block(x: Any) -> pl.BlockSpec:
        alone = x.shape[0] == 1
        return pl.BlockSpec((1, *x.shape[1:]), lambda head: (0 if alone else head, 0, 0))

    return pl.pallas_call(
        partial(kernel, scans=scans, normalize=static.normalize),
        grid=(operands[0].shape[0],),
        in_specs=[block(x) for x in operands],
        out_specs=tuple(block(x) for x in out_shapes),
        out_shape=tuple(out_shapes),
        interpret=static.interpret,
    )(*operands)


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
    """The full form on a TPU; arguments and results as in `lion.attention.pallas_gpu.attention`, also in float32."""
    (batch, time, heads, _), value_dim = q.shape, v.shape[-1]
    before, through = one_sided_min(scans, positions, direction, heads)
    fill = -time % _LANES
    if before is not None:
        before, through = (jnp.pad(x, [(0, 0)] * 3 + [(0, fill)], mode="edge") for x in (before, through))
        before, through = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (before, through))
    places = np.pad(np.stack(positions), ((0, 0), (0, fill)), constant_values=time)
    static = Static(tuple(map(tuple, places.tolist())), before is not None, normalize, interpret)

    def head_first(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, fill), (0, 0), (0, -x.shape[-1] % 8)])
        return jnp.moveaxis(x, 2, 1).reshape(batch * heads, time + fill, -1)

    def back(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, heads, time + fill, -1), 1, 2)[:, :time]

    if before is not None:
        before, through = (x.reshape(batch * heads, *x.shape[2:]) for x in (before, through))
    result = _attention(*(head_first(x) for x in (q, k, v)), before, through, static)
    if normalize:
        return back(result)[..., :value_dim]
    return back(result[0])[..., :value_dim], jnp.swapaxes(back(result[1])[..., 0], 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, before: jax.Array | None, through: jax.Array | None, static: Static
) -> Any:
    """`attention` with heads in the leading axis: `[heads, time, size]`; before and through `[heads, scans, time]`."""
    return _forward(q, k, v, before, through, static)[0]


def _vectors(before: jax.Array | None, through: jax.Array | None, static: Static) -> list[jax.Array]:
    """Before, through and position of each scan, along rows and along columns."""
    if before is None:
        return []
    position = jnp.broadcast_to(jnp.array(static.positions, _F32), before.shape)
    rows = jnp.stack([before, through, position], 2).reshape(before.shape[0], -1, before.shape[-1])
    return [rows, jnp.swapaxes(rows, 1, 2)]


def _forward(q, k, v, before, through, static):
    scans = 0 if before is None else before.shape[1]
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype if static.normalize else _F32)]
    if not static.normalize:
        shapes.append(jax.ShapeDtypeStruct((*v.shape[:2], 1), _F32))
    result = _call(_forward_kernel, static, (q, k, v, *_vectors(before, through, static)), shapes, scans)
    return result[0] if static.normalize else result, (q, k, v, before, through)


def _backward(static, residuals, cotangents):
    q, k, v, before, through = residuals
    scans = 0 if before is None else before.shape[1]
    d_output, *d_row_sum = (cotangents,) if static.normalize else cotangents
    operands = (q, k, v, d_output.astype(q.dtype), *_vectors(before, through, static), *d_row_sum)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    if scans:
        shapes += [
            jax.ShapeDtypeStruct((q.shape[0], *s), _F32) for s in ((2 * scans, q.shape[1]), (q.shape[1], 2 * scans))
        ]
    d_q, d_k, d_v, *parts = _call(_backward_kernel, static, operands, shapes, scans)
    if not scans:
        return d_q, d_k, d_v, None, None
    total = (parts[0] + jnp.swapaxes(parts[1], 1, 2)).reshape(-1, scans, 2, q.shape[1])
    return d_q, d_k, d_v, total[:, :, 0], total[:, :, 1]


_attention.defvjp(_forward, _backward)
