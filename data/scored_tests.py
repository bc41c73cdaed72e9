"""Zero-shot tests as arrays: how likely a model finds a text after another, and whether it would write it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.tokenizers import Tokenizer
from training.errors import UserError


class Scored(NamedTuple):
    """Sequences and which of their tokens count.

    Attributes:
      tokens: [sequences, time], int32; what follows a sequence's end is arbitrary.
      labels: [sequences, time], int32, the next tokens.
      weights: [sequences, time], float32, 1 where the label counts.
    """

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def continuations(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]], longest: int | None = None) -> Scored:
    """Texts after contexts: the tokens of both together, those of the text counted.

    The two are encoded as one, as they would be in training. A token that belongs to both counts. Where the whole is
    longer than `longest`, the context loses its beginning. A context begins with the token of a new document.

    Args:
      tokenizer: of the model.
      pairs: context and text. An empty context is allowed.
      longest: tokens; None is as many as there are.
    """
    contexts = tokenizer.encode_all([context for context, _ in pairs])
    wholes = tokenizer.encode_all([context + text for context, text in pairs])
    rows, starts = [], []
    for before, whole in zip(contexts, wholes, strict=True):
        same = _common(before, whole)
        row = np.concatenate([[tokenizer.document], whole])
        cut = 0 if longest is None else max(0, len(row) - longest - 1)
        rows.append(row[cut:])
        starts.append(max(0, same - cut))
    return scored(rows, starts)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens both begin with."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def scored(rows: Sequence[np.ndarray], starts: Sequence[int]) -> Scored:
    """Rows of tokens as arrays; of each, the labels from number `start` on count, the second token being label 0."""
    time = -(-(max(map(len, rows)) - 1) // 64) * 64  # kernels work in pieces of 64
    tokens = np.zeros((len(rows), time), np.int32)
    labels, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        tokens[i, : len(row) - 1] = row[:-1]
        labels[i, : len(row) - 1] = row[1:]
        weights[i, start : len(row) - 1] = 1
    return Scored(tokens, labels, weights)


def save(path: str | Path, test: Scored) -> None:
    """Writes a test; the arrays are small numbers."""
    np.savez_compressed(path, **{name: array.astype(np.uint32) for name, array in test._asdict().items()})


def load(path: str | Path) -> Scored:
    """The test of a file that `save` wrote.

    Raises:
      UserError: there is none.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no test {path}; prepare the texts again")
    with np.load(path) as file:
        return Scored(file["tokens"].astype(np.int32), file["labels"].astype(np.int32), file["weights"].astype("f4"))
