"""What mixers with a matrix for a state share: projections, short convolution, heads, output norm and gate, decoding.

Every mixer of a language model, these and `models.causal_attention`, has three methods:

    mixer(x, segment_ids=None) -> y            x, y [batch, time, width]; segment_ids [batch, time]
    mixer.prefill(x, length) -> (y, cache)     a prompt; the cache has room for `length` tokens in all
    mixer.step(x, cache) -> (y, cache)         one token more, x and y [batch, width]

A cache is a dict of arrays. Those of the mixers here do not grow with `length`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import Linear, RmsNorm, ShortConvolution, kept, wide
from models.short_convolution import Part
from training.errors import UserError

Cache = dict[str, Any]


class RecurrentMixer(nnx.Module):
    """Queries, keys and values from one projection, perhaps through a short convolution; a recurrence; an output.

    A subclass gives `recur`, and where it differs `activate`.

    Args:
      width: of the tokens.
      heads: of queries and keys, which have `expand_k * width` channels in all, and of values, with `expand_v * width`.
      expand_k: see `heads`.
      expand_v: see `heads`.
      convolution: tokens that the short convolution sees; 0 is none.
      silu: whether SiLU follows the convolution.
      unit_keys: whether the convolution also divides each head's query and key by its norm.
      gate: whether the output is multiplied with `swish(x W_g)`.
      norm_epsilon: of the output's norm, one for each head with a common scale.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        convolution: int = 0,
        silu: bool = True,
        unit_keys: bool = False,
        gate: bool = False,
        norm_epsilon: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        keys, values = int(width * expand_k), int(width * expand_v)
        if keys % heads or values % heads:
            raise UserError(f"{keys} channels of keys and {values} of values do not split into {heads} heads")
        self.heads, self.keys, self.values = heads, keys, values
        self.qkv = Linear(width, 2 * keys + values, rngs=rngs)
        head = keys // heads if unit_keys else None
        parts = (Part(keys, head), Part(keys, head), Part(values))
        self.convolution = ShortConvolution(parts, convolution, silu=silu, rngs=rngs) if convolution else None
        self.gate = Linear(width, values, rngs=rngs) if gate else None
        self.norm = RmsNorm(values // heads, norm_epsilon)
        self.out = Linear(values, width, rngs=rngs)

    def activate(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What follows the projection, or the convolution if there is one."""
        return q, k, v

    def recur(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The recurrence from a state of zeros.

        Args:
          x: the mixer's input, [batch, time, width].
          q: [batch, time, heads, dim].
          k: [batch, time, heads, dim].
          v: [batch, time, heads, value_dim].
          segment_ids: [batch, time] or None.

        Returns:
          The output, like `v`, and the last state, [batch, heads, dim, value_dim].
        """
        raise NotImplementedError

    def recur_step(
        self, x: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache
    ) -> tuple[jax.Array, jax.Array]:
        """One token of `recur`, without the time axis, from the cache's `state` on."""
        raise NotImplementedError

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self._sequence(x, segment_ids)[0]

    def prefill(self, x: jax.Array, length: int) -> tuple[jax.Array, Cache]:
        """As the module's docstring says; `length` does not matter."""
        y, projected, state = self._sequence(x, None)
        cache = {"state": state, "position": jnp.full((), x.shape[1], jnp.int32)}
        if self.convolution:
            cache["convolution"] = self.convolution.cache(projected)
        return y, cache

    def step(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        u = self.qkv(x)
        new = {"position": cache["position"] + 1}
        if self.convolution:
            parts, new["convolution"] = self.convolution.step(u, cache["convolution"])
        else:
            parts = self._split(u)
        output, new["state"] = self.recur_step(x, *self._heads(parts), cache)
        return self._finish(x, output), new

    def _sequence(self, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        projected = self.qkv(x)
        parts = self.convolution(projected, segment_ids) if self.convolution else self._split(projected)
        output, state = self.recur(x, *self._heads(parts), segment_ids)
        return self._finish(x, output), projected, state

    def _split(self, u: jax.Array) -> list[jax.Array]:
        return jnp.split(u, [self.keys, 2 * self.keys], -1)

    def _heads(self, parts: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        parts = self.activate(*parts)
        return tuple(kept(part).reshape(*part.shape[:-1], self.heads, -1) for part in parts)

    def _finish(self, x: jax.Array, output: jax.Array) -> jax.Array:
        y = self.norm(output).reshape(*x.shape[:-1], self.values)
        if self.gate:
            y = y * jax.nn.silu(self.gate(x))
        return self.out(y)


def step_size_bias(key: jax.Array, heads: int) -> jax.Array:
    """Biases whose softplus is log-uniform in [1e-3, 1e-1], as in Mamba; [heads]."""
    steps = jnp.exp(jax.random.uniform(key, (heads,), minval=jnp.log(1e-3), maxval=jnp.log(1e-1)))
    return jnp.log(jnp.expm1(steps))


def selective_log_decay(logits: jax.Array, bias: jax.Array, log_rate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mamba-2's steps and log-decays: `softplus(logits + bias)`, and that times `-exp(log_rate)`; float32 at least."""
    steps = jax.nn.softplus(logits.astype(wide(logits.dtype)) + bias)
    return steps, -jnp.exp(log_rate) * steps
