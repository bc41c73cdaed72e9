"""The short convolution in plain JAX, for every device, dtype and length."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

NORM_EPSILON = 1e-6  # that of `deltanet.delta_rule`


class Part(NamedTuple):
    """Consecutive channels that come back as one array."""

    channels: int
    head: int | None = None
    """So many channels each are divided by their norm, `sqrt(sum(x ** 2) + 1e-6)`; None leaves them as they are."""


def finish(u: jax.Array, parts: Sequence[Part], silu: bool, dtype: jnp.dtype) -> list[jax.Array]:
    """What follows the sums of the convolution, `u`, [..., channels], float32 at least: SiLU, and the norms of heads.

    Returns:
      The parts, [..., channels of the part], in `dtype`.
    """
    if silu:
        u = jax.nn.silu(u)
    bounds = [sum(part.channels for part in parts[:i]) for i in range(1, len(parts))]
    return [_normalized(x, part.head).astype(dtype) for x, part in zip(jnp.split(u, bounds, -1), parts, strict=True)]


def _normalized(x: jax.Array, head: int | None) -> jax.Array:
    if head is None:
        return x
    heads = x.reshape(*x.shape[:-1], -1, head)
    return (heads * jax.lax.rsqrt(jnp.square(heads).sum(-1, keepdims=True) + NORM_EPSILON)).reshape(x.shape)


def _convolve(x: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The sums, in the wider of the two dtypes."""
    time, before = x.shape[1], len(kernel) - 1
    x = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
    ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (before, 0)))
    sums = jnp.zeros((), kernel.dtype)
    for begin, tap in enumerate(kernel):
        seen = x[:, begin : begin + time]
        if ids is not None:
            seen = jnp.where((ids[:, begin : begin + time] == segment_ids)[..., None], seen, 0)
        sums = sums + seen * tap
    return sums


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def xla_short_convolution(
    x: jax.Array, kernel: jax.Array, segment_ids: jax.Array | None, parts: Sequence[Part], silu: bool
) -> list[jax.Array]:
    """See `short_convolution`; `kernel` in float32 at least. The backward pass keeps only the arguments."""
    # Written once: the compiler would rather compute them anew wherever they are read.
    return jax.lax.optimization_barrier(finish(_convolve(x, kernel, segment_ids), parts, silu, x.dtype))


def _forward(x, kernel, segment_ids, parts, silu):
    return xla_short_convolution(x, kernel, segment_ids, parts, silu), (x, kernel, segment_ids)


def _backward(parts, silu, residuals, d_parts):
    x, kernel, segment_ids = residuals
    u, convolve_back = jax.vjp(lambda x, kernel: _convolve(x, kernel, segment_ids), x, kernel)
    _, finish_back = jax.vjp(lambda u: finish(u, parts, silu, x.dtype), u)
    # d_u is written once, not computed anew for each token that has a part in it; and a pass of its own sums over
    # tokens: joined to the one that writes d_x, both take half as long again.
    (d_u,) = finish_back(d_parts)
    d_u, again = jax.lax.optimization_barrier((d_u, d_u))
    return convolve_back(d_u)[0], convolve_back(again)[1], None


xla_short_convolution.defvjp(_forward, _backward)
