"""Other linear transformers in both directions, through the same op (section 3 and appendix B of the paper).

Each is the bidirectional form of a causal recurrence `S_i = L_i * S_{i-1} + k_i v_i^T`, `y_i = q_i^T S_i`, with the
diagonal counted once. What surrounds the recurrence in its own model (convolutions, output gates) is left out; a
normalisation over each head, which the models without row sums have in one form or another, is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lion.layer import FEATURE_MAPS, LinearMixer, gate_logits
from training.config import resolve


def head_norm(y: jax.Array) -> jax.Array:
    """Divides by the root mean square over the last axis."""
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(y.dtype)


class Mapped(LinearMixer):
    """A mixer given by its `terms` and by how it reads the result."""

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k, v, `[batch, time, heads, dim]`, and log-decays as `lion_attention` takes them."""
        raise NotImplementedError(f"{type(self).__name__} defines no terms")

    def read(self, numerator: jax.Array) -> jax.Array:
        """The output of the heads, from `sum_j M_ij (q_i . k_j) v_j`."""
        return head_norm(numerator)

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        y = self.read(self.attend(*self.terms(x), normalize=False, padding_mask=padding_mask))
        return self.out(y.reshape(x.shape))


class RetNet(Mapped):
    """RetNet (Sun et al. 2023): fixed decays `1 - 2^(-5 - h)`, no row sums; its rotations of q and k are left out."""

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        q, k, v = self.project(x)
        return q * self.dim**-0.5, k, v, jnp.log1p(-(2.0 ** (-5 - np.arange(self.heads, dtype=np.float32))))


class GatedRfa(LinearMixer):
    """Gated random feature attention (Peng et al. 2021): `S = g S + (1 - g) k v^T`, divided by the row sums.

    The feature map is LION's; random features would be another.
    """

    def __init__(self, width: int, heads: int, *, feature_map: str = "silu", rngs: nnx.Rngs, **shared):
        super().__init__(width, heads, rngs=rngs, **shared)
        self.feature_map = feature_map
        self.gate = self.linear(width, heads, rngs=rngs)

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k, v and log-decays, as `Mapped.terms`."""
        q, k, v = self.project(x)
        q, k = (FEATURE_MAPS[self.feature_map](z) for z in (q, k))
        logits = gate_logits(self.gate, x, self.heads)
        return q, k * jax.nn.sigmoid(-logits)[..., None].astype(k.dtype), v, jax.nn.log_sigmoid(logits)

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        return self.out(self.attend(*self.terms(x), padding_mask=padding_mask).reshape(x.shape))


class Mamba2(Mapped):
    """Mamba-2 (Dao & Gu 2024): steps `softplus(w x + b)` scale keys, and decays `exp(-step exp(A))`; no row sums.

    The steps start between 1e-3 and 1e-1 and `exp(A)` between 1 and 16, as in Mamba-2. q and k are of each head.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **shared):
        super().__init__(width, heads, rngs=rngs, **shared)
        self.step = self.linear(width, heads, rngs=rngs)
        steps = 10 ** jax.random.uniform(rngs.params(), (heads,), minval=-3, maxval=-1)
        self.step.bias[...] = jnp.log(jnp.expm1(steps))
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16)))

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        q, k, v = self.project(x)
        step = jax.nn.softplus(gate_logits(self.step, x, self.heads))
        return q, k * step[..., None].astype(k.dtype), v, -step * jnp.exp(self.log_rate[...].astype(step.dtype))


class MLstm(LinearMixer):
    """The mLSTM of xLSTM (Beck et al. 2024): `S = f S + i k v^T`, divided by `max(|q^T z|, 1)`.

    The exponential input gate has the soft cap of xLSTM-7B instead of a running maximum, which has no bidirectional
    counterpart in the paper.
    """

    CAP = 15.0

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **shared):
        super().__init__(width, heads, rngs=rngs, **shared)
        self.input_gate, self.forget_gate = (self.linear(width, heads, rngs=rngs) for _ in range(2))

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k, v and log-decays, as `Mapped.terms`."""
        q, k, v = self.project(x)
        gate = jnp.exp(self.CAP * jnp.tanh(gate_logits(self.input_gate, x, self.heads) / self.CAP))
        k = k * self.dim**-0.5 * gate[..., None].astype(k.dtype)
        return q, k, v, jax.nn.log_sigmoid(gate_logits(self.forget_gate, x, self.heads))

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        q, k, v, decay = self.terms(x)
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)  # the last column becomes the row sum
        y = self.attend(q, k, v, decay, normalize=False, padding_mask=padding_mask)
        return self.out((y[..., :-1] / jnp.maximum(jnp.abs(y[..., -1:]), 1)).reshape(x.shape))


class Hgrn2(Mapped):
    """HGRN-2 (Qin et al. 2024): a decay for each channel and token, and `k = 1 - decay`; no lower bounds on decays."""

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        q, k, v = self.project(x)
        logits = k.astype(jnp.promote_types(k.dtype, jnp.float32))
        return jax.nn.silu(q), jax.nn.sigmoid(-logits).astype(k.dtype), v, jax.nn.log_sigmoid(logits)


class Rwkv6(Mapped):
    """RWKV-6 (Peng et al. 2024): a decay `exp(-exp(w))` for each channel and token, w linear in x; no token shift.

    The bonus for the current token, which RWKV-6 adds to its diagonal, has no place in the paper's mapping.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, **shared):
        super().__init__(width, heads, rngs=rngs, **shared)
        self.gate = self.linear(width, width, rngs=rngs)
        self.gate.bias[...] = jnp.tile(jnp.linspace(-6.0, -1.0, self.dim), heads)

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        q, k, v = self.project(x)
        logits = gate_logits(self.gate, x, self.heads)
        return q, k, v, -jnp.exp(logits.reshape(*x.shape[:2], self.heads, self.dim))


class DeltaNet(LinearMixer):
    """DeltaNet (Schlag et al. 2021; Yang et al. 2024) in both directions, as the paper's remark has it (section 3).

    Its state decays by a matrix, `S_i = (I - b_i k_i k_i^T) S_{i-1} + b_i k_i v_i^T`, so that the full form would need
    an inverse. Both directions run the causal op, and what a token writes for itself, `b_i (q_i . k_i) v_i`, counts
    once. As in the remark, what reaches a token passes the matrix of that token, not that of the token that wrote it.
    Queries and keys are SiLU of unit length, the steps `sigmoid(w x)`, and the heads' outputs normalised, as in
    DeltaNet; its short convolutions are left out.

    Args:
      op: import path of the causal op, or the op: `op(q, k, v, beta, scale=...)` gives outputs and a state.
      width, heads, rngs, **shared: see `LinearMixer`; the choices of a form are not for this mixer.
    """

    def __init__(self, width: int, heads: int, *, op: str | Callable[..., Any], rngs: nnx.Rngs, **shared):
        super().__init__(width, heads, rngs=rngs, **shared)
        self.op = resolve(op) if isinstance(op, str) else op
        self.step = self.linear(width, heads, rngs=rngs)

    def terms(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """q, k and v, `[batch, time, heads, dim]`, and steps `[batch, time, heads]` between 0 and 1."""
        q, k, v = self.project(x)
        q, k = (_unit(jax.nn.silu(z)) for z in (q, k))
        return q, k, v, jax.nn.sigmoid(gate_logits(self.step, x, self.heads))

    def __call__(self, x: jax.Array, padding_mask: jax.Array | None = None) -> jax.Array:
        """`[batch, time, width]` to the same; `padding_mask` `[batch, time]` is true where a token counts."""
        q, k, v, step = self.terms(x)
        if padding_mask is not None:
            step = jnp.where(padding_mask[..., None], step, 0)  # such a token changes no state
        forward, _ = self.op(q, k, v, step, scale=1.0)
        backward, _ = self.op(*(jnp.flip(z, 1) for z in (q, k, v, step)), scale=1.0)
        own = step * jnp.sum(q.astype(step.dtype) * k.astype(step.dtype), -1)
        y = forward + jnp.flip(backward, 1) - (own[..., None] * v).astype(v.dtype)
        return self.out(head_norm(y).reshape(x.shape))


def _unit(x: jax.Array) -> jax.Array:
    """Unit length over the last axis; zero stays zero."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)
