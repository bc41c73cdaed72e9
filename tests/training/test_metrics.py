import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.toys import get_config
from training import metrics
from training.config import override
from training.errors import UserError
from training.loop import train

ROOT = Path(__file__).parents[2]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / metrics.FILE
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    file = metrics.MetricsFile(tmp_path, resume_step=2)
    file.write(3, {"loss": [0.5, 0.25]})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_read_ignores_half_a_line(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1, "loss": [1.0, NaN]}\n{"step": 2, "lo')
    series = metrics.read(tmp_path)
    assert series["loss"]["step"].tolist() == [1]
    np.testing.assert_array_equal(series["loss"]["value"], [[1.0, np.nan]])


def test_summary_gives_the_range_of_several_replicas():
    assert metrics.summary({"loss": 0.25, "mae": [0.5, 0.125]}) == "loss 0.25  mae 0.125..0.5"


def test_the_progress_line_ends_with_the_run(tmp_path, capsys):
    train(get_config(), tmp_path / "myrun")
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("myrun  step 40/40 (100%)  loss 0.0")
    assert last.endswith("left 0s")


def test_wandb_offline_writes_a_run_and_resume_keeps_its_id(tmp_path):
    code = (
        "import sys; from tests.training.toys import get_config; from training.config import override;"
        "from training.loop import train;"
        "train(override(get_config(), {'wandb.mode': 'offline', 'steps': sys.argv[2]}), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path, "10 steps"], cwd=ROOT, check=True, capture_output=True)
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1
    assert (tmp_path / "wandb_id").read_text() in runs[0].name
    assert runs[0].stat().st_size > 1000


def test_wandb_online_without_a_network_is_one_clear_error(tmp_path, monkeypatch):
    import wandb

    def init(**arguments):
        assert arguments["mode"] == "online"
        assert arguments["resume"] == "allow"
        raise wandb.errors.CommError("no route to host\nmore")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"no route to host.*wandb login.*offline"):
        train(override(get_config(), {"wandb.mode": "online"}), tmp_path)


def test_wandb_gets_every_record(tmp_path, monkeypatch):
    import wandb

    class Run:
        logged, exit_code = [], None

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self, exit_code):
            self.exit_code = exit_code

    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **arguments: run)
    train(override(get_config(), {"wandb.mode": "online", "seeds": (0, 1)}), tmp_path)
    assert run.exit_code == 0
    assert {step for step, _ in run.logged} == set(range(41))
    assert {"loss/0", "loss/1", "mae/0", "mae/1"} in [set(values) for _, values in run.logged]


def test_an_unknown_wandb_mode(tmp_path):
    with pytest.raises(UserError, match="choose from disabled, offline, online"):
        train(override(get_config(), {"wandb.mode": "ofline"}), tmp_path)
