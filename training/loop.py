"""The training loop, from a config and a folder to a trained model."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from training.checkpoint import Checkpoints, Restored
from training.config import differences, from_json, to_json
from training.durations import to_steps
from training.errors import UserError, nearest
from training.metrics import Recorder, named, replace
from training.provenance import provenance
from training.sharding import batch_sharding, check_batch, make_mesh, state_shardings
from training.step import PRECISIONS, Program, State
from training.task import Task

CONFIG_FILE = "config.json"
FINISHED_FILE = "finished.json"


class Result(NamedTuple):
    """A finished run."""

    models: list[nnx.Module]  # one per replica, in the order of `training.step.replica_points`
    metrics: dict[str, Any]  # the last value of each metric; a list over replicas where there are several
    wall_seconds: float  # of all sessions of this run together


def train(config: ConfigDict, workdir: str | Path) -> Result:
    """Trains what `config` describes in `workdir`, from its newest checkpoint if there is one.

    The workdir gets `config.json`, `metrics.jsonl` (a line per `log_every`, and one per evaluation), `checkpoints/`
    and, at the end, `finished.json`. A run that was killed and started again ends in the same state, and the same
    metrics, as one that was not.

    Raises:
      UserError: a bad config, a workdir that holds another run, or a loss that is not finite.
    """
    use_compilation_cache()
    config = config.copy_and_resolve_references()
    config.lock()
    workdir = Path(workdir)
    program = make_program(config)
    claim_workdir(workdir, config)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)))
        compiled = Compiled(program)
        data = _Data(program)
        step, state, seconds = _start(compiled, checkpoints, data)
        finished = read_finished(workdir)
        if finished is not None and step == finished["step"]:
            return Result(program.models(state), finished["metrics"], finished["wall_seconds"])
        begin = time.monotonic() - seconds
        recorder = stack.enter_context(
            Recorder(config, workdir, step, program.total_steps, program.to_steps(config.log_every))
        )
        trace = stack.enter_context(_Trace(config.profile, workdir / "profile"))
        if step == 0:
            recorder.evaluation(0, compiled.evaluate(state))

        plan = _Plan(program)
        stops = step > 0 and _stops(config, recorder.last)
        while step < program.total_steps and not stops:
            length = plan.next_stop(step) - step
            trace.update(step, step + length)
            state, metrics = compiled.steps(state, step, length, data.take(length))
            recorder.steps(step, metrics)  # waits for the dispatch before this one only
            step += length
            if plan.evaluates(step):
                recorder.evaluation(step, compiled.evaluate(state))
                stops = _stops(config, recorder.last)
            if plan.saves(step) or stops:
                recorder.settle()  # every metric up to here is checked and written before the checkpoint is
                checkpoints.save(step, state, data.state(), time.monotonic() - begin)
                recorder.last_checkpoint = step

        checkpoints.wait()
        result = Result(program.models(state), recorder.last, time.monotonic() - begin)
        _write_finished(workdir / FINISHED_FILE, step, result)
        return result


def read_finished(workdir: Path) -> dict[str, Any] | None:
    """What a finished run left: `step`, the last `metrics`, `wall_seconds` and `provenance`; None before its end."""
    path = workdir / FINISHED_FILE
    return json.loads(path.read_text()) if path.exists() else None


def evaluate(workdir: str | Path, step: int | None = None) -> dict[str, Any]:
    """The results of all evaluators for a checkpoint of a run, the newest or that of `step`.

    Returns `step`, and `evaluator/metric` -> value, a list over replicas where there are several.

    Raises:
      UserError: there is no run, or no such checkpoint.
    """
    compiled, restored = _restore(Path(workdir), step)
    return {"step": restored.step, **named(compiled.evaluate(restored.state))}


def load(workdir: str | Path, step: int | None = None) -> tuple[Task, list[nnx.Module]]:
    """The task of a run, and the models of a checkpoint, the newest or that of `step`: one for each replica.

    Raises:
      UserError: there is no run, or no such checkpoint.
    """
    compiled, restored = _restore(Path(workdir), step)
    return compiled.program.task(), compiled.program.models(restored.state)


def _restore(workdir: Path, step: int | None) -> tuple["Compiled", Restored]:
    use_compilation_cache()
    if not (workdir / CONFIG_FILE).exists():
        raise UserError(f"{workdir} holds no run: there is no {CONFIG_FILE}")
    config = from_json((workdir / CONFIG_FILE).read_text())
    compiled = Compiled(make_program(config))
    with contextlib.closing(Checkpoints(workdir, config.keep_checkpoints)) as checkpoints:
        restored = checkpoints.restore(compiled.abstract_state, step)
    if restored is None:
        raise UserError(f"{workdir} holds no checkpoint yet")
    return compiled, restored


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "linear-transformers" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_program(config: ConfigDict) -> Program:
    """Checks a config and makes it executable.

    Raises:
      UserError: a setting that this machine or the task cannot serve.
    """
    if config.precision not in PRECISIONS:
        raise UserError(f"precision={config.precision!r}: choose from {', '.join(PRECISIONS)}")
    if config.on_nonfinite not in ("stop", "record"):
        raise UserError(f"on_nonfinite={config.on_nonfinite!r}: choose from stop, record")
    if not 0 <= config.ema_decay < 1:
        raise UserError(f"ema_decay={config.ema_decay}: choose a number from 0 (no average) to below 1")
    if config.steps_per_dispatch < 1 or config.optimizer.accumulate < 1:
        raise UserError("steps_per_dispatch and optimizer.accumulate are at least 1")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch(config.batch_size, config.optimizer.accumulate, mesh)
    task = Program(config, mesh, 0).task()
    total = to_steps(config.steps, batch_size=config.batch_size, examples_per_epoch=task.examples_per_epoch)
    return Program(config, mesh, total)


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`, or checks that the one there says the same.

    Raises:
      UserError: the workdir holds a run of another config.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        if lines := differences(path.read_text(), config):
            shown = "; ".join(lines[:5]) + (f"; and {len(lines) - 5} more" if len(lines) > 5 else "")
            raise UserError(f"{workdir} holds a run of another config ({shown}); choose another --workdir")
    elif jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            replace(path, to_json(config))
        except OSError as error:
            raise UserError(f"the workdir cannot be written: {error}; choose another --workdir") from error


class Compiled:
    """The program's functions, compiled for its mesh, with the replicas bound."""

    def __init__(self, program: Program) -> None:
        self.program = program
        whole = NamedSharding(program.mesh, PartitionSpec())
        self._replicas = program.replicas
        task = program.task()
        self._resident = jax.device_put(task.residents(), whole) if hasattr(task, "residents") else None
        shapes = jax.eval_shape(program.init, self._replicas)
        shardings = state_shardings(shapes, program.mesh, replicas=program.count > 1)
        self.abstract_state: State = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        self._init = jax.jit(program.init, out_shardings=shardings)
        self._steps = jax.jit(
            program.steps, static_argnames="length", donate_argnums=0, out_shardings=(shardings, whole)
        )
        self._evaluate = jax.jit(program.evaluate, out_shardings=whole)

    def init(self) -> State:
        return self._init(self._replicas)

    def steps(self, state: State, step: int, length: int, batches: Any) -> tuple[State, Any]:
        data = {"batches": batches, "resident": self._resident}
        return self._steps(state, self._replicas, np.int32(step), length=length, **data)

    def evaluate(self, state: State) -> Any:
        return self._evaluate(state, self._replicas, self._resident)


class _Data:
    """Host batches for the device, if the task has any: stacked over the steps of a dispatch, sharded over the mesh."""

    def __init__(self, program: Program) -> None:
        self._task, self._mesh = program.task(), program.mesh
        self._iterator = None
        if not hasattr(self._task, "batch"):
            seed = program.config.seeds[0]
            self._iterator = self._task.batches(seed, jax.process_index(), jax.process_count())

    def take(self, length: int) -> Any:
        if self._iterator is None:
            return None
        return jax.tree.map(self._stack, *(next(self._iterator) for _ in range(length)))

    def _stack(self, *arrays: np.ndarray) -> jax.Array:
        axis = self._task.batch_axis % arrays[0].ndim + 1
        sharding = batch_sharding(self._mesh, arrays[0].ndim + 1, axis)
        return jax.make_array_from_process_local_data(sharding, np.stack(arrays))

    def state(self) -> Any:
        return None if self._iterator is None else self._iterator.get_state()

    def restore(self, state: Any) -> None:
        if self._iterator is not None:
            self._iterator.set_state(state)


class _Plan:
    """Where dispatches end, by the step alone, so that a resumed run is cut like an undisturbed one.

    All dispatches but the last have one length, so that a step is compiled once: the largest that divides the
    intervals of evaluation, checkpoints and resampling, and is at most `steps_per_dispatch`.
    """

    def __init__(self, program: Program) -> None:
        config = program.config
        self._total = program.total_steps
        self._eval, self._save = program.to_steps(config.eval_every), program.to_steps(config.checkpoint_every)
        shared = program.task().resample_every
        common = math.gcd(self._eval, self._save, shared if shared > 1 else 0) or config.steps_per_dispatch
        self.length = max(n for n in range(1, config.steps_per_dispatch + 1) if common % n == 0)

    def next_stop(self, step: int) -> int:
        return min(step + self.length, self._total)

    def evaluates(self, step: int) -> bool:
        return step == self._total or (bool(self._eval) and step % self._eval == 0)

    def saves(self, step: int) -> bool:
        return step == self._total or (bool(self._save) and step % self._save == 0)


class _Trace(contextlib.AbstractContextManager):
    """A profile of the dispatches that hold the steps which the config names; look at it with XProf or Perfetto."""

    def __init__(self, spec: ConfigDict, folder: Path) -> None:
        self._steps = range(spec.start, spec.start + spec.steps)
        self._folder, self._running = folder, False

    def update(self, first: int, stop: int) -> None:
        """Called before the dispatch of the steps from `first` up to `stop`."""
        wanted = bool(self._steps) and first < self._steps.stop and stop > self._steps.start
        if wanted and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif self._running and not wanted:
            self.__exit__()

    def __exit__(self, *error: Any) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


def _start(compiled: Compiled, checkpoints: Checkpoints, data: _Data) -> tuple[int, State, float]:
    """Step, state and seconds spent so far: from the newest checkpoint, or from nothing."""
    restored = checkpoints.restore(compiled.abstract_state)
    if restored is None:
        return 0, compiled.init(), 0.0
    data.restore(restored.iterator)
    return restored.step, restored.state, restored.seconds


def _stops(config: ConfigDict, last: dict[str, Any]) -> bool:
    """Whether the best replica of every seed has reached what `config.stop` asks for.

    Raises:
      UserError: no evaluator gives such a metric.
    """
    name = config.stop.metric
    if not name:
        return False
    if name not in last:
        raise UserError(f"config.stop.metric is {name!r}, which no evaluator gives: {nearest(name, last)}")
    by_seed = np.reshape(last[name], (-1, len(config.seeds)))  # seeds vary fastest
    return bool((np.fmax.reduce(by_seed, 0) >= config.stop.at_least).all())


def _write_finished(path: Path, step: int, result: Result) -> None:
    if jax.process_index() == 0:
        seconds = round(result.wall_seconds, 3)
        record = {"step": step, "metrics": result.metrics, "wall_seconds": seconds, "provenance": provenance()}
        replace(path, json.dumps(record, indent=2) + "\n")
