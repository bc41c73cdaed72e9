"""Where the points of a sweep run: on this machine, on a cluster, or as agents of a wandb sweep.

A launcher decides only where and when; what happens to a point is `run_point`, the same everywhere.
"""

import functools
import importlib
import math
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, Protocol

from scripts.sweeping.points import Point, unfinished
from scripts.sweeping.runner import Status, failure, run_point
from training.durations import format_seconds
from training.errors import UserError


class Launcher(Protocol):
    def run(self, points: Sequence[Point]) -> bool:
        """Brings the unfinished `points` to their end.

        Returns True once they have ended, False if they go on without this process.

        Raises:
          UserError: something that the launcher needs is missing.
          KeyboardInterrupt: the user stopped it; all that it started has ended.
        """


class LocalLauncher:
    """Worker processes on this machine, one point each at a time."""

    def __init__(self, workers: int | None) -> None:
        self._environments = worker_environments(workers)

    def run(self, points: Sequence[Point]) -> bool:
        waiting = queue.SimpleQueue()
        for point in unfinished(points):
            waiting.put(point)
        progress = Progress(points, len(self._environments))
        stop = threading.Event()
        with ThreadPoolExecutor(len(self._environments)) as pool:
            workers = [pool.submit(_work, waiting, env, stop, progress) for env in self._environments]
            try:
                wait(workers)
            finally:  # on an interrupt the workers end their runs before the pool lets go
                stop.set()
        for worker in workers:
            worker.result()
        return True


def _work(waiting: queue.SimpleQueue, env: Mapping[str, str], stop: threading.Event, progress: "Progress") -> None:
    """Takes points until there are none; a failed one does not stop the others."""
    while not stop.is_set():
        try:
            point = waiting.get_nowait()
        except queue.Empty:
            return
        progress.begin(point)
        progress.end(point, run_point(point, env, stop))


class Progress:
    """A line at every change: counts, and an estimate of the time left."""

    def __init__(self, points: Sequence[Point], workers: int) -> None:
        self._workers = workers
        self._durations = [point.record()["wall_seconds"] for point in points if point.finished]
        self._count = Counter(finished=len(self._durations))
        self._left = len(points) - len(self._durations)
        self._lock = threading.Lock()

    def begin(self, point: Point) -> None:
        with self._lock:
            self._left -= 1
            self._count[Status.RUNNING] += 1
            self._print(f"start     {point.name}")

    def end(self, point: Point, status: Status) -> None:
        with self._lock:
            self._count[Status.RUNNING] -= 1
            if status is Status.RUNNING:
                self._count["elsewhere"] += 1
                self._print(f"elsewhere {point.name}: another process runs it")
                return
            self._count[status] += 1
            if status is Status.FINISHED:
                self._durations.append(point.record()["wall_seconds"])
            reason = f": {failure(point)} ({point.log})" if status is Status.FAILED else ""
            self._print(f"{status:<9} {point.name}{reason}")

    def _print(self, event: str) -> None:
        counts = {"done": self._count[Status.FINISHED], "running": self._count[Status.RUNNING]}
        counts |= {"failed": self._count[Status.FAILED], "left": self._left}
        print(
            f"{event}\n  {', '.join(f'{n} {what}' for what, n in counts.items())}{self._estimate()}",
            flush=True,
        )

    def _estimate(self) -> str:
        to_do = self._left + self._count[Status.RUNNING]
        if not self._durations or not to_do:
            return ""
        rounds = math.ceil(to_do / self._workers)
        return f"; about {format_seconds(rounds * sum(self._durations) / len(self._durations))} left"


class SubmititLauncher:
    """A job array on a cluster, through submitit; this process does not wait for it."""

    def __init__(self, workdir: Path, workers: int | None, parameters: Mapping[str, Any]) -> None:
        """`workers` limits how many jobs run at once; `parameters` are submitit's own, and `cluster`."""
        self._folder = workdir / "submitit"
        limit = {"slurm_array_parallelism": workers} if workers else {}
        self._parameters = {"name": workdir.resolve().name, "timeout_min": 24 * 60, **limit, **parameters}

    def run(self, points: Sequence[Point]) -> bool:
        submitit = _require("submitit")
        parameters = dict(self._parameters)
        try:
            executor = submitit.AutoExecutor(folder=self._folder, cluster=parameters.pop("cluster", None))
            executor.update_parameters(**parameters)
            jobs = executor.map_array(PointJob(), unfinished(points))
        except (
            NameError,
            AssertionError,
            ValueError,
            RuntimeError,
            submitit.core.utils.FailedJobError,
        ) as error:
            raise UserError(f"submitit: {error}") from error
        print(
            f"submitted {len(jobs)} jobs to {executor.cluster}: {', '.join(job.job_id for job in jobs)}; "
            f"their files are in {self._folder}, and --summarize shows how far they are"
        )
        return False


class PointJob:
    """What a cluster job does with its point; a class because submitit asks for its `checkpoint`."""

    def __call__(self, point: Point) -> str:
        status = run_point(point, os.environ, threading.Event())
        if status is Status.FAILED:
            raise RuntimeError(failure(point))  # so that the cluster's accounting shows it too
        return str(status)

    def checkpoint(self, point: Point) -> Any:
        """What to requeue after a preemption or a timeout: the same again, since a run resumes by itself."""
        return _require("submitit").helpers.DelayedSubmission(self, point)


class WandbLauncher:
    """Agents of a wandb sweep; those on other machines join by its id and share the sweep's folder.

    The wandb sweep is a grid over one parameter, `point`, whose values are the points' names. An agent's run
    carries the point's overrides and final metrics; a run that the config asks for is the trainer's own.
    """

    def __init__(self, workers: int | None, project: str, sweep_id: str | None, command: Sequence[str]) -> None:
        """Joins the sweep `sweep_id`, or creates one that others join with `command` and its id.

        `project` may be `entity/project`.
        """
        self._environments = worker_environments(workers)
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or None
        self._sweep_id = sweep_id
        self._command = command

    def run(self, points: Sequence[Point]) -> bool:
        wandb = _require("wandb")
        sweep_id = self._sweep_id or self._create(wandb, unfinished(points))
        agents = [
            functools.partial(_agent, sweep_id, self._entity, self._project, points, env) for env in self._environments
        ]
        if len(agents) == 1:
            agents[0]()
        else:
            _run_processes(agents)
        return True

    def _create(self, wandb: ModuleType, points: Sequence[Point]) -> str:
        grid = {"method": "grid", "parameters": {"point": {"values": [point.name for point in points]}}}
        try:
            sweep_id = wandb.sweep(grid, entity=self._entity, project=self._project)
        except (wandb.Error, OSError) as error:
            _no_wandb(error)
        print(
            f"other machines join with: {shlex.join([*self._command, f'--wandb.sweep_id={sweep_id}'])}",
            flush=True,
        )
        return sweep_id


def _agent(sweep_id: str, entity: str | None, project: str, points: Sequence[Point], env: Mapping[str, str]) -> None:
    """Runs the points that the wandb sweep hands out, until it has no more."""
    wandb = _require("wandb")
    named = {point.name: point for point in points}
    stop = threading.Event()
    try:
        wandb.agent(sweep_id, lambda: _run_next(wandb, named, env, stop), entity=entity, project=project)
    except (wandb.Error, OSError) as error:
        _no_wandb(error)
    finally:
        stop.set()


def _run_next(wandb: ModuleType, named: Mapping[str, Point], env: Mapping[str, str], stop: threading.Event) -> None:
    """Runs the point that the agent was handed. It never raises: wandb gives up after a few runs that do."""
    run = wandb.init()
    name = run.config["point"]
    point = named.get(name)
    if point is None:
        print(f"the wandb sweep asks for the point {name}, which sweep() does not have here", file=sys.stderr)
        run.finish(exit_code=1)
        return
    run.name = name
    run.config.update(point.overrides)
    agents_own = ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_SERVICE")
    status = run_point(point, {key: value for key, value in env.items() if key not in agents_own}, stop)
    print(
        f"{status:<9} {name}{f': {failure(point)} ({point.log})' if status is Status.FAILED else ''}",
        flush=True,
    )
    if status is Status.FINISHED:
        run.summary.update(point.record()["metrics"])
    run.finish(exit_code=int(status is not Status.FINISHED))


def _run_processes(tasks: Sequence[functools.partial]) -> None:
    """Runs each task in a process of its own: a wandb agent keeps its state in the environment."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_guard, args=(task,)) for task in tasks]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise


def _guard(task: functools.partial) -> None:
    """Ends a process as the main one would: one line for a user's error, silence after an interrupt."""
    interrupt_on_terminate()
    try:
        task()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def interrupt_on_terminate() -> None:
    """Makes SIGTERM do what Ctrl-C does, so that one path ends the runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def worker_environments(workers: int | None) -> list[dict[str, str]]:
    """The environment of each worker: the GPUs shared out evenly, and their memory where workers share one.

    No number of workers means one per GPU, or one where there are none.
    """
    gpus = visible_gpus()
    workers = workers or max(1, len(gpus))
    if not gpus:
        return [dict(os.environ)] * workers
    if workers <= len(gpus):
        share = len(gpus) // workers
        own = [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * share : (i + 1) * share])} for i in range(workers)]
    else:
        fraction = 0.9 / math.ceil(workers / len(gpus))
        own = [
            {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.3f}"}
            for i in range(workers)
        ]
    return [{**os.environ, **env} for env in own]


def visible_gpus() -> list[str]:
    """The names of the GPUs that CUDA programs see, found without loading one."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return re.findall(r"^GPU (\d+):", listing, re.MULTILINE)


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"--launcher={package} needs the package: pip install {package}") from error


def _no_wandb(error: Exception) -> NoReturn:
    raise UserError(f"wandb: {error} (it needs an account and a network; --launcher=local does not)") from error
