"""Metrics: JSON lines in the workdir, a progress line on the terminal, wandb where it is asked for."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from training.durations import format_seconds
from training.errors import UserError

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends a JSON line per record; what was written before a kill stays.

    On resume, lines past the restored step (and half a line that a kill left) are dropped, so that a resumed run
    writes the same file as an undisturbed one.
    """

    def __init__(self, workdir: Path, *, resume_step: int) -> None:
        path = workdir / FILE
        kept = [line for line in _whole_lines(path) if json.loads(line)["step"] <= resume_step] if resume_step else []
        replace(path, "".join(kept))
        self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def replace(path: Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def read(workdir: str | Path) -> dict[str, dict[str, np.ndarray]]:
    """All metrics of a run: name -> `{"step": [records], "value": [records, ...]}`."""
    series: dict[str, tuple[list, list]] = {}
    for line in _whole_lines(Path(workdir) / FILE):
        record = json.loads(line)
        step = record.pop("step")
        for name, value in record.items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    return {name: {"step": np.array(s), "value": np.array(v, dtype=float)} for name, (s, v) in series.items()}


def _whole_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Recorder(contextlib.AbstractContextManager):
    """Checks and writes what a run reports: to the metrics file, the progress line and wandb.

    Only process 0 writes; every process checks.
    """

    def __init__(self, config: ConfigDict, workdir: Path, step: int, total_steps: int, log_every: int) -> None:
        primary = jax.process_index() == 0
        self._workdir, self._config = workdir, config
        self._log_every = max(log_every, 1)
        self._wandb = Wandb(config.wandb, workdir, config.to_dict()) if primary else None
        self._file = MetricsFile(workdir, resume_step=step) if primary else None
        self._progress = Progress(workdir.name, step, total_steps) if primary else None
        self._pending: tuple[int, Any] | None = None
        self._window: list[dict[str, np.ndarray]] = []
        self.last: dict[str, Any] = {name: series["value"][-1].tolist() for name, series in read(workdir).items()}
        self.last_checkpoint = step

    def steps(self, first: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of the steps after `first`; waits only for those of the call before."""
        self._fetch()
        self._pending = (first, metrics)

    def evaluation(self, step: int, results: Mapping[str, Mapping[str, jax.Array]]) -> None:
        """Writes the evaluators' results, as `evaluator/metric`."""
        self._fetch()
        self._write(step, named(results))

    def settle(self) -> None:
        """Everything that was given so far is checked and on its way to the disk."""
        self._fetch()
        self._close_window()
        if self._file:
            self._file.flush()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.settle()
        if self._file:
            self._progress.end(self.last)
            self._file.close()
            self._wandb.finish(failed=error is not None)

    def _fetch(self) -> None:
        if self._pending is None:
            return
        first, metrics = self._pending
        self._pending = None
        host = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        length = host["loss"].shape[-1]
        for i in range(length):
            row = {name: value[..., i] for name, value in host.items()}
            self._check(first + i, row["loss"])
            self._window.append(row)
            self._step = first + i + 1
            if self._step % self._log_every == 0:
                self._close_window()
        if self._file:
            self._file.flush()
            self._progress.update(first + length, {"loss": host["loss"][..., -1]})

    def _close_window(self) -> None:
        if self._window:
            names = self._window[0]
            self._write(self._step, {n: np.mean([row[n] for row in self._window], axis=0).tolist() for n in names})
            self._window = []

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        self.last |= metrics
        if self._file and metrics:
            self._file.write(step, metrics)
            self._wandb.log(step, metrics)

    def _check(self, step: int, loss: np.ndarray) -> None:
        finite = np.isfinite(loss)
        if finite.all() or (self._config.on_nonfinite == "record" and finite.any()):
            return
        which = f" of replicas {np.flatnonzero(~finite).tolist()}" if loss.ndim else ""
        saved = f"the checkpoint of step {self.last_checkpoint} is good" if self.last_checkpoint else "none was saved"
        raise UserError(
            f"the loss{which} is not finite at step {step}; {saved} (workdir {self._workdir}, whose config.json says "
            "what was run). Lower optimizer.learning_rate, clip (optimizer.clip), or set on_nonfinite='record' to let "
            "the other replicas go on"
        )


def named(results: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, Any]:
    """Evaluators' results as `evaluator/metric` -> number or nested list."""
    return {
        f"{name}/{key}": np.asarray(value, float).tolist()
        for name, group in results.items()
        for key, value in group.items()
    }


class Progress:
    """One line on stderr: rewritten in place on a terminal, a new line every ten seconds elsewhere."""

    def __init__(self, name: str, start: int, total: int) -> None:
        self._name, self._start, self._total = name, start, total
        self._begin = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._step = start

    def update(self, step: int, metrics: Mapping[str, Any], *, last: bool = False) -> None:
        self._step = step
        now = time.monotonic()
        if not last and now - self._last < (0.2 if self._terminal else 10.0):
            return
        self._last = now
        rate = (step - self._start) / max(now - self._begin, 1e-9)
        left = format_seconds((self._total - step) / rate) if rate > 0 else "?"
        text = (
            f"{self._name}  step {step}/{self._total} ({100 * step / self._total:.0f}%)  {summary(metrics)}"
            f"  {rate:.0f} steps/s  left {left}"
        )
        end = "\n" if last or not self._terminal else ""
        sys.stderr.write(f"\r\x1b[K{text}{end}" if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def end(self, metrics: Mapping[str, Any]) -> None:
        """The last line, which stays."""
        self.update(self._step, {"loss": metrics["loss"]} if "loss" in metrics else {}, last=True)


def summary(metrics: Mapping[str, Any]) -> str:
    """The scalar metrics in one line; the range where there are several replicas."""
    parts = []
    for name, value in metrics.items():
        value = np.asarray(value, dtype=float)
        low, high = (value.min(), value.max()) if value.size else (math.nan, math.nan)
        parts.append(f"{name} {low:.4g}" if low == high or value.size == 1 else f"{name} {low:.4g}..{high:.4g}")
    return "  ".join(parts)


class Wandb:
    """Sends records to wandb when the config asks for it. wandb is imported only then."""

    def __init__(self, spec: Mapping[str, Any], workdir: Path, config: Mapping[str, Any]) -> None:
        self._run = None
        if spec["mode"] not in ("disabled", "offline", "online"):
            raise UserError(f"wandb.mode={spec['mode']!r}: choose from disabled, offline, online")
        if spec["mode"] == "disabled":
            return
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError(f"wandb.mode={spec['mode']!r} needs wandb; run `pip install wandb`") from error
        try:
            self._run = wandb.init(
                mode=spec["mode"],
                project=spec["project"],
                name=spec["name"] or workdir.name,
                dir=str(workdir),
                id=_run_id(workdir),
                resume="allow" if spec["mode"] == "online" else None,
                config=dict(config),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(
                f"wandb cannot start ({str(error).splitlines()[0]}); log in with `wandb login`, "
                "or set --config.wandb.mode=offline and upload later with `wandb sync`"
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._run is not None:
            self._run.log(_by_replica(metrics), step=step)

    def finish(self, *, failed: bool = False) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _run_id(workdir: Path) -> str:
    """The same run in the same workdir goes on as one run on wandb's side too."""
    path = workdir / "wandb_id"
    if not path.exists():
        replace(path, os.urandom(6).hex())
    return path.read_text()


def _by_replica(metrics: Mapping[str, Any]) -> dict[str, float]:
    flat = {}
    for name, value in metrics.items():
        array = np.asarray(value, dtype=float)
        for index in np.ndindex(array.shape):
            flat["/".join([name, *map(str, index)])] = float(array[index])
    return flat
