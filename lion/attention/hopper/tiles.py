"""What the kernels share: sizes, the mask between tiles of tokens, and who works on which tile."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from models.kernels import mosaic_gpu as mgpu
from models.kernels.mosaic_gpu import along_columns, along_rows, columns_of, row_and_column, rows_of, tile

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `pallas_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

TIME = 256
SIZE = 64
TILE = 64  # the smallest number of rows of the matrix unit
COPY = 8  # rows of device memory that a copy moves at least
F32, BF16 = jnp.float32, jnp.bfloat16
SQUARE = (TILE, TILE)

# A function of its own in the program: the layers of a model share one kernel, which takes seconds to lower.
compiled_once = partial(jax.jit, static_argnames="layout")


class Layout(NamedTuple):
    """Sizes and static choices of a problem."""

    batch: int
    time: int
    heads: int
    scans: int
    in_order: bool  # one scan in the order of the tokens, in both directions
    shared: bool  # one decay for all of the batch
    normalize: bool
    most_warpgroups: int  # that share the tiles
    interpret: Any

    @property
    def tiles(self) -> int:
        return -(-self.time // TILE)

    @property
    def warpgroups(self) -> int:
        return min(self.most_warpgroups, self.tiles)

    @property
    def grid(self) -> dict[str, int]:
        """A block for each head."""
        return {"batch": self.batch, "heads": self.heads}

    @property
    def rows(self) -> int:
        """Numbers per token; see `numbers_of`."""
        return (6 if self.tiles > 1 else 2) if self.in_order else 3 * self.scans

    def other(self, own: Any, offset: int) -> Any:
        """The tile that many places after one's own, in a ring."""
        return lax.rem(own + offset, jnp.int32(self.tiles))


def padded(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays `[batch, time, heads, size]` with zeros up to whole copies of tokens, and up to `SIZE`."""
    return [jnp.pad(x, [(0, 0), (0, -x.shape[1] % COPY), (0, 0), (0, SIZE - x.shape[-1])]) for x in arrays]


def tokens_of(index: Any) -> Any:
    """Those of a tile."""
    return pl.ds(index * TILE, TILE)


def shared_tiles(layout: Layout, *names: str) -> dict[str, Any]:
    """Shared memory for arrays of a head, `[tiles, TILE, SIZE]` each."""
    return {name: tile(layout.tiles, TILE, SIZE) for name in names}


def by_columns(vector: Any) -> jax.Array:
    """The matrix all of whose rows are a vector in shared memory."""
    return columns_of(along_columns(vector), SQUARE)


# The mask. `rows` is a reference to the numbers per token, [rows, time] in shared memory.


def numbers_of(before: jax.Array, through: jax.Array, positions: np.ndarray, layout: Layout) -> jax.Array:
    """The numbers per token, `[batch or 1, heads, rows, whole tiles]`.

    Before and through of each scan, in powers of 2; then, for a scan in order, the factors of the mask between tiles,
    where there are several: of queries and keys below the diagonal and above it; for others, the positions.
    """
    pad = [(0, 0)] * 3 + [(0, layout.tiles * TILE - layout.time)]
    before, through = (jnp.pad(x * math.log2(math.e), pad, mode="edge") for x in (before, through))
    scans = [x[:, :, n] for n in range(layout.scans) for x in (before, through)]
    if not layout.in_order:
        places = np.pad(positions, ((0, 0), (0, pad[-1][1]))).astype(np.float32)
        scans += [jnp.broadcast_to(place, scans[0].shape) for place in places]
        return jnp.stack(scans, 2)
    if layout.tiles == 1:
        return jnp.stack(scans, 2)
    b, t = (x.reshape(*x.shape[:2], layout.tiles, TILE) for x in scans)
    start, end = b[..., :1], t[..., -1:]
    factors = (b - start, end - b, end - t, t - start)
    return jnp.stack([*scans, *(jnp.exp2(x).reshape(scans[0].shape) for x in factors)], 2)


def masks_between(
    rows: Any, i: Any, j: Any, layout: Layout, *, diagonal: bool, keys_in_rows: bool = False
) -> list[jax.Array]:
    """The masks of the scans between the queries of tile i and the keys of tile j; `diagonal` where they are one."""

    def entries(row: Any, queries: bool) -> jax.Array:
        part = rows.at[row, tokens_of(i if queries else j)]
        if queries != keys_in_rows:
            return rows_of(along_rows(part), SQUARE)
        return by_columns(part)

    if layout.in_order and not diagonal:
        of_query, of_key = jnp.where(i > j, 2, 4), jnp.where(i > j, 3, 5)
        between = jnp.exp2(rows[0, jnp.maximum(i, j) * TILE] - rows[1, jnp.minimum(i, j) * TILE + TILE - 1])
        in_rows = rows.at[of_key, tokens_of(j)] if keys_in_rows else rows.at[of_query, tokens_of(i)]
        in_columns = entries(of_query, True) if keys_in_rows else entries(of_key, False)
        return [rows_of(along_rows(in_rows) * between, SQUARE) * in_columns]
    return [
        jnp.exp2(
            jnp.minimum(
                entries(2 * n, True) - entries(2 * n, False), entries(2 * n + 1, False) - entries(2 * n + 1, True)
            )
        )
        for n in range(layout.scans)
    ]


def mean(masks: Sequence[jax.Array]) -> jax.Array:
    return masks[0] if len(masks) == 1 else sum(masks[1:], masks[0]) * (1 / len(masks))


def by_side(
    x: jax.Array, rows: Any, n: int, i: Any, j: Any, layout: Layout, *, diagonal: bool, keys_in_rows: bool
) -> list[jax.Array]:
    """Row sums of a tile's entries below the diagonal of the scan n and above it."""
    if layout.in_order and not diagonal:
        total = x.sum(axis=1)
        return [total * jnp.where(i > j, 1.0, 0.0), total * jnp.where(i > j, 0.0, 1.0)]
    if layout.in_order:
        row, column = row_and_column(SQUARE)
    else:
        row_tile, column_tile = (j, i) if keys_in_rows else (i, j)
        place = 2 * layout.scans + n
        row = rows_of(along_rows(rows.at[place, tokens_of(row_tile)]), SQUARE)
        column = by_columns(rows.at[place, tokens_of(column_tile)])
    sides = (column > row, column < row) if keys_in_rows else (row > column, row < column)
    return [jnp.where(side, x, 0.0).sum(axis=1) for side in sides]


def plus(x: jax.Array | None, y: jax.Array) -> jax.Array:
    return y if x is None else x + y


def inverse(row_sum: jax.Array) -> jax.Array:
    """Of row sums; those of padded tokens are zero, as are their numerators."""
    return 1 / jnp.where(row_sum == 0, 1.0, row_sum)


def accumulate(accumulator: Any, x: jax.Array, y: Any, scratch: Sequence[Any], warpgroup: int) -> None:
    """Starts to add `x y`, x in registers; the interpreter, which has no such product, takes x from shared memory."""
    x = x.astype(BF16)
    if scratch:
        scratch[0].at[warpgroup][...] = x
        plgpu.commit_smem()
        x = scratch[0].at[warpgroup]
    plgpu.wgmma(accumulator, x, y)


def own_tiles(layout: Layout, run: Any) -> None:
    """Runs `run(tile, warpgroup)` for every tile of a warpgroup."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.loop(0, -(-layout.tiles // layout.warpgroups))
    def _(turn: Any) -> None:
        own = turn * layout.warpgroups + warpgroup

        @pl.when(own < layout.tiles)
        def _() -> None:
            run(own, warpgroup)


def call(
    body: Any, name: str, layout: Layout, grid: dict[str, int], out_type: Any, scratch: dict[str, Any], *operands: Any
) -> Any:
    """Runs a kernel with a block of `layout.warpgroups` for each point of the grid."""
    left = [tile(layout.warpgroups, *SQUARE)] if layout.interpret else []
    return mgpu.kernel(
        body,
        f"lion_attention_{name}",
        layout.interpret,
        out_type=out_type,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=layout.warpgroups,
        thread_name="warpgroup",
        scratch_types={**scratch, "left_s": left},
    )(*operands)


def copy_in(
    arrays: Sequence[tuple[Any, Any]], others: Sequence[tuple[Any, Any]], layout: Layout, loaded: Any, first: Any = 0
) -> None:
    """Copies tiles of a head, from the first one on, to shared memory, with zeros past the end, and other arrays.

    Args:
      arrays: references `[batch, time, heads, size]`, and their targets `[tiles, TILE, size]`.
      others: references and targets of the same shapes.
    """
    b, h = lax.axis_index("batch"), lax.axis_index("heads")

    @pl.when(lax.axis_index("warpgroup") == 0)
    def _() -> None:
        @pl.loop(0, layout.tiles)
        def _(index: Any) -> None:
            for source, target in arrays:
                plgpu.copy_gmem_to_smem(source.at[b, tokens_of(first + index), h], target.at[index], loaded)

        for source, target in others:
            plgpu.copy_gmem_to_smem(source, target, loaded)

    plgpu.barrier_wait(loaded)


def of_head(array: Any) -> Any:
    """What an array `[batch or 1, heads or 1, ...]` holds of a block's head."""
    b, h = lax.axis_index("batch"), lax.axis_index("heads")
    return array.at[b if array.shape[0] > 1 else 0, h if array.shape[1] > 1 else 0]
