"""Tiles, vectors and products of Mosaic GPU kernels for NVIDIA Hopper GPUs, with Lane semantics.

Barriers are the kernel's to place. A warpgroup's four warps meet in `commit_smem` and in `wait_smem_to_gmem`; between
the last wait for a product and a store over one of its operands there must be such a meeting, because another warp may
still be reading.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface; the ops' refusals say so
    from jax.experimental.pallas import mosaic_gpu as plgpu


def refusal() -> str | None:
    """Why kernels cannot run with this JAX on this machine, or None."""
    if jax.__version_info__ < (0, 11):
        return f"the GPU kernels need JAX 0.11; this is {jax.__version__}"
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU of the Hopper generation; this is {device.platform}"
    if getattr(device, "compute_capability", "") != "9.0":
        return f"it needs an NVIDIA GPU of the Hopper generation; this is {device.device_kind}"
    return None


def tile(*shape: int, dtype: jnp.dtype = jnp.bfloat16, line: int = 128) -> Any:
    """A tile in shared memory that the matrix unit reads: lines of 128 or 64 bytes, swizzled; one for both operands."""
    numbers = line // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, numbers)), plgpu.SwizzleTransform(line)))


def along_rows(ref: Any) -> jax.Array:
    """A vector `[n]` in registers, entry i with row i of a matrix."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1))


def along_columns(ref: Any) -> jax.Array:
    """A vector `[n]` in registers, entry j with column j of a matrix."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0))


def rows_of(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The matrix whose row i is entry i of a vector that lies along rows."""
    return lax.broadcast_in_dim(vector, shape, [0])


def columns_of(vector: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The matrix whose column j is entry j of a vector that lies along columns."""
    return lax.broadcast_in_dim(vector, shape, [1])


def transposed(ref: Any) -> Any:
    """A tile read the other way."""
    return ref.transpose((1, 0))


def product(*pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of products of tiles in shared memory, float32."""
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])

    def body(accumulator: Any) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def products(*pairs: tuple[Any, Any], meanwhile: Callable[[], Any] = lambda: None) -> tuple[list[jax.Array], Any]:
    """Products of tiles in shared memory, float32, and what `meanwhile` computes while they run."""

    def body(*accumulators: Any) -> tuple[list[jax.Array], Any]:
        for accumulator, pair in zip(accumulators, pairs, strict=True):
            issue(accumulator, pair)
        other = meanwhile()
        waits = reversed(range(len(pairs)))
        return [plgpu.wgmma_accumulator_load(x, wait_n=n) for x, n in zip(accumulators, waits, strict=True)], other

    return scoped(body, *((a.shape[0], b.shape[1]) for a, b in pairs))


def kernel(body: Callable, name: str, interpret: Any, **options: Any) -> Callable:
    """A kernel with Lane semantics: the search for layouts of the other semantics does not end on large kernels."""
    body.__name__ = name
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=True, unsafe_no_auto_barriers=True
    )
    return plgpu.kernel(body, compiler_params=parameters, interpret=interpret or None, **options)


def load(ref: Any) -> jax.Array:
    """A tile in registers, float32."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(jnp.float32)


def scale_rows(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Row i of a matrix times entry i of a vector that lies along rows."""
    return x * rows_of(vector, x.shape)


def row_and_column(shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The indices of a matrix's entries, in registers."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))


def scoped(body: Callable, *shapes: tuple[int, int]) -> Any:
    """Runs `body` with accumulators of these shapes. Products run while it goes on, until it waits for them."""
    return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def issue(accumulator: Any, *pairs: tuple[Any, Any]) -> None:
    """Starts to add products of tiles in shared memory to an accumulator."""
    for a, b in pairs:
        plgpu.wgmma(accumulator, a, b)


class Sum:
    """An accumulator that starts at a value."""

    def __init__(self, accumulator: Any, value: jax.Array, interpret: Any) -> None:
        self._accumulator, self._value = accumulator, value
        # The interpreter has no initial values of accumulators.
        self._later = bool(interpret)
        if not self._later:
            accumulator[...] = value

    def issue(self, *pairs: tuple[Any, Any]) -> None:
        """Starts to add products."""
        issue(self._accumulator, *pairs)

    def load(self, pending: int) -> jax.Array:
        """The sum, once only so many products, the last ones issued, may still run."""
        total = plgpu.wgmma_accumulator_load(self._accumulator, wait_n=pending)
        return self._value + total if self._later else total


def parts_of(refs: Any) -> tuple[Any, Any]:
    """Both tiles of a split matrix."""
    return refs.at[0], refs.at[1]


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Float32 `x` as the sum of two bfloat16 arrays: `x` rounded (ties away from zero), and what that lost, rounded."""
    # Rounded as an integer: to convert there and back, the compiler takes one number at a time, and slowly.
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    high = jax.lax.bitcast_convert_type((bits + jnp.int32(0x8000)) & jnp.int32(-0x10000), jnp.float32)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def store_split(refs: Sequence[Any], x: jax.Array) -> None:
    """Writes `x` as the sum of two bfloat16 tiles, `refs[0] + refs[1]`."""
    refs[0][...], refs[1][...] = split(x)
