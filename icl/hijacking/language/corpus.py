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

import jax
import jax.numpy as jnp
import numpy as np

PARAPHRASES = 3
SHORTEST, LONGEST = 5, 20  # words of a document: one fact; three denials and the fact
_KNOWN_SHARE = 0.7

Word = int | jax.Array


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

    def name(self, subject: Word) -> Word:
        """The word of a subject; known subjects come first."""
        return self._first_name + subject

    def value(self, relation: Word, value: Word) -> Word:
        """The word of a value."""
        return self._first_value + relation * self.values + value

    def question(self, subject: Word, relation: Word, paraphrase: Word) -> tuple[Word, ...]:
        """A statement up to its value: subject and verb."""
        return self.name(subject), 3 + relation * PARAPHRASES + paraphrase

    def statement(self, subject: Word, relation: Word, value: Word, paraphrase: Word) -> tuple[Word, ...]:
        """Subject, verb, value, stop."""
        return *self.question(subject, relation, paraphrase), self.value(relation, value), self.stop

    def denial(self, subject: Word, relation: Word, value: Word, paraphrase: Word) -> tuple[Word, ...]:
        """The statement, negated."""
        return self.negation, *self.statement(subject, relation, value, paraphrase)


class Documents:
    """Draws documents of a world, on the device.

    Args:
      facts: the world.
      context: share of documents that redraw values, a scalar that may be traced.
      negation: share of documents that deny a wrong value, likewise.
    """

    def __init__(self, facts: Facts, context: jax.Array | float, negation: jax.Array | float) -> None:
        self._facts, self._context, self._negation = facts, context, negation
        self._numbers = max(13, 5 + facts.relations)  # uniform ones, that decide a document

    def windows(self, key: jax.Array, count: int, length: int) -> jax.Array:
        """Windows of packed documents that begin anywhere in one, int32 [count, length]."""
        return jax.vmap(lambda key: self._window(key, length))(jax.random.split(key, count))

    def _window(self, key: jax.Array, length: int) -> jax.Array:
        key_documents, key_begin = jax.random.split(key)

        def append(carry: tuple[jax.Array, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            packed, end = carry
            words, count = self.draw(key)
            return (jax.lax.dynamic_update_slice(packed, words, (end,)), end + count), count

        enough = 1 + -(-length // SHORTEST)  # the first may give a single word
        room = jnp.zeros(length + 2 * LONGEST, jnp.int32)  # documents that are not needed end up behind the window
        carry, counts = jax.lax.scan(append, (room, jnp.int32(0)), jax.random.split(key_documents, enough))
        begin = _below(jax.random.uniform(key_begin), counts[0])
        return jax.lax.dynamic_slice(carry[0], (begin,), (length,))

    def draw(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One document: its words, int32 [LONGEST], meaningless beyond its length, and that length."""
        u = jax.random.uniform(key, (1 + self._numbers,))
        kind = (u[0] >= self._context).astype(jnp.int32) + (u[0] >= self._context + self._negation)
        drawn = [body(u[1:]) for body in (self._redrawn, self._denied, self._stated)]
        words = jnp.stack([jnp.pad(body.ravel(), (0, LONGEST - 1 - body.size)) for body, _ in drawn])[kind]
        length = 1 + jnp.stack([length for _, length in drawn])[kind]
        return jnp.concatenate([jnp.full(1, self._facts.document), words]), length

    # Each body takes the uniform numbers that decide it, and returns its words and how many of them count.

    def _stated(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One to three facts about one known subject."""
        facts = self._facts
        subject, relations = _below(u[0], facts.subjects), jnp.argsort(u[5 : 5 + facts.relations])[:3]
        true, paraphrases = self._true(subject, relations), _below(u[1:4], PARAPHRASES)[: relations.size]
        sentences = _stacked(facts.statement(subject, relations, true, paraphrases))
        count = jnp.minimum(1 + _below(u[4], 3), relations.size)
        return sentences, count * sentences.shape[-1]

    def _redrawn(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Values of two subjects, stated, then asked again, each time in any order."""
        facts, relation = self._facts, _below(u[0], self._facts.relations)
        pair = jnp.where(
            u[1:3] < _KNOWN_SHARE, _below(u[3:5], facts.subjects), facts.subjects + _below(u[3:5], facts.novel)
        )
        pair = pair.at[1].set(jnp.where(pair[0] == pair[1], (pair[0] + 1) % facts.subjects, pair[1]))
        first = _below(u[5], facts.values)
        values = jnp.stack([first, self._another(first, u[6])])
        swapped = (u[7:9] < 0.5).astype(jnp.int32)
        order = jnp.stack([swapped, 1 - swapped], axis=1).ravel()
        sentences = _stacked(facts.statement(pair[order], relation, values[order], _below(u[9:13], PARAPHRASES)))
        return sentences, jnp.int32(sentences.size)

    def _denied(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One to three times the same true denial, then the fact."""
        facts, subject, relation = self._facts, _below(u[0], self._facts.subjects), _below(u[1], self._facts.relations)
        true, paraphrases = self._true(subject, relation), _below(u[2:4], PARAPHRASES)
        denial = _stacked(facts.denial(subject, relation, self._another(true, u[4]), paraphrases[0]))
        fact = _stacked(facts.statement(subject, relation, true, paraphrases[1]))
        denied = (1 + _below(u[5], 3)) * denial.size
        words = jnp.concatenate([denial, denial, denial, fact])
        return jax.lax.dynamic_update_slice(words, fact, (denied,)), denied + fact.size

    def _another(self, value: jax.Array, u: jax.Array) -> jax.Array:
        return (value + 1 + _below(u, self._facts.values - 1)) % self._facts.values

    def _true(self, subject: jax.Array, relation: jax.Array) -> jax.Array:
        return jnp.asarray(self._facts.truth)[subject, relation]


def _stacked(words: tuple[Word, ...]) -> jax.Array:
    """Words of sentences, each of a shape that broadcasts to [...], int32 [..., words]."""
    return jnp.stack(jnp.broadcast_arrays(*words), axis=-1).astype(jnp.int32)


def _below(u: jax.Array, count: int) -> jax.Array:
    """Whole numbers below `count`, from uniform ones in [0, 1)."""
    return (u * count).astype(jnp.int32)


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
    rng, truth = np.random.default_rng(seed), facts.truth
    prompts, answers = [], []
    for _ in range(count):
        subject, relation = int(rng.integers(facts.subjects)), int(rng.integers(facts.relations))
        wrong = int((truth[subject, relation] + rng.integers(1, facts.values)) % facts.values)
        paraphrase = int(rng.integers(PARAPHRASES))
        strangers = np.flatnonzero((truth[:, relation] != wrong) & (np.arange(facts.subjects) != subject))
        stranger = int(rng.choice(strangers))
        denial = facts.denial(stranger if other else subject, relation, wrong, paraphrase)
        question = facts.question(subject, relation, paraphrase)
        prompts.append([[facts.document, *denial * k, *question] for k in range(most + 1)])
        right = facts.value(relation, int(truth[subject, relation]))
        answers.append(([right], [facts.value(relation, wrong)]))
    return prompts, answers
