"""The short convolution, with what follows it, as Mosaic GPU kernels for NVIDIA Hopper GPUs, in bfloat16.

What there is to do is to move bytes: forward reads `x` and writes the parts, backward reads `x` and the parts'
gradients and writes `d_x`. A block has 512 channels and runs over `span` tokens, two or eight at a time. A thread
keeps four channels, and of the tokens before only what the convolution still sees, in registers; a head of 128
channels is a warp, one of 64 half a warp, so that its norm is a sum over lanes. Nothing goes through shared memory.
Without heads, 256 channels make a block where 512 do not divide a part.

Backward computes the sums of the convolution again. With `d_u` the gradient of these sums,

    d_x_t = sum over s of kernel[-1 - s] d_u_{t + s},    d_kernel[-1 - s] = sum over t of d_u_t x_{t - s},

so `d_x` follows `size - 1` tokens behind, and a block goes on for as many tokens of the next. Each block writes its
own sum for `d_kernel`. In packed sequences a factor of 0 stands for each pair of tokens of different segments.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from models.kernels import mosaic_gpu as mgpu
from models.short_convolution.xla import NORM_EPSILON, Part

if jax.__version_info__ >= (0, 11):  # earlier versions have another interface, and `mosaic_gpu.refusal` says so
    from jax.experimental.pallas import mosaic_gpu as plgpu

CHANNELS = (512, 256)  # of a block: four or two for each of its 128 threads
HEADS = (128, 64)
SPANS = (128, 64, 32, 16)  # tokens of a block, best first
SIZES = range(2, 6)
_AHEAD = 8  # tokens whose loads are issued together
_AHEAD_BACKWARD = 2  # of which those of the next turn are under way too


def refusal(x: jax.Array, kernel: jax.Array, parts: Sequence[Part]) -> str | None:
    """Why these arguments are not served, or None."""
    if x.dtype != jnp.bfloat16:
        return f"the GPU kernels take bfloat16, not {x.dtype}"
    if len(kernel) not in SIZES:
        return f"the GPU kernels see {SIZES[0]} to {SIZES[-1]} tokens, not {len(kernel)}"
    if x.shape[1] % SPANS[-1]:
        return f"the GPU kernels take multiples of {SPANS[-1]} tokens, not {x.shape[1]}"
    heads = {part.head for part in parts} - {None}
    if len(heads) > 1 or not heads <= set(HEADS):
        return f"the GPU kernels take heads of 64 or of 128 channels, not of {sorted(heads)}"
    least = CHANNELS[0] if heads else CHANNELS[-1]
    if rest := [part.channels for part in parts if part.channels % least]:
        return f"the GPU kernels take parts of multiples of {least} channels, not of {rest[0]}"
    return None


def _block_shape(parts: Sequence[Part]) -> tuple[int, int]:
    """The rows of a block and their channels, which are those of a head, where there are heads."""
    channels = next(size for size in CHANNELS if not any(part.channels % size for part in parts))
    head = next((part.head for part in parts if part.head), channels // 4)
    return channels // head, head


def _layout(rows: int, head: int) -> Any:
    """Of a block's channels at one token: those of a thread lie side by side in memory, and so do those of a warp."""
    if rows == 4:  # a warp for each
        tiles, warps, lanes = ((rows, head), (head // 32,)), (-3,), (-2,)
    else:
        tiles, warps, lanes = ((rows, head), (rows // 4, 4)), (-4,), (-2, -3)
    return plgpu.Layout.TILED(plgpu.Tiling(tiles), warp_dims=warps, lane_dims=lanes, vector_dim=-1)


class _Block:
    """What both kernels do with a token of a block, `[rows, head]` in float32 registers."""

    def __init__(self, layout: Any, taps: Sequence[jax.Array], silu: bool) -> None:
        self._layout, self._taps, self._silu = layout, taps, silu

    def sums(self, seen: Sequence[jax.Array]) -> jax.Array:
        """The convolution, of as many tokens as it sees, in their order."""
        return sum(tap * x for tap, x in zip(self._taps, reversed(seen), strict=True))

    def spread(self, of_heads: jax.Array, shape: tuple[int, int]) -> jax.Array:
        """A number of each head, for each of its channels."""
        return plgpu.layout_cast(lax.broadcast_in_dim(of_heads, shape, [0]), self._layout)

    def value(self, u: jax.Array, normalized: bool) -> jax.Array:
        y = u * _logistic(u) if self._silu else u
        return y * self._inverse_norm(y) if normalized else y

    def d_sums(self, u: jax.Array, d_y: jax.Array, normalized: bool) -> jax.Array:
        """The gradient of `u`, from that of its value."""
        logistic = _logistic(u) if self._silu else None
        z = u * logistic if self._silu else u
        if normalized:
            inverse = self._inverse_norm(z)
            y = z * inverse
            d_y = inverse * (d_y - y * self.spread((y * d_y).sum(axis=1), u.shape))
        return d_y * (logistic + z * (1 - logistic)) if self._silu else d_y

    def _inverse_norm(self, y: jax.Array) -> jax.Array:
        return self.spread(lax.rsqrt((y * y).sum(axis=1) + NORM_EPSILON), y.shape)


def _logistic(u: jax.Array) -> jax.Array:
    root = lax.rsqrt(1 + jnp.exp(-u))  # a division takes three times as many instructions
    return root * root


class _Grid:
    """Blocks over channels, tokens and the batch, and the place of the one that runs."""

    def __init__(self, x: jax.Array, size: int, parts: Sequence[Part]) -> None:
        self.batch, self.time, channels = x.shape
        self.size, self.parts = size, parts
        self.span = next(span for span in SPANS if self.time % span == 0)
        self.rows, self.head = _block_shape(parts)
        self.layout = _layout(self.rows, self.head)
        self.grid = (channels // (self.rows * self.head), self.time // self.span, self.batch)
        self.names = ("channels", "spans", "batch")
        self.shape = (self.batch, self.time, channels // self.head, self.head)

    def part_shape(self, part: Part) -> tuple[int, ...]:
        return (*self.shape[:2], part.channels // self.head, self.head)

    def for_its_part(self, run: Callable[[int, Part, Any], None]) -> None:
        """Calls `run` with the part of this block, its number, and the rows of the part that are this block's."""
        place, begin = lax.axis_index("channels"), 0
        for i, part in enumerate(self.parts):
            end = begin + part.channels // (self.rows * self.head)
            rows = pl.ds((place - begin) * self.rows, self.rows)
            pl.when((place >= begin) & (place < end))(partial(run, i, part, rows))
            begin = end

    def load(self, ref: Any) -> jax.Array:
        return plgpu.load(ref, layout=self.layout, optimized=False)


class _Token(NamedTuple):
    """What is known of a token: its numbers, and its segment if there are segments."""

    value: jax.Array
    segment: jax.Array | None

    def wide(self) -> "_Token":
        """Its numbers in float32."""
        return self._replace(value=self.value.astype(jnp.float32))


class _Tokens:
    """The tokens of a block."""

    def __init__(self, grid: _Grid, x_ref: Any, segments_ref: Any | None) -> None:
        self._grid, self._x, self._segments = grid, x_ref, segments_ref
        self.batch, self.first = lax.axis_index("batch"), lax.axis_index("spans") * grid.span
        self.rows = pl.ds(lax.axis_index("channels") * grid.rows, grid.rows)

    def load(self, t: jax.Array) -> _Token:
        segment = None if self._segments is None else self._segments[self.batch, t]
        return _Token(self._grid.load(self._x.at[self.batch, t, self.rows]), segment)

    def before(self) -> tuple[_Token, ...]:
        """Those that the first one sees; zeros before the sequence."""
        tokens = []
        for t in (self.first - s for s in range(self._grid.size - 1, 0, -1)):
            x, segment = self.load(jnp.maximum(t, 0)).wide()
            tokens.append(_Token(x * jnp.where(t >= 0, 1.0, 0.0), segment))
        return tuple(tokens)


def _of_one_segment(tokens: Sequence[_Token], one: _Token) -> list[jax.Array]:
    """The numbers of tokens, zeros for those of other segments than that of `one`."""
    if one.segment is None:
        return [token.value for token in tokens]
    return [
        token.value if token is one else token.value * jnp.where(token.segment == one.segment, 1.0, 0.0)
        for token in tokens
    ]


def _arrays(grid: _Grid, x: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None) -> list[jax.Array]:
    """What both kernels read. The taps are turned round: `taps[s]` meets the token `s` before.

    And being computed, they are an array of their own. A slice of a model's stacked parameters XLA would take in the
    call of the kernel itself, which then is no part of the one launch of many kernels.
    """
    ids = [] if segment_ids is None else [segment_ids.astype(jnp.int32)]
    return [x.reshape(grid.shape), kernel[::-1].reshape(grid.size, -1, grid.head), *ids]


def _run_forward(x, kernel, segment_ids, parts, silu, interpret) -> list[jax.Array]:
    size = len(kernel)
    grid = _Grid(x, size, parts)
    arrays = _arrays(grid, x, kernel, segment_ids)

    def body(*refs):
        (x_ref, kernel_ref, *segments_ref), part_refs = refs[: len(arrays)], refs[len(arrays) :]
        tokens = _Tokens(grid, x_ref, *(segments_ref or [None]))
        block = _Block(grid.layout, [grid.load(kernel_ref.at[s, tokens.rows]) for s in range(size)], silu)

        def run(i, part, part_rows):
            def some(turn, seen):
                begin = tokens.first + turn * _AHEAD
                seen = (*seen, *(tokens.load(begin + j).wide() for j in range(_AHEAD)))
                for j in range(_AHEAD):
                    u = block.sums(_of_one_segment(seen[j : j + size], seen[j + size - 1]))
                    y = block.value(u, part.head is not None)
                    part_refs[i].at[tokens.batch, begin + j, part_rows][...] = y.astype(x.dtype)
                return seen[_AHEAD:]

            lax.fori_loop(0, grid.span // _AHEAD, some, tokens.before())

        grid.for_its_part(run)

    outputs = mgpu.kernel(
        body,
        "short_convolution",
        interpret,
        out_type=[jax.ShapeDtypeStruct(grid.part_shape(part), x.dtype) for part in parts],
        grid=grid.grid,
        grid_names=grid.names,
    )(*arrays)
    return [y.reshape(*x.shape[:2], -1) for y in outputs]


def _run_backward(x, kernel, segment_ids, d_parts, parts, silu, interpret) -> tuple[jax.Array, jax.Array]:
    size, behind = len(kernel), len(kernel) - 1
    grid = _Grid(x, size, parts)
    arrays = _arrays(grid, x, kernel, segment_ids)
    d_parts = [d.reshape(grid.part_shape(part)) for d, part in zip(d_parts, parts, strict=True)]

    def body(*refs):
        (x_ref, kernel_ref, *segments_ref), refs = refs[: len(arrays)], refs[len(arrays) :]
        d_refs, (d_x_ref, d_kernel_ref) = refs[: len(parts)], refs[len(parts) :]
        place = lax.axis_index("spans")
        tokens = _Tokens(grid, x_ref, *(segments_ref or [None]))
        taps = [grid.load(kernel_ref.at[s, tokens.rows]) for s in range(size)]
        block = _Block(grid.layout, taps, silu)

        def run(i, part, part_rows):
            def load(t):
                """A token and its gradient, as they are in memory; those of the last one after the end."""
                t = jnp.minimum(t, grid.time - 1)
                return tokens.load(t), grid.load(d_refs[i].at[tokens.batch, t, part_rows])

            def one(seen, d_y, d_taps, counts_if):
                """The gradient of the sums of the newest token that was seen; and `d_taps` with it, if it counts."""
                visible = _of_one_segment(seen, seen[-1])
                d_u = block.d_sums(block.sums(visible), d_y.astype(jnp.float32), part.head is not None)
                counted = d_u * jnp.where(counts_if, 1.0, 0.0)
                d_taps = tuple(d_tap + counted * x for d_tap, x in zip(d_taps, reversed(visible), strict=True))
                return d_u, counted, d_taps

            # The first tokens' d_u is also in d_x of the block before, which has counted it, where there is one.
            seen, d_us = tokens.before(), ()
            nothing = plgpu.layout_cast(jnp.zeros((grid.rows, grid.head), jnp.float32), grid.layout)
            d_taps = (nothing,) * size
            for token, d_y in map(load, (tokens.first + j for j in range(behind))):
                seen = (*seen, token.wide())
                d_u, _, d_taps = one(seen[-size:], d_y, d_taps, place == 0)
                d_us = (*d_us, _Token(d_u, token.segment))

            def places(turn):
                begin = tokens.first + behind + turn * _AHEAD_BACKWARD
                return [begin + j for j in range(_AHEAD_BACKWARD)]

            def some(turn, carry):
                seen, d_us, d_taps, loaded = carry
                # A store holds back the loads after it, so the next turn's are issued before the first one.
                loading = [load(t) for t in places(turn + 1)]
                for t, (token, d_y) in zip(places(turn), loaded, strict=True):
                    seen = (*seen[-behind:], token.wide())
                    _, d_u, d_taps = one(seen, d_y, d_taps, t < grid.time)
                    d_us = (*d_us[-behind:], _Token(d_u, token.segment))
                    visible = _of_one_segment(d_us, d_us[0])
                    d_x = sum(tap * d_u for tap, d_u in zip(taps, visible, strict=True))
                    d_x_ref.at[tokens.batch, t - behind, tokens.rows][...] = d_x.astype(x.dtype)
                return seen[-behind:], d_us[-behind:], d_taps, loading

            carry = (seen[-behind:], d_us, d_taps, [load(t) for t in places(0)])
            _, _, d_taps, _ = lax.fori_loop(0, grid.span // _AHEAD_BACKWARD, some, carry)
            for s, d_tap in enumerate(d_taps):
                d_kernel_ref.at[tokens.batch, place, s, tokens.rows][...] = d_tap

        grid.for_its_part(run)

    sums = (grid.batch, grid.time // grid.span, size, *grid.shape[2:])
    d_x, d_kernel = mgpu.kernel(
        body,
        "short_convolution_backward",
        interpret,
        out_type=[jax.ShapeDtypeStruct(grid.shape, x.dtype), jax.ShapeDtypeStruct(sums, jnp.float32)],
        grid=grid.grid,
        grid_names=grid.names,
    )(*arrays, *d_parts)
    return d_x.reshape(x.shape), d_kernel.sum((0, 1)).reshape(kernel.shape)[::-1]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def pallas_short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    segment_ids: jax.Array | None,
    parts: Sequence[Part],
    silu: bool,
    interpret: Any = False,
) -> list[jax.Array]:
    """See `short_convolution`, for what `refusal` lets pass, with `kernel` in float32.

    `interpret`, a `plgpu.InterpretGPUParams`, runs the kernels without a GPU.
    """
    return _run_forward(x, kernel, segment_ids, parts, silu, interpret)


def _forward(x, kernel, segment_ids, parts, silu, interpret):
    return _run_forward(x, kernel, segment_ids, parts, silu, interpret), (x, kernel, segment_ids)


def _backward(parts, silu, interpret, residuals, d_parts):
    return *_run_backward(*residuals, d_parts, parts, silu, interpret), None


pallas_short_convolution.defvjp(_forward, _backward)
