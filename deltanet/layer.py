"""DeltaNet as a layer (arXiv:2406.06484, section 3 and the ablations of section 4), and Gated DeltaNet.

The defaults are the paper's; options make its ablations and the variants that followed:

| option | paper | elsewhere |
|---|---|---|
| `convolution` | 4 | 0: no short convolution |
| `feature_map` | "silu" | "relu", "elu" (1 + ELU), "identity" |
| `key_norm` | "l2" | "l1", as of Schlag et al. 2021 |
| `gate` | False | True: a swish gate on the output |
| `negative_eigenvalues` | False | True: step sizes up to 2 (arXiv:2411.12537) |
"""

import jax
import jax.numpy as jnp
from flax import nnx

from deltanet.delta_rule import delta_rule, delta_rule_step
from models.layers import FEATURE_MAPS, Linear, choose, wide
from models.recurrent_mixer import RecurrentMixer, selective_log_decay, step_size_bias
from training.sharding import over_examples

NORM_EPSILON = 1e-6


def _unit_sum(x: jax.Array) -> jax.Array:
    """`x` over the sum of the absolute values of its last axis."""
    y = x.astype(wide(x.dtype))
    return (y / (jnp.abs(y).sum(-1, keepdims=True) + NORM_EPSILON)).astype(x.dtype)


KEY_NORMS = {"l2": lambda x: x, "l1": _unit_sum}
"""Of queries and keys, before the op; "l2" is the op's own, or the convolution's."""


class DeltaNet(RecurrentMixer):
    """Queries, keys and values through a convolution and an activation, the delta rule, and a norm of each head.

    Args:
      width: of the tokens.
      heads: of queries, keys and values.
      convolution: tokens that the short convolution sees; 0 is none.
      feature_map: of queries and keys, a key of `models.layers.FEATURE_MAPS`; values have SiLU.
      key_norm: of queries and keys, one of `KEY_NORMS`.
      negative_eigenvalues: whether step sizes go up to 2 instead of 1.
      implementation: of the delta rule, see `delta_rule`.
      **shared: see `RecurrentMixer`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        convolution: int = 4,
        feature_map: str = "silu",
        key_norm: str = "l2",
        negative_eigenvalues: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **shared,
    ):
        self.feature_map = choose(FEATURE_MAPS, feature_map, "feature_map")
        self.key_norm = choose(KEY_NORMS, key_norm, "key_norm")
        # With SiLU for all channels, the convolution does it, and the norms, in the same pass.
        fused = convolution > 0 and feature_map == "silu"
        unit_keys = fused and key_norm == "l2"
        super().__init__(
            width, heads=heads, convolution=convolution, silu=fused, unit_keys=unit_keys, rngs=rngs, **shared
        )
        self.l2_normalize = key_norm == "l2" and not unit_keys
        self.beta_limit = 2.0 if negative_eigenvalues else 1.0
        self.implementation = implementation
        self.beta = Linear(width, heads, rngs=rngs)

    def activate(self, q, k, v):
        if self.convolution and self.convolution.silu:
            return q, k, v
        return self.feature_map(q), self.feature_map(k), jax.nn.silu(v)

    def log_decay(self, x: jax.Array) -> jax.Array | None:
        """[..., heads] for tokens [..., width]; None is no decay."""
        return None

    def recur(self, x, q, k, v, segment_ids):
        def run(q, k, v, beta, decay, segment_ids):
            return delta_rule(
                q,
                k,
                v,
                beta,
                decay,
                segment_ids=segment_ids,
                l2_normalize=self.l2_normalize,
                implementation=self.implementation,
            )

        return over_examples(run, *self._terms(x, q, k, v), self.log_decay(x), segment_ids)

    def recur_step(self, x, q, k, v, cache):
        return delta_rule_step(
            *self._terms(x, q, k, v),
            self.log_decay(x),
            initial_state=cache["state"],
            l2_normalize=self.l2_normalize,
        )

    def _terms(self, x, q, k, v) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        beta = self.beta(x)
        return self.key_norm(q), self.key_norm(k), v, self.beta_limit * jax.nn.sigmoid(beta.astype(wide(beta.dtype)))


class GatedDeltaNet(DeltaNet):
    """DeltaNet whose state decays, by a factor for each head and token (arXiv:2412.06464).

    Args:
      width: of the tokens.
      expand_k: channels of keys per unit of width.
      expand_v: channels of values per unit of width.
      gate: whether the output has a swish gate.
      **shared: see `DeltaNet`.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        expand_k: float = 1.5,
        expand_v: float = 3.0,
        gate: bool = True,
        rngs: nnx.Rngs,
        **shared,
    ):
        super().__init__(width, heads=heads, expand_k=expand_k, expand_v=expand_v, gate=gate, rngs=rngs, **shared)
        self.step_logits = Linear(width, heads, rngs=rngs)
        self.step_bias = nnx.Param(step_size_bias(rngs.params(), heads))
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1e-3, maxval=16.0)))

    def log_decay(self, x):
        return selective_log_decay(self.step_logits(x), self.step_bias[...], self.log_rate[...])[1]
