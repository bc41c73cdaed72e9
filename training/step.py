"""The pure part of training: replicas, the optimiser step, and several steps in one dispatch."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from training.config import build, flatten
from training.durations import to_steps
from training.errors import UserError, nearest
from training.optimizer import learning_rate, make_optimizer
from training.sharding import constrain_batch
from training.task import Batch, Metrics, Task

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class State(NamedTuple):
    """What training changes, a pytree of arrays; with a leading axis over replicas where there are several."""

    params: nnx.State
    rest: nnx.State  # other variables of the model, such as running statistics
    opt_state: optax.OptState
    average: nnx.State | None = None  # moving average of the parameters, where the config asks for one


class Replica(NamedTuple):
    """What tells one replica from another: its seed and its values of the replicated config entries."""

    seed: jax.Array
    values: dict[str, jax.Array]

    def key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), purpose)


_INIT, _DATA, _LOSS = range(3)  # what a replica's keys are for


def data_key(seed: jax.Array | int) -> jax.Array:
    """The key from which the replicas with this seed draw their data."""
    return Replica(seed, {}).key(_DATA)


@dataclasses.dataclass(frozen=True)
class Program:
    """A config made executable: pure functions from state to state, compiled when first called."""

    config: ConfigDict
    mesh: Mesh
    total_steps: int

    @functools.cached_property
    def count(self) -> int:
        """How many replicas are trained at once."""
        return len(replica_points(self.config))

    @functools.cached_property
    def replicas(self) -> Replica:
        """All replicas, stacked, in the host's memory; without a leading axis where there is one."""
        points = replica_points(self.config)
        values = {name: np.array([v[name] for _, v in points], np.float32) for name in points[0][1]}
        stacked = Replica(np.array([seed for seed, _ in points], np.uint32), values)
        return stacked if self.count > 1 else jax.tree.map(lambda x: x[0], stacked)

    def _over_replicas(self, function: Any, in_axes: Any) -> Any:
        return jax.vmap(function, in_axes) if self.count > 1 else function

    def task(self, values: Mapping[str, Any] | None = None, resident: Any = None) -> Task:
        """The task; with a replica's own values where the config replicates some of its arguments.

        Args:
          values: of the replicated entries.
          resident: the task's own data as arguments of the compiled program, where it has any.
        """
        spec = _with_values(self.config, values or {})
        more = {} if resident is None else {"resident": resident}
        return build(spec["task"], model=spec["model"], batch_size=self.config.batch_size, **more)

    def to_steps(self, duration: Any) -> int:
        task = self.task()
        return to_steps(
            duration,
            batch_size=self.config.batch_size,
            examples_per_epoch=task.examples_per_epoch,
            total_steps=self.total_steps,
        )

    def schedule(self, values: Mapping[str, Any] | None = None) -> Any:
        """The learning rate by step."""
        return learning_rate(_with_values(self.config, values or {})["optimizer"], self.to_steps, self.total_steps)

    def _optimizer(self, values: Mapping[str, Any]) -> optax.GradientTransformationExtraArgs:
        return make_optimizer(_with_values(self.config, values)["optimizer"], self.schedule(values))

    @functools.cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The static half of the model."""
        return nnx.graphdef(nnx.eval_shape(lambda: self.task().init(jax.random.key(0))))

    def init(self, replicas: Replica) -> State:
        """Fresh states of all replicas."""

        def one(replica: Replica) -> State:
            model = self.task(replica.values).init(replica.key(_INIT))
            _, params, rest = nnx.split(model, nnx.Param, ...)
            average = jax.tree.map(jnp.copy, params) if self.config.ema_decay else None
            return State(params, rest, self._optimizer(replica.values).init(params), average)

        return self._over_replicas(one, (0,))(replicas)

    def steps(
        self, state: State, replicas: Replica, step: jax.Array, length: int, batches: Batch = None, resident: Any = None
    ) -> Any:
        """`length` optimiser steps from `step` on; metrics have a leading axis over steps (after that of replicas).

        Args:
          batches: host batches stacked on a leading axis over steps; None where the task makes them on the device.
          resident: see `task`.
        """

        def one(state: State, replica: Replica, step: jax.Array, batches: Batch) -> tuple[State, Metrics]:
            task = self.task(replica.values, resident)
            batch_at = self._batch_maker(task, replica, step) if batches is None else lambda _, batch: batch

            def body(state: State, slot: tuple[jax.Array, Batch]) -> tuple[State, Metrics]:
                index, batch = slot
                return self._step(task, state, replica, index, batch_at(index, batch))

            return jax.lax.scan(body, state, (step + jnp.arange(length), batches))

        return self._over_replicas(one, (0, 0, None, None))(state, replicas, step, batches)

    def _batch_maker(self, task: Task, replica: Replica, step: jax.Array) -> Any:
        """A function from step to batch; a batch that all steps of a dispatch share is made once, outside the scan."""
        key = replica.key(_DATA)

        def make(index: jax.Array) -> Batch:
            return constrain_batch(task.batch(key, index), self.mesh, task.batch_axis)

        if task.resample_every == 1:
            return lambda index, _: make(index)
        shared = make(step // task.resample_every)
        return lambda index, _: shared

    def _step(self, task: Task, state: State, replica: Replica, index: jax.Array, batch: Batch) -> Any:
        key = jax.random.fold_in(replica.key(_LOSS), index)
        objective = functools.partial(self._loss, task)
        (loss, (metrics, rest)), grads = self._gradient(task, objective, state, key, batch)
        updates, opt_state = self._optimizer(replica.values).update(
            grads,
            state.opt_state,
            state.params,
            value=loss,  # this and the rest serve line searches; other optimisers ignore them
            grad=grads,
            value_fn=lambda params: objective(params, state.rest, key, batch)[0],
        )
        params = optax.apply_updates(state.params, updates)
        return State(params, rest, opt_state, self._averaged(state.average, params)), {"loss": loss, **metrics}

    def _averaged(self, average: nnx.State | None, params: nnx.State) -> nnx.State | None:
        if average is None:
            return None
        return jax.tree.map(lambda a, p: a + (1 - self.config.ema_decay) * (p - a), average, params)

    def _loss(self, task: Task, params: nnx.State, rest: nnx.State, key: jax.Array, batch: Batch) -> Any:
        dtype = PRECISIONS[self.config.precision]
        model = nnx.merge(self.graphdef, _cast(params, dtype), rest, copy=True)
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            loss, metrics = task.loss(model, _cast(batch, dtype), key)
        metrics = jax.tree.map(lambda m: m.astype(jnp.float32), metrics)
        return loss.astype(jnp.float32), (metrics, nnx.state(model, nnx.Not(nnx.Param)))

    def _gradient(self, task: Task, objective: Any, state: State, key: jax.Array, batch: Batch) -> Any:
        """Loss, metrics and gradients of a batch, micro-batch by micro-batch where the config accumulates."""
        value_and_grad = jax.value_and_grad(objective, has_aux=True)
        pieces = self.config.optimizer.accumulate
        if pieces == 1:
            return value_and_grad(state.params, state.rest, key, batch)

        def part(carry: Any, slot: Any) -> Any:
            rest, total = carry
            (loss, (metrics, rest)), grads = value_and_grad(state.params, rest, *slot)
            return (rest, jax.tree.map(jnp.add, total, grads)), (loss, metrics)

        slots = jax.random.split(key, pieces), _split(batch, task.batch_axis, pieces)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (rest, total), (losses, metrics) = jax.lax.scan(part, (state.rest, zeros), slots)
        mean = jax.tree.map(lambda m: m.mean(0), (losses, metrics))
        return (mean[0], (mean[1], rest)), jax.tree.map(lambda g: g / pieces, total)

    def evaluate(self, state: State, replicas: Replica, resident: Any = None) -> dict[str, Metrics]:
        """The results of all the task's evaluators: evaluator -> metric -> value. `resident`: see `task`.

        Those of the moving average of the parameters, if there is one, are under the evaluator's name with `_ema`.
        """

        def one(state: State, replica: Replica) -> dict[str, Metrics]:
            evaluators = self.task(replica.values, resident).evaluators()
            results = {}
            for suffix, params in (("", state.params), ("_ema", state.average)):
                if params is not None:
                    model = nnx.merge(self.graphdef, params, state.rest, copy=True)
                    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                        results |= {name + suffix: run(model, replica.key(_DATA)) for name, run in evaluators.items()}
            return results

        return self._over_replicas(one, (0, 0))(state, replicas)

    def models(self, state: State) -> list[nnx.Module]:
        """The model of each replica."""
        states = [state] if self.count == 1 else [jax.tree.map(lambda x, i=i: x[i], state) for i in range(self.count)]
        return [nnx.merge(self.graphdef, one.params, one.rest, copy=True) for one in states]


def replica_points(config: ConfigDict) -> list[tuple[int, dict[str, float]]]:
    """Seed and replicated values of each replica: seeds vary fastest, then the last replicated entry.

    Raises:
      UserError: no seed, or an entry that the config does not have.
    """
    flat = flatten(config)
    names = [name for name, _ in config.replicate]
    for name in names:
        if name not in flat:
            raise UserError(f"config.replicate names {name!r}, which is no config key: {nearest(name, flat)}")
        if isinstance(flat[name], bool) or not isinstance(flat[name], int | float):
            raise UserError(f"config.replicate names {name!r}, whose value {flat[name]!r} is no number; use a sweep")
    if not config.seeds:
        raise UserError("config.seeds is empty; give at least one, e.g. (0,)")
    grid = itertools.product(*(values for _, values in config.replicate), config.seeds)
    return [(seed, dict(zip(names, values, strict=True))) for *values, seed in grid]


def _with_values(config: ConfigDict, values: Mapping[str, Any]) -> dict[str, Any]:
    """The config as plain dicts, a replica's values put in place (they may be traced)."""
    plain = config.to_dict()
    for dotted, value in values.items():
        *path, last = dotted.split(".")
        functools.reduce(dict.__getitem__, path, plain)[last] = value
    return plain


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _split(batch: Batch, axis: int, pieces: int) -> Batch:
    """Cuts the batch axis into `pieces`, counted by a new leading axis."""

    def split(x: jax.Array) -> jax.Array:
        at = axis % x.ndim
        x = x.reshape(*x.shape[:at], pieces, x.shape[at] // pieces, *x.shape[at + 1 :])
        return jnp.moveaxis(x, at, 0)

    return jax.tree.map(split, batch)
