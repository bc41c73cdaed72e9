"""Linear transformers with an embedding, and the gradient-descent families (Li et al. 2025, eq. 3.3, 3.4 and 4.1).

`weights` returns the vector u that the answer is linear in: the score of a query is `<u, x_query>`. It takes second
moments as sums, and divides them by the fixed training length n inside: that is a rescaling of Q, and not the
normalisation by the actual length, under which the number of hijacking tokens could not matter.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from icl.gradient_descent import gradient_descent
from icl.linear_attention import Gram, prediction_weights, product
from training.errors import UserError, nearest

FORMS = ("full", "sparse", "scalar")


class EmbeddedLinearTransformer(nnx.Module):
    """W_E, P and Q of every layer are trained; the embedding starts at the identity plus noise.

    Attributes:
      embedding: W_E, [d + 1, d + 1].
      p, q: [layers, 1, d + 1, d + 1].
    """

    def __init__(self, layers: int, dimension: int, context: int, init_std: float, *, rngs: nnx.Rngs):
        self._context = context
        size = dimension + 1
        self.embedding = nnx.Param(jnp.eye(size) + init_std * jax.random.normal(rngs.params(), (size, size)))
        self.p = nnx.Param(init_std * jax.random.normal(rngs.params(), (layers, 1, size, size)))
        self.q = nnx.Param(init_std * jax.random.normal(rngs.params(), (layers, 1, size, size)))

    def weights(self, gram: jax.Array) -> jax.Array:
        """u, [d, batch], for second moments [d + 1, d + 1, batch]."""
        embedding = self.embedding[...]
        matrix = jnp.broadcast_to(embedding[..., None], gram.shape)
        embedded = product(product(matrix, gram / self._context), jnp.swapaxes(matrix, 0, 1))
        row = prediction_weights(embedded, self.p[...], self.q[...])
        return jnp.einsum("ij,ib->jb", embedding[:, :-1], row, precision=jax.lax.Precision.HIGHEST)


class DescentTransformer(nnx.Module):
    """Gradient descent from a trained start with trained preconditioners (proposition 4.1).

    Attributes:
      start: w_0, [d].
      rates: multiples of the identity, [layers], or matrices, [layers, d, d]; on the mean over the training length.
    """

    def __init__(self, layers: int, dimension: int, context: int, scalar: bool, init_std: float, *, rngs: nnx.Rngs):
        self._context, self._dimension = context, dimension
        self.start = nnx.Param(init_std * jax.random.normal(rngs.params(), (dimension,)))
        shape = (layers,) if scalar else (layers, dimension, dimension)
        self.rates = nnx.Param(init_std * jax.random.normal(rngs.params(), shape))

    def weights(self, gram: jax.Array) -> jax.Array:
        """As `EmbeddedLinearTransformer.weights`."""
        start, rates = self.start[...], self.rates[...]
        matrices = rates if rates.ndim == 3 else rates[:, None, None] * jnp.eye(self._dimension, dtype=rates.dtype)
        s, b = gram[:-1, :-1] / self._context, gram[:-1, -1] / self._context
        shifted = b - jnp.einsum("ijb,j->ib", s, start, precision=jax.lax.Precision.HIGHEST)
        return start[:, None] + gradient_descent(Gram(s, shifted, gram[-1, -1]), matrices)[-1]


def linear_transformer(
    form: str, layers: int, dimension: int, context: int, init_std: float = 0.005, *, rngs: nnx.Rngs
) -> nnx.Module:
    """The family by name: `full`, `sparse` (preconditioned descent) or `scalar` (one step size per layer)."""
    if form not in FORMS:
        raise UserError(f"model.form={form!r}: {nearest(form, FORMS)}")
    if form == "full":
        return EmbeddedLinearTransformer(layers, dimension, context, init_std, rngs=rngs)
    return DescentTransformer(layers, dimension, context, form == "scalar", init_std, rngs=rngs)
