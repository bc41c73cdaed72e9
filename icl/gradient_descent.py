"""Gradient descent, GD++ and least squares on regression prompts: what the transformer is held to.

The recursions are those of Ahn et al. (arXiv:2306.00297): Lemma 1, section 5 (GD++), and the baselines of figures 6
and 7. The batch of prompts is the last axis, and every function works in the dtype of its arguments.
"""

from functools import partial

import jax
import jax.numpy as jnp

from icl.linear_attention import Gram
from icl.regression import Covariance

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def gradient_descent(gram: Gram, preconditioners: jax.Array) -> jax.Array:
    """The iterates of preconditioned gradient descent from 0 on `R(w) = sum_i (<w, x_i> - y_i)^2 / 2n`.

    Step l is `w <- w - M_l grad R(w)`. The transformer of eq. (8) predicts `<w, x_query>` with `M_l = -A_l^T` for
    trained blocks A_l (Lemma 1; the paper omits the transpose, which is right for symmetric blocks only).

    Args:
      gram: moments of the examples. `yy` is not used.
      preconditioners: M, [steps, d, d].

    Returns:
      w after every step, [steps, d, batch].
    """
    w = jnp.zeros_like(gram.xy)
    iterates = []
    for m in preconditioners:
        gradient = _einsum("ijb,jb->ib", gram.xx, w) - gram.xy
        w = w - _einsum("ij,jb->ib", m, gradient)
        iterates.append(w)
    return jnp.stack(iterates)


def gd_plus_plus(x: jax.Array, y: jax.Array, x_query: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The query's label entry after GD++ (section 5): a step on the labels, then one on the covariates.

    With `S = X X^T / n` of the current covariates, a step is `y_i <- y_i + a (X y / n)^T x_i` and
    `x_i <- (I + a b S) x_i`, for the examples and the query alike, both from the old values. It is the model of
    eq. (11) with multiples of the identity as blocks.

    Args:
      x: [d, n, batch].
      y: [n, batch].
      x_query: [d, batch].
      a: [steps], negative for descent.
      b: [steps].

    Returns:
      [batch]. The prediction is minus this entry.
    """
    n = y.shape[0]
    tokens = jnp.concatenate([x, x_query[:, None]], axis=1)
    labels = jnp.concatenate([y, jnp.zeros_like(y[:1])], axis=0)
    for a_step, b_step in zip(a, b, strict=True):
        examples = tokens[:, :n]
        direction = _einsum("inb,nb->ib", examples, labels[:n]) / n
        similarity = _einsum("inb,imb->nmb", examples, tokens)
        labels = labels + a_step * _einsum("ib,imb->mb", direction, tokens)
        tokens = tokens + a_step * b_step * _einsum("inb,nmb->imb", examples, similarity) / n
    return labels[n]


def least_squares(x: jax.Array, y: jax.Array, covariance: Covariance) -> jax.Array:
    """The interpolant of least norm in whitened coordinates, [d, batch], for x [d, n, batch], y [n, batch].

    Where n >= d this is the task vector itself; for fewer examples the expected loss is d - n.
    """
    whitened = _einsum("ji,jnb->bni", covariance.inverse_sqrt, x)
    w = _einsum("bin,nb->ib", jnp.linalg.pinv(whitened), y)
    return _einsum("ij,jb->ib", covariance.inverse_sqrt, w)
