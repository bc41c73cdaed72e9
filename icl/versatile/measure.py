"""Evaluation in float64: trained models and baselines on the same fresh prompts, by noise level and by depth.

A model of L layers predicts with a polynomial of degree (3^L - 1) / 2 in the second moments, so one prompt in 1e5 can
make the mean. Means therefore come with the mean over all but the largest 0.1 %, the maximum, and the fraction of
prompts whose error is not finite, which the means leave out.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icl.linear_attention import prediction_weights
from icl.versatile.baselines import Spectral, Tuned, baseline_losses, oracle_losses, spectral, tune
from icl.versatile.data import Sequences, interval_table, sample_sequences
from icl.versatile.theory import diagonal_views

EXAMPLES, DIMENSION = 20, 10

TUNING_SEED, TEST_SEED = 31, 32
_CHUNK = 2**11
_DEEPEST = 7  # layers of the paper's deepest models


def _keys(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), -(-count // _CHUNK))


def _chunk(key: jax.Array, intervals: jax.Array) -> Sequences:
    return sample_sequences(key, intervals, EXAMPLES, DIMENSION, _CHUNK)


@jax.jit
def _spectral_chunks(keys: jax.Array, intervals: jax.Array) -> Spectral:
    parts = jax.lax.map(lambda key: spectral(_chunk(key, intervals)), keys)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), parts)


def prompts_of(problem: str, seed: int, count: int) -> Spectral:
    """About `count` prompts in their eigenbases, float64; call it, and what uses them, under `jax.enable_x64`."""
    return _spectral_chunks(_keys(seed, count), jnp.asarray(interval_table([problem])[0], jnp.float64))


@functools.cache
def tuned_baselines(problem: str, count: int) -> Tuned:
    """The baselines' constants, tuned on `count` prompts."""
    with jax.enable_x64(True):
        return tune(prompts_of(problem, TUNING_SEED, count), EXAMPLES)


@functools.cache
def baselines(problem: str, tuning: int, test: int) -> dict[str, Any]:
    """Adjusted losses of the baselines, each summarised, the oracle's full squared error, and the tuned constants."""
    tuned = tuned_baselines(problem, tuning)
    return {"tuned": tuned._asdict(), **baseline_profile(problem, tuned, test)}


def baseline_profile(problem: str, tuned: Tuned, count: int) -> dict[str, Any]:
    """Adjusted losses of baselines with given constants on a problem, and the oracle's full squared error."""
    with jax.enable_x64(True):
        prompts = prompts_of(problem, TEST_SEED, count)
        oracle = oracle_losses(prompts)
        return {
            "oracle": 2 * float(oracle.mean()),
            **{
                name: summarize(np.asarray(losses - oracle))
                for name, losses in baseline_losses(prompts, tuned, EXAMPLES).items()
            },
        }


@functools.cache
def _oracle(problem: str, seed: int, count: int) -> np.ndarray:
    """The oracle's losses, [prompts]; many models are measured on the same prompts."""
    with jax.enable_x64(True):
        return np.asarray(oracle_losses(prompts_of(problem, seed, count)))


@functools.partial(jax.jit, static_argnames="readouts")
def _losses(p: jax.Array, q: jax.Array, keys: jax.Array, intervals: jax.Array, readouts: tuple[int, ...]) -> jax.Array:
    def on_chunk(key: jax.Array) -> jax.Array:
        prompts = _chunk(key, intervals)

        def one(p: jax.Array, q: jax.Array) -> jax.Array:
            w = [prediction_weights(prompts.gram, p[:k], q[:k])[:-1] if k else 0.0 for k in readouts]
            return jnp.stack([0.5 * jnp.square(each - prompts.w).sum(0) for each in w])

        return jax.vmap(one)(p, q)

    return jnp.moveaxis(jax.lax.map(on_chunk, keys), 0, -2)


def adjusted_errors(
    models: Sequence[nnx.Module], problem: str, count: int, readouts: Sequence[int], seed: int = TEST_SEED
) -> np.ndarray:
    """Half squared errors above the oracle's, prompt by prompt.

    Args:
      models: of one architecture.
      problem: the noise problem to test on.
      count: number of prompts, rounded up to whole chunks.
      readouts: the numbers of layers after which the prediction is read; 0 predicts zero.
      seed: of the prompts; the same seed gives the same prompts for every model.

    Returns:
      [models, readouts, prompts], float64.
    """
    with jax.enable_x64(True):
        p, q = (np.stack(each) for each in zip(*map(_matrices, models), strict=True))
        if tuple(readouts) == (p.shape[1],):  # one program, which is slow to compile, then serves all depths
            p, q, readouts = _deepened(p), _deepened(q), (max(_DEEPEST, p.shape[1]),)
        intervals = jnp.asarray(interval_table([problem])[0], jnp.float64)
        losses = _losses(p, q, _keys(seed, count), intervals, tuple(readouts))
        return np.asarray(losses).reshape(*losses.shape[:2], -1) - _oracle(problem, seed, count)


def _matrices(model: nnx.Module) -> tuple[np.ndarray, np.ndarray]:
    """P and Q of all layers, or their diagonals, float64."""
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: np.asarray(x, np.float64), state))
    p, q = model.matrices() if hasattr(model, "matrices") else (model.p[...], model.q[...])
    return np.asarray(p), np.asarray(q)


def _deepened(matrices: np.ndarray) -> np.ndarray:
    """The matrices of [models, layers, ...] with layers in front that change nothing, `_DEEPEST` in all."""
    missing = max(_DEEPEST - matrices.shape[1], 0)
    return np.pad(matrices, [(0, 0), (missing, 0), *[(0, 0)] * (matrices.ndim - 2)])


def summarize(errors: np.ndarray) -> dict[str, float]:
    """Mean and its standard error, trimmed mean, maximum and non-finite fraction of one model's errors [prompts].

    All but the last are infinite for a model that diverged altogether.
    """
    finite = np.sort(errors[np.isfinite(errors)])
    if not len(finite):
        return {**dict.fromkeys(("mean", "error", "trimmed", "max"), float("inf")), "nonfinite": 1.0}
    kept = finite[: len(finite) - max(len(errors) // 1000, 1)]
    return {
        "mean": float(finite.mean()),
        "error": float(finite.std() / np.sqrt(len(finite))),
        "trimmed": float(kept.mean()),
        "max": float(finite[-1]),
        "nonfinite": 1 - len(finite) / len(errors),
    }


def profile(
    models: Sequence[nnx.Module], sigmas: Sequence[float], count: int, readouts: Sequence[int]
) -> dict[str, list]:
    """Adjusted losses by noise level: `mean` and `trimmed`, each [sigmas][models][readouts]."""
    found: dict[str, list] = {"mean": [], "trimmed": []}
    for sigma in sigmas:
        errors = adjusted_errors(models, f"fixed:{sigma}", count, readouts)
        summaries = [[summarize(row) for row in rows] for rows in errors]
        for name, values in found.items():
            values.append([[row[name] for row in rows] for rows in summaries])
    return found


def diagonal_share(p: np.ndarray, q: np.ndarray) -> list[dict[str, float]]:
    """How much of each layer of a dense one-head model is tied-diagonal, over the entries that can matter.

    Args:
      p: [layers, d + 1, d + 1].
      q: as `p`. In the last layer only the last row of P is read, and of Q what multiplies the query's covariates.

    Returns:
      For each layer the norm of the tied-diagonal part over the whole norm, for P and for Q.
    """
    d = p.shape[-1] - 1
    shares = []
    for layer, matrices in enumerate(zip(p, q, strict=True)):
        is_last, is_first = layer == len(p) - 1, layer == 0
        mask_p = np.ones((d + 1, d + 1))
        mask_q = np.ones((d + 1, d + 1))
        if is_last:
            mask_p[:-1] = 0
        if is_first and is_last:
            mask_q[:, -1] = 0  # the query's label entry is still 0
        shares.append(
            {
                name: _tied_share(matrix, mask)
                for name, matrix, mask in zip("pq", matrices, (mask_p, mask_q), strict=True)
            }
        )
    return shares


def _tied_share(matrix: np.ndarray, mask: np.ndarray) -> float:
    d = len(matrix) - 1
    diagonal = np.diag([np.trace(matrix[:-1, :-1]) / d] * d + [matrix[-1, -1]])
    return float(np.linalg.norm(mask * diagonal) / np.linalg.norm(mask * matrix))


def layer_terms(model: nnx.Module, sigmas: Sequence[float], count: int) -> dict[str, list]:
    """What a diagonal model's layers do, by noise level: medians over prompts of the terms of Lemma A.1.

    Returns:
      `rescale` (the s of `(1 + s) w`), `step` and `momentum` (norms of what is taken from w), each [sigmas][layers].
    """

    def one(gram: jax.Array, omegas: Mapping[str, jax.Array]) -> list[jax.Array]:
        found = [terms for _, terms in diagonal_views(gram, omegas)]
        return [
            jnp.stack([t.rescale for t in found]),
            jnp.stack([jnp.linalg.norm(t.step) for t in found]),
            jnp.stack([jnp.linalg.norm(t.momentum) for t in found]),
        ]

    names = ("rescale", "step", "momentum")
    result: dict[str, list] = {name: [] for name in names}
    with jax.enable_x64(True):
        omegas = {name: jnp.asarray(value, jnp.float64) for name, value in model.omegas().items()}
        mapped = jax.jit(jax.vmap(one, (-1, None)))
        for sigma in sigmas:
            intervals = jnp.asarray(interval_table([f"fixed:{sigma}"])[0], jnp.float64)
            grams = _chunk(jax.random.key(TEST_SEED), intervals).gram[..., :count]
            for name, value in zip(names, mapped(grams, omegas), strict=True):
                result[name].append(np.median(value, axis=0).tolist())
    return result
