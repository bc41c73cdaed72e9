import itertools

import jax
import jax.numpy as jnp
import numpy as np

from data.scored_tests import scored
from deltanet.evaluators import scores

KINDS = 11  # of tokens in the texts, so that some pairs repeat


def log_probabilities(logits, row):
    """Of each token of a row after those before it, from the whole logits."""
    found = logits(row[:-1])
    shifted = found - found.max(-1, keepdims=True)
    table = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return table[np.arange(len(row) - 1), row[1:]], found.argmax(-1) == row[1:]


def test_stream_loss(model, logits):
    tokens, length, words = np.random.default_rng(0).integers(KINDS, size=45), 16, 7
    found = jax.jit(lambda: scores.stream_loss(model, jnp.asarray(tokens, jnp.uint16), length, 2, words))()
    logs, right, repeated, places = [], [], [], []
    for begin in range(0, len(tokens) - 1, length):
        row = tokens[begin : begin + length + 1]
        values, hits = log_probabilities(logits, row)
        pairs = list(itertools.pairwise(row))
        logs += list(values)
        right += list(hits)
        repeated += [pair in pairs[:i] for i, pair in enumerate(pairs)]
        places += [i * scores.PARTS // length for i in range(len(values))]
    logs, repeated, places = map(np.array, (logs, repeated, places))
    assert len(logs) == 44
    np.testing.assert_allclose(found["loss"], -logs.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(-logs.mean()), rtol=1e-5)
    np.testing.assert_allclose(found["word_perplexity"], np.exp(-logs.sum() / words), rtol=1e-4)
    np.testing.assert_allclose(found["accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(found["loss_repeated"], -logs[repeated].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["loss_new"], -logs[~repeated].mean(), rtol=1e-5)
    by_part = [-logs[places == part].mean() for part in range(scores.PARTS)]
    np.testing.assert_allclose(found["loss_by_position"], by_part, rtol=1e-5)


def test_continuation_scores(model, logits):
    rng = np.random.default_rng(1)
    rows = [rng.integers(KINDS, size=size) for size in (5, 9, 7)]
    row = rows[2]
    for i in range(4, len(row)):  # what greedy decoding writes
        row[i] = logits(row[:i])[-1].argmax()
    starts = [1, 4, 3]
    found, greedy = jax.jit(lambda: scores.continuation_scores(model, scored(rows, starts), batch=2))()
    expected = [log_probabilities(logits, row)[0][start:].sum() for row, start in zip(rows, starts, strict=True)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert greedy[2]
    result = jax.jit(lambda: scores.lambada(model, scored(rows, starts), batch=3))()
    np.testing.assert_allclose(result["perplexity"], np.exp(-np.mean(expected)), rtol=1e-5)
    np.testing.assert_allclose(result["accuracy"], greedy.mean())
