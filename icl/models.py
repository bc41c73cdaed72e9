"""Linear transformers for in-context regression, as Flax modules over `icl.linear_attention`.

Both take the Gram state of a batch of prompts and the queries, and return the query's label entry after the last
layer; the paper's prediction is minus that (Ahn et al. 2023, section 2).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from icl.linear_attention import Gram, gram_transformer, sparse_transformer


class LinearTransformer(nnx.Module):
    """Unconstrained P and Q in every layer and head, eq. (3) and (4); no sharing between layers.

    Attributes:
      p: projections, [layers, heads, d + 1, d + 1].
      q: bilinear forms of the scores, [layers, heads, d + 1, d + 1].
    """

    def __init__(self, layers: int, dimension: int, heads: int = 1, init_std: float = 1e-4, *, rngs: nnx.Rngs):
        shape = (layers, heads, dimension + 1, dimension + 1)
        self.p = nnx.Param(init_std * jax.random.normal(rngs.params(), shape))
        self.q = nnx.Param(init_std * jax.random.normal(rngs.params(), shape))

    def __call__(self, gram: Gram, x_query: jax.Array) -> jax.Array:
        """The query's label entry, [batch], for queries [d, batch]."""
        query = jnp.concatenate([x_query, jnp.zeros_like(x_query[:1])])
        return gram_transformer(gram, query, self.p[...], self.q[...])[-1, -1]


class SparseLinearTransformer(nnx.Module):
    """The structured models: `P = [[B, 0], [0, 1]]`, `Q = [[A, 0], [0, 0]]`, eq. (11); eq. (8) without `project`.

    A has the sign of the authors' code, so gradient descent has negative A. The last layer's B does not influence the
    output; it is kept, as in the paper, and stays where it was initialised.

    Attributes:
      a: blocks A, [layers, heads, d, d].
      b: blocks B, the same shape; None where they are fixed at zero.
    """

    def __init__(
        self,
        layers: int,
        dimension: int,
        heads: int = 1,
        project: bool = True,
        init_std: float = 1e-4,
        *,
        rngs: nnx.Rngs,
    ):
        shape = (layers, heads, dimension, dimension)
        self.a = nnx.Param(init_std * jax.random.normal(rngs.params(), shape))
        self.b = nnx.Param(init_std * jax.random.normal(rngs.params(), shape)) if project else None

    def __call__(self, gram: Gram, x_query: jax.Array) -> jax.Array:
        """The query's label entry, [batch], for queries [d, batch]."""
        return sparse_transformer(gram, x_query, self.a[...], None if self.b is None else self.b[...])
