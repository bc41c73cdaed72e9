"""The factors of the decay (DERIVATION.md, "One chunk").

`rows` is a reference to the numbers per token of a chunk, [1 to 3, chunk], in shared memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deltanet.delta_rule.hopper.layout import CHUNK, Layout
from models.kernels.mosaic_gpu import along_columns, along_rows, row_and_column


def pairs(rows: Any, layout: Layout) -> jax.Array:
    """Gamma, [chunk, chunk]: ones on and below the diagonal where there is no decay."""
    i, j = row_and_column((CHUNK, CHUNK))
    reaches = i >= j
    if not layout.gated:
        return jnp.where(reaches, 1.0, 0.0)

    def difference(ref):
        row = lax.broadcast_in_dim(along_rows(ref), (CHUNK, CHUNK), [0])
        column = lax.broadcast_in_dim(along_columns(ref), (CHUNK, CHUNK), [1])
        return row - column

    if layout.packed:
        reaches = reaches & (difference(rows.at[2]) == 0)
    # The mask comes before the exponential, which could overflow above the diagonal.
    return jnp.exp(jnp.where(reaches, difference(rows.at[1]), -jnp.inf))


def entry(rows: Any, layout: Layout) -> jax.Array:
    """gamma, [chunk], along rows."""
    factor = jnp.exp(along_rows(rows.at[1]))
    return jnp.where(along_rows(rows.at[2]) == 0, factor, 0.0) if layout.packed else factor


def exit(rows: Any, layout: Layout) -> jax.Array:
    """lambda, [chunk], along rows."""
    factor = jnp.exp(rows[1, CHUNK - 1] - along_rows(rows.at[1]))
    return jnp.where(along_rows(rows.at[2]) == rows[2, CHUNK - 1], factor, 0.0) if layout.packed else factor


def whole(rows: Any, layout: Layout) -> jax.Array:
    """The decay of the state over the chunk, a number."""
    factor = jnp.exp(rows[1, CHUNK - 1])
    return jnp.where(rows[2, CHUNK - 1] == 0, factor, 0.0) if layout.packed else factor
