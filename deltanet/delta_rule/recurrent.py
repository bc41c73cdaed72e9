"""The delta rule one token at a time: the step of decoding, and the paper's recurrent form of whole sequences."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

# Tokens between the states that the backward keeps; those between are computed again.
BLOCK = 64


def update(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """One token, arXiv:2406.06484 section 2.2 (transposed state).

    Args:
      state: [..., dim, value_dim], float32 or float64, which is the dtype of the computation.
      q: [..., dim].
      k: [..., dim].
      v: [..., value_dim].
      beta: [...].
      decay: factors of the old state, [...]; None is no decay.
      scale: of the query.

    Returns:
      The new state, and the output [..., value_dim] in the dtype of `v`.
    """
    dtype = v.dtype
    q, k, v, beta = (x.astype(state.dtype) for x in (q, k, v, beta))
    read = partial(jnp.einsum, "...kv,...k->...v", precision=lax.Precision.HIGHEST)
    if decay is not None:
        state = decay[..., None, None] * state
    error = v - read(state, k)
    state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
    return state, (scale * read(state, q)).astype(dtype)


def recurrent_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
    starts: jax.Array | None,
    state: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """The delta rule token by token; arguments and results as in `chunked_delta_rule`, `time` a multiple of `BLOCK`."""
    decay = None if g is None else jnp.exp(g.astype(state.dtype))
    if starts is not None:
        decay = (1 if decay is None else decay) * jnp.broadcast_to(1 - starts[..., None], beta.shape).astype(
            state.dtype
        )

    def token(state, inputs):
        return update(state, *inputs, scale)

    @jax.checkpoint
    def block(state, inputs):
        return lax.scan(token, state, inputs)

    def cut(x):
        return jnp.moveaxis(x, 1, 0).reshape(-1, BLOCK, x.shape[0], *x.shape[2:])

    final, output = lax.scan(block, state, jax.tree.map(cut, (q, k, v, beta, decay)))
    return jnp.moveaxis(output.reshape(-1, *output.shape[2:]), 0, 1), final
