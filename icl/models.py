"""Linear transformers for in-context regression, as Flax modules over `icl.linear_attention`.

Called with the Gram state of a batch of prompts and the queries, they return the query's label entry after the last
layer; the prediction is minus that (Ahn et al. 2023, section 2). `weights` is the vector that the prediction is linear
in (Vladymyrov et al. 2024, Theorem 4.1), from second moments in any normalisation.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from icl.linear_attention import Gram, gram_transformer, prediction_weights, sparse_transformer


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

    def weights(self, g: jax.Array, layers: int | None = None) -> jax.Array:
        """w after the first `layers` layers, or all, [d, batch]; the prediction is `<w, x_query>`.

        g holds the second moments of the example tokens, [d + 1, d + 1, batch].
        """
        return prediction_weights(g, self.p[:layers], self.q[:layers])[:-1]


class DiagonalLinearTransformer(nnx.Module):
    """Diagonal P and Q whose entries for the covariates are tied: four numbers in a layer and head, and three in GD++.

    `P = diag(p_x, ..., p_x, p_y)` and `Q = diag(q_x, ..., q_x, q_y)` (Vladymyrov et al. 2024, eq. 9); GD++ has
    `q_y = 0` (eq. 11), so that no token's label entry changes its covariates or scales itself.

    Attributes:
      p_x, p_y, q_x: [layers, heads].
      q_y: the same shape; None where it is fixed at zero.
    """

    def __init__(
        self,
        layers: int,
        dimension: int,
        heads: int = 1,
        reads_labels: bool = True,
        init_std: float = 0.01,
        *,
        rngs: nnx.Rngs,
    ):
        self._dimension = dimension
        self.p_x, self.p_y, self.q_x = (self._entry(layers, heads, init_std, rngs) for _ in range(3))
        self.q_y = self._entry(layers, heads, init_std, rngs) if reads_labels else None

    @staticmethod
    def _entry(layers: int, heads: int, init_std: float, rngs: nnx.Rngs) -> nnx.Param:
        return nnx.Param(init_std * jax.random.normal(rngs.params(), (layers, heads)))

    def weights(self, g: jax.Array, layers: int | None = None) -> jax.Array:
        """As `LinearTransformer.weights`."""
        p, q = self.matrices()
        return prediction_weights(g, p[:layers], q[:layers])[:-1]

    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """The diagonals of P and Q, each [layers, heads, d + 1]."""
        p_x, p_y, q_x = self.p_x[...], self.p_y[...], self.q_x[...]
        q_y = jnp.zeros_like(q_x) if self.q_y is None else self.q_y[...]

        def diagonal(covariates: jax.Array, label: jax.Array) -> jax.Array:
            repeated = jnp.broadcast_to(covariates[..., None], (*covariates.shape, self._dimension))
            return jnp.concatenate([repeated, label[..., None]], axis=-1)

        return diagonal(p_x, p_y), diagonal(q_x, q_y)

    def omegas(self) -> dict[str, jax.Array]:
        """The products that the layers depend on, summed over heads, each [layers]: `xy` is `sum_h p_x q_y`."""
        p, q = self.matrices()
        ends = {"x": 0, "y": -1}
        return {f"{i}{j}": (p[..., a] * q[..., b]).sum(-1) for i, a in ends.items() for j, b in ends.items()}


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
