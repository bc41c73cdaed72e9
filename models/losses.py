"""Cross-entropy over large vocabularies without ever holding all logits."""

import jax
import jax.numpy as jnp


def chunked_cross_entropy(
    hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, *, chunk: int = 4096
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weighted sum of the losses of the next tokens, some tokens of the sequences at a time.

    The gradient is computed along with the loss, so that no logits are computed twice. Labels and weights have none.

    Args:
      hidden: [batch, time, width].
      head: [width, vocabulary], of the same dtype.
      labels: [batch, time], integers; where the weight is zero, any.
      weights: [batch, time], float32.
      chunk: tokens of the whole batch whose logits exist at once, about; at least one of each row.

    Returns:
      The sum of `weights * loss`, the sum of the weights, and that of the weights where the likeliest token is the
      label; float32 scalars.
    """
    batch, time = labels.shape
    size = max(1, min(time, chunk // batch))
    pieces = -(-time // size)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, pieces * size - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, pieces, size, *x.shape[2:]), 1, 0)

    labels = jnp.where(weights > 0, labels, 0)
    loss, correct = _summed(cut(hidden), head, cut(labels), cut(weights))
    return loss, weights.sum(), correct


@jax.custom_vjp
def _summed(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two sums over pieces, [pieces, batch, time, ...]."""

    def add(sums, piece):
        loss, correct, _ = _piece(head, *piece)
        return (sums[0] + loss, sums[1] + correct), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), (hidden, labels, weights))[0]


def _piece(head, hidden, labels, weights):
    """The sums of one piece, and its logits, float32 at least, less the logarithm of their sum."""
    logits = jnp.einsum("btw,wv->btv", hidden, head, preferred_element_type=jnp.promote_types(head.dtype, jnp.float32))
    log_likelihoods = jax.nn.log_softmax(logits)
    found = jnp.take_along_axis(log_likelihoods, labels[..., None], -1)[..., 0]
    right = logits.argmax(-1) == labels
    sums = -(weights * found).sum().astype(jnp.float32), (weights * right).sum().astype(jnp.float32)
    return *sums, log_likelihoods


def _forward(hidden, head, labels, weights):
    def add(carry, piece):
        loss, correct, d_head = carry
        hidden, labels, weights = piece
        more, right, log_likelihoods = _piece(head, *piece)
        d_logits = jnp.exp(log_likelihoods) - jax.nn.one_hot(labels, head.shape[1], dtype=log_likelihoods.dtype)
        d_logits = (weights[..., None] * d_logits).astype(hidden.dtype)
        d_head = d_head + jnp.einsum("btw,btv->wv", hidden, d_logits, preferred_element_type=d_head.dtype)
        return (loss + more, correct + right, d_head), jnp.einsum("btv,wv->btw", d_logits, head)

    zero = jnp.zeros((), jnp.float32)
    d_head = jnp.zeros(head.shape, jnp.promote_types(head.dtype, jnp.float32))
    (loss, correct, d_head), d_hidden = jax.lax.scan(add, (zero, zero, d_head), (hidden, labels, weights))
    return (loss, correct), (d_hidden, d_head.astype(head.dtype))


def _backward(residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return d_hidden * scale.astype(d_hidden.dtype), d_head * scale.astype(d_head.dtype), None, None


_summed.defvjp(_forward, _backward)
