"""Losses and zero-shot scores of language models, as pure functions of a model and arrays."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

PARTS = 8
"""Of the positions of a window, by which losses are also given: a model that recalls gets better along it."""


def windows(tokens: jax.Array, length: int, batch: int) -> dict[str, jax.Array]:
    """A stream of tokens as batches of windows, in which each token but the first is a label once.

    Args:
      tokens: [tokens].
      length: labels in a window.
      batch: windows in a batch.

    Returns:
      `tokens` and `labels`, [batches, batch, length], int32, and `weights`, float32, 0 behind the stream's end.
    """
    count = len(tokens) - 1
    rows = -(-count // length)
    batch = min(batch, rows)
    rows = -(-rows // batch) * batch
    padded = jnp.pad(tokens.astype(jnp.int32), (0, rows * length + 1 - len(tokens)))
    shape = (rows // batch, batch, length)
    weights = (jnp.arange(rows * length) < count).astype(jnp.float32)
    return {
        "tokens": padded[:-1].reshape(shape),
        "labels": padded[1:].reshape(shape),
        "weights": weights.reshape(shape),
    }


def stream_loss(model: nnx.Module, tokens: jax.Array, length: int, batch: int, words: int) -> dict[str, jax.Array]:
    """How well a model predicts a stream of tokens, in windows of its own length without context before them.

    Args:
      model: a `models.language_model.CausalLanguageModel`.
      tokens: [tokens].
      length: of the windows.
      batch: windows at a time.
      words: of the text, for the perplexity per word.

    Returns:
      `loss`, the mean over tokens, in nats; `perplexity` of tokens; `word_perplexity`; `accuracy`; `loss_by_position`,
      the mean over each eighth of the windows, [8]; `loss_repeated` and `loss_new`, the mean over tokens that followed
      the token before them somewhere earlier in the window, and over the others. (On the former recall shows.)
    """

    def one(data: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        losses, right = token_losses(model, data["tokens"], data["labels"])
        weights = data["weights"]
        repeated = weights * repeats(data["tokens"], data["labels"])
        edges = jnp.arange(length) * PARTS // length
        by_part = jax.ops.segment_sum((weights * losses).sum(0), edges, PARTS)
        return {
            "loss": (weights * losses).sum(),
            "right": (weights * right).sum(),
            "weights": weights.sum(),
            "by_part": by_part,
            "part_weights": jax.ops.segment_sum(weights.sum(0), edges, PARTS),
            "repeated": (repeated * losses).sum(),
            "repeated_weights": repeated.sum(),
        }

    sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(one, windows(tokens, length, batch)))
    loss = sums["loss"] / sums["weights"]
    new = jnp.maximum(sums["weights"] - sums["repeated_weights"], 1)
    return {
        "loss": loss,
        "perplexity": jnp.exp(loss),
        "word_perplexity": jnp.exp(sums["loss"] / words),
        "accuracy": sums["right"] / sums["weights"],
        "loss_by_position": sums["by_part"] / jnp.maximum(sums["part_weights"], 1),
        "loss_repeated": sums["repeated"] / jnp.maximum(sums["repeated_weights"], 1),
        "loss_new": (sums["loss"] - sums["repeated"]) / new,
    }


def token_losses(model: nnx.Module, tokens: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The loss of each label, and whether it is the likeliest token; [batch, time], float32 and bool.

    Logits exist for one row of the batch at a time.
    """
    hidden = model.hidden(tokens)

    def row(data: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(data[0])
        found = jnp.take_along_axis(logits, data[1][:, None], -1)[:, 0]
        return jax.nn.logsumexp(logits, -1) - found, logits.argmax(-1) == data[1]

    return jax.lax.map(row, (hidden, labels))


def repeats(tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the pair of a token and its label stood before in the same row; [batch, time], bool."""
    time = tokens.shape[1]

    def row(first: jax.Array, second: jax.Array) -> jax.Array:
        order = jnp.lexsort((jnp.arange(time), second, first))  # equal pairs side by side, in the order of the text
        a, b = first[order], second[order]
        same = jnp.concatenate([jnp.zeros(1, bool), (a[1:] == a[:-1]) & (b[1:] == b[:-1])])
        return jnp.zeros(time, bool).at[order].set(same)

    return jax.vmap(row)(tokens, labels)


def continuation_scores(model: nnx.Module, test: Any, batch: int) -> tuple[jax.Array, jax.Array]:
    """How likely a model finds texts after their contexts.

    Args:
      model: a `models.language_model.CausalLanguageModel`.
      test: `tokens`, `labels`, `weights` of `data.scored_tests.Scored`.
      batch: sequences at a time.

    Returns:
      The logarithm of each text's probability, [sequences], float32, and whether greedy decoding would write it.
    """
    count = len(test.tokens)
    batch = min(batch, count)
    pieces = -(-count // batch)

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(jnp.asarray(x), ((0, pieces * batch - count), (0, 0)))
        return x.reshape(pieces, batch, -1)

    def one(data: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        tokens, labels, weights = data
        losses, right = token_losses(model, tokens.astype(jnp.int32), labels.astype(jnp.int32))
        return -(weights * losses).sum(-1), (right | (weights == 0)).all(-1)

    scores, greedy = jax.lax.map(one, (cut(test.tokens), cut(test.labels), cut(test.weights)))
    return scores.reshape(-1)[:count], greedy.reshape(-1)[:count]


def lambada(model: nnx.Module, test: Any, batch: int) -> dict[str, jax.Array]:
    """`perplexity` of the last words, and `accuracy`: the share that greedy decoding writes (section 4, Table 1)."""
    scores, greedy = continuation_scores(model, test, batch)
    return {"perplexity": jnp.exp(-scores.mean()), "accuracy": greedy.mean()}


def text_scores(model: nnx.Module, test: Any, batch: int) -> np.ndarray:
    """`continuation_scores`' logarithms, compiled and fetched; [sequences]."""
    graph, state = nnx.split(model)
    score = jax.jit(lambda state, test: continuation_scores(nnx.merge(graph, state), test, batch)[0])
    return np.asarray(score(state, test))


def share_of_pairs(found: np.ndarray, right: np.ndarray) -> float:
    """The share of pairs of which the right text scores more, such as BLiMP's and PIQA's.

    Args:
      found: [2 * pairs], scores of texts, the two of a pair side by side.
      right: [pairs], 0 or 1.
    """
    return float((found.reshape(-1, 2).argmax(-1) == right).mean())
