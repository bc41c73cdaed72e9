"""The oracle: Eq. 8 with the mask of Eq. 9 written out, one multiplication by a decay at a time.

No logarithms, sums of them, chunks or states appear here, so nothing is shared with the forms under test. It costs
`time^2` memory (times the head size where the decay is a vector) and is as accurate as the dtype of its arguments.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def reference_mask(decay: jax.Array, direction: str = "both") -> jax.Array:
    """The mask of Eq. 9 for decays `[time, ...]` (not their logarithms), `[time (query), time (key), ...]`.

    Below the diagonal it is the product of the decays of the tokens `j ... i - 1`, above it of `i + 1 ... j`; both hold
    the decay of the key. `direction` "forward" keeps what is on and below the diagonal, "backward" on and above.
    """
    time = decay.shape[0]
    index = jnp.arange(time).reshape(time, *[1] * (decay.ndim - 1))
    nothing = jnp.zeros_like(decay)

    def lower(row: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = jnp.where(index < i, row * decay[i - 1], nothing)
        row = jnp.where(index == i, 1, row)
        return row, row

    def upper(row: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        strict = jnp.where(index > i, row * decay[jnp.minimum(i + 1, time - 1)], nothing)
        return jnp.where(index == i, 1, strict), strict

    _, on_and_below = jax.lax.scan(lower, nothing, jnp.arange(time))
    _, above = jax.lax.scan(upper, nothing, jnp.arange(time), reverse=True)
    if direction == "forward":
        return on_and_below
    on_diagonal = jnp.where(jnp.expand_dims(index, 1) == index[None], 1, jnp.zeros_like(above))
    return on_diagonal + above if direction == "backward" else on_and_below + above


def reference_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | Sequence[jax.Array] | None = None,
    *,
    normalize: bool = True,
    padding_mask: jax.Array | None = None,
    orders: Sequence[Sequence[int]] | None = None,
    direction: str = "both",
) -> jax.Array:
    """`SCALE(Q K^T * M) V`; the arguments are those of `lion.attention.lion_attention`."""
    orders = [range(q.shape[1])] if orders is None else orders
    log_decays = log_decay if isinstance(log_decay, tuple | list) else [log_decay] * len(orders)
    scores = 0
    for one, order in zip(log_decays, orders, strict=True):
        order = np.asarray(order)
        inverse = np.argsort(order)
        decay = jnp.ones((), q.dtype) if one is None else jnp.exp(one)
        if decay.ndim < 2:
            decay = jnp.broadcast_to(decay, q.shape[:3])
        if decay.ndim == 3:
            decay = decay[..., None]
        in_order = jnp.moveaxis(decay[:, order], 1, 0)
        mask = reference_mask(in_order, direction)[inverse][:, inverse]
        scores += jnp.einsum("bihd,ijbhd,bjhd->bhij", q, jnp.broadcast_to(mask, (*mask.shape[:4], q.shape[-1])), k)
    scores /= len(orders)
    if padding_mask is not None:
        scores *= padding_mask[:, None, None, :]
    if normalize:
        total = scores.sum(-1, keepdims=True)
        scores /= total if padding_mask is None else jnp.where(padding_mask[:, None, :, None], total, 1)
    y = jnp.einsum("bhij,bjhv->bihv", scores, v)
    return y if padding_mask is None else y * padding_mask[..., None, None]
