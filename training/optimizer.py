"""Optimisers of optax by name, with schedules, clipping and weight-decay masks, as the config describes them."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from training.errors import UserError, nearest

Schedule = Callable[[jax.Array], jax.Array]


def _halving(steps: int, final_fraction: float, halve_every: int) -> Schedule:
    return optax.exponential_decay(1.0, halve_every, 0.5, staircase=True)


SCHEDULES: dict[str, Callable[[int, float, int], Schedule]] = {
    "constant": lambda steps, final_fraction, halve_every: optax.constant_schedule(1.0),
    "cosine": lambda steps, final_fraction, halve_every: optax.cosine_decay_schedule(1.0, steps, final_fraction),
    "linear": lambda steps, final_fraction, halve_every: optax.linear_schedule(1.0, final_fraction, steps),
    "halving": _halving,
}
"""Factors of the peak learning rate after warm-up, by name: `(steps, final_fraction, halve_every) -> schedule`."""


def clip_by_matrix_norm(threshold: float) -> optax.GradientTransformation:
    """Scales each matrix (the last two axes of each parameter) to at most `threshold` in Frobenius norm.

    Parameters that stack the matrices of several layers are clipped layer by layer (Ahn et al. 2023, official code).
    """

    def clip(matrix: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1), keepdims=True))
        return matrix * jnp.minimum(1.0, threshold / jnp.maximum(norm, jnp.finfo(matrix.dtype).tiny))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def clip_by_finite_global_norm(threshold: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`; a gradient whose norm is not finite counts as zero.

    Where the loss is a polynomial of high degree, a rare batch overflows; without this it would end the run.
    """
    inner = optax.clip_by_global_norm(threshold)

    def clip(updates: Any, _: Any) -> Any:
        finite = jnp.isfinite(optax.tree.norm(updates))
        clipped, _ = inner.update(updates, inner.init(updates))
        return jax.tree.map(lambda u: jnp.where(finite, u, 0), clipped)

    return optax.stateless(clip)


CLIPS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "none": lambda threshold: optax.identity(),
    "global_norm": optax.clip_by_global_norm,
    "finite_global_norm": clip_by_finite_global_norm,
    "matrix_norm": clip_by_matrix_norm,
    "value": optax.clip,
}
"""Gradient clipping before the optimiser, by name: `threshold -> transformation`."""


def learning_rate(spec: Mapping[str, Any], to_steps: Callable[[Any], int], total_steps: int) -> Schedule:
    """The learning rate by step, as `spec` (the config's `optimizer`) describes it."""
    warmup = to_steps(spec["warmup"])
    make = _by_name(SCHEDULES, spec["schedule"], "optimizer.schedule")
    decay = make(max(total_steps - warmup, 1), spec["final_fraction"], max(to_steps(spec["halve_every"]), 1))
    factor = optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decay], [warmup]) if warmup else decay
    return lambda step: spec["learning_rate"] * factor(step)


def make_optimizer(spec: Mapping[str, Any], schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    """The optimiser that `spec` (the config's `optimizer`) describes: clipping, then the optax optimiser.

    Raises:
      UserError: an unknown optimiser, clipping or option.
    """
    optimizers = {name: fn for name, fn in vars(optax).items() if callable(fn) and _takes_learning_rate(fn)}
    make = _by_name(optimizers, spec["name"], "optimizer.name")
    parameters = inspect.signature(make).parameters
    options = dict(spec["options"])
    for key in options:
        if key not in parameters:
            raise UserError(f"optax.{spec['name']} takes no option {key!r}: {nearest(key, parameters)}")
    if spec["decay_exclude"] and "mask" in parameters:
        options["mask"] = decay_mask(spec["decay_exclude"])
    clip = _by_name(CLIPS, spec["clip"], "optimizer.clip")(spec["clip_threshold"])
    return optax.with_extra_args_support(optax.chain(clip, make(learning_rate=schedule, **options)))


def decay_mask(exclude: str) -> Callable[[Any], Any]:
    """True for the parameters whose weights decay: those whose path (`a/b/kernel`) `exclude` does not match."""
    pattern = re.compile(exclude)

    def mask(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: pattern.search(jax.tree_util.keystr(path, simple=True, separator="/")) is None, params
        )

    return mask


def _takes_learning_rate(function: Callable[..., Any]) -> bool:
    try:
        return "learning_rate" in inspect.signature(function).parameters
    except ValueError:  # a builtin without a signature
        return False


def _by_name(table: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in table:
        raise UserError(f"{key}={name!r} is unknown: {nearest(name, table)}")
    return table[name]
