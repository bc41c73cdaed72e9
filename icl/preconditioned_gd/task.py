"""In-context linear regression as a task of the training loop (Ahn et al. 2023, sections 2, 4.3 and 5.1)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from icl.linear_attention import Gram, prompt_gram
from icl.models import LinearTransformer, SparseLinearTransformer
from icl.preconditioned_gd.theory import dist_to_identity
from icl.regression import Covariance, diagonal_covariance, rotated_covariance, sample_prompts
from training.config import build
from training.errors import UserError


class Batch(NamedTuple):
    """Prompts, reduced to what a linear transformer sees of them."""

    gram: Gram
    x_query: jax.Array  # [d, batch]
    target: jax.Array  # the query's label <w, x>, [batch]


@dataclasses.dataclass(frozen=True)
class InContextRegression:
    """Regression prompts with a random task each; the loss of eq. (5), a plain mean of squared errors.

    Args:
      model: the model's import path and arguments.
      batch_size: prompts per step.
      examples: labelled examples n of a prompt.
      variances: eigenvalues of the covariance Sigma of the covariates; their number is the dimension d.
      rotated: whether Sigma has random eigenvectors, drawn once per seed, or is diagonal.
      covariates: latent distribution, see `icl.regression.sample_prompts`.
      gamma_shape: of the covariates "gamma".
      task_prior: "inverse_covariance" (Theorems 3 and 4, the experiments) or "identity" (Theorem 1).
      resample_every: steps that share a batch.
      test_prompts: size of the fixed test set, and of the validation set.
    """

    model: Mapping[str, Any]
    batch_size: int
    examples: int = 20
    variances: tuple[float, ...] = (1.0, 1.0, 0.25, 0.0625, 1.0)
    rotated: bool = True
    covariates: str = "normal"
    gamma_shape: float = 2.5
    task_prior: str = "inverse_covariance"
    resample_every: int = 1
    test_prompts: int = 20_000

    examples_per_epoch = None
    batch_axis = -1

    def init(self, key: jax.Array) -> nnx.Module:
        return build(self.model, dimension=len(self.variances), rngs=nnx.Rngs(key))

    def covariance(self, key: jax.Array) -> Covariance:
        """The covariance of the run with this data key."""
        variances = jnp.array(self.variances)
        return (
            rotated_covariance(jax.random.fold_in(key, 0), variances)
            if self.rotated
            else diagonal_covariance(variances)
        )

    def prompts(self, key: jax.Array, prompt_key: jax.Array, count: int) -> Batch:
        """`count` prompts drawn with `prompt_key`, under the covariance of the run with the data key `key`."""
        drawn = sample_prompts(
            prompt_key, self.covariance(key), self.examples, count, self.covariates, self.gamma_shape, self.task_prior
        )
        target = jnp.sum(drawn.w * drawn.x_query, axis=0)
        return Batch(prompt_gram(drawn.x, drawn.y), drawn.x_query, target)

    def batch(self, key: jax.Array, index: jax.Array) -> Batch:
        return self.prompts(key, jax.random.fold_in(jax.random.fold_in(key, 1), index), self.batch_size)

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.mean(squared_errors(model, batch)), {}

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """Losses on the test set (seed 99) and the validation set (seed 999), and the structure of the weights."""

        def on_prompts(seed: int) -> Callable[..., dict[str, jax.Array]]:
            def evaluate(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
                errors = squared_errors(model, self.prompts(key, jax.random.key(seed), self.test_prompts))
                return {"loss": errors.mean(), "median": jnp.median(errors)}

            return evaluate

        def structure(model: nnx.Module, key: jax.Array) -> dict[str, jax.Array]:
            return weight_structure(model, self.covariance(key))

        return {"test": on_prompts(99), "validation": on_prompts(999), "structure": structure}


def squared_errors(model: nnx.Module, batch: Batch) -> jax.Array:
    """`([Z_L]_{d+1,n+1} + <w, x>)^2` for each prompt, [batch]."""
    return jnp.square(model(batch.gram, batch.x_query) + batch.target)


def weight_structure(model: nnx.Module, covariance: Covariance) -> dict[str, jax.Array]:
    """How far the learned matrices are from the theorems' structure, each an array over layers.

    For the sparse models, with A and B summed over heads: distances of `Sigma^1/2 A Sigma^1/2` (`dist_a`), of A itself
    (`dist_a_raw`) and of B (`dist_b`) to the multiples of the identity (section 4.3), and those multiples (`a`, `b`).
    For the full model: the last row of P relative to its last entry (`p_off`), the top block of Q with the scale of P
    multiplied in (`q_top`), and the rest of Q's first columns relative to it (`q_off`).

    Raises:
      UserError: a model of another class.
    """
    if isinstance(model, LinearTransformer):
        p_row, q = model.p[...][:, 0, -1], model.q[...][:, 0]
        top = q[:, :-1, :-1]
        return {
            "p_off": jnp.linalg.norm(p_row[:, :-1], axis=-1) / jnp.abs(p_row[:, -1]),
            "q_off": jnp.linalg.norm(q[:, -1, :-1], axis=-1) / jnp.linalg.norm(top, axis=(-2, -1)),
            "q_top": p_row[:, -1, None, None] * top,
        }
    if not isinstance(model, SparseLinearTransformer):
        raise UserError(f"{type(model).__name__} has no known structure; use a model of icl.models")
    a = model.a[...].sum(1)
    whitened = covariance.sqrt.T @ a @ covariance.sqrt
    result = {"dist_a": dist_to_identity(whitened), "dist_a_raw": dist_to_identity(a), "a": _multiple(whitened)}
    if model.b is not None:
        b = model.b[...].sum(1)
        result |= {"dist_b": dist_to_identity(b), "b": _multiple(b)}
    return result


def _multiple(matrix: jax.Array) -> jax.Array:
    return jnp.trace(matrix, axis1=-2, axis2=-1) / matrix.shape[-1]
