"""Linear attention for callers: checks and padding."""

import jax
import jax.numpy as jnp

from models.linear_attention.chunked import chunked_linear_attention

CHUNK = 64


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
    """Causal linear attention whose state decays, for each head (RetNet, Mamba-2) or each of its channels (GLA).

        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T
        o_t = scale S_t^T q_t

    Args:
      q: queries, [batch, time, heads, dim], any floating dtype; sums are in float32 at least.
      k: keys, like `q`.
      v: values, [batch, time, heads, value_dim], of the same dtype.
      g: logarithms of the decay, finite and not positive, [batch, time, heads] or [batch, time, heads, dim]; None is no
        decay.
      scale: of the queries; None is `dim ** -0.5`.
      initial_state: [batch, heads, dim, value_dim], float32 or float64; None is zero. It is that of the first segment.
      segment_ids: integers, [batch, time]; where the number changes, the state starts from zero.

    Returns:
      The output, like `v`, and the state after the last token, [batch, heads, dim, value_dim], float32 at least.

    Raises:
      TypeError: an argument has a wrong dtype.
      ValueError: shapes do not fit.
    """
    _check(q, k, v, g, initial_state, segment_ids)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    time, scale, state = q.shape[1], _scale(q, scale), _state(q, v, initial_state)
    starts = None
    if segment_ids is not None:
        starts = jnp.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).astype(jnp.int32), ((0, 0), (1, 0)))
    if g is not None:
        g = g.astype(wide)
        g = g[..., None] if g.ndim == 3 else g
    chunk = min(CHUNK, 1 << (time - 1).bit_length())
    q, k, v, g, starts = (_pad(x, -time % chunk) for x in (q, k, v, g, starts))
    output, state = chunked_linear_attention(q, k, v, g, starts, state, scale, chunk)
    return output[:, :time], state


def linear_attention_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token of `linear_attention`, for decoding: the same arguments without the time axis."""
    state, dtype = initial_state, initial_state.dtype
    if g is not None:
        decay = jnp.exp(g.astype(dtype))
        state = state * (decay[..., None] if decay.ndim == 3 else decay[..., None, None])
    state = state + k.astype(dtype)[..., None] * v.astype(dtype)[..., None, :]
    output = jnp.einsum("bhdv,bhd->bhv", state, q.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    return (_scale(q, scale) * output).astype(v.dtype), state


def _scale(q: jax.Array, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _state(q: jax.Array, v: jax.Array, initial_state: jax.Array | None) -> jax.Array:
    if initial_state is not None:
        return initial_state
    batch, _, heads, dim = q.shape
    return jnp.zeros((batch, heads, dim, v.shape[-1]), jnp.promote_types(q.dtype, jnp.float32))


def _pad(x: jax.Array | None, missing: int) -> jax.Array | None:
    """Zeros at the end of the time axis: a token with key 0 and log-decay 0 changes nothing."""
    if x is None or not missing:
        return x
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def _check(q, k, v, g, initial_state, segment_ids) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("g", g), ("initial_state", initial_state)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be of a floating dtype, not {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.ndim != 4 or v.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q and v must be [batch, time, heads, dim], not empty; they are {q.shape} and {v.shape}")
    batch, time, heads, dim = q.shape
    expected = {
        "k": (k, (q.shape,)),
        "v": (v, ((batch, time, heads, v.shape[-1]),)),
        "g": (g, ((batch, time, heads), q.shape)),
        "initial_state": (initial_state, ((batch, heads, dim, v.shape[-1]),)),
        "segment_ids": (segment_ids, ((batch, time),)),
    }
    for name, (x, shapes) in expected.items():
        if x is not None and x.shape not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]} beside q of shape {q.shape}, not {x.shape}")
