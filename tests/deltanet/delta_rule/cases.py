"""The one test body of the delta rule's implementations: values and all gradients against the float64 oracle."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deltanet.delta_rule import reference

# Relative root mean square of the error: output and final state, gradients.
TOLERANCES = {"float32": (1e-5, 1e-5), "bfloat16": (0.006, 0.008)}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a problem.

    Attributes:
      keys: squared weight of a direction that all keys share; 1 is all alike.
      beta: the largest step size, or one of "zero", "one" and "two" for exactly these.
      gated: with a log-decay.
      segments: lengths of packed sequences, or empty; they sum to `time`.
      state: with an initial state, and with a cotangent of the final state.
    """

    time: int = 130
    dim: int = 32
    value_dim: int = 32
    heads: int = 2
    batch: int = 1
    keys: float = 0.0
    beta: float | str = 1.0
    gated: bool = False
    segments: tuple[int, ...] = ()
    state: bool = True
    normalize: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        """The fields that differ from the defaults."""
        default = Case()
        changed = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: value for name, value in changed.items() if value != getattr(default, name)}
        return ",".join(f"{name}={value}" for name, value in changed.items()) or "default"


@dataclasses.dataclass
class Problem:
    """Differentiable arguments, the segments, and the cotangents of both results, as NumPy arrays."""

    arguments: dict[str, np.ndarray]
    segment_ids: np.ndarray | None
    cotangents: tuple[np.ndarray, np.ndarray]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make(case: Case) -> Problem:
    """Random arguments; those of a low precision are rounded to it, so that the oracle sees the same numbers."""
    rng = np.random.default_rng(0)
    tokens = (case.batch, case.time, case.heads)
    dtype = np.dtype(getattr(ml_dtypes, case.dtype, case.dtype))
    q = _unit(rng.standard_normal((*tokens, case.dim)))
    shared = _unit(rng.standard_normal((case.batch, 1, case.heads, case.dim)))
    k = np.sqrt(1 - case.keys) * _unit(rng.standard_normal((*tokens, case.dim))) + np.sqrt(case.keys) * shared
    k = _unit(k)
    if case.normalize:
        q, k = 3 * q, k * rng.uniform(0.5, 2, (*tokens, 1))
    fixed = {"zero": 0.0, "one": 1.0, "two": 2.0}
    beta = np.full(tokens, fixed[case.beta]) if case.beta in fixed else rng.uniform(0, case.beta, tokens)
    arguments = {"q": q, "k": k, "v": rng.standard_normal((*tokens, case.value_dim)), "beta": beta}
    arguments = {name: x.astype(dtype) for name, x in arguments.items()}
    if case.gated:
        arguments["g"] = -rng.exponential(0.1, tokens).astype(np.float32)
    state_shape = (case.batch, case.heads, case.dim, case.value_dim)
    if case.state:
        arguments["initial_state"] = (0.3 * rng.standard_normal(state_shape)).astype(np.float32)
    segment_ids = None
    if case.segments:
        assert sum(case.segments) == case.time
        ids = np.repeat(np.arange(len(case.segments), dtype=np.int32), case.segments)
        # Rows of a batch have different boundaries.
        segment_ids = np.stack([np.roll(ids, 5 * row) if row else ids for row in range(case.batch)])
    d_output = rng.standard_normal((*tokens, case.value_dim)).astype(dtype)
    d_final = rng.standard_normal(state_shape).astype(np.float32) * (1.0 if case.state else 0.0)
    return Problem(arguments, segment_ids, (d_output, d_final))


def evaluate(run: Callable, problem: Problem, **options) -> dict[str, np.ndarray]:
    """Results and gradients of `run`, by name."""
    arguments = {name: jnp.asarray(x) for name, x in problem.arguments.items()}
    segment_ids = None if problem.segment_ids is None else jnp.asarray(problem.segment_ids)

    @jax.jit
    def all_of_it(arguments, cotangents):
        def call(arguments):
            arguments = dict(arguments)
            positional = [arguments.pop(name, None) for name in ("q", "k", "v", "beta", "g")]
            return run(*positional, **arguments, segment_ids=segment_ids, **options)

        results, pull = jax.vjp(call, arguments)
        cotangents = tuple(x.astype(y.dtype) for x, y in zip(cotangents, results, strict=True))
        return results, pull(cotangents)[0]

    (output, state), gradients = all_of_it(arguments, problem.cotangents)
    named = {"output": output, "state": state, **{f"d_{name}": x for name, x in gradients.items()}}
    return {name: np.asarray(x) for name, x in named.items()}


@functools.cache
def expected(case: Case) -> dict[str, np.ndarray]:
    """The oracle's results and gradients, in float64."""
    with jax.enable_x64(True):
        problem = make(case)
        problem.arguments = {name: x.astype(np.float64) for name, x in problem.arguments.items()}
        problem.cotangents = tuple(x.astype(np.float64) for x in problem.cotangents)
        return evaluate(reference.delta_rule, problem, l2_normalize=case.normalize)


def relative_rms(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Of the difference, over that of what was wanted; the difference itself where nothing was."""
    difference = np.linalg.norm(actual.astype(np.float64) - wanted)
    return float(difference / (np.linalg.norm(wanted) or 1.0))


def check(run: Callable, case: Case) -> None:
    """Results and gradients of `run` on the case, against the oracle."""
    wanted, actual = expected(case), evaluate(run, make(case), l2_normalize=case.normalize)
    errors = {name: relative_rms(actual[name], wanted[name]) for name in wanted}
    if os.environ.get("DELTA_RULE_SHOW_ERRORS"):
        print(case, {name: f"{error:.1e}" for name, error in errors.items()})
    value_bound, gradient_bound = TOLERANCES[case.dtype]
    for name, x in actual.items():
        assert np.isfinite(x.astype(np.float64)).all(), f"{name} is not finite"
        bound = gradient_bound if name.startswith("d_") else value_bound
        assert errors[name] <= bound, f"{name}: {errors[name]:.2e} > {bound:.0e}; all: {errors}"
