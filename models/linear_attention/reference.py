"""Linear attention token by token: the oracle of the chunked form. It shares no algebra with it."""

import jax
import jax.numpy as jnp
from jax import lax


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence as it is written; arguments and results as in `models.linear_attention.linear_attention`.

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale S_t^T q_t

    Computes in float32, or in float64 where an argument is float64, and returns that dtype.
    """
    dtype = jnp.result_type(jnp.float32, q, k, v)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    batch, time, heads, dim = q.shape
    decay = jnp.ones_like(q)
    if g is not None:
        decay = jnp.broadcast_to(jnp.exp(g.astype(dtype)).reshape(batch, time, heads, -1), q.shape)
    if segment_ids is not None:
        starts = jnp.zeros((batch, time), bool).at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
        decay = jnp.where(starts[..., None, None], 0, decay)
    scale = dim**-0.5 if scale is None else scale
    state = jnp.zeros((batch, heads, dim, v.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)

    def token(state, inputs):
        q, k, v, decay = inputs
        state = decay[..., None] * state + k[..., None] * v[..., None, :]
        return state, scale * (state * q[..., None]).sum(-2)

    state, output = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, decay)))
    return jnp.moveaxis(output, 0, 1), state
