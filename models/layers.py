"""Small layers of language models. Each computes in the dtype of its input, whatever the dtype of its parameters.

So the dtype of the embedded tokens is that of the whole model, while parameters stay in float32; norms and gates, whose
rounding would be felt, compute in float32 at least.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from training.errors import UserError, nearest
from training.sharding import gathered

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


def shifted(x: jax.Array, steps: int) -> jax.Array:
    """`x` [batch, time, ...] as it was `steps` tokens before; zeros come in."""
    if steps == 0:
        return x
    return jnp.pad(x, [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]


def _convolve(x: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    y = x * kernel[-1]
    for steps in range(1, len(kernel)):
        past = shifted(x, steps)
        if segment_ids is not None:
            past = jnp.where((shifted(segment_ids, steps) == segment_ids)[..., None], past, 0)
        y = y + past * kernel[-1 - steps]
    return y


@jax.custom_vjp
def _convolution(x: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """`_convolve`, whose backward sums over tokens in a pass of its own: joined to the one that writes d_x, both take
    half as long again."""
    return _convolve(x, kernel, segment_ids)


def _convolution_forward(x, kernel, segment_ids):
    return _convolve(x, kernel, segment_ids), (x, kernel, segment_ids)


def _convolution_backward(residuals, d_y):
    x, kernel, segment_ids = residuals
    _, backward = jax.vjp(lambda x, kernel: _convolve(x, kernel, segment_ids), x, kernel)
    return backward(d_y)[0], backward(jax.lax.optimization_barrier(d_y))[1], None


_convolution.defvjp(_convolution_forward, _convolution_backward)


class ShortConvolution(nnx.Module):
    """A causal convolution of each channel on its own: token t sees tokens t - size + 1 to t of its segment. No bias.

    Args:
      channels: of the input.
      size: tokens that an output sees.
    """

    def __init__(self, channels: int, size: int = 4, *, rngs: nnx.Rngs):
        self.size, self.channels = size, channels
        self.kernel = nnx.Param(INIT(rngs.params(), (size, channels)))

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """`[batch, time, channels]` to the same; tokens of other segments [batch, time] count as zeros."""
        return _convolution(x, gathered(self.kernel[...].astype(x.dtype)), segment_ids)

    def cache(self, x: jax.Array) -> jax.Array:
        """The last `size - 1` tokens of `x`, zeros in front of short ones, [batch, size - 1, channels]."""
        return jnp.pad(x, ((0, 0), (self.size - 1, 0), (0, 0)))[:, x.shape[1] :]

    def step(self, x: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One token [batch, channels] after those in the cache: the output, and the new cache."""
        seen = jnp.concatenate([cache, x[:, None]], 1)
        kernel = self.kernel[...].astype(x.dtype)
        y = x * kernel[-1]
        for steps in range(1, self.size):
            y = y + seen[:, -1 - steps] * kernel[-1 - steps]
        return y, seen[:, 1:]


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
