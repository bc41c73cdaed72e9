"""The linear transformers that DeltaNet is compared with, as mixers: arXiv:2406.06484 section 4 and its Table 2.

| mixer | state | details |
|---|---|---|
| `LinearAttention` | `S += k v^T` | feature map of queries and keys; an output norm in place of row sums |
| `RetNet` | `S = gamma_h S + k v^T`, `gamma_h = 1 - 2^(-5-h)` | rotary positions, swish gate |
| `Gla` | `S = diag(alpha_t) S + k v^T` | `alpha = sigmoid(x W1 W2 + b)^(1/16)`, low rank, swish gate |
| `Mamba2` | `S = alpha_t S + k (step_t v)^T` | one query and key for all heads, convolution, gate before the norm |
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import FEATURE_MAPS, Linear, RmsNorm, ShortConvolution, choose, rotate, wide
from models.linear_attention import linear_attention, linear_attention_step
from models.recurrent_mixer import Cache, RecurrentMixer, selective_log_decay, step_size_bias
from models.short_convolution import Part
from training.errors import UserError


class LinearMixer(RecurrentMixer):
    """Linear attention with the log-decays that a subclass computes."""

    def log_decay(self, x: jax.Array) -> jax.Array | None:
        """[..., heads] or [..., heads, dim] for tokens [..., width]; None is no decay."""
        return None

    def place(self, q: jax.Array, k: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys [batch, time, heads, dim] that know their positions [time]."""
        return q, k

    def recur(self, x, q, k, v, segment_ids):
        q, k = self.place(q, k, jnp.arange(q.shape[1]))
        return linear_attention(q, k, v, self.log_decay(x), segment_ids=segment_ids)

    def recur_step(self, x, q, k, v, cache):
        q, k = (z[:, 0] for z in self.place(q[:, None], k[:, None], cache["position"][None]))
        return linear_attention_step(q, k, v, self.log_decay(x), initial_state=cache["state"])


class LinearAttention(LinearMixer):
    """Linear attention without decay.

    Args:
      width: of the tokens.
      feature_map: of queries and keys, a key of `models.layers.FEATURE_MAPS`.
      **shared: see `RecurrentMixer`.
    """

    def __init__(self, width: int, *, feature_map: str = "identity", rngs: nnx.Rngs, **shared):
        super().__init__(width, rngs=rngs, **shared)
        self.feature_map = choose(FEATURE_MAPS, feature_map, "feature_map")

    def activate(self, q, k, v):
        q, k, v = super().activate(q, k, v)
        return self.feature_map(q), self.feature_map(k), v


class RetNet(LinearMixer):
    """RetNet (arXiv:2307.08621): a fixed decay for each head.

    Args:
      width: of the tokens.
      expand_v: channels of values per unit of width.
      gate: whether the output has a swish gate.
      rotary_base: of the rotary position embedding.
      **shared: see `RecurrentMixer`.
    """

    def __init__(
        self,
        width: int,
        *,
        expand_v: float = 2.0,
        gate: bool = True,
        rotary_base: float = 1e4,
        rngs: nnx.Rngs,
        **shared,
    ):
        super().__init__(width, expand_v=expand_v, gate=gate, rngs=rngs, **shared)
        self.rotary_base = rotary_base

    def log_decay(self, x):
        rates = jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.heads, dtype=wide(x.dtype)))))
        return jnp.broadcast_to(rates, (*x.shape[:-1], self.heads))

    def place(self, q, k, positions):
        return rotate(q, positions, self.rotary_base), rotate(k, positions, self.rotary_base)


class Gla(LinearMixer):
    """Gated linear attention (arXiv:2312.06635): a decay for each channel of the keys and each token.

    Args:
      width: of the tokens.
      expand_k: channels of keys per unit of width.
      gate: whether the output has a swish gate.
      rank: of the decays' projection.
      temperature: the sigmoid's logarithm is divided by it.
      **shared: see `RecurrentMixer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = 4,
        expand_k: float = 0.5,
        gate: bool = True,
        rank: int = 16,
        temperature: float = 16.0,
        rngs: nnx.Rngs,
        **shared,
    ):
        super().__init__(width, heads=heads, expand_k=expand_k, gate=gate, rngs=rngs, **shared)
        self.temperature = temperature
        self.decay_down = Linear(width, rank, rngs=rngs)
        self.decay_up = Linear(rank, self.keys, bias=True, rngs=rngs)

    def log_decay(self, x):
        logits = self.decay_up(self.decay_down(x))
        logits = logits.reshape(*x.shape[:-1], self.heads, -1).astype(wide(x.dtype))
        return jax.nn.log_sigmoid(logits) / self.temperature


class Mamba2(nnx.Module):
    """Mamba-2 (arXiv:2405.21060) with one group: a decay for each head and token.

    Args:
      width: of the tokens.
      expand: channels of values per unit of width.
      head_dim: channels of values in a head.
      state: channels of queries and keys, which all heads share.
      convolution: tokens that the short convolution over values, keys and queries sees.
      norm_epsilon: of the output's norm, over all channels.
    """

    def __init__(
        self,
        width: int,
        *,
        expand: float = 2.0,
        head_dim: int = 64,
        state: int = 128,
        convolution: int = 4,
        norm_epsilon: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.values, self.state, self.head_dim = int(expand * width), state, head_dim
        if self.values % head_dim:
            raise UserError(f"{self.values} channels of values do not split into heads of {head_dim}")
        self.heads = self.values // head_dim
        self.project = Linear(width, 2 * self.values + 2 * state + self.heads, rngs=rngs)
        self.convolution = ShortConvolution((Part(self.values + 2 * state),), convolution, silu=True, rngs=rngs)
        self.step_bias = nnx.Param(step_size_bias(rngs.params(), self.heads))
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (self.heads,), minval=1, maxval=16)))
        self.skip = nnx.Param(jnp.ones(self.heads))
        self.norm = RmsNorm(self.values, norm_epsilon)
        self.out = Linear(self.values, width, rngs=rngs)

    def __call__(self, x: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        return self._sequence(x, segment_ids)[0]

    def prefill(self, x: jax.Array, length: int) -> tuple[jax.Array, Cache]:
        """As `models.recurrent_mixer` says; `length` does not matter."""
        y, u, state = self._sequence(x, None)
        return y, {"state": state, "convolution": self.convolution.cache(u)}

    def step(self, x: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        gate, u, logits = self._split(x)
        (u,), convolution = self.convolution.step(u, cache["convolution"])
        values, k, q, written, decay = self._terms(u, logits)
        output, state = linear_attention_step(q, k, written, decay, scale=1.0, initial_state=cache["state"])
        return self._finish(output, values, gate), {"state": state, "convolution": convolution}

    def _sequence(self, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
        gate, u, logits = self._split(x)
        (convolved,) = self.convolution(u, segment_ids)
        values, k, q, written, decay = self._terms(convolved, logits)
        output, state = linear_attention(q, k, written, decay, scale=1.0, segment_ids=segment_ids)
        return self._finish(output, values, gate), u, state

    def _split(self, x: jax.Array) -> list[jax.Array]:
        """The gate, what is convolved, and the logits of the steps."""
        return jnp.split(self.project(x), [self.values, 2 * self.values + 2 * self.state], -1)

    def _terms(self, u: jax.Array, logits: jax.Array) -> tuple[jax.Array, ...]:
        """Values, keys, queries, what is written to the state, and log-decays, all by heads, after the convolution."""
        values, k, q = jnp.split(u, [self.values, self.values + self.state], -1)
        values = values.reshape(*values.shape[:-1], self.heads, self.head_dim)
        k, q = (jnp.broadcast_to(z[..., None, :], (*values.shape[:-1], self.state)) for z in (k, q))
        steps, decay = selective_log_decay(logits, self.step_bias[...], self.log_rate[...])
        return values, k, q, values * steps[..., None].astype(values.dtype), decay

    def _finish(self, output: jax.Array, values: jax.Array, gate: jax.Array) -> jax.Array:
        output = output + self.skip[...][:, None].astype(values.dtype) * values
        return self.out(self.norm(output.reshape(gate.shape) * jax.nn.silu(gate)))
