"""The synthetic benchmarks as tasks of the training loop."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltanet.synthetic.tokens import IGNORE, Benchmark, TokenSet
from models.losses import chunked_cross_entropy
from training.config import build
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class SyntheticTask:
    """A fixed training set that stays on the device; the loss is the cross-entropy at the labelled positions.

    Args:
      model: the model's import path and arguments; it is also given `vocabulary_size`.
      batch_size: examples per step.
      data: import path and arguments of a function that returns a `Benchmark`.
      shuffle: whether the order of the training examples is a fresh one in every epoch. What is left at the end of an
        epoch, less than a batch, is not used in it.
      eval_batch: examples that are evaluated at once.
      chunk: positions whose logits are held at once.
      resident: what `residents` gave, on the device; given by the loop.
    """

    model: Mapping[str, Any]
    batch_size: int
    data: Mapping[str, Any]
    shuffle: bool = True
    eval_batch: int = 250
    chunk: int = 8192
    resident: Mapping[str, Any] | None = None

    resample_every = 1
    batch_axis = 0

    @property
    def benchmark(self) -> Benchmark:
        return build(self.data)

    @property
    def examples_per_epoch(self) -> int:
        return len(self.benchmark.train.tokens)

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, vocabulary_size=self.benchmark.vocabulary, rngs=nnx.Rngs(params=key))

    def residents(self) -> dict[str, Any]:
        """The training set, and the held-out sets in batches filled up with examples without labels."""
        train, held_out = self.benchmark.train, self.benchmark.held_out
        if self.batch_size > len(train.tokens):
            raise UserError(f"a batch of {self.batch_size} is more than the {len(train.tokens)} training examples")
        cut = {name: _in_batches(examples, self.eval_batch) for name, examples in held_out.items()}
        return {"train": {"tokens": train.tokens, "labels": train.labels}, "held_out": cut}

    def batch(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """Tokens and labels, [batch, time]: the next examples of the epoch."""
        train = self.resident["train"]
        count = len(train["tokens"])
        epoch, place = jnp.divmod(index, count // self.batch_size)
        rows = place * self.batch_size + jnp.arange(self.batch_size)
        if self.shuffle:
            rows = jnp.argsort(jax.random.bits(jax.random.fold_in(key, epoch), (count,)))[rows]
        return {name: x[rows].astype(jnp.int32) for name, x in train.items()}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        model.train()
        places = labelled_places(batch["labels"], self.benchmark.train.labelled)
        hidden = at_places(model.hidden(batch["tokens"], rngs=nnx.Rngs(dropout=key)), places)
        labels = at_places(batch["labels"], places)
        weights = (labels != IGNORE).astype(jnp.float32)
        loss, total, correct = chunked_cross_entropy(hidden, model.head, labels, weights, chunk=self.chunk)
        return loss / total, {"accuracy": correct / total}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """One for each held-out set, see `measured`."""

        def evaluator(name: str, examples: TokenSet) -> Callable[..., dict[str, jax.Array]]:
            return lambda model, key: measured(
                model, self.resident["held_out"][name], examples.labelled, self.benchmark.vocabulary
            )

        return {name: evaluator(name, examples) for name, examples in self.benchmark.held_out.items()}


def labelled_places(labels: jax.Array, count: int) -> jax.Array:
    """The positions of the labels, in their order and then of others up to `count`, [batch, count]."""
    return jnp.argsort(labels == IGNORE, axis=1, stable=True)[:, :count]


def at_places(x: jax.Array, places: jax.Array) -> jax.Array:
    """`x` [batch, time, ...] at `places` [batch, count]."""
    return jnp.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), 1)


def _in_batches(examples: TokenSet, size: int) -> dict[str, np.ndarray]:
    fill = -len(examples.tokens) % size

    def cut(x: np.ndarray, value: int) -> np.ndarray:
        x = np.pad(x, ((0, fill), (0, 0)), constant_values=value)
        return x.reshape(-1, size, x.shape[1])

    batches = {"tokens": cut(examples.tokens, 0), "labels": cut(examples.labels, IGNORE)}
    return batches if examples.legal is None else {**batches, "legal": cut(examples.legal, 0)}


def measured(
    model: nnx.Module, batches: Mapping[str, jax.Array], labelled: int, vocabulary: int
) -> dict[str, jax.Array]:
    """How often the likeliest token is the label.

    Args:
      model: with `hidden` and `logits`.
      batches: `tokens` and `labels`, and perhaps `legal`, as of a `TokenSet`, [batches, batch, time].
      labelled: the largest number of labels in an example.
      vocabulary: of tokens.

    Returns:
      `loss` and `accuracy` over all labels; `macro_accuracy`, the mean over tokens that are a label or predicted, as
      torchmetrics has it; with `legal`, also how often the likeliest token may follow, `legal_accuracy`.
    """
    model.eval()
    graph, state = nnx.split(model)

    def counts(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        batch = {name: x.astype(jnp.int32) for name, x in batch.items()}
        one = nnx.merge(graph, state)
        places = labelled_places(batch["labels"], labelled)
        logits = one.logits(at_places(one.hidden(batch["tokens"]), places))
        labels = at_places(batch["labels"], places)
        counted = (labels != IGNORE).astype(jnp.float32)
        labels, guess = jnp.where(labels == IGNORE, 0, labels), logits.argmax(-1)
        right = counted * (guess == labels)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]

        def by_token(tokens: jax.Array, weights: jax.Array) -> jax.Array:
            return jnp.zeros(vocabulary).at[tokens].add(weights)

        sums = {
            "loss": (counted * losses).sum(),
            "labels": by_token(labels, counted),
            "guesses": by_token(guess, counted),
            "right": by_token(labels, right),
        }
        if "legal" in batch:
            sums["legal"] = (counted * (at_places(batch["legal"], places) >> guess & 1)).sum()
        return sums

    sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(counts, dict(batches)))
    total = sums["labels"].sum()
    seen = (sums["labels"] + sums["guesses"]) > 0
    recall = sums["right"] / jnp.maximum(sums["labels"], 1)
    results = {
        "loss": sums["loss"] / total,
        "accuracy": sums["right"].sum() / total,
        "macro_accuracy": recall.sum() / seen.sum(),
    }
    return results | ({"legal_accuracy": sums["legal"] / total} if "legal" in sums else {})
