"""Sets of token sequences with a label where something is to be predicted."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

IGNORE = -100
"""The label of a position where nothing is to be predicted."""


class TokenSet(NamedTuple):
    """Examples of one length.

    Attributes:
      tokens: [examples, time], int16; the model's input.
      labels: [examples, time], int16; what the model is to predict after it has read the token at the same place,
        or `IGNORE`.
      legal: [examples, time], int32, or None. Bit v says whether token v may follow; for sources where several may.
    """

    tokens: np.ndarray
    labels: np.ndarray
    legal: np.ndarray | None = None

    @property
    def labelled(self) -> int:
        """The largest number of labels in an example."""
        return int((self.labels != IGNORE).sum(1).max())


class Benchmark(NamedTuple):
    """A training set and what it is judged by."""

    train: TokenSet
    held_out: Mapping[str, TokenSet]
    vocabulary: int


def next_tokens(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of next-token prediction, both one token shorter than `sequences` [examples, time]."""
    return sequences[:, :-1].astype(np.int16), sequences[:, 1:].astype(np.int16)


def distinct(rng: np.random.Generator, rows: int, low: int, high: int, count: int) -> np.ndarray:
    """`count` distinct integers of [low, high) in random order for each row, uniformly, [rows, count]."""
    if count * count > 2 * (high - low):  # rows drawn with replacement would rarely be free of repetitions
        return low + rng.random((rows, high - low)).argsort(1)[:, :count]
    drawn = np.empty((rows, count), np.int64)
    left = np.arange(rows)
    while left.size:
        drawn[left] = rng.integers(low, high, (left.size, count))
        ordered = np.sort(drawn[left], 1)
        left = left[(ordered[:, 1:] == ordered[:, :-1]).any(1)]
    return drawn


def successive(rng: np.random.Generator, rows: int, weights: np.ndarray, count: int) -> np.ndarray:
    """`count` distinct indices for each row, drawn one after the other with probability proportional to `weights`.

    The largest of independent Gumbel variables around the logarithms of the weights, in falling order, are such draws.
    """
    keys = np.log(weights) + rng.gumbel(size=(rows, len(weights)))
    return np.argsort(-keys, 1)[:, :count]
