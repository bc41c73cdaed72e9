"""Small layers of language models. Each computes in the dtype of its input, whatever the dtype of its parameters.

So the dtype of the embedded tokens is that of the whole model, while parameters stay in float32; norms and gates, whose
rounding would be felt, compute in float32 at least.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from models.short_convolution import Part, finish, short_convolution
from training.errors import UserError, nearest
from training.sharding import gathered, over_examples

INIT = nnx.initializers.normal(0.02)


ACTIVATION = "activation"


def kept(x: jax.Array) -> jax.Array:
    """Marks what the backward pass may keep where it does not keep everything; see `models.stack.REMAT`."""
    return checkpoint_name(x, ACTIVATION)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 where that is the dtype."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """`x W + b`, W [inputs, outputs], normal with deviation 0.02; no bias unless asked for."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ gathered(self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class RmsNorm(nnx.Module):
    """Root mean square over the last axis, with a scale."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(wide(x.dtype))
        y = y * kept(jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon))
        return kept((y * self.scale[...]).astype(x.dtype))


class LayerNorm(nnx.Module):
    """Mean and variance over the last axis, with scale and shift."""

    def __init__(self, width: int, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(wide(x.dtype))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class SwiGlu(nnx.Module):
    """`W_down (SiLU(x W_gate) * (x W_up))` without biases."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate, self.up = (Linear(width, hidden, rngs=rngs) for _ in range(2))
        self.down = Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(kept(jax.nn.silu(self.gate(x)) * self.up(x)))

    @staticmethod
    def default_hidden(width: int) -> int:
        """Two thirds of four times the width, up to a multiple of 256: 8 width^2 parameters, as a GELU MLP has."""
        return 256 * -(-int(width * 4 * 2 / 3) // 256)


class GeluMlp(nnx.Module):
    """Two linear layers with biases and a GELU between them."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.up = Linear(width, hidden, bias=True, rngs=rngs)
        self.down = Linear(hidden, width, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))

    @staticmethod
    def default_hidden(width: int) -> int:
        return 4 * width


MLPS: dict[str, type] = {"swiglu": SwiGlu, "gelu": GeluMlp}
NORMS: dict[str, type] = {"rms": RmsNorm, "layer": LayerNorm}

FEATURE_MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + 1,
}
"""Of queries and keys; "elu" is 1 + ELU, which is positive."""


def choose(table: dict, name: str, what: str):
    """The entry of a table of choices.

    Raises:
      UserError: there is none of this name; the nearest is named.
    """
    if name not in table:
        raise UserError(f"{what}={name!r} does not exist: {nearest(name, table)}")
    return table[name]


class ShortConvolution(nnx.Module):
    """A causal convolution of each channel on its own, and what follows it: see `models.short_convolution`. No bias.

    Token t sees tokens t - size + 1 to t of its segment.

    Args:
      parts: of the result, together all channels.
      size: tokens that an output sees.
      silu: whether SiLU follows.
    """

    def __init__(self, parts: Sequence[Part], size: int = 4, *, silu: bool, rngs: nnx.Rngs):
        self.size, self.parts, self.silu = size, tuple(parts), silu
        self.kernel = nnx.Param(INIT(rngs.params(), (size, sum(part.channels for part in parts))))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> list[jax.Array]:
        """The parts of `[batch, time, channels]`; tokens of other segments [batch, time] count as zeros."""

        def run(x, segment_ids, kernel):
            return short_convolution(x, kernel, self.parts, segment_ids, silu=self.silu)

        return [kept(part) for part in over_examples(run, x, segment_ids, whole=(gathered(self.kernel[...]),))]

    def cache(self, x: jax.Array) -> jax.Array:
        """The last `size - 1` tokens of `x`, zeros in front of short ones, [batch, size - 1, channels]."""
        return jnp.pad(x, ((0, 0), (self.size - 1, 0), (0, 0)))[:, x.shape[1] :]

    def step(self, x: jax.Array, cache: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        """One token [batch, channels] after those in the cache: the parts, and the new cache."""
        seen = jnp.concatenate([cache, x[:, None]], 1)
        sums = (seen.astype(wide(x.dtype)) * self.kernel[...]).sum(1)
        return finish(sums, self.parts, self.silu, x.dtype), seen[:, 1:]


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021); channel i and channel i + dim / 2 are a pair.

    Args:
      x: [batch, time, heads, dim], dim even.
      positions: [time] or [batch, time].
      base: of the geometric sequence of wave lengths.
    """
    dtype = wide(x.dtype)
    rates = base ** (-jnp.arange(0, x.shape[-1], 2, dtype=dtype) / x.shape[-1])
    angles = positions.astype(dtype)[..., None, None] * rates
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(dtype), 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
