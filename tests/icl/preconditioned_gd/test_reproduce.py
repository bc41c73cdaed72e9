"""Every entry of the paper from config to PNG, at a size where the numbers mean nothing."""

import json

import pytest

from icl.preconditioned_gd import measure, reproduce
from training import report

LONG = {"figure6", "figure7", "theorem1", "basins"}  # many trainings, of code that the other entries run too
SMALL = {"steps": "200 steps", "batch_size": 32, "task.test_prompts": 64, "checkpoint_every": "200 steps"}


@pytest.fixture
def _small(monkeypatch):
    train = report.Context.train
    monkeypatch.setattr(
        report.Context,
        "train",
        lambda self, name, config, overrides=None: train(self, name, config, {**(overrides or {}), **SMALL}),
    )
    monkeypatch.setattr(measure, "BASELINE_PROMPTS", 200)
    monkeypatch.setattr(reproduce, "_test_prompts", lambda context: 2**16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One folder for all entries: those of one training share it, as they do for a user."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in reproduce.ENTRIES]
)
def test_an_entry_leaves_json_table_and_figure(name, runs, tmp_path):
    entry = reproduce.ENTRIES[name]
    record = report.reproduce(f"paper/{name}", entry, "cpu", runs, tmp_path / "results")
    path = tmp_path / "results" / "paper" / f"{name}.cpu.json"
    assert json.loads(path.read_text())["rows"] == record["rows"]
    assert len(record["rows"]) >= 2
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    page = path.with_suffix(".md").read_text()
    assert entry.claim in page
    assert entry.scales["cpu"] in page
    path.with_suffix(".png").unlink()
    report.render(entry, path)
    assert path.with_suffix(".md").read_text() == page
    assert path.with_suffix(".png").exists()
