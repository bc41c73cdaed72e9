"""The delta rule token by token: the oracle of the other forms. It shares no algebra with them."""

import jax
import jax.numpy as jnp
from jax import lax

NORM_EPSILON = 1e-6  # inside the root, as in the authors' code


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    l2_normalize: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The recurrence of arXiv:2406.06484 section 2.2 (transposed state) with the decay of arXiv:2412.06464, eq. (10).

        u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
        S_t = exp(g_t) S_{t-1} + k_t u_t^T
        o_t = scale S_t^T q_t

    Computes in float32, or in float64 where an argument is float64 (which needs `jax.enable_x64`).

    Args:
      q: queries, [batch, time, heads, dim], any floating dtype.
      k: keys, like `q`.
      v: values, [batch, time, heads, value_dim].
      beta: step sizes, [batch, time, heads].
      g: logarithms of the decay, like `beta`; None is no decay.
      scale: of the queries; None is `dim ** -0.5`.
      initial_state: [batch, heads, dim, value_dim]; None is zero.
      segment_ids: integers, [batch, time]. Where the number changes, the state starts again from zero.
      l2_normalize: divide queries and keys by `sqrt(sum(x ** 2) + 1e-6)` first.

    Returns:
      The output, [batch, time, heads, value_dim], and the state after the last token, [batch, heads, dim, value_dim],
      both in the dtype of the computation.
    """
    dtype = jnp.result_type(jnp.float32, q, k, v, beta)
    q, k, v, beta = (x.astype(dtype) for x in (q, k, v, beta))
    batch, time, heads, dim = q.shape
    if l2_normalize:
        q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + NORM_EPSILON) for x in (q, k))
    decay = jnp.ones_like(beta) if g is None else jnp.exp(g.astype(dtype))
    if segment_ids is not None:
        starts = jnp.zeros((batch, time), bool).at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
        decay = jnp.where(starts[..., None], 0, decay)
    scale = dim**-0.5 if scale is None else scale
    state = jnp.zeros((batch, heads, dim, v.shape[-1]), dtype) if initial_state is None else initial_state.astype(dtype)

    def token(state, inputs):
        q, k, v, beta, decay = inputs
        state = decay[..., None, None] * state
        error = v - (state * k[..., None]).sum(-2)
        state = state + k[..., None] * (beta[..., None] * error)[..., None, :]
        return state, scale * (state * q[..., None]).sum(-2)

    state, output = lax.scan(token, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, beta, decay)))
    return jnp.moveaxis(output, 0, 1), state
