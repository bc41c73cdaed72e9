"""In-context classification as a task of the training loop (Li et al. 2025, sections 3 and 5)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icl.hijacking.data import SIGN_MEAN, clean_gram, sample_tasks
from training.config import build

_VALIDATION_SEED = 999


class Batch(NamedTuple):
    """Clean prompts, reduced to what a linear transformer sees of them."""

    gram: jax.Array  # [d + 1, d + 1, batch]
    w: jax.Array  # [d, batch]


@dataclasses.dataclass(frozen=True)
class HijackedClassification:
    """Clean classification prompts with a random task each; hijacking happens at test time only.

    The loss is the expected squared error over the query, `||u||^2 - 2 SIGN_MEAN <u, w> + 1`: it has the same minimiser
    as the error on single queries and far less noise in its gradient.

    Args:
      model: the model's import path and arguments.
      batch_size: prompts per step.
      dimension: d.
      examples: training context length n.
      spread: standard deviation of a coordinate of the prior.
      varied: whether the context length is uniform on 0, ..., n instead of n.
      validation_prompts: size of the fixed validation set, whose prompts have n examples.
    """

    model: Mapping[str, Any]
    batch_size: int
    dimension: int = 10
    examples: int = 20
    spread: float = 0.1
    varied: bool = False
    validation_prompts: int = 2**13

    examples_per_epoch = None
    batch_axis = -1
    resample_every = 1

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, dimension=self.dimension, context=self.examples, rngs=nnx.Rngs(key))

    def prompts(self, key: jax.Array, count: int, varied: bool) -> Batch:
        key_w, key_x, key_length = jax.random.split(key, 3)
        w = sample_tasks(key_w, self.dimension, self.spread, count)
        length = jax.random.randint(key_length, (count,), 0, self.examples + 1) if varied else None
        return Batch(clean_gram(key_x, w, self.examples, length), w)

    def batch(self, key: jax.Array, index: jax.Array) -> Batch:
        return self.prompts(jax.random.fold_in(key, index), self.batch_size, self.varied)

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return expected_errors(model.weights(batch.gram), batch.w).mean(), {}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """Excess risk and accuracy on clean prompts of the training length, the same ones for all seeds."""

        def clean(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            batch = self.prompts(jax.random.key(_VALIDATION_SEED), self.validation_prompts, varied=False)
            u = model.weights(batch.gram)
            excess = expected_errors(u, batch.w) - (1 - 2 / math.pi)
            return {"excess": excess.mean(), "accuracy": clean_accuracy(u, batch.w).mean()}

        return {"clean": clean}


def expected_errors(u: jax.Array, w: jax.Array) -> jax.Array:
    """`E (<u, x> - sign <w, x>)^2` over the query, [batch], for u and unit w, both [d, batch]."""
    return jnp.square(u).sum(0) - 2 * SIGN_MEAN * (u * w).sum(0) + 1


def clean_accuracy(u: jax.Array, w: jax.Array) -> jax.Array:
    """`P(sign <u, x> = sign <w, x>) = 1 - angle(u, w) / pi`, [batch]."""
    cosine = (u * w).sum(0) / (jnp.linalg.norm(u, axis=0) * jnp.linalg.norm(w, axis=0))
    return 1 - jnp.arccos(jnp.clip(cosine, -1, 1)) / math.pi
