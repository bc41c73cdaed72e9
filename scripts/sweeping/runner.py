"""Running one point: its lock, its process, its log and what became of it. Every launcher ends here."""

import contextlib
import enum
import fcntl
import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from scripts.sweeping.points import Point

POLL_SECONDS = 0.1
GRACE_SECONDS = 20.0  # between asking a run to end and killing it
LOCK_TRIES = 4  # looking at a lock takes it for an instant, so one refusal says little


class Status(enum.StrEnum):
    """What became of a point; read from its folder, so that every sweep on the folder sees the same."""

    FINISHED = "finished"
    FAILED = "failed"
    RUNNING = "running"  # somebody holds its lock
    STOPPED = "stopped"  # begun, and resumed by the next sweep
    WAITING = "waiting"


def status(point: Point) -> Status:
    if point.finished:
        return Status.FINISHED
    if _is_locked(point.folder / "lock"):
        return Status.RUNNING
    if (point.folder / "failed.json").exists():
        return Status.FAILED
    return Status.STOPPED if point.log.exists() else Status.WAITING


def failure(point: Point) -> str:
    """Why a failed point failed, on one line."""
    return json.loads((point.folder / "failed.json").read_text())["reason"]


def run_point(point: Point, env: Mapping[str, str], stop: threading.Event) -> Status:
    """Runs or resumes a point until it ends or `stop` is set; leaves it alone if another process has it.

    The lock goes with the run: its process inherits it, so that a run which outlives a killed sweep still has
    it, and the death of the last holder frees it.
    """
    with _hold(point.folder) as lock:
        if lock is None:
            return Status.RUNNING
        if point.finished:  # by another sweep, since this one looked
            return Status.FINISHED
        (point.folder / "failed.json").unlink(missing_ok=True)
        exit_status = _execute(point, env, stop, lock)
        if point.finished:
            return Status.FINISHED
        if stop.is_set():
            return Status.STOPPED
        write_atomically(point.folder / "failed.json", json.dumps({"reason": _reason(point.log, exit_status)}))
        return Status.FAILED


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that readers see as a whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


def _execute(point: Point, env: Mapping[str, str], stop: threading.Event, lock: IO[str]) -> int:
    """Runs the point's command in a process group of its own and returns its exit status."""
    with point.log.open("a") as log:
        log.write(f"$ {shlex.join(point.command)}\n")
        log.flush()
        process = subprocess.Popen(
            point.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**env, "PYTHONUNBUFFERED": "1"},  # the log's last line is the last thing that happened
            pass_fds=[lock.fileno()],
            start_new_session=True,
        )
    try:
        while process.poll() is None and not stop.wait(POLL_SECONDS):
            pass
    finally:
        _end(process)
    return process.returncode


def _end(process: subprocess.Popen) -> None:
    """Ends what is left of a process and of those that it started: asks first, then kills."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[IO[str] | None]:
    """The point's lock as an open file, or None if somebody else has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        for _ in range(LOCK_TRIES):
            if _lock(file, fcntl.LOCK_EX):
                yield file
                return
            time.sleep(POLL_SECONDS)
        yield None


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        return not _lock(file, fcntl.LOCK_SH)


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _reason(log: Path, exit_status: int) -> str:
    """The exit status and the log's last line."""
    if exit_status < 0:
        how = f"killed by {signal.Signals(-exit_status).name}"
    elif exit_status == 0:
        how = "ended without finished.json"
    else:
        how = f"exit status {exit_status}"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return f"{how}: {next((line.strip() for line in reversed(lines) if line.strip()), 'no output')[:300]}"
