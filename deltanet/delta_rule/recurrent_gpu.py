"""The recurrent form of whole sequences with the state on the chip, for NVIDIA Hopper GPUs: the paper's baseline.

Forward only, without decay. A block owns 64 value columns of a head: `S^T`, `[64, dim]`, stays in the registers of one
warpgroup from the first token to the last, and tokens come by asynchronous copies, a block of them ahead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from models.kernels import mosaic_gpu as mgpu
from models.kernels.mosaic_gpu import along_columns, along_rows, columns_of, rows_of

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 32  # tokens of a copy
COLUMNS = 64  # value columns of a block
_SLOTS = 2


def recurrent_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, scale: float, interpret: Any = False
) -> jax.Array:
    """The output of the delta rule, token by token, from a state of zeros, arXiv:2406.06484 section 2.2.

    Args:
      q: queries, [batch, time, heads, dim]; `time` a multiple of `BLOCK`, `dim` of 64 up to 256.
      k: keys, like `q`.
      v: values, [batch, time, heads, value_dim]; `value_dim` a multiple of `COLUMNS`.
      beta: step sizes, [batch, time, heads].
      scale: of the queries.
      interpret: a `plgpu.InterpretGPUParams` runs it without a GPU.

    Returns:
      The output, like `v`.
    """
    batch, time, heads, dim = q.shape
    beta = jnp.swapaxes(beta, 1, 2).astype(jnp.float32)
    blocks = time // BLOCK

    def body(q_ref, k_ref, v_ref, beta_ref, output_ref, q_s, k_s, v_s, beta_s, output_s, full):
        b, h = lax.axis_index("batch"), lax.axis_index("heads")
        columns = pl.ds(lax.axis_index("slices") * COLUMNS, COLUMNS)

        def fetch(block):
            slot, tokens = lax.rem(block, jnp.int32(_SLOTS)), pl.ds(block * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, h], q_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(k_ref.at[b, tokens, h], k_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(v_ref.at[b, tokens, h, columns], v_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(beta_ref.at[b, h, tokens], beta_s.at[slot], full.at[slot])

        def many(block, state):
            slot = lax.rem(block, jnp.int32(_SLOTS))
            pl.when(block + 1 < blocks)(lambda: fetch(block + 1))
            plgpu.barrier_wait(full.at[slot])

            def token(t, state):
                key = columns_of(along_columns(k_s.at[slot, t]).astype(jnp.float32), state.shape)
                error = along_rows(v_s.at[slot, t]).astype(jnp.float32) - (state * key).sum(axis=1)
                state = state + rows_of(beta_s[slot, t] * error, state.shape) * key
                query = columns_of(along_columns(q_s.at[slot, t]).astype(jnp.float32), state.shape)
                output_s.at[t][...] = (scale * (state * query).sum(axis=1)).astype(v.dtype)
                return state

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the output of the block before
            state = lax.fori_loop(0, BLOCK, token, state)
            plgpu.commit_smem()  # also: all warps are done with this slot
            plgpu.copy_smem_to_gmem(output_s, output_ref.at[b, pl.ds(block * BLOCK, BLOCK), h, columns])
            return state

        fetch(jnp.int32(0))
        nothing = plgpu.layout_cast(jnp.zeros((COLUMNS, dim), jnp.float32), plgpu.Layout.WGMMA)
        lax.fori_loop(0, blocks, many, nothing)
        plgpu.wait_smem_to_gmem(0)

    return mgpu.kernel(
        body,
        "delta_rule_recurrent",
        interpret,
        out_type=jax.ShapeDtypeStruct(v.shape, v.dtype),
        grid=(batch, heads, v.shape[-1] // COLUMNS),
        grid_names=("batch", "heads", "slices"),
        scratch_types=[
            plgpu.SMEM((_SLOTS, BLOCK, dim), q.dtype),
            plgpu.SMEM((_SLOTS, BLOCK, dim), k.dtype),
            plgpu.SMEM((_SLOTS, BLOCK, COLUMNS), v.dtype),
            plgpu.SMEM((_SLOTS, BLOCK), jnp.float32),
            plgpu.SMEM((BLOCK, COLUMNS), v.dtype),
            plgpu.Barrier(num_arrivals=4, num_barriers=_SLOTS),
        ],
    )(q, k, v, beta)
