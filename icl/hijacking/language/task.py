"""Language modelling on the corpus of facts, as a task of the training loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from icl.hijacking.language.corpus import Documents, Facts, hijacking_prompts
from icl.hijacking.language.gpt2 import GPT2, Shape
from training.config import build


def small_gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int, *, rngs: nnx.Rngs) -> GPT2:
    """A GPT-2 of any size."""
    return GPT2(Shape(vocabulary, positions, width, layers, heads), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class FactCorpus:
    """Next-word prediction on packed documents, see `icl.hijacking.language.corpus`.

    Args:
      model: the model's import path and arguments.
      batch_size: windows per step.
      subjects, novel, relations, values: of the world.
      corpora: for each corpus the share of documents that redraw values and the share with true denials.
      corpus: which of them; a number, so that one training can replicate it.
      length: words in a window; at least that of the longest test prompt.
      questions: number of questions that test recall.
    """

    model: Mapping[str, Any]
    batch_size: int
    subjects: int = 400
    novel: int = 600
    relations: int = 4
    values: int = 12
    corpora: Sequence[tuple[float, float]] = ((0.4, 0.01),)
    corpus: int = 0
    length: int = 64
    questions: int = 256

    examples_per_epoch = None
    resample_every = 1
    batch_axis = 0

    @property
    def facts(self) -> Facts:
        return Facts(self.subjects, self.novel, self.relations, self.values)

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, vocabulary=self.facts.vocabulary, positions=self.length, rngs=nnx.Rngs(key))

    def batch(self, key: jax.Array, index: jax.Array) -> jax.Array:
        context, negation = jnp.asarray(self.corpora)[jnp.asarray(self.corpus, jnp.int32)]
        documents = Documents(self.facts, context, negation)
        return documents.windows(jax.random.fold_in(key, index), self.batch_size, self.length)

    def loss(self, model: nnx.Module, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch)[:, :-1], batch[:, 1:])
        return losses.mean(), {}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """`recall`: the share of questions about known subjects that are answered right.

        `stated` and `redrawn`: the loss on documents of one kind, on which depths are matched.
        """
        prompts, answers = hijacking_prompts(self.facts, self.questions, 0, other=False, seed=1)
        questions = np.array([group[0] for group in prompts])
        right = np.array([answer[0][0] for answer in answers])

        def recall(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            return {"accuracy": (model(questions)[:, -1].argmax(-1) == right).mean()}

        def on_documents(context: float) -> Callable[..., dict[str, jax.Array]]:
            def evaluate(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
                tokens = Documents(self.facts, context, 0.0).windows(jax.random.key(2), 256, self.length)
                return {"loss": self.loss(model, tokens, key)[0]}

            return evaluate

        return {"recall": recall, "stated": on_documents(0.0), "redrawn": on_documents(1.0)}
