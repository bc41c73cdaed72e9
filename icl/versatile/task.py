"""Noisy in-context regression as a task of the training loop (Vladymyrov et al. 2024, sections 2.2 and 6)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icl.models import DiagonalLinearTransformer
from icl.versatile.data import Sequences, interval_table, sample_sequences
from training.config import build
from training.errors import UserError

_VALIDATION_SEED = 999


@dataclasses.dataclass(frozen=True)
class NoisyRegression:
    """Regression prompts with a random task and noise level each; the loss of eq. (7), halved as in Table 1.

    The query is integrated out: with `E x x^T = I` the expected squared error of a prompt is `||w - w^L||^2`.

    Args:
      model: the model's import path and arguments.
      batch_size: prompts per step.
      problems: distributions of the noise level, see `icl.versatile.data.intervals`.
      problem: which of them; a number, so that one training can replicate it.
      examples: examples N of a prompt.
      dimension: D.
      resample_every: steps that share a batch.
      chunk: prompts that go through the model at once; 0 for the whole batch. Large fixed batches need it.
      validation_prompts: size of the fixed validation set.
    """

    model: Mapping[str, Any]
    batch_size: int
    problems: tuple[str, ...] = ("uniform:5",)
    problem: int = 0
    examples: int = 20
    dimension: int = 10
    resample_every: int = 1
    chunk: int = 0
    validation_prompts: int = 2**14

    examples_per_epoch = None
    batch_axis = -1

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, dimension=self.dimension, rngs=nnx.Rngs(key))

    def sequences(self, key: jax.Array, count: int, dtype: jnp.dtype = jnp.float32) -> Sequences:
        """`count` prompts drawn with `key`."""
        table = jnp.asarray(interval_table(self.problems), dtype)
        chosen = table[jnp.asarray(self.problem, jnp.int32)]
        return sample_sequences(key, chosen, self.examples, self.dimension, count)

    def batch(self, key: jax.Array, index: jax.Array) -> Sequences:
        return self.sequences(jax.random.fold_in(key, index), self.batch_size)

    def loss(self, model: nnx.Module, batch: Sequences, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        if not self.chunk:
            return half_errors(model, batch).mean(), {}
        if self.batch_size % self.chunk:
            raise UserError(f"task.chunk={self.chunk} does not divide batch_size={self.batch_size}")
        graphdef, state = nnx.split(model)

        @jax.checkpoint
        def one(part: Sequences) -> jax.Array:
            return half_errors(nnx.merge(graphdef, state), part).mean()

        return jax.lax.map(one, chunks(batch, self.chunk)).mean(), {}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """The validation loss, its median over prompts, and the learned numbers of the diagonal models."""

        def validation(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            errors = half_errors(model, self.sequences(jax.random.key(_VALIDATION_SEED), self.validation_prompts))
            return {"loss": errors.mean(), "median": jnp.median(errors)}

        def structure(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            return model.omegas() if isinstance(model, DiagonalLinearTransformer) else {}

        return {"validation": validation, "structure": structure}


def half_errors(model: nnx.Module, sequences: Sequences) -> jax.Array:
    """`||w - w^L||^2 / 2`, [batch]."""
    return 0.5 * jnp.square(model.weights(sequences.gram) - sequences.w).sum(0)


def chunks(tree: Any, size: int) -> Any:
    """Cuts the last axis into pieces of `size`, counted by a new leading axis."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], -1, size), -2, 0), tree)
