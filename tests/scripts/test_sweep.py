"""The sweep tool, with a small trainer in the place of train.py."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from scripts import sweep
from scripts.sweeping import launchers, points, runner
from training.config import override, to_json

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
from ml_collections import ConfigDict

def get_config(arg=None):
    return ConfigDict({
        "optimizer": {"rate": 0.1, "name": "adam"}, "layers": 1, "bias": False, "note": None,
        "seeds": (0, 1, 2), "replicate": (), "steps": 2, "wait": False, "fail": False, "arg": arg or "none",
    })

def sweep():
    return %s
"""

# Takes `steps` steps and resumes where it was; with `wait` it stays at step 1 until the file `go` is there.
TRAINER = """
import json, os, pathlib, sys, time

flags = dict(argument[2:].split("=", 1) for argument in sys.argv[1:])
workdir = pathlib.Path(flags["workdir"])
with (workdir / "starts").open("a") as file:
    print(os.getpid(), os.getppid(), file=file)
progress = workdir / "progress"
step = int(progress.read_text()) if progress.exists() else 0
print("from step", step)
if flags.get("config.fail") == "True" and not (workdir.parent / "mended").exists():
    sys.exit("no such data set")
for step in range(step, int(flags.get("config.steps", 2))):
    while step == 1 and flags.get("config.wait") == "True" and not (workdir.parent / "go").exists():
        time.sleep(0.01)
    time.sleep(float(flags.get("config.optimizer.rate", 0)))
    partial = workdir / "progress.partial"
    partial.write_text(str(step + 1))
    partial.replace(progress)
metrics = {"loss": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.5, 0.5], "per_layer": [[1.0, 2.0]] * 3}
partial = workdir / "finished.partial"
partial.write_text(json.dumps({"step": step + 1, "metrics": metrics, "wall_seconds": 12.25}))
partial.replace(workdir / "finished.json")
"""

# The same script with the small trainer, for what needs a process: signals, concurrency, job queues.
# A shell that runs the tests in the background makes their children ignore SIGINT; the driver heeds it all the same.
DRIVER = f"""
import signal
import sys

sys.path.insert(0, {str(ROOT)!r})
from scripts import sweep

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sweep.interrupt_on_terminate()
    sys.exit(sweep.main(sys.argv[2:], train=[sys.executable, sys.argv[1]]))
"""

# Hands out the grid's points once each, to any number of agents, and notes what it was asked for.
WANDB = """
import json, os, pathlib

HERE = pathlib.Path(__file__).parent
current = None

class Error(Exception):
    pass

def note(**record):
    with (HERE / "notes.jsonl").open("a") as file:
        print(json.dumps(record), file=file)

def sweep(grid, entity, project):
    (HERE / "grid.json").write_text(json.dumps(grid))
    note(what="sweep", entity=entity, project=project)
    return "id7"

def agent(sweep_id, function, entity, project):
    global current
    note(what="agent", sweep_id=sweep_id, entity=entity, project=project)
    for name in json.loads((HERE / "grid.json").read_text())["parameters"]["point"]["values"]:
        try:
            (HERE / name).mkdir()
        except FileExistsError:
            continue
        current = name
        function()

class Run:
    def __init__(self):
        self.name, self.config, self.summary = None, {"point": current}, {}

    def finish(self, exit_code):
        note(what="run", name=self.name, config=self.config, summary=self.summary, exit_code=exit_code)

init = Run
"""


# submitit stays out of this process: its import closes the log handlers there are, and pytest's capture too.
needs_submitit = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


class Sweep:
    """A sweep in a folder of its own: its config file, its trainer, and ways to start it."""

    def __init__(self, folder: Path) -> None:
        self.workdir = folder / "runs"
        self.config = folder / "config.py"
        self.trainer = folder / "trainer.py"
        self.trainer.write_text(TRAINER)
        self.driver = folder / "driver.py"
        self.driver.write_text(DRIVER)
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        self._started = []

    def points(self, *overrides: dict) -> "Sweep":
        self.config.write_text(CONFIG % repr(list(overrides)))
        return self

    def arguments(self, *more: str) -> list[str]:
        return [f"--config={self.config}", f"--workdir={self.workdir}", *more]

    def main(self, *more: str) -> int:
        return sweep.main(self.arguments(*more), train=[sys.executable, str(self.trainer)])

    def start(self, *more: str) -> subprocess.Popen:
        command = [sys.executable, str(self.driver), str(self.trainer), *self.arguments(*more)]
        with self._out.open("w") as out, self._err.open("w") as err:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err)
        self._started.append(process)
        return process

    def wait(self, process: subprocess.Popen) -> tuple[int, str, str]:
        """The exit status of a started sweep, and what the last one started has printed."""
        return process.wait(20), self._out.read_text(), self._err.read_text()

    def end(self) -> None:
        """Ends what a failed test may have left."""
        if self.workdir.exists():
            self.go()
        for process in self._started:
            process.kill()
            process.wait()

    def go(self) -> None:
        (self.workdir / "go").touch()

    def starts(self, name: str) -> list[list[int]]:
        """The process and its parent, for each time that the point was started."""
        return [[int(n) for n in line.split()] for line in (self.workdir / name / "starts").read_text().splitlines()]

    def summary(self) -> dict[str, dict]:
        return {row["point"]: row for row in json.loads((self.workdir / "summary.json").read_text())}


@pytest.fixture
def a_sweep(tmp_path: Path) -> Iterator[Sweep]:
    tool = Sweep(tmp_path)
    yield tool
    tool.end()


@pytest.fixture
def wandb_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[dict]]]:
    """Puts the stand-in in wandb's place, here and in child processes; gives what it noted of a kind."""
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def notes(what: str) -> list[dict]:
        records = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
        return [record for record in records if record.pop("what") == what]

    yield notes
    sys.modules.pop("wandb", None)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def at_step(folder: Path, step: int) -> Callable[[], bool]:
    progress = folder / "progress"
    return lambda: progress.exists() and progress.read_text() == str(step)


# Points, their names and their checks


def test_names_are_readable_and_depend_on_the_point_only(a_sweep: Sweep) -> None:
    one, two = {"optimizer.rate": 0.01, "layers": 2}, {"layers": 3}

    def names(*overrides: dict) -> list[str]:
        a_sweep.points(*overrides)
        return [p.name for p in points.read_points(str(a_sweep.config), a_sweep.workdir, {}, ["train"])]

    assert names(one, two) == ["layers=2,optimizer.rate=0.01", "layers=3"]
    assert names(two, dict(reversed(one.items()))) == ["layers=3", "layers=2,optimizer.rate=0.01"]
    assert names({"optimizer.rate": 1}) == names({"optimizer.rate": 1.0}) == ["optimizer.rate=1.0"]
    assert names({}) == ["default"]


@pytest.mark.parametrize("value", ["a b/c", "a,layers=2", "é", "x" * 300, "..", (1, 2), ""])
def test_odd_names_are_safe_and_unique(value: str | tuple) -> None:
    name = points.point_name({"optimizer.name": value})
    assert re.fullmatch(r"[A-Za-z0-9_.,+=-]{1,150}", name)
    assert name == points.point_name({"optimizer.name": value})
    assert name != points.point_name({"optimizer.name": f"{value}-"})


def test_names_do_not_collide() -> None:
    pairs = [
        ({"n": "a,b=1"}, {"b": 1, "n": "a"}),
        ({"n": "a b"}, {"n": "a-b"}),
        ({"n": "x" * 300}, {"n": "x" * 301}),
    ]
    for first, second in pairs:
        assert points.point_name(first) != points.point_name(second)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([{}, {"optimizer.rte": 0.1}], "point 1 of sweep(): the config has no key 'optimizer.rte'"),
        ([{"optimizer.rte": 0.1}], "did you mean 'optimizer.rate'?"),
        ([{"optimizer": {"rate": 1.0}}], "the config has no key 'optimizer'; did you mean 'optimizer."),
        ([{"layers": "two"}], "config key 'layers' is of type int, not str ('two')"),
        ([{"layers": 2.5}], "config key 'layers' is of type int, not float (2.5)"),
        ([{"layers": True}], "'layers' is of type int, not bool (True)"),
        ([{"note": 3}], "a command line cannot set 'note' from None to 3"),
        ([{"layers": 2}, {"layers": 3}, {"layers": 2}], "sweep() has the point layers=2 2 times"),
        ([], "sweep() has no points"),
        (["layers"], "sweep() returns a list of dicts of overrides"),
    ],
)  # fmt: skip
def test_a_bad_sweep_is_one_line_before_anything_starts(
    a_sweep: Sweep, capsys: pytest.CaptureFixture, overrides: list, message: str
) -> None:
    assert a_sweep.points(*overrides).main() == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out
    assert not a_sweep.workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.layrs=2"], "command line: the config has no key 'layrs'; did you mean 'layers'?"),
        (["--config.layers=many"], "command line: config key 'layers' is of type int, not str ('many')"),
        (["--config.optimizer.rate=1"], "sweep() sets 'optimizer.rate', and so does the command line"),
        (["--layers=2"], "unknown argument '--layers=2'"),
        (["--config.layers", "2"], "unknown argument '--config.layers'"),
        (["--workers=0"], "'0' is not a positive number"),
        (["--launcher=cloud"], "invalid choice: 'cloud'"),
        (["--submitit.name=x"], "--submitit.* needs --launcher=submitit"),
        (["--wandb.sweep_id=x"], "--wandb.* needs --launcher=wandb"),
    ],
)
def test_a_bad_command_line_is_one_line(
    a_sweep: Sweep, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert a_sweep.points({"optimizer.rate": 0.0}).main(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): pass", "defines no sweep()"),
        ("def sweep(): pass", "defines no get_config(arg=None)"),
        ("import nothing_of_the_kind", "ModuleNotFoundError: No module named 'nothing_of_the_kind'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("def get_config(): return 1 / 0\ndef sweep(): return []", "ZeroDivisionError: division by zero"),
        (None, "there is no config file"),
    ],
)
def test_a_bad_config_file_is_one_line(
    a_sweep: Sweep, capsys: pytest.CaptureFixture, text: str | None, message: str
) -> None:
    if text is not None:
        a_sweep.config.write_text(text)
    assert a_sweep.main() == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_argument_reaches_get_config_and_sweep(a_sweep: Sweep) -> None:
    a_sweep.config.write_text(
        CONFIG.replace("def sweep():", "def sweep(arg):") % "[{'optimizer.name': arg}, {'layers': 2}]"
    )
    first, second = points.read_points(f"{a_sweep.config}:b=1", a_sweep.workdir, {}, ["train"])
    assert first.settings == {"optimizer.name": "b=1", "layers": 1}
    assert second.config.arg == "b=1"
    assert first.command[1] == f"--config={a_sweep.config}:b=1"


@pytest.mark.filterwarnings("ignore:the load_module")  # how ml_collections reads a config file
def test_commands_say_to_the_trainer_what_the_sweep_means(a_sweep: Sweep) -> None:
    values = {"optimizer.rate": 1e-5, "optimizer.name": "a, b='c'", "layers": 7, "seeds": (3,), "bias": True}
    a_sweep.points(values)
    (point,) = points.read_points(str(a_sweep.config), a_sweep.workdir, {"steps": "5"}, ["train"])
    parsed = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=parsed, sys_argv=list(point.command))
    flags.DEFINE_string("workdir", None, "", flag_values=parsed)
    parsed(list(point.command))
    assert parsed.config.to_dict() == point.config.to_dict() == override(point.config, values | {"steps": 5}).to_dict()
    assert parsed.workdir == str(point.folder)


# Running on this machine


def test_a_sweep_runs_skips_and_grows(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    rates = [{"optimizer.rate": 0.0, "layers": n} for n in (1, 2)]
    assert a_sweep.points(*rates).main("--workers=2", "--config.steps=3") == 0
    assert "2 done, 0 running, 0 failed, 0 left" in capsys.readouterr().out
    assert a_sweep.points({"layers": 3}, *reversed(rates)).main("--config.steps=3") == 0
    out = capsys.readouterr().out
    assert "2 done, 1 running, 0 failed, 0 left; about 12s left" in out
    names = ["layers=3", "layers=2,optimizer.rate=0.0", "layers=1,optimizer.rate=0.0"]
    assert [len(a_sweep.starts(name)) for name in names] == [1, 1, 1]
    assert list(a_sweep.summary()) == names
    assert a_sweep.summary()["layers=3"]["step"] == 3
    assert a_sweep.main("--config.steps=3") == 0
    assert "start" not in capsys.readouterr().out


def test_a_failed_point_stops_nobody_and_is_tried_again(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    a_sweep.points({"fail": True}, {"layers": 2})
    assert a_sweep.main() == 1
    out = capsys.readouterr().out
    assert "failed    fail=True: exit status 1: no such data set (" in out
    assert "1 done, 0 running, 1 failed, 0 left" in out
    assert "1 of 2 points are not finished; to go on: python scripts/sweep.py --config=" in out
    assert {name: row["status"] for name, row in a_sweep.summary().items()} == {
        "fail=True": "failed",
        "layers=2": "finished",
    }
    (a_sweep.workdir / "mended").touch()
    assert a_sweep.main() == 0
    assert len(a_sweep.starts("fail=True")) == 2
    log = (a_sweep.workdir / "fail=True" / "log.txt").read_text().splitlines()
    assert log[0] == log[3]
    assert log[0].startswith("$ ")
    assert log[0].endswith(f"--workdir={a_sweep.workdir}/fail=True --config.fail=True")
    assert log[1:3] == ["from step 0", "no such data set"]


def test_a_run_that_ends_without_a_result_has_failed(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    a_sweep.trainer.write_text("print('nothing done')")
    assert a_sweep.points({"layers": 2}).main() == 1
    assert "ended without finished.json: nothing done" in capsys.readouterr().out


def test_a_killed_run_resumes(a_sweep: Sweep) -> None:
    a_sweep.points({"wait": True})
    folder = a_sweep.workdir / "wait=True"
    first = a_sweep.start()
    wait_for(at_step(folder, 1))
    os.kill(a_sweep.starts("wait=True")[0][0], signal.SIGKILL)
    exit_status, out, _ = a_sweep.wait(first)
    assert exit_status == 1
    assert "failed    wait=True: killed by SIGKILL: from step 0" in out
    a_sweep.go()
    assert a_sweep.main() == 0
    assert "from step 1" in (folder / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_and_says_how_to_go_on(a_sweep: Sweep, number: signal.Signals) -> None:
    a_sweep.points({"wait": True}, {"wait": True, "layers": 2}, {"layers": 3})
    process = a_sweep.start("--workers=2")
    names = ["wait=True", "layers=2,wait=True"]
    wait_for(lambda: all(at_step(a_sweep.workdir / name, 1)() for name in names))
    process.send_signal(number)
    exit_status, _, err = a_sweep.wait(process)
    assert exit_status == 130
    assert err.startswith("stopped; the same command goes on from here: python scripts/sweep.py --config=")
    for name in names:
        with pytest.raises(ProcessLookupError):
            os.kill(a_sweep.starts(name)[0][0], 0)
    assert a_sweep.main("--summarize") == 1
    assert [row["status"] for row in a_sweep.summary().values()] == ["stopped", "stopped", "waiting"]
    a_sweep.go()
    assert a_sweep.main() == 0


def test_a_run_that_does_not_end_when_asked_is_killed(a_sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.1)
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", deaf]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    with process.stdout:
        process.stdout.readline()
        runner._end(process)
    assert process.returncode == -signal.SIGKILL


def test_two_sweeps_share_the_points(a_sweep: Sweep) -> None:
    names = [f"layers={n},optimizer.rate=0.1" for n in range(4)]
    a_sweep.points(*({"layers": n, "optimizer.rate": 0.1} for n in range(4)))
    sweeps = [a_sweep.start("--workers=2") for _ in range(2)]
    for process in sweeps:
        a_sweep.wait(process)
    assert [len(a_sweep.starts(name)) for name in names] == [1] * 4
    assert all((a_sweep.workdir / name / "finished.json").exists() for name in names)


def test_a_run_that_outlives_its_sweep_keeps_its_lock(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    a_sweep.points({"wait": True})
    process = a_sweep.start()
    wait_for(at_step(a_sweep.workdir / "wait=True", 1))
    process.kill()
    process.wait()
    assert a_sweep.main() == 1
    assert "elsewhere wait=True: another process runs it" in capsys.readouterr().out
    assert a_sweep.summary()["wait=True"]["status"] == "running"
    ((pid, _),) = a_sweep.starts("wait=True")
    os.kill(pid, signal.SIGKILL)
    a_sweep.go()
    wait_for(lambda: a_sweep.main() == 0)
    assert len(a_sweep.starts("wait=True")) == 2


def test_a_folder_with_another_config_is_refused(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    a_sweep.points({"layers": 2})
    (point,) = points.read_points(str(a_sweep.config), a_sweep.workdir, {}, ["train"])
    assert a_sweep.main() == 0
    (point.folder / "config.json").write_text(to_json(ConfigDict(point.config)))
    assert a_sweep.main() == 0
    capsys.readouterr()
    assert a_sweep.main("--config.steps=9") == 2
    assert "holds a run of another config (steps: 2 there, 9 now)" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    assert a_sweep.points({"layers": 2}).main() == 0
    capsys.readouterr()
    assert a_sweep.points({"layers": 2}, {"optimizer.name": "a b"}).main("--dry_run", "--config.steps=5") == 0
    finished, command = capsys.readouterr().out.splitlines()
    assert finished == "# finished: layers=2"
    name = points.point_name({"optimizer.name": "a b"})
    assert shlex.split(command)[2:] == [
        f"--config={a_sweep.config}",
        f"--workdir={a_sweep.workdir / name}",
        "--config.steps=5",
        "--config.optimizer.name=a b",
    ]
    assert not (a_sweep.workdir / name).exists()


def test_the_summary_has_settings_metrics_seconds_and_status(a_sweep: Sweep, capsys: pytest.CaptureFixture) -> None:
    a_sweep.points({"layers": 2}, {"fail": True})
    a_sweep.main()
    capsys.readouterr()
    assert a_sweep.main("--summarize") == 1
    out = capsys.readouterr().out
    assert out == textwrap.dedent(
        """\
        | layers | fail  | loss  | accuracy | seconds | status   |
        | ------ | ----- | ----- | -------- | ------- | -------- |
        | 2      | False | 2 ± 1 | 0.5 ± 0  | 12.2    | finished |
        | 1      | True  |       |          |         | failed   |
        """
    )
    assert (a_sweep.workdir / "summary.md").read_text().startswith(out)
    assert a_sweep.summary()["layers=2"] == {
        "point": "layers=2",
        "overrides": {"layers": 2},
        "status": "finished",
        "step": 2,
        "metrics": {"loss": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.5, 0.5], "per_layer": [[1.0, 2.0]] * 3},
        "wall_seconds": 12.25,
    }


def test_gpus_are_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(workers: int | None) -> list[tuple[str | None, str | None]]:
        environments = launchers.worker_environments(workers)
        return [(e.get("CUDA_VISIBLE_DEVICES"), e.get("XLA_PYTHON_CLIENT_MEM_FRACTION")) for e in environments]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shares(None) == [(None, None)]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: GPU-a)'\necho 'GPU 1: H100 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    assert shares(None) == [("0", None), ("1", None)]
    assert shares(3) == [("0", "0.450"), ("1", "0.450"), ("0", "0.450")]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert shares(1) == [("4,5,6,7", None)]
    assert shares(2) == [("4,5", None), ("6,7", None)]


def test_the_script_runs_from_the_root_and_starts_fast(a_sweep: Sweep) -> None:
    a_sweep.points({"layers": 2})
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "scripts/sweep.py", *a_sweep.arguments("--dry_run")]
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    start = f"{sys.executable} train.py --config={a_sweep.config} "
    assert out == f"{start}--workdir={a_sweep.workdir}/layers=2 --config.layers=2\n"
    check = "import sys; from scripts import sweep; print({'jax', 'wandb', 'submitit'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "set()\n"


# Clusters and wandb


@pytest.mark.parametrize("package", ["submitit", "wandb"])
def test_a_missing_package_is_named(
    a_sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert a_sweep.points({"layers": 2}).main(f"--launcher={package}") == 2
    assert capsys.readouterr().err == f"error: --launcher={package} needs the package: pip install {package}\n"


@needs_submitit
def test_submitit_runs_and_requeues_the_points(a_sweep: Sweep) -> None:
    a_sweep.points({"wait": True}, {"layers": 2}, {"fail": True})
    process = a_sweep.start("--launcher=submitit", "--submitit.cluster=local", "--workers=2")
    exit_status, out, err = a_sweep.wait(process)
    assert exit_status == 0, err
    assert "submitted 3 jobs to local: " in out
    wait_for(at_step(a_sweep.workdir / "wait=True", 1))
    ((_, job),) = a_sweep.starts("wait=True")
    os.kill(job, signal.SIGUSR2)  # what submitit takes for a preemption
    wait_for(lambda: len(a_sweep.starts("wait=True")) == 2)
    a_sweep.go()
    wait_for(lambda: all((a_sweep.workdir / n / "finished.json").exists() for n in ("wait=True", "layers=2")))
    wait_for((a_sweep.workdir / "fail=True" / "failed.json").exists)
    assert "from step 1" in (a_sweep.workdir / "wait=True" / "log.txt").read_text()
    assert a_sweep.main("--summarize") == 1
    assert [row["status"] for row in a_sweep.summary().values()] == ["finished", "finished", "failed"]


@needs_submitit
@pytest.mark.parametrize("parameter", ["slurm_partitoin=gpu", "gpus_per_node=two", "cluster=nowhere"])
def test_a_bad_submitit_parameter_is_one_line(a_sweep: Sweep, parameter: str) -> None:
    a_sweep.points({"layers": 2})
    process = a_sweep.start("--launcher=submitit", "--submitit.cluster=local", f"--submitit.{parameter}")
    exit_status, _, err = a_sweep.wait(process)
    assert exit_status == 2
    assert err.startswith("error: submitit: ")
    assert err.count("\n") == 1


def test_wandb_is_asked_for_a_grid_and_told_the_results(
    a_sweep: Sweep, wandb_notes: Callable[[str], list[dict]], capsys: pytest.CaptureFixture
) -> None:
    a_sweep.points({"layers": 1}).main()
    a_sweep.points({"layers": 1}, {"layers": 2}, {"fail": True})
    assert a_sweep.main("--launcher=wandb", "--wandb.project=team/things") == 1
    assert wandb_notes("sweep") == [{"entity": "team", "project": "things"}]
    assert wandb_notes("agent") == [{"sweep_id": "id7", "entity": "team", "project": "things"}]
    assert wandb_notes("run") == [
        {
            "name": "layers=2",
            "config": {"point": "layers=2", "layers": 2},
            "summary": {"loss": [1.0, 2.0, 3.0], "accuracy": [0.5, 0.5, 0.5], "per_layer": [[1.0, 2.0]] * 3},
            "exit_code": 0,
        },
        {"name": "fail=True", "config": {"point": "fail=True", "fail": True}, "summary": {}, "exit_code": 1},
    ]
    out = capsys.readouterr().out
    assert re.search(
        r"join with: python scripts/sweep.py --config=.* --wandb.project=team/things --wandb.sweep_id=id7\n",
        out,
    )
    assert "failed    fail=True: exit status 1: no such data set (" in out


def test_several_wandb_agents_share_the_points(a_sweep: Sweep, wandb_notes: Callable[[str], list[dict]]) -> None:
    a_sweep.points(*({"layers": n, "optimizer.rate": 0.2} for n in range(3)))
    process = a_sweep.start("--launcher=wandb", "--workers=2")
    exit_status, _, err = a_sweep.wait(process)
    assert exit_status == 0, err
    assert len(wandb_notes("sweep")) == 1
    assert len(wandb_notes("agent")) == 2
    assert sorted(run["name"] for run in wandb_notes("run")) == [f"layers={n},optimizer.rate=0.2" for n in range(3)]


def test_joining_a_wandb_sweep_of_other_points(
    a_sweep: Sweep, wandb_notes: Callable[[str], list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    grid = {"parameters": {"point": {"values": ["layers=9", "layers=2"]}}}
    (tmp_path / "stub" / "grid.json").write_text(json.dumps(grid))
    assert a_sweep.points({"layers": 2}).main("--launcher=wandb", "--wandb.sweep_id=id8") == 0
    assert [agent["sweep_id"] for agent in wandb_notes("agent")] == ["id8"]
    assert [run["exit_code"] for run in wandb_notes("run")] == [1, 0]
    assert "asks for the point layers=9, which sweep() does not have here" in capsys.readouterr().err


def test_stopping_wandb_agents_stops_their_runs(a_sweep: Sweep, wandb_notes: Callable[[str], list[dict]]) -> None:
    a_sweep.points({"wait": True}, {"wait": True, "layers": 2})
    process = a_sweep.start("--launcher=wandb", "--workers=2")
    names = ["wait=True", "layers=2,wait=True"]
    wait_for(lambda: all(at_step(a_sweep.workdir / name, 1)() for name in names))
    process.terminate()
    exit_status, _, err = a_sweep.wait(process)
    assert exit_status == 130
    assert err.startswith("stopped; the same command goes on")
    for name in names:
        with pytest.raises(ProcessLookupError):
            os.kill(a_sweep.starts(name)[0][0], 0)
    assert len(wandb_notes("agent")) == 2


@needs_wandb
def test_wandb_without_an_account_is_one_clear_error(a_sweep: Sweep, tmp_path: Path) -> None:
    a_sweep.points({"layers": 2})
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(a_sweep.driver),
        str(a_sweep.trainer),
        *a_sweep.arguments("--launcher=wandb"),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: wandb: .*wandb login.* \(it needs an account .*\)\n", result.stderr)
