"""Classification prompts, clean and hijacked (Li et al. 2025, definitions 3.1 and 3.2).

A clean prompt has a task `w = g / ||g||`, `g ~ N(1, spread^2 I)`, examples `x_i ~ N(0, I)` with `y_i = sign <w, x_i>`
and a query. Tasks gather around `beta = 1 / sqrt(d)`. A hijacked prompt repeats one token N times: it lies on the
boundary beside the query, with the label that the query does not have. The batch of prompts is the last axis.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

SIGN_MEAN = (2 / jnp.pi) ** 0.5
"""`E <v, x> sign <w, x> = SIGN_MEAN <v, w>` for unit w and `x ~ N(0, I)`."""


def mean_direction(dimension: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """beta, [d]."""
    return jnp.full(dimension, dimension**-0.5, dtype)


def sample_tasks(
    key: jax.Array, dimension: int, spread: jax.Array | float, batch: int, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
    """Unit task vectors, [d, batch]. `spread` is the standard deviation of a coordinate of g around 1."""
    g = 1 + spread * jax.random.normal(key, (dimension, batch), dtype)
    return g / jnp.linalg.norm(g, axis=0)


def clean_gram(key: jax.Array, w: jax.Array, examples: int, length: jax.Array | None = None) -> jax.Array:
    """Second moments of the example tokens `(x, y)`, as sums, [d + 1, d + 1, batch], for tasks [d, batch].

    Args:
      key: of the examples.
      w: tasks.
      examples: number of examples.
      length: [batch], how many of them count; all if it is not given.
    """
    x = jax.random.normal(key, (len(w), examples, w.shape[-1]), w.dtype)
    y = jnp.where(_einsum("ib,inb->nb", w, x) < 0, -1, 1).astype(w.dtype)
    tokens = jnp.concatenate([x, y[None]])
    if length is not None:
        tokens = tokens * (jnp.arange(examples)[:, None] < length)
    return _einsum("inb,jnb->ijb", tokens, tokens)


class Hijack(NamedTuple):
    """Hijacked prompts.

    Attributes:
      w: tasks, [d, batch].
      x_token: the covariates of the repeated token, orthogonal to w, [d, batch].
      x_query: `x_token + sigma w`, [d, batch].
      y_query: `sign(sigma)`, the query's label, [batch]. The token's label is the other one.
    """

    w: jax.Array
    x_token: jax.Array
    x_query: jax.Array
    y_query: jax.Array

    def gram(self, count: jax.Array | float) -> jax.Array:
        """Second moments of the context, as sums: `count` times one token's, [d + 1, d + 1, batch]."""
        token = jnp.concatenate([self.x_token, -self.y_query[None]])
        return count * token[:, None] * token[None]


def sample_hijack(key: jax.Array, w: jax.Array, sigma: jax.Array | float) -> Hijack:
    """Hijacked prompts for the tasks [d, batch]; `sigma` is the query's distance from the boundary, with its sign.

    The token's label is set, not computed: a point on the boundary has none.
    """
    x = jax.random.normal(key, w.shape, w.dtype)
    x_token = x - (x * w).sum(0) * w
    sigma = jnp.broadcast_to(jnp.asarray(sigma, w.dtype), w.shape[1:])
    return Hijack(w, x_token, x_token + sigma * w, jnp.sign(sigma))
