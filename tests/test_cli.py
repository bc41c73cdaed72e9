"""The command-line entries as a user meets them."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOY = "--config=tests/training/toys.py"

BLOCK = """
import sys, runpy
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("tensorflow", "tensorflow_datasets", "wandb", "matplotlib", "grain")
        return None if absent else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def call(*arguments, code=None):
    command = [sys.executable, *(("-c", code) if code else ()), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("entry", ["train.py", "eval.py"])
def test_help_is_quick(entry):
    begin = time.monotonic()
    done = call(entry, "--help")
    assert time.monotonic() - begin < 3
    assert "--workdir" in done.stdout
    assert done.stderr == ""


def test_optional_packages_may_be_absent(tmp_path):
    code = (
        BLOCK
        + "import training.loop, icl.preconditioned_gd.task\n"
        + "sys.argv = sys.argv[:1] + ['--help']\nrunpy.run_path('train.py')"
    )
    assert call(code=code).returncode == 0
    run = "sys.argv[1:] = {}\nrunpy.run_path('train.py', run_name='__main__')"
    done = call(code=BLOCK + run.format([TOY, f"--workdir={tmp_path / 'a'}"]))
    assert done.returncode == 0, done.stderr
    done = call(code=BLOCK + run.format([TOY, "--config.wandb.mode=offline", f"--workdir={tmp_path / 'b'}"]))
    assert done.returncode == 2
    assert "pip install wandb" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TOY, "--config.optimizer.lerning_rate=0.1"], "did you mean 'learning_rate'?"),
        ([TOY, "--config.zzz=1"], "the config has no key 'zzz'"),
        ([TOY, "--config.batch_size=many"], "--config.batch_size=many"),
        ([TOY, "--config.task.name=tests.training.toys.DeviceRegresion"], "did you mean 'DeviceRegression'?"),
        ([TOY, "--config.task.name=tests.training.nowhere.Task"], "No module named 'tests.training.nowhere'"),
        ([TOY, "--config.steps=ten"], "is not a duration"),
        ([TOY, "--config.batch_size=30", "--config.optimizer.accumulate=4"], "use a multiple of 4, e.g. 32"),
        ([TOY, "--config.mesh.data=64"], "needs 64 devices"),
        ([TOY, "--config.task.explode_at=3"], "is not finite at step 3"),
        ([TOY, "--config.precision=float16"], "choose from float32, bfloat16"),
        (["--config=tests/training/nowhere.py"], "tests/training/nowhere.py"),
        (["--config=configs/icl/preconditioned_gd/theorem3.py:scal=cpu"], "did you mean 'scale'?"),
        ([TOY, "--wrkdir=x"], "Did you mean: workdir"),
        ([TOY, "surplus"], "unexpected argument 'surplus'"),
        ([], "--config is missing"),
    ],
)
def test_bad_input_ends_in_one_message(arguments, message, tmp_path):
    done = call("train.py", *arguments, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr


def test_a_workdir_that_cannot_be_written():
    done = call("train.py", TOY, "--workdir=/proc/run")
    assert done.returncode == 2
    assert "/proc/run" in done.stderr
    assert "Traceback" not in done.stderr


def test_train_then_eval(tmp_path):
    done = call("train.py", TOY, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "finished in" in done.stdout
    done = call("eval.py", f"--workdir={tmp_path}", "--step=30")
    assert '"test/loss"' in done.stdout
    done = call("eval.py", f"--workdir={tmp_path}", "--step=31")
    assert done.returncode == 2
    assert "there are [30, 40]" in done.stderr


def test_print_config_needs_no_workdir():
    done = call("train.py", TOY, "--config.batch_size=64", "--print_config")
    assert "batch_size: 64" in done.stdout
