"""GPT-2 models that classify in context, in the style of Garg et al. 2022 (figure 5 of Li et al. 2025)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icl.hijacking.data import Hijack, sample_hijack, sample_tasks
from icl.hijacking.language.gpt2 import Block, Dense, LayerNorm, Shape
from training.config import build


class InContextGPT2(nnx.Module):
    """Reads x_1, y_1, x_2, y_2, ... as vectors, and predicts at every x."""

    def __init__(self, layers: int, width: int, heads: int, dimension: int, positions: int, *, rngs: nnx.Rngs):
        shape = Shape(0, positions, width, layers, heads)
        self.read_in, self.read_out = Dense(dimension, width, dimension**-0.5, rngs), Dense(width, 1, 0.02, rngs)
        self.wpe = nnx.Param(0.02 * jax.random.normal(rngs.params(), (positions, width)))
        self.blocks = nnx.List([Block(shape, rngs) for _ in range(layers)])
        self.ln_f = LayerNorm(width, shape.epsilon)

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Scores at every x, [batch, n], each from the pairs before it, for x [batch, n, d] and y [batch, n]."""
        labels = jnp.zeros_like(x).at[..., 0].set(y)
        tokens = jnp.stack([x, labels], axis=2).reshape(x.shape[0], -1, x.shape[-1])[:, :-1]
        h = self.read_in(tokens) + self.wpe[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.read_out(self.ln_f(h))[:, ::2, 0]


class Pairs(NamedTuple):
    """Examples in order, the query last."""

    x: jax.Array  # [batch, n + 1, d]
    y: jax.Array  # [batch, n + 1]


@dataclasses.dataclass(frozen=True)
class InContextClassification:
    """Squared error on the label at every x of a clean prompt.

    Args:
      model: the model's import path and arguments.
      batch_size: prompts per step.
      dimension: d.
      examples: pairs before the query.
      spread: standard deviation of a coordinate of the prior.
    """

    model: Mapping[str, Any]
    batch_size: int
    dimension: int = 20
    examples: int = 40
    spread: float = 0.1

    examples_per_epoch = None
    resample_every = 1
    batch_axis = 0

    def init(self, key: jax.Array) -> nnx.Module:
        positions = 2 * self.examples + 1
        return build(self.model, dimension=self.dimension, positions=positions, rngs=nnx.Rngs(key))

    def batch(self, key: jax.Array, index: jax.Array) -> Pairs:
        key_w, key_x = jax.random.split(jax.random.fold_in(key, index))
        w = sample_tasks(key_w, self.dimension, self.spread, self.batch_size)
        x = jax.random.normal(key_x, (self.batch_size, self.examples + 1, self.dimension))
        return Pairs(x, jnp.where(jnp.einsum("db,bnd->bn", w, x) < 0, -1.0, 1.0))

    def loss(self, model: nnx.Module, batch: Pairs, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        errors = jnp.square(model(*batch) - batch.y)
        return errors.mean(), {"last": errors[:, -1].mean()}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """Accuracy under 0 to n hijacking tokens at sigma = 0.1, [n + 1]; figure 5's cliff is at the last position."""

        def hijacked(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            key_w, key_x = jax.random.split(jax.random.key(999))
            hijack = sample_hijack(key_x, sample_tasks(key_w, self.dimension, self.spread, 256), 0.1)
            counts = jnp.arange(self.examples + 1)
            return {
                "accuracy": jax.lax.map(lambda n: (hijacked_scores(model, hijack, n, self.examples) > 0).mean(), counts)
            }

        return {"hijacked": hijacked}


def hijacked_scores(model: nnx.Module, hijack: Hijack, count: jax.Array, most: int) -> jax.Array:
    """The score of the query behind `count` of at most `most` hijacking tokens, [batch].

    The query stands at position `count`; what follows it is not seen.
    """
    is_query = (jnp.arange(most + 1) >= count)[:, None]
    x = jnp.where(is_query, hijack.x_query.T[:, None], hijack.x_token.T[:, None])
    y = jnp.broadcast_to(-hijack.y_query[:, None], x.shape[:2])
    return jnp.take(model(x, y), count, axis=1)
