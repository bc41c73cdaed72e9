"""`T S T^T` for many tiny matrices as Mosaic GPU kernels, forward and backward, in float32.

The matrices of a prompt have at most 12 rows, and the batch is the last axis. XLA reads both operands of a product once
for every row and column of the result, so it is bound by the cache. Here a thread holds a prompt's matrices in
registers: each is read once, and both products of a congruence share one kernel.

With C the symmetric part of the result's cotangent and S symmetric, the gradients are `T^T C T` and `2 C T S`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `serves` says no
    from jax.experimental.pallas import mosaic_gpu as plgpu

LANES = 128  # prompts of a block, each with a thread
LARGEST = 12  # three matrices of 12 rows fill a block's shared memory

Matrix = list[list[jax.Array]]  # entries, each [LANES]


def serves(t: jax.Array, s: jax.Array) -> bool:
    """Whether the kernels take these operands on the default device."""
    return (
        jax.__version_info__ >= (0, 11)
        and jax.default_backend() == "gpu"
        and t.dtype == s.dtype == jnp.float32
        and len(t) <= LARGEST
        and t.shape[-1] % LANES == 0
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def congruence(t: jax.Array, s: jax.Array, interpret: Any = False) -> jax.Array:
    """`T S T^T` per prompt for symmetric S.

    Args:
      t: [d, d, batch], float32, with d at most 12 and the batch a multiple of 128.
      s: as `t`, symmetric in its first two axes; its gradient is, too.
      interpret: False, or the parameters of Pallas' GPU interpreter.
    """
    return _call(_forward_kernel, (t, s), 1, interpret)[0]


def _forward(t: jax.Array, s: jax.Array, interpret: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return congruence(t, s, interpret), (t, s)


def _backward(
    interpret: Any, operands: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    d_s, d_t = _call(_backward_kernel, (cotangent, *operands), 2, interpret)
    return d_t, d_s


congruence.defvjp(_forward, _backward)


def _call(kernel: Callable[..., None], operands: tuple[jax.Array, ...], results: int, interpret: Any) -> list:
    """Runs `kernel(operand tiles)`; it leaves its results in the first `results` tiles."""
    d, batch = operands[0].shape[1:]
    tile = plgpu.SMEM((d, d, LANES), jnp.float32)

    def body(*refs: Any) -> None:
        count = len(operands)
        inputs, outputs, tiles, barrier = refs[:count], refs[count : -count - 1], refs[-count - 1 : -1], refs[-1]
        prompts = pl.ds(lax.axis_index("block") * LANES, LANES)
        for source, target in zip(inputs, tiles, strict=True):
            plgpu.copy_gmem_to_smem(source.at[:, :, prompts], target, barrier)
        plgpu.barrier_wait(barrier)
        kernel(*tiles)
        plgpu.commit_smem()
        for source, target in zip(tiles, outputs, strict=False):
            plgpu.copy_smem_to_gmem(source, target.at[:, :, prompts])
        plgpu.wait_smem_to_gmem(0)

    shape = jax.ShapeDtypeStruct((d, d, batch), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=[shape] * results,
        grid=(batch // LANES,),
        grid_names=("block",),
        scratch_types=[*[tile] * len(operands), plgpu.Barrier(num_arrivals=len(operands))],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*operands)


def _entry(tile: Any, i: int, j: int) -> jax.Array:
    return plgpu.load(tile.at[i, j], layout=plgpu.Layout.WG_STRIDED((LANES,), 1))


def _dot(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    products = [a * b for a, b in zip(left, right, strict=True)]
    return sum(products[1:], start=products[0])


def _symmetric(tile: Any) -> Matrix:
    """The symmetric part of a tile, in registers once."""
    d = tile.shape[0]
    rows: Matrix = [[_entry(tile, 0, 0)] * d for _ in range(d)]
    for i in range(d):
        for j in range(i + 1):
            rows[i][j] = rows[j][i] = 0.5 * (_entry(tile, i, j) + _entry(tile, j, i)) if i != j else _entry(tile, i, i)
    return rows


def _matrix(tile: Any) -> Matrix:
    d = tile.shape[0]
    return [[_entry(tile, i, j) for j in range(d)] for i in range(d)]


def _forward_kernel(t_tile: Any, s_tile: Any) -> None:
    """The result replaces T: its entry (i, j) is `<(T S)_i, T_j>`."""
    t, s = _matrix(t_tile), _symmetric(s_tile)
    for i, row in enumerate(t):
        ts = [_dot(row, column) for column in s]
        for j in range(i, len(t)):
            t_tile[i, j] = t_tile[j, i] = _dot(ts, t[j])


def _backward_kernel(c_tile: Any, t_tile: Any, s_tile: Any) -> None:
    """`T^T C T` replaces C, and `2 C T S` replaces T."""
    d = c_tile.shape[0]
    c = _symmetric(c_tile)
    ct = []  # the columns of C T
    for j in range(d):
        t_column = [_entry(t_tile, k, j) for k in range(d)]
        ct.append([_dot(row, t_column) for row in c])
    for i in range(d):
        t_column = [_entry(t_tile, k, i) for k in range(d)]
        for j in range(i, d):
            c_tile[i, j] = c_tile[j, i] = _dot(t_column, ct[j])
    for j in range(d):
        s_column = [2 * _entry(s_tile, k, j) for k in range(d)]
        for i in range(d):
            t_tile[i, j] = _dot([column[i] for column in ct], s_column)
