"""Linear transformers on regression prompts: the literal layer, and the exact recursion on Gram matrices.

The equations are those of Ahn et al., "Transformers learn to implement preconditioned gradient descent for in-context
learning" (arXiv:2306.00297), section 2. A prompt is n examples and one query; its token matrix holds the examples as
columns `(x_i, y_i)` and the query as the last column `(x_query, 0)`.

Two forms of the same map live here:

* `literal_attention`, `literal_transformer`: the paper's formulas on token matrices, batch first. They are the oracle.
* `sparse_transformer`, `gram_transformer`, `prediction_weights`: what training uses. The examples reach the query only
  through their second moments, so a layer costs a few products of matrices of the size of one token, whatever the
  number of examples.

The fast forms keep the batch of prompts on the last axis. The matrices of one prompt are tiny, and only the batch is
long enough to fill vector registers or a GPU's warps.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from icl import congruence_gpu

# A GPU would otherwise round float32 operands to 10 bits of mantissa, and the losses of interest go down to 1e-6.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def literal_attention(
    tokens: jax.Array, p: jax.Array, q: jax.Array, activation: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """Masked linear attention `sum_h P_h Z M act(Z^T Q_h Z)`, eq. (3); with an activation, that of Theorem 5.

    Args:
      tokens: token matrices Z, [..., d + 1, n + 1], any floating dtype.
      p: projections, [heads, d + 1, d + 1].
      q: bilinear forms of the scores, [heads, d + 1, d + 1].
      activation: entrywise map of the scores; none means linear attention.

    Returns:
      [..., d + 1, n + 1]. The mask M keeps the query from being attended to; the query itself is still updated.
    """
    is_example = jnp.arange(tokens.shape[-1]) < tokens.shape[-1] - 1
    mask = jnp.diag(is_example.astype(tokens.dtype))
    z = tokens[..., None, :, :]
    scores = z.mT @ q @ z
    if activation is not None:
        scores = activation(scores)
    return (p @ z @ mask @ scores).sum(-3)


def literal_transformer(
    tokens: jax.Array, p: jax.Array, q: jax.Array, activation: Callable[[jax.Array], jax.Array] | None = None
) -> jax.Array:
    """The token matrices after all layers `Z + Attn(Z) / n`, eq. (4).

    Args:
      tokens: [..., d + 1, n + 1], any floating dtype.
      p: [layers, heads, d + 1, d + 1].
      q: [layers, heads, d + 1, d + 1].
      activation: as in `literal_attention`.

    Returns:
      [..., d + 1, n + 1]. The paper's prediction is minus the last entry of the last row.
    """
    n = tokens.shape[-1] - 1
    for p_layer, q_layer in zip(p, q, strict=True):
        tokens = tokens + literal_attention(tokens, p_layer, q_layer, activation) / n
    return tokens


class Gram(NamedTuple):
    """Second moments of a prompt's n examples, each with the factor 1/n.

    Attributes:
      xx: covariates with covariates, [d, d, batch].
      xy: covariates with labels, [d, batch].
      yy: labels with labels, [batch].
    """

    xx: jax.Array
    xy: jax.Array
    yy: jax.Array


def prompt_gram(x: jax.Array, y: jax.Array) -> Gram:
    """Second moments of the examples `x` [d, n, batch] and their labels `y` [n, batch]."""
    n = y.shape[0]
    return Gram(
        xx=_einsum("inb,jnb->ijb", x, x) / n,
        xy=_einsum("inb,nb->ib", x, y) / n,
        yy=_einsum("nb,nb->b", y, y) / n,
    )


def sparse_transformer(
    gram: Gram, x_query: jax.Array, a: jax.Array, b: jax.Array | None = None, y_query: jax.Array | float = 0.0
) -> jax.Array:
    """The query's label entry after all layers of the sparse models, eq. (11), and eq. (8) where `b` is None.

    Layer l is `P = [[B, 0], [0, 1]]`, `Q = [[A, 0], [0, 0]]`, summed over heads. A is the block as it is trained, with
    the sign of eq. (11): gradient descent has negative A. The arguments of a shallower model are `a[:l]` and `b[:l]`.

    With S and c the moments `xx` and `xy`, and `T = I + sum_h B_h S A_h`, one layer is

        y <- y + c^T A x,    x <- T x,    c <- T (c + S A^T c),    S <- T S T^T,    where A = sum_h A_h,

    so the last layer needs neither T nor B, the one before it no new S, and without B neither S nor x changes.

    Args:
      gram: moments of the examples. `yy` is not used.
      x_query: [d, batch], any floating dtype.
      a: [layers, heads, d, d].
      b: [layers, heads, d, d], or None for B = 0. `b[-1]` does not influence the result.
      y_query: [batch] or a number, the label entry that the query enters with. Its true label turns the result into
        the residual (Lemma 5); this holds for the sparse models only.

    Returns:
      [batch]. The prediction is minus this entry when `y_query` is 0.
    """
    s, c, _ = gram
    x, y = x_query, y_query
    last = len(a) - 1
    for layer, a_heads in enumerate(a):
        a_sum = a_heads.sum(0)
        y = y + (c * _einsum("ij,jb->ib", a_sum, x)).sum(0)
        if layer == last:
            break
        c = c + _apply(s, _einsum("ji,jb->ib", a_sum, c))
        if b is not None:
            t = _residual_sandwich(b[layer], s, a_heads)
            x, c = jnp.moveaxis(product(t, jnp.stack([x, c], axis=1)), 1, 0)
            if layer < last - 1:
                s = _congruence(t, s)
    return y


def gram_transformer(gram: Gram, query: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """The query token after each layer, for unconstrained P and Q: eq. (4) as a recursion on Gram matrices.

    With G the second moment of the whole example tokens, and z the query token, one layer is
    `T = I + sum_h P_h G Q_h`, `z <- T z`, `G <- T G T^T`.

    Args:
      gram: moments of the examples.
      query: the query token, its label entry last, [d + 1, batch], any floating dtype.
      p: [layers, heads, d + 1, d + 1].
      q: [layers, heads, d + 1, d + 1].

    Returns:
      [layers, d + 1, batch].
    """
    g = token_gram(gram)
    queries = []
    for p_heads, q_heads in zip(p, q, strict=True):
        t = _residual_sandwich(p_heads, g, q_heads)
        query = _apply(t, query)
        queries.append(query)
        if len(queries) < len(p):
            g = _congruence(t, g)
    return jnp.stack(queries)


def prediction_weights(g: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """The vector that the prediction is linear in: it is `<w, z>` for a query token z (Vladymyrov et al., Theorem 4.1).

    A layer maps every token by `T = I + sum_h P_h G Q_h`, and the prediction is minus the last entry of the query's
    token, so w is minus the last row of the product of all T. It is built from the last layer backwards, by products
    with vectors; the last layer needs its last row only, and so only the last row of P.

    Args:
      g: second moments of the example tokens in any normalisation, [d + 1, d + 1, batch], any floating dtype.
      p: [layers, heads, d + 1, d + 1], or [layers, heads, d + 1] where the matrices are diagonal.
      q: as `p`.

    Returns:
      [d + 1, batch]. The last entry acts on the label entry that the query enters with, which is 0 in prompts.
    """
    maps = []
    for p_heads, q_heads in zip(p[:-1], q[:-1], strict=True):
        maps.append(_residual_sandwich(p_heads, g, q_heads))
        g = _congruence(maps[-1], g)
    row = _last_row(p[-1], g, q[-1])
    for t in reversed(maps):
        row = _apply(jnp.swapaxes(t, 0, 1), row)
    return -row


def token_gram(gram: Gram) -> jax.Array:
    """Second moment of the tokens `(x, y)`, [d + 1, d + 1, batch]."""
    top = jnp.concatenate([gram.xx, gram.xy[:, None]], axis=1)
    bottom = jnp.concatenate([gram.xy, gram.yy[None]], axis=0)
    return jnp.concatenate([top, bottom[None]], axis=0)


def _residual_sandwich(left: jax.Array, middle: jax.Array, right: jax.Array) -> jax.Array:
    """`I + sum_h left_h middle right_h`, for left and right [heads, d, d] and one middle [d, d, batch] per prompt.

    Diagonal left and right, [heads, d], only scale the entries.

    The sandwich is a linear map of the d^2 entries of the middle matrix. Forming its matrix first leaves a single
    matrix product with the batch as its long axis, whatever the number of heads, and the gradients are two more.
    That costs d^4 per prompt, which is the faster way for the single-digit d of these experiments.
    """
    d = middle.shape[0]
    if left.ndim == 2:
        sandwich = _einsum("hi,hj->ij", left, right)[:, :, None] * middle
    else:
        kernel = _einsum("hij,hkl->iljk", left, right).reshape(d * d, d * d)
        sandwich = _einsum("mk,kb->mb", kernel, middle.reshape(d * d, -1)).reshape(middle.shape)
    return sandwich + jnp.eye(d, dtype=middle.dtype)[:, :, None]


def _last_row(left: jax.Array, middle: jax.Array, right: jax.Array) -> jax.Array:
    """The last row of `_residual_sandwich` for a symmetric middle, [d, batch]."""
    if left.ndim == 2:
        row = _einsum("h,hj->j", left[:, -1], right)[:, None] * middle[-1]
    else:
        row = _einsum("hjl,hjb->lb", right, _einsum("jkb,hk->hjb", middle, left[:, -1]))
    return row.at[-1].add(1)


def _congruence(t: jax.Array, s: jax.Array) -> jax.Array:
    """`T S T^T` per prompt for symmetric S, all [d, d, batch]."""
    if congruence_gpu.serves(t, s):
        return congruence_gpu.congruence(t, s)
    return product(product(t, s), jnp.swapaxes(t, 0, 1))


def _apply(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Matrix [i, k, batch] times vector [k, batch], per prompt."""
    return product(matrix, vector[:, None])[:, 0]


@jax.custom_vjp
def product(left: jax.Array, right: jax.Array) -> jax.Array:
    """Matrix product per prompt, [i, k, batch] times [k, j, batch].

    Written as a sum of k outer products, each a vectorised loop over the batch; a batched dot, or a reduction over the
    axis k, is several times slower on a CPU. There the sum is a loop, because the CPU compiler fuses unrolled sums of
    one product into the next and computes every entry again for each use: with d = 11 that is ten times slower. The
    gradient is spelled out because differentiating through the slices would scatter every outer product into its own
    array.
    """
    return jax.lax.platform_dependent(left, right, cpu=_looped_product, default=_unrolled_product)


def _unrolled_product(left: jax.Array, right: jax.Array) -> jax.Array:
    outer_products = [left[:, k, None] * right[None, k] for k in range(right.shape[0])]
    return sum(outer_products[1:], start=outer_products[0])


def _looped_product(left: jax.Array, right: jax.Array) -> jax.Array:
    def add(k: jax.Array, total: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_index_in_dim(left, k, 1, keepdims=True)
        return total + column * jax.lax.dynamic_index_in_dim(right, k, 0, keepdims=True)

    zeros = jnp.zeros((left.shape[0], *right.shape[1:]), left.dtype)
    return jax.lax.fori_loop(0, right.shape[0], add, zeros)


def _product_forward(left: jax.Array, right: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(left, right), (left, right)


def _product_backward(operands: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    left, right = operands
    return product(cotangent, jnp.swapaxes(right, 0, 1)), product(jnp.swapaxes(left, 0, 1), cotangent)


product.defvjp(_product_forward, _product_backward)
