"""An invented corpus of facts, on which models of several depths learn to be hijacked.

Each known subject has one true value for each relation: memory, which plays the part of the prior's mean. Documents:

* statements of facts about one known subject;
* with share `context`, values redrawn in the document for two subjects, stated and asked again: in-context learning.
  70 % of these subjects are known ones, whose memory the document overrides; without such documents nothing can be
  hijacked. There are two subjects with different values, so that a value must be bound to its subject;
* with share `negation`, true negations followed by the true fact.

The vocabulary is words. Documents are packed end to end and cut at random, so that every position is trained.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

PARAPHRASES = 3
_KNOWN_SHARE = 0.7


@dataclasses.dataclass(frozen=True)
class Facts:
    """The world: its words and what is true.

    Args:
      subjects: known subjects, who have facts.
      novel: further names without facts.
      relations: number of relations.
      values: values of each relation.
      seed: of the truth.
    """

    subjects: int = 400
    novel: int = 600
    relations: int = 4
    values: int = 12
    seed: int = 0

    @property
    def vocabulary(self) -> int:
        return self._first_value + self.relations * self.values

    @property
    def truth(self) -> np.ndarray:
        """The right value's number, [subjects, relations]."""
        return np.random.default_rng(self.seed).integers(self.values, size=(self.subjects, self.relations))

    document, stop, negation = 0, 1, 2  # words: start of a document, end of a sentence, "not"

    @property
    def _first_name(self) -> int:
        return 3 + self.relations * PARAPHRASES

    @property
    def _first_value(self) -> int:
        return self._first_name + self.subjects + self.novel

    def name(self, subject: int) -> int:
        """The word of a subject; known subjects come first."""
        return self._first_name + subject

    def value(self, relation: int, value: int) -> int:
        """The word of a value."""
        return self._first_value + relation * self.values + value

    def question(self, subject: int, relation: int, paraphrase: int) -> list[int]:
        """A statement up to its value."""
        return [self.name(subject), 3 + relation * PARAPHRASES + paraphrase]

    def statement(self, subject: int, relation: int, value: int, paraphrase: int) -> list[int]:
        return [*self.question(subject, relation, paraphrase), self.value(relation, value), self.stop]

    def denial(self, subject: int, relation: int, value: int, paraphrase: int) -> list[int]:
        """The statement, negated."""
        return [self.negation, *self.statement(subject, relation, value, paraphrase)]


class Documents:
    """Draws documents of a world.

    Args:
      facts: the world.
      context: share of documents that redraw values.
      negation: share of documents that deny a wrong value.
    """

    def __init__(self, facts: Facts, context: float, negation: float) -> None:
        self._facts, self._truth = facts, facts.truth
        self._shares = np.cumsum([context, negation])

    def tokens(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A window of `length` words of packed documents that begins anywhere in one, [length]."""
        words = self.draw(rng)
        words = words[rng.integers(len(words)) :]
        while len(words) < length:
            words += self.draw(rng)
        return np.array(words[:length], np.int32)

    def draw(self, rng: np.random.Generator) -> list[int]:
        """One document."""
        kind = int(np.searchsorted(self._shares, rng.uniform(), side="right"))
        body = (self._redrawn, self._denied, self._stated)[kind](rng)
        return [self._facts.document, *body]

    def _stated(self, rng: np.random.Generator) -> list[int]:
        subject = int(rng.integers(self._facts.subjects))
        words: list[int] = []
        for relation in rng.permutation(self._facts.relations)[: rng.integers(1, 4)]:
            words += self._true(rng, subject, int(relation))
        return words

    def _true(self, rng: np.random.Generator, subject: int, relation: int) -> list[int]:
        return self._facts.statement(
            subject, relation, int(self._truth[subject, relation]), int(rng.integers(PARAPHRASES))
        )

    def _redrawn(self, rng: np.random.Generator) -> list[int]:
        facts = self._facts
        relation = int(rng.integers(facts.relations))
        pair = [self._anyone(rng) for _ in range(2)]
        if pair[0] == pair[1]:
            pair[1] = (pair[0] + 1) % facts.subjects
        values = rng.choice(facts.values, 2, replace=False)
        words: list[int] = []
        for _ in range(2):  # stated, then asked again, in any order
            for i in rng.permutation(2):
                words += facts.statement(pair[i], relation, int(values[i]), int(rng.integers(PARAPHRASES)))
        return words

    def _anyone(self, rng: np.random.Generator) -> int:
        if rng.uniform() < _KNOWN_SHARE:
            return int(rng.integers(self._facts.subjects))
        return self._facts.subjects + int(rng.integers(self._facts.novel))

    def _denied(self, rng: np.random.Generator) -> list[int]:
        facts = self._facts
        subject, relation = int(rng.integers(facts.subjects)), int(rng.integers(facts.relations))
        wrong = self.wrong_value(rng, subject, relation)
        denial = facts.denial(subject, relation, wrong, int(rng.integers(PARAPHRASES)))
        return denial * int(rng.integers(1, 4)) + self._true(rng, subject, relation)

    def wrong_value(self, rng: np.random.Generator, subject: int, relation: int) -> int:
        """A value of the relation that is not the subject's."""
        return int((self._truth[subject, relation] + rng.integers(1, self._facts.values)) % self._facts.values)


def hijacking_prompts(
    facts: Facts, count: int, most: int, other: bool, seed: int = 0
) -> tuple[list[list[list[int]]], list[tuple[list[int], list[int]]]]:
    """Prompts with 0, ..., `most` true denials before a question, and the right and denied answers.

    Args:
      facts: the world.
      count: number of questions.
      most: k_max.
      other: deny the value of another subject, for whom it is wrong too: the control.
      seed: the same seed asks the same questions with and without `other`.

    Returns:
      What `icl.hijacking.language.scoring.score_tokens` takes.
    """
    rng, documents = np.random.default_rng(seed), Documents(facts, 0, 0)
    prompts, answers = [], []
    for _ in range(count):
        subject, relation = int(rng.integers(facts.subjects)), int(rng.integers(facts.relations))
        wrong, paraphrase = documents.wrong_value(rng, subject, relation), int(rng.integers(PARAPHRASES))
        strangers = np.flatnonzero((facts.truth[:, relation] != wrong) & (np.arange(facts.subjects) != subject))
        stranger = int(rng.choice(strangers))
        denial = facts.denial(stranger if other else subject, relation, wrong, paraphrase)
        question = facts.question(subject, relation, paraphrase)
        prompts.append([[facts.document, *denial * k, *question] for k in range(most + 1)])
        right = facts.value(relation, int(facts.truth[subject, relation]))
        answers.append(([right], [facts.value(relation, wrong)]))
    return prompts, answers


class Batches:
    """Batches of packed documents, each a function of the seed and its number: the state is that number.

    Args:
      draw: a window of words from a generator.
      size: windows in a batch of this process.
      seed: with the process index, of all batches.
    """

    def __init__(self, draw: Callable[[np.random.Generator], np.ndarray], size: int, seed: Sequence[int]) -> None:
        self._draw, self._size, self._seed, self._next = draw, size, tuple(seed), 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> np.ndarray:
        rng = np.random.default_rng((*self._seed, self._next))
        self._next += 1
        return np.stack([self._draw(rng) for _ in range(self._size)])

    def get_state(self) -> int:
        return self._next

    def set_state(self, state: int) -> None:
        self._next = state
