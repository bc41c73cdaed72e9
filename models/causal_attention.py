"""Causal softmax attention with rotary positions, over the whole context or a sliding window."""

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import Linear, rotate
from models.recurrent_mixer import Cache
from training.errors import UserError


class CausalAttention(nnx.Module):
    """Multi-head causal softmax attention without biases; the methods are those of `models.recurrent_mixer`.

    Args:
      width: of the tokens.
      heads: they share the width equally.
      window: tokens that a token sees, itself included; None is all before it.
      rotary_base: of the rotary position embedding; None is no position embedding.
      implementation: "xla", "cudnn" or None: cuDNN's fused kernels on NVIDIA GPUs in 16 bits, else XLA.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        window: int | None = None,
        rotary_base: float | None = 1e4,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if width % heads or (rotary_base is not None and (width // heads) % 2):
            raise UserError(f"a width of {width} does not split into {heads} heads of an even size")
        if window is not None and window < 1:
            raise UserError(f"window={window}: a token sees at least itself")
        self.width, self.heads, self.window = width, heads, window
        self.rotary_base, self.implementation = rotary_base, implementation
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self._attend(*self._project(x, jnp.arange(x.shape[1])), segment_ids)

    def prefill(self, x: jax.Array, length: int) -> tuple[jax.Array, Cache]:
        """A prompt; the cache holds the last `window` of `length` tokens, token t in slot t modulo its size."""
        time = x.shape[1]
        q, k, v = self._project(x, jnp.arange(time))
        size = length if self.window is None else min(length, self.window)
        kept = jnp.arange(max(time - size, 0), time)
        empty = jnp.zeros((x.shape[0], size, *k.shape[2:]), k.dtype)
        cache = {name: empty.at[:, kept % size].set(z[:, kept]) for name, z in (("k", k), ("v", v))}
        return self._attend(q, k, v, None), {**cache, "position": jnp.full((), time, jnp.int32)}

    def step(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        position = cache["position"]
        q, k, v = self._project(x[:, None], position[None])
        size = cache["k"].shape[1]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cache[name], z, position % size, 1) for name, z in (("k", k), ("v", v))
        )
        seen = jnp.arange(size) <= position
        y = jax.nn.dot_product_attention(q, keys, values, mask=seen[None, None, None], implementation="xla")
        return self.out(y.reshape(x.shape)), {"k": keys, "v": values, "position": position + 1}

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [batch, time, heads, dim]."""
        q, k, v = jnp.split(self.qkv(x).reshape(*x.shape[:2], 3 * self.heads, -1), 3, 2)
        if self.rotary_base is not None:
            q, k = (rotate(z, positions, self.rotary_base) for z in (q, k))
        return q, k, v

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        mask = None if segment_ids is None else (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
        window = None if self.window is None else (self.window - 1, 0)
        y = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=window, implementation=self._implementation(q.dtype)
        )
        return self.out(y.reshape(*y.shape[:2], -1))

    def _implementation(self, dtype: jnp.dtype) -> str:
        if self.implementation is not None:
            return self.implementation
        return "cudnn" if jax.default_backend() == "gpu" and jnp.finfo(dtype).bits == 16 else "xla"
