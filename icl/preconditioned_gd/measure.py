"""Measurements that the figures share: losses of trained models and of the baselines, and learned matrices."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icl.gradient_descent import constant_step_descent, least_squares
from icl.linear_attention import sparse_transformer
from icl.preconditioned_gd.task import InContextRegression, squared_errors
from icl.regression import Prompts, diagonal_covariance, sample_prompts
from training.loop import make_program
from training.report import Run
from training.step import data_key

TEST_KEY = 20231  # of the prompts here; training and its test set use other keys

BASELINE_PROMPTS = 100_000  # to tune a baseline on, and as many to test it

COARSE_STEPS = (0.008, 0.01, 0.02, 0.04, 0.08, 0.16)
"""Step sizes that the authors' code tries for gradient descent in figure 7 (for the preconditioned one in figure 6)."""
FINER_STEPS = (0.001, 0.002, 0.004, *COARSE_STEPS)
"""Those for the preconditioned one in figure 7 (for plain gradient descent in figure 6)."""
DENSE_STEPS = tuple(np.geomspace(0.001, 0.3, 80).tolist())
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


def last_losses(run: Run, fraction: float) -> list[float]:
    """The training loss averaged over the last `fraction` of the steps, for each seed."""
    series = run.series("loss")
    late = series["step"] > (1 - fraction) * series["step"][-1]
    return np.atleast_1d(series["value"][late].mean(0)).tolist()


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
    on the same grid, and "tuned": all examples, dense grid. The step size is chosen on 1e5 prompts and the loss
    measured on 1e5 others. None of it depends on Sigma's eigenvectors.

    Returns:
      `{"gd" or "pgd": {variant: {"loss", "step_size"}}, "ols": {"coded": {"loss"}, "all": {"loss"}}}`.
    """
    d = len(variances)
    tuning, test = (_plain_prompts(examples, tuple(variances), seed) for seed in (0, 1))
    inverse = jnp.diag(1 / jnp.asarray(variances))
    result: dict[str, dict[str, Any]] = {}
    for name, grid, matrix in (("gd", plain_grid, jnp.eye(d)), ("pgd", whitened_grid, inverse)):
        variants = {"coded": (examples - 1, grid), "all": (examples, grid), "tuned": (examples, DENSE_STEPS)}
        result[name] = {}
        for variant, (used, steps_tried) in variants.items():
            losses = _descent_losses(tuning, used, jnp.asarray(steps_tried), steps, matrix)
            best = float(steps_tried[int(np.nanargmin(np.where(np.isfinite(losses), losses, np.nan)))])
            loss = float(_descent_losses(test, used, jnp.array([best]), steps, matrix)[0])
            result[name][variant] = {"loss": loss, "step_size": best}
    result["ols"] = {
        variant: {"loss": _least_squares_loss(test, used, tuple(variances))}
        for variant, used in (("coded", examples - 1), ("all", examples))
    }
    return result


@functools.cache
def _plain_prompts(examples: int, variances: tuple[float, ...], seed: int) -> Prompts:
    return sample_prompts(jax.random.key(seed), diagonal_covariance(jnp.asarray(variances)), examples, BASELINE_PROMPTS)


@functools.partial(jax.jit, static_argnames=("used", "steps"))
def _descent_losses(prompts: Prompts, used: int, step_sizes: jax.Array, steps: int, matrix: jax.Array) -> jax.Array:
    def loss(step_size: jax.Array) -> jax.Array:
        w = constant_step_descent(prompts.x[:, :used], prompts.y[:used], step_size, steps, matrix)
        return jnp.mean(jnp.sum((w - prompts.w) * prompts.x_query, axis=0) ** 2)

    return jax.lax.map(loss, step_sizes)


def _least_squares_loss(prompts: Prompts, used: int, variances: tuple[float, ...]) -> float:
    w = least_squares(prompts.x[:, :used], prompts.y[:used], diagonal_covariance(jnp.asarray(variances)))
    return float(jnp.mean(jnp.sum((w - prompts.w) * prompts.x_query, axis=0) ** 2))
