"""Trained models on clean and hijacked prompts, in float64.

The answer to N hijacking tokens is a polynomial in N of degree (3^L - 1) / 2. For N far above the training length it is
extrapolated, so the fraction of answers that are not finite is reported, and such answers count as wrong.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy import special
from scipy import stats

from icl.hijacking.data import clean_gram, sample_hijack, sample_tasks
from icl.hijacking.task import clean_accuracy, expected_errors

TEST_SEED = 17
_CHUNK = 2**10


def _in_float64(models: Sequence[nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    """One graph and the stacked float64 states of models of one architecture."""
    states = [jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.state(model)) for model in models]
    return nnx.graphdef(models[0]), jax.tree.map(lambda *leaves: np.stack(leaves), *states)


def _keys(prompts: int) -> jax.Array:
    return jax.random.split(jax.random.key(TEST_SEED), -(-prompts // _CHUNK))


@functools.partial(jax.jit, static_argnames=("graphdef", "dimension"))
def _hijacked_scores(
    graphdef: nnx.GraphDef, states: Any, keys: jax.Array, dimension: int, spread: float, sigma: float, count: float
) -> jax.Array:
    def on_chunk(key: jax.Array) -> jax.Array:
        key_w, key_x = jax.random.split(key)
        hijack = sample_hijack(key_x, sample_tasks(key_w, dimension, spread, _CHUNK, jnp.float64), sigma)
        gram = hijack.gram(count)
        return jax.vmap(lambda state: (nnx.merge(graphdef, state).weights(gram) * hijack.x_query).sum(0))(states)

    return jnp.moveaxis(jax.lax.map(on_chunk, keys), 0, 1)


def robust_accuracy(
    models: Sequence[nnx.Module], dimension: int, spread: float, sigma: float, counts: Sequence[int], prompts: int
) -> dict[str, list]:
    """Accuracy under `counts` hijacking tokens at distance sigma > 0.

    Returns:
      `accuracy` and `nonfinite`, each [counts][models].
    """
    found: dict[str, list] = {"accuracy": [], "nonfinite": []}
    with jax.enable_x64(True):
        graphdef, states = _in_float64(models)
        for count in counts:
            scores = _hijacked_scores(graphdef, states, _keys(prompts), dimension, spread, sigma, float(count))
            scores = np.asarray(scores).reshape(len(models), -1)
            found["accuracy"].append((np.isfinite(scores) & (scores > 0)).mean(1).tolist())
            found["nonfinite"].append((~np.isfinite(scores)).mean(1).tolist())
    return found


@functools.partial(jax.jit, static_argnames=("graphdef", "dimension", "examples"))
def _clean(
    graphdef: nnx.GraphDef, states: Any, keys: jax.Array, dimension: int, spread: float, examples: int, length: int
) -> tuple[jax.Array, jax.Array]:
    def on_chunk(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_w, key_x = jax.random.split(key)
        w = sample_tasks(key_w, dimension, spread, _CHUNK, jnp.float64)
        gram = clean_gram(key_x, w, examples, jnp.full(_CHUNK, length))
        u = jax.vmap(lambda state: nnx.merge(graphdef, state).weights(gram))(states)
        return jax.vmap(expected_errors, (0, None))(u, w), jax.vmap(clean_accuracy, (0, None))(u, w)

    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), jax.lax.map(on_chunk, keys))


def clean_quality(
    models: Sequence[nnx.Module], dimension: int, spread: float, lengths: Sequence[int], prompts: int
) -> dict[str, list]:
    """Clean prompts by context length: `excess`, its `median` over prompts, `accuracy` and `nonfinite`.

    Each is [lengths][models]. Answers that are not finite count as wrong.
    """
    found: dict[str, list] = {"excess": [], "median": [], "accuracy": [], "nonfinite": []}
    with jax.enable_x64(True):
        graphdef, states = _in_float64(models)
        for length in lengths:
            errors, accuracy = (
                np.asarray(x).reshape(len(models), -1)
                for x in _clean(graphdef, states, _keys(prompts), dimension, spread, max(lengths), length)
            )
            excess = errors - (1 - 2 / np.pi)
            found["excess"].append(excess.mean(1).tolist())
            found["median"].append(np.median(excess, axis=1).tolist())
            found["accuracy"].append(np.nan_to_num(accuracy, nan=0.0).mean(1).tolist())
            found["nonfinite"].append((~np.isfinite(accuracy)).mean(1).tolist())
    return found


def bayes_accuracy(
    dimension: int, spread: float, lengths: Sequence[int], prompts: int, sweeps: int, seed: int = 0
) -> list[dict[str, float]]:
    """Accuracy of the posterior-mean direction of w, a ceiling for every model that is linear in the query.

    Gibbs sampling of `g ~ N(1, spread^2 I)` under the constraints `y_i <g, x_i> > 0`, coordinate by coordinate, from
    the true g on; the first fifth of the sweeps is left out.

    Returns:
      For each context length the mean accuracy and its standard error.
    """
    rng = np.random.default_rng(seed)
    g = 1 + spread * rng.normal(size=(prompts, dimension))
    w = g / np.linalg.norm(g, axis=1, keepdims=True)
    x = rng.normal(size=(prompts, max(lengths), dimension))
    signed = x * np.sign(np.einsum("bnd,bd->bn", x, w))[..., None]
    results = []
    with jax.enable_x64(True):
        for length in lengths:
            mean = np.asarray(_mean_direction(jnp.asarray(signed.T), jnp.asarray(g.T), spread, length, sweeps, seed))
            cosine = (mean.T * w).sum(1) / np.linalg.norm(mean, axis=0)
            accuracy = 1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi
            results.append({"mean": float(accuracy.mean()), "error": float(accuracy.std() / np.sqrt(prompts))})
    return results


@functools.partial(jax.jit, static_argnames="sweeps")
def _mean_direction(
    signed: jax.Array, g: jax.Array, spread: float, length: jax.Array, sweeps: int, seed: jax.Array
) -> jax.Array:
    """Sum of g / ||g|| over sweeps, [d, prompts], for the first `length` of the examples `y_i x_i` [d, n, prompts]."""
    counts = (jnp.arange(signed.shape[1]) < length)[:, None]
    begin = jnp.where(counts, (signed * g[:, None]).sum(0), 0)

    def coordinate(margins: jax.Array, one: tuple) -> tuple[jax.Array, jax.Array]:
        column, old, uniform = one
        rest = margins - column * old
        bound = -rest / column  # column g_j > -rest: a lower bound where column > 0, else an upper one
        low = jnp.where(counts & (column > 0), bound, -jnp.inf).max(0)
        high = jnp.where(counts & (column < 0), bound, jnp.inf).min(0)
        a, b = special.ndtr((low - 1) / spread), special.ndtr((high - 1) / spread)
        drawn = 1 + spread * special.ndtri(jnp.clip(a + (b - a) * uniform, 1e-300, 1 - 1e-16))
        new = jnp.clip(drawn, low, high)
        return rest + column * new, new

    def sweep(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        g, margins, total = carry
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.key(seed), number), g.shape, g.dtype)
        margins, g = jax.lax.scan(coordinate, margins, (signed, g, uniform))
        direction = g / jnp.linalg.norm(g, axis=0)
        return (g, margins, total + jnp.where(number >= sweeps // 5, direction, 0)), None

    return jax.lax.scan(sweep, (g, begin, jnp.zeros_like(g)), jnp.arange(sweeps))[0][2]


def depth_trend(layers: Sequence[int], values: np.ndarray) -> tuple[str, str]:
    """The slope of `values` [depths, seeds] in log2 of the depth: as text with its 95 % interval, and what it says.

    The interval is Student's, from the scatter of seeds: with five a depth, a bootstrap over them would be too narrow.
    """
    values = np.asarray(values)
    line = stats.linregress(np.repeat(np.log2(layers), values.shape[1]), values.ravel())
    if values.size <= 2:
        return f"{line.slope:+.4f} per doubling", "too few seeds to tell"
    half = line.stderr * stats.t.ppf(0.975, values.size - 2)
    low, high = line.slope - half, line.slope + half
    verdict = "rises" if low > 0 else "falls" if high < 0 else "no trend"
    return f"{line.slope:+.4f} per doubling ({low:+.4f} to {high:+.4f})", verdict
