"""Recall in context: FDA, SWDE and SQuAD as text completion (Arora et al. 2024, "Based").

A prompt is a document that ends where its answer should begin; a model continues it greedily up to a line's end, and is
right where the answer is in what it wrote, whatever the case. Numbers depend on how documents are cut: compare only
models that were asked in one way, and no published numbers.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from data.tokenizers import Tokenizer
from models.sampling import generate
from training.errors import UserError, nearest

ANSWER_TOKENS = 48


class Question(NamedTuple):
    """A document that ends where the answer should begin, and the answer."""

    prompt: str
    answer: str


def _stored(row: dict) -> Question:
    """The document as it is stored: it ends with the key and a colon, or within the sentence that holds the answer."""
    return Question(row["text"].rstrip(), row["value"])


def _key_again(row: dict) -> Question:
    """Without the key at the document's end, which is asked for anew."""
    key = row["key"].strip()
    body = row["text"].rstrip().removesuffix(":").rstrip()
    return Question(f"{body.removesuffix(key).rstrip()}. {key}:", row["value"])


FORMATS: dict[str, Callable[[dict], Question]] = {"stored": _stored, "key_again": _key_again}
"""From a record with `text`, `value` and perhaps `key` to a question, by name."""


def read(path: str | Path, form: str = "stored") -> list[Question]:
    """The questions of a JSON-lines file of the hub's `based-fda`, `based-swde` or `based-squad`.

    Raises:
      UserError: no such file, an unknown form, or a record without `text` or `value`.
    """
    if form not in FORMATS:
        raise UserError(f"there is no form {form!r} of questions: {nearest(form, FORMATS)}")
    try:
        lines = Path(path).read_text().splitlines()
        return [FORMATS[form](json.loads(line)) for line in lines if line.strip()]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no records of recall questions: {type(error).__name__} {error}") from error


def window(tokenizer: Tokenizer, question: Question, longest: int) -> np.ndarray:
    """At most `longest` tokens of the prompt: its last line, and what stands around the answer before it.

    Plain cutting from the left would cut most answers away. Where the answer is not in the document, or near its end,
    the last tokens are taken.
    """
    tokens = tokenizer.encode(question.prompt)
    place = question.prompt.lower().find(question.answer.lower())
    room = longest - 1
    if len(tokens) <= room or place < 0:
        return np.concatenate([[tokenizer.document], tokens[-room:]])
    head, line, tail = question.prompt.rpartition("\n")
    if not line:
        head, _, tail = question.prompt.rpartition(". ")
    asked = tokenizer.encode(line + tail)[-room // 2 :]
    body = tokenizer.encode(head)
    centre, size = len(tokenizer.encode(head[:place])), room - len(asked)
    begin = min(max(0, centre - size // 2), max(0, len(body) - size))
    return np.concatenate([[tokenizer.document], body[begin : begin + size], asked])


def accuracy(model: nnx.Module, tokenizer: Tokenizer, questions: Sequence[Question], longest: int) -> float:
    """The share of questions that a model answers right.

    Args:
      model: a `models.language_model.CausalLanguageModel`.
      tokenizer: its tokeniser.
      questions: see `read`.
      longest: tokens of a prompt.
    """
    right = 0
    for question in questions:
        prompt = window(tokenizer, question, longest)[None]
        added = generate(model, prompt, tokens=ANSWER_TOKENS, key=jax.random.key(0), temperature=0)
        right += is_right(tokenizer.decode(np.asarray(added[0]).tolist()), question.answer)
    return right / len(questions)


def is_right(written: str, answer: str) -> bool:
    """Whether the answer is in the first line that was written, whatever the case."""
    return answer.strip().lower() in written.lstrip("\n").partition("\n")[0].lower()
