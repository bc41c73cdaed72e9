"""The bidirectional recurrence, Theorem 3.1: memory for two states and the outputs, one step a token.

Each state decays with the gate of the token that it has just left, which realises the mask of Eq. 9; the recurrence as
printed decays with the gate of the token that it enters, and gives the transposed mask (DERIVATION.md, section 3).
Its use is inference: differentiating it keeps the states of all steps.
"""

import jax
import jax.numpy as jnp

from lion.attention.decay import accumulator


def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, direction: str = "both"
) -> tuple[jax.Array, jax.Array]:
    """Numerators and row sums; arguments and results as in `lion.attention.full.full`."""
    batch, heads, time, dim = q.shape
    acc = accumulator(q.dtype)
    decay = jnp.ones((1, 1, time, 1), acc) if log_decay is None else jnp.exp(log_decay)
    q, k, v = (jnp.moveaxis(x.astype(acc), 2, 0) for x in (q, k, v))
    decay = jnp.moveaxis(decay, 2, 0)
    # Both directions take their steps together, on a leading axis where there are two.
    ways = {
        "both": (slice(None), slice(None, None, -1)),
        "forward": (slice(None),),
        "backward": (slice(None, None, -1),),
    }
    ways = ways[direction]
    share = 1 / len(ways)  # of the diagonal that each direction counts

    def step(states: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]) -> tuple[tuple, tuple]:
        state, key_sum = states
        q, k, v, left = token
        state = left[..., None] * state + k[..., None] * v[..., None, :]
        key_sum = left * key_sum + k
        own = (1 - share) * jnp.sum(q * k, -1)
        y = jnp.sum(q[..., None] * state, -2) - own[..., None] * v
        return (state, key_sum), (y, jnp.sum(q * key_sum, -1) - own)

    tokens = [jnp.stack([x[way] for way in ways], 1) for x in (q, k, v, decay)]
    tokens[3] = jnp.concatenate([jnp.ones_like(tokens[3][:1]), tokens[3][:-1]])
    start = jnp.zeros((len(ways), batch, heads, dim, v.shape[-1]), acc), jnp.zeros((len(ways), batch, heads, dim), acc)
    _, outputs = jax.lax.scan(step, start, tuple(tokens))
    numerator, row_sum = (sum(y[:, i][way] for i, way in enumerate(ways)) for y in outputs)
    return jnp.moveaxis(numerator, 0, 2), jnp.moveaxis(row_sum, 0, 2)
