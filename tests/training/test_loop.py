import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.toys import get_config
from training import metrics
from training.checkpoint import Checkpoints
from training.config import override
from training.errors import UserError
from training.loop import FINISHED_FILE, Compiled, evaluate, make_program, train

ROOT = Path(__file__).parents[2]


def final_state(config, workdir):
    compiled = Compiled(make_program(config))
    with contextlib.closing(Checkpoints(Path(workdir), 2)) as checkpoints:
        return checkpoints.restore(compiled.abstract_state)


def assert_same_run(config, a, b):
    """Two workdirs hold the same final state, iterator state and metrics, bit for bit."""
    one, two = final_state(config, a), final_state(config, b)
    assert (one.step, one.iterator) == (two.step, two.iterator)
    jax.tree.map(np.testing.assert_array_equal, one.state, two.state)
    assert (Path(a) / metrics.FILE).read_text() == (Path(b) / metrics.FILE).read_text()


class Stop(Exception):
    """Stands for a kill."""


def train_and_stop(config, workdir, monkeypatch, after):
    """Trains until `after` checkpoints have been started, then stops without any of the loop's own clean-up."""
    saved = Checkpoints.save
    count = 0

    def save(self, *args):
        nonlocal count
        saved(self, *args)
        count += 1
        if count == after:
            self.wait()
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(Stop):
            train(config, workdir)


@pytest.mark.parametrize("data", ["device", "host"])
def test_a_resumed_run_equals_an_undisturbed_one(data, tmp_path, monkeypatch):
    config = get_config(data)
    train(config, tmp_path / "whole")
    train_and_stop(config, tmp_path / "stopped", monkeypatch, after=1)
    train_and_stop(config, tmp_path / "stopped", monkeypatch, after=2)
    with (tmp_path / "stopped" / metrics.FILE).open("a") as file:
        file.write('{"step": 35, "loss": 0.1}\n{"step": 36, "lo')  # what a kill between checkpoints leaves
    result = train(config, tmp_path / "stopped")
    assert_same_run(config, tmp_path / "whole", tmp_path / "stopped")
    assert result.metrics == json.loads((tmp_path / "whole" / "finished.json").read_text())["metrics"]


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(times, tmp_path):
    overrides = {"steps": "6000 steps", "checkpoint_every": "200 steps", "eval_every": "1000 steps"}
    config = override(get_config("host"), overrides)
    flags = [f"--config.{key}={value}" for key, value in overrides.items()]

    def start(name):
        command = [sys.executable, "train.py", "--config=tests/training/toys.py:host", f"--workdir={tmp_path / name}"]
        return subprocess.Popen([*command, *flags], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    moments = random.Random(0)
    kills = 0
    while kills < times:
        process = start("killed")
        before = steps_done(tmp_path / "killed")
        while steps_done(tmp_path / "killed") <= before and process.poll() is None:
            time.sleep(0.01)  # start-up is no test; wait until it trains
        time.sleep(moments.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "killed" / "finished.json").exists():
            shutil.rmtree(tmp_path / "killed")  # it was faster than the kills: once more from the start
    assert start("killed").wait() == 0
    assert_same_run(config, tmp_path / "whole", tmp_path / "killed")


def steps_done(workdir):
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        return json.loads((workdir / metrics.FILE).read_text().splitlines()[-1])["step"]
    return 0


# Orbax gives up the other reads of a damaged checkpoint; on Python 3.13 their callbacks may find its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("victim", ["truncated", "emptied", "metadata"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(victim, tmp_path, monkeypatch, capsys):
    config = get_config()
    train(config, tmp_path / "whole")
    train_and_stop(config, tmp_path / "damaged", monkeypatch, after=3)
    damage(tmp_path / "damaged" / "checkpoints" / "30", victim)
    train(config, tmp_path / "damaged")
    assert "the checkpoint at step 30 is damaged" in capsys.readouterr().err
    assert (tmp_path / "damaged" / "damaged" / "30").exists()
    assert_same_run(config, tmp_path / "whole", tmp_path / "damaged")


def damage(checkpoint, how):
    if how == "metadata":
        (checkpoint / "extra" / "metadata").write_text('{"iterat')
        return
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if how == "truncated" else 0])


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = override(get_config(), {"seeds": (0, 1)})
    first = train(config, tmp_path)
    stamp = (tmp_path / metrics.FILE).stat().st_mtime_ns
    second = train(config, tmp_path)
    assert second.metrics == first.metrics
    assert (tmp_path / metrics.FILE).stat().st_mtime_ns == stamp
    jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(r.models[1]) for r in (first, second)))


def test_a_run_killed_before_it_noted_its_end_still_knows_its_results(tmp_path):
    config = get_config()
    whole = train(config, tmp_path)
    (tmp_path / FINISHED_FILE).unlink()
    assert train(config, tmp_path).metrics == whole.metrics


def test_metrics_hold_every_step_and_every_evaluation(tmp_path):
    train(override(get_config(), {"seeds": (0, 1)}), tmp_path)
    series = metrics.read(tmp_path)
    assert series["loss"]["step"].tolist() == list(range(1, 41))
    assert series["loss"]["value"].shape == (40, 2)
    assert series["test/loss"]["step"].tolist() == [0, 10, 20, 30, 40]


def test_a_logging_interval_holds_the_mean(tmp_path):
    train(get_config(), tmp_path / "every")
    train(override(get_config(), {"log_every": "5 steps"}), tmp_path / "fifth")
    every, fifth = (metrics.read(tmp_path / name)["loss"] for name in ("every", "fifth"))
    assert fifth["step"].tolist() == list(range(5, 41, 5))
    np.testing.assert_allclose(fifth["value"], every["value"].reshape(8, 5).mean(1), rtol=1e-12)


def test_another_config_in_the_workdir_is_refused_and_nothing_is_lost(tmp_path):
    train(get_config(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.05 there, 0.1 now"):
        train(override(get_config(), {"optimizer.learning_rate": 0.1}), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    config = override(get_config(), {"task.explode_at": 25, "seeds": (0, 1)})
    with pytest.raises(UserError, match=r"replicas \[0, 1\] is not finite at step 25; the checkpoint of step 20"):
        train(config, tmp_path)
    assert final_state(config, tmp_path).step == 20


def test_the_finite_replicas_can_go_on(tmp_path):
    config = override(
        get_config(),
        {"replicate": (("task.explode_at", (-1, 25)),), "on_nonfinite": "record"},
    )
    result = train(config, tmp_path)
    assert np.isfinite(result.metrics["loss"]).tolist() == [True, False]


def test_evaluate_reads_a_checkpoint(tmp_path):
    result = train(get_config(), tmp_path)
    newest = evaluate(tmp_path)
    assert newest == {"step": 40, "test/loss": result.metrics["test/loss"]}
    assert evaluate(tmp_path, 30)["test/loss"] == metrics.read(tmp_path)["test/loss"]["value"][-2]
    with pytest.raises(UserError, match="no checkpoint at step 35"):
        evaluate(tmp_path, 35)
    with pytest.raises(UserError, match="holds no run"):
        evaluate(tmp_path / "nowhere")


def test_the_profiler_window(tmp_path):
    train(override(get_config(), {"profile.start": 10, "profile.steps": 10}), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_durations_in_epochs_and_percent(tmp_path):
    config = override(get_config(), {"steps": "2 epochs", "eval_every": "50%", "checkpoint_every": "0 steps"})
    train(config, tmp_path)
    assert metrics.read(tmp_path)["test/loss"]["step"].tolist() == [0, 32, 64]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["64"]


def test_a_run_ends_when_every_seed_has_a_replica_that_is_good_enough(tmp_path):
    stop = {"stop.metric": "test/loss", "stop.at_least": 0.0}
    config = override(get_config(), {"seeds": (0, 1), **stop})
    ended = train(config, tmp_path)
    assert json.loads((tmp_path / FINISHED_FILE).read_text())["step"] == 10  # the first evaluation after a step
    assert train(config, tmp_path).metrics == ended.metrics
    (tmp_path / FINISHED_FILE).unlink()  # as if it had been killed after its last checkpoint
    assert train(config, tmp_path).metrics == ended.metrics
    assert final_state(config, tmp_path).step == 10


def test_a_metric_that_no_evaluator_gives_cannot_end_a_run(tmp_path):
    with pytest.raises(UserError, match="test/loss"):
        train(override(get_config(), {"stop.metric": "test/los"}), tmp_path)
