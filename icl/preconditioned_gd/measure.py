"""Measurements that the figures share: losses of trained models and of the baselines, and learned matrices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icl.gradient_descent import gradient_descent, least_squares
from icl.linear_attention import prompt_gram, sparse_transformer
from icl.preconditioned_gd.stationary import family_loss
from icl.preconditioned_gd.task import InContextRegression, squared_errors
from icl.regression import Covariance, diagonal_covariance, sample_prompts
from training.loop import make_program
from training.report import Run
from training.step import data_key

TEST_KEY = 20231  # of the prompts here; training and its test set use other keys

BASELINE_PROMPTS = 2**16  # for the baselines' losses: within 1 %, as tasks and queries are integrated out

COARSE_STEPS = (0.008, 0.01, 0.02, 0.04, 0.08, 0.16)
"""Step sizes that the authors' code tries for gradient descent in figure 7 (for the preconditioned one in figure 6)."""
FINER_STEPS = (0.001, 0.002, 0.004, *COARSE_STEPS)
"""Those for the preconditioned one in figure 7 (for plain gradient descent in figure 6)."""
DENSE_STEPS = tuple(np.geomspace(0.01, 0.3, 100).tolist())
"""A grid so fine that its best step is the best step."""


def task_of(run: Run) -> InContextRegression:
    """The task of a run."""
    return make_program(run.config).task()


def final_errors(run: Run, prompts: int) -> np.ndarray:
    """Squared errors of each seed's final model on fresh prompts, [seeds, prompts], the same prompts in law."""
    task, chunk = task_of(run), 2**16

    @jax.jit
    def errors(model: nnx.Module, seed: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.key(TEST_KEY), prompts // chunk)
        return jax.lax.map(lambda key: squared_errors(model, task.prompts(data_key(seed), key, chunk)), keys).ravel()

    models = zip(run.result.models, run.config.seeds, strict=True)
    return np.stack([np.asarray(errors(model, np.uint32(seed)), np.float64) for model, seed in models])


def loss_ratios(run: Run, optima: np.ndarray, prompts: int) -> list[float]:
    """Loss of each seed's final model over that of `P = e e^T`, `Q = [[A, 0], [0, 0]]`, A in `optima` [seeds, d, d].

    Both see the same fresh prompts, so the ratio is far more precise than either loss.
    """
    task = task_of(run)

    @jax.jit
    def losses(model: nnx.Module, optimum: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = task.prompts(data_key(seed), jax.random.key(TEST_KEY), prompts)
        ideal = sparse_transformer(batch.gram, batch.x_query, optimum[None, None])
        return squared_errors(model, batch).mean(), jnp.square(ideal + batch.target).mean()

    rows = zip(run.result.models, optima, run.config.seeds, strict=True)
    pairs = [losses(model, jnp.asarray(optimum, jnp.float32), np.uint32(seed)) for model, optimum, seed in rows]
    return [float(ours / best) for ours, best in pairs]


def summarize_errors(errors: np.ndarray) -> dict[str, list[float]]:
    """Mean, mean without the largest 0.1 %, and median for each seed: the tails of deep models are heavy."""
    kept = np.sort(errors, axis=-1)[:, : -max(errors.shape[-1] // 1000, 1)]
    return {
        "mean": errors.mean(-1).tolist(),
        "trimmed": kept.mean(-1).tolist(),
        "median": np.median(errors, axis=-1).tolist(),
    }


def learned_matrices(run: Run) -> dict[str, list]:
    """A, whitened A (in Sigma's eigenbasis) and B of every seed, [seeds, layers, d, d], heads summed."""
    task = task_of(run)
    result: dict[str, list] = {"a": [], "a_whitened": [], "b": []}
    for model, seed in zip(run.result.models, run.config.seeds, strict=True):
        root = task.covariance(data_key(seed)).sqrt
        a = model.a[...].sum(1)
        result["a"].append(np.asarray(a).tolist())
        result["a_whitened"].append(np.asarray(root.T @ a @ root).tolist())
        if model.b is not None:
            result["b"].append(np.asarray(model.b[...].sum(1)).tolist())
    return result


def curve(run: Run, name: str, points: int = 300) -> dict[str, list]:
    """A metric over the run, thinned to about `points` records: `{"step": [...], "value": [records][seeds]...}`."""
    series = run.series(name)
    count = len(series["step"])
    keep = np.unique(np.linspace(0, count - 1, min(points, count)).astype(int))
    values = series["value"][keep]
    if len(run.config.seeds) == 1:
        values = values[:, None]
    return {"step": series["step"][keep].tolist(), "value": np.round(values, 7).tolist()}


def last_value(run: Run, name: str) -> np.ndarray:
    """The final value of a metric, [seeds, ...]."""
    value = np.asarray(run.result.metrics[name], float)
    return value if len(run.config.seeds) > 1 else value[None]


def last_losses(run: Run, fraction: float) -> np.ndarray:
    """The training losses recorded in the last `fraction` of the steps, [records, seeds]."""
    series = run.series("loss")
    late = series["step"] > (1 - fraction) * series["step"][-1]
    return series["value"][late].reshape(late.sum(), -1)


def selected_losses(run: Run, last: int) -> list[float]:
    """The authors' protocol: the test loss at the evaluation, of the last ones, whose validation loss is least."""
    validation, test = (run.series(f"{name}/loss")["value"][-last:] for name in ("validation", "test"))
    validation, test = (values.reshape(len(values), -1) for values in (validation, test))
    return test[validation.argmin(0), np.arange(test.shape[1])].tolist()


def descent_baselines(
    examples: int, steps: int, variances: Sequence[float], plain_grid: Sequence[float], whitened_grid: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Gradient descent, plain and preconditioned with Sigma^-1, with equal steps; least squares.

    Three variants of each: "coded" as in the authors' code (one example left out, their coarse grid), "all" examples
    on the same grid, and "tuned": all examples, dense grid. None of it depends on Sigma's eigenvectors. The
    preconditioned one is exact, as it lives in the stationary family; of the others only the covariates are sampled.

    Returns:
      `{"gd" or "pgd": {variant: {"loss", "step_size"}}, "ols": {"coded": {"loss"}, "all": {"loss"}}}`.
    """
    covariance = diagonal_covariance(jnp.asarray(variances))
    x = sample_prompts(jax.random.key(0), covariance, examples, BASELINE_PROMPTS).x

    def plain(used: int, grid: Sequence[float]) -> np.ndarray:
        return np.asarray(_descent_losses(x[:, :used], covariance, jnp.asarray(grid), steps))

    def preconditioned(used: int, grid: Sequence[float]) -> np.ndarray:
        d = len(variances)
        return np.array([family_loss((-step * used,) * steps, (0.0,) * steps, used, d) for step in grid])

    result: dict[str, dict[str, Any]] = {}
    for name, losses_at, grid in (("gd", plain, plain_grid), ("pgd", preconditioned, whitened_grid)):
        variants = {"coded": (examples - 1, grid), "all": (examples, grid), "tuned": (examples, DENSE_STEPS)}
        result[name] = {}
        for variant, (used, tried) in variants.items():
            losses = losses_at(used, tried)
            best = int(np.nanargmin(losses))
            result[name][variant] = {"loss": float(losses[best]), "step_size": float(tried[best])}
    result["ols"] = {
        variant: {"loss": float(_least_squares_loss(x[:, :used], covariance))}
        for variant, used in (("coded", examples - 1), ("all", examples))
    }
    return result


@functools.partial(jax.jit, static_argnames="steps")
def _descent_losses(x: jax.Array, covariance: Covariance, step_sizes: jax.Array, steps: int) -> jax.Array:
    """The losses of `w <- w - eta X (X^T w - y)` for each eta of `step_sizes`, on prompts with the examples `x`.

    As in the authors' code the steps are on the sum of squares: `eta n` on the mean.
    """
    d, n, _ = x.shape
    gram = prompt_gram(x, jnp.zeros_like(x[0]))

    def loss(step_size: jax.Array) -> jax.Array:
        preconditioners = jnp.broadcast_to(step_size * n * jnp.eye(d), (steps, d, d))

        def estimate(w: jax.Array) -> jax.Array:
            labelled = gram._replace(xy=jnp.einsum("ijb,j->ib", gram.xx, w, precision=jax.lax.Precision.HIGHEST))
            return gradient_descent(labelled, preconditioners)[-1]

        return _loss_over_tasks(estimate, covariance)

    return jax.lax.map(loss, step_sizes)


@jax.jit
def _least_squares_loss(x: jax.Array, covariance: Covariance) -> jax.Array:
    def estimate(w: jax.Array) -> jax.Array:
        return least_squares(x, jnp.einsum("i,inb->nb", w, x, precision=jax.lax.Precision.HIGHEST), covariance)

    return _loss_over_tasks(estimate, covariance)


def _loss_over_tasks(estimate: Callable[[jax.Array], jax.Array], covariance: Covariance) -> jax.Array:
    """The in-context loss of an estimator that maps a task vector [d] to what it finds on every prompt, [d, batch].

    The means over the query and over `w ~ N(0, Sigma^-1)` are exact: the error is linear in w, so its mean square is a
    sum over the columns of a root of Sigma^-1.
    """

    def error(w: jax.Array) -> jax.Array:
        return covariance.sqrt.T @ (estimate(w) - w[:, None])

    return jnp.square(jax.lax.map(error, covariance.inverse_sqrt.T)).sum((0, 1)).mean()
