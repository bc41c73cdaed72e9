"""Sizes and static choices that the kernels share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

from models.kernels import mosaic_gpu as mgpu

CHUNK = 64  # also the smallest number of rows of the matrix unit
COLUMNS = 64  # value columns of a warpgroup, where there are heads enough
SHARED_MEMORY = 227 * 1024 - 1024  # bytes of a block, less the barriers
MULTIPROCESSORS = 132
F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16


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
        return 32 if 2 * self.batch * self.heads * self.value_dim // COLUMNS <= MULTIPROCESSORS else COLUMNS

    @property
    def warpgroups(self) -> int:
        """Warpgroups that compute in a block of a sweep; one with few heads, or where keys leave no room for two."""
        groups = self.value_dim // COLUMNS
        return 2 if groups % 2 == 0 and self.dim <= 128 and self.batch * self.heads * groups > MULTIPROCESSORS else 1

    @property
    def multiprocessors(self) -> int:
        """Of the GPU."""
        return MULTIPROCESSORS

    @property
    def slices(self) -> int:
        """Blocks that share the value columns of a head."""
        return self.value_dim // (self.columns * self.warpgroups)


def kernel(body: Callable, name: str, layout: Layout, **options: Any) -> Callable:
    """A kernel of this op; `options` are those of `plgpu.kernel`."""
    return mgpu.kernel(body, f"delta_rule_{name}", layout.interpret, **options)


def in_roles(warpgroups: int, copy: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """Splits the warpgroups of a block: the last copies, the others compute and get the registers that it leaves."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == warpgroups)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        copy()

    @pl.when(warpgroup < warpgroups)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)
