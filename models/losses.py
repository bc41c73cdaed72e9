"""Cross-entropy over large vocabularies without ever holding all logits."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from training.sharding import devices_in_use


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
      chunk: tokens whose logits a device holds at once, about; at least one of each of its rows.

    Returns:
      The sum of `weights * loss`, the sum of the weights, and that of the weights where the likeliest token is the
      label; float32 scalars.
    """
    batch, time = labels.shape
    size = max(1, min(time, chunk * devices_in_use() // batch))
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
        loss, correct, _, _ = _piece(head, *piece)
        return (sums[0] + loss, sums[1] + correct), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, zero), (hidden, labels, weights))[0]


def _piece(head, hidden, labels, weights):
    """The sums of one piece, its logits, float32 at least, and the logarithms of the sums of their exponentials."""
    logits = jnp.einsum("btw,wv->btv", hidden, head, preferred_element_type=jnp.promote_types(head.dtype, jnp.float32))

    def at(tokens):
        return jnp.take_along_axis(logits, tokens[..., None], -1)

    likeliest = logits.argmax(-1)  # and so the maximum is known without reading the logits again
    maximum = at(likeliest)
    total = maximum + jnp.log(jnp.exp(logits - maximum).sum(-1, keepdims=True))
    loss = (weights * (total - at(labels))[..., 0]).sum()
    correct = (weights * (likeliest == labels)).sum()
    return loss.astype(jnp.float32), correct.astype(jnp.float32), logits, total


def _forward(hidden, head, labels, weights):
    def add(carry, piece):
        loss, correct, d_head = carry
        hidden, labels, weights = piece
        more, right, logits, total = _piece(head, *piece)
        d_logits = jnp.exp(logits - total) - jax.nn.one_hot(labels, head.shape[1], dtype=logits.dtype)
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


def next_token_loss(
    model: nnx.Module, batch: Mapping[str, jax.Array], chunk: int, rngs: nnx.Rngs | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean loss of a language model over the weighted tokens of a batch.

    Args:
      model: a `models.language_model.CausalLanguageModel`.
      batch: `tokens` and `labels` [batch, time], `weights` [batch, time], and perhaps `segment_ids` [batch, time].
      chunk: see `chunked_cross_entropy`.
      rngs: for the model's dropout.

    Returns:
      The loss and a dict with the share of tokens that are predicted, `accuracy`.
    """
    hidden = model.hidden(batch["tokens"], segment_ids=batch.get("segment_ids"), rngs=rngs)
    weights = batch["weights"].astype(jnp.float32)
    loss, total, correct = chunked_cross_entropy(hidden, model.head, batch["labels"], weights, chunk=chunk)
    total = jnp.maximum(total, 1)
    return loss / total, {"accuracy": correct / total}
