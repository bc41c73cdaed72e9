"""Every entry runs, at toy size, and leaves its three files."""

import json

import numpy as np
import pytest

from icl.hijacking import reproduce
from training import report

TINY = {"steps": "4 steps", "batch_size": 32, "task.validation_prompts": 64, "seeds": (0, 1)}
THEORY = ("optima", "exact", "figure2", "ceiling")


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    train = report.Context.train
    monkeypatch.setattr(report.Context, "train", lambda self, name, config: train(self, name, config, TINY))
    monkeypatch.setattr(reproduce, "_depths", lambda context: (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", reproduce.ENTRIES)
def test_an_entry_leaves_json_table_and_figure(name, runs, tmp_path):
    entry = reproduce.ENTRIES[name]
    record = report.reproduce(f"paper/{name}", entry, "cpu", runs, tmp_path)
    path = tmp_path / "paper" / f"{name}.cpu.json"
    assert json.loads(path.read_text())["rows"] == record["rows"]
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert entry.claim in path.with_suffix(".md").read_text()
    if name in THEORY:
        assert all(row["passed"] is not False for row in record["rows"]), record["rows"]


def cells(excesses, slope):
    """A group of depths with these excesses, whose accuracy rises by `slope` per doubling."""
    seeds = np.linspace(-0.002, 0.002, 5)
    return [
        {
            "layers": layers,
            "excess": [excess] * 5,
            "accuracy": [(0.5 + slope * np.log2(layers) + seeds).tolist()] * len(reproduce.COUNTS),
        }
        for layers, excess in excesses.items()
    ]


def test_the_trend_counts_depths_of_equal_excess_only():
    equal = {1: 1.0, 2: 1.001, 4: 1.002}
    rises = reproduce._depth_trend("gpu", "x", cells(equal, 0.05))
    assert "rises, over L = 1, 2, 4" in rises.ours
    assert rises.passed
    assert "falls" in reproduce._depth_trend("gpu", "x", cells(equal, -0.05)).ours
    assert "no trend" in reproduce._depth_trend("gpu", "x", cells(equal, 0.0)).ours
    unequal = reproduce._depth_trend("gpu", "x", cells(equal | {8: 1.2}, 0.05))
    assert "over L = 1, 2, 4" in unequal.ours
    assert not unequal.passed
    assert "fewer than two" in reproduce._depth_trend("gpu", "x", cells({1: 1.0, 2: 2.0}, 0.05)).ours
