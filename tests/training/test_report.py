"""Results that go on from one machine to the next."""

import json
from pathlib import Path

import pytest

from training import report

TOYS = "tests/training/toys.py"
COLUMNS = ("a", "b")


def table(**overrides):
    """An entry with a training for each column."""

    def run(context: report.Context):
        losses = {name: context.metrics(name, TOYS, {"steps": "8 steps", **overrides}) for name in COLUMNS}
        return {name: metrics["loss"] for name, metrics in losses.items() if metrics is not None}

    def rows(values):
        return [report.Row(name, "", f"{values[name]:.3f}" if name in values else "") for name in COLUMNS]

    return report.Entry("t", "c", {"cpu": "all"}, run, rows, lambda values, path: path.touch())


@pytest.fixture
def first(tmp_path) -> tuple[Path, dict]:
    """The results folder of a machine whose runs are gone, and what it recorded."""
    results = tmp_path / "results"
    return results, report.reproduce("table", table(), "cpu", tmp_path / "first", results)


def test_recorded_trainings_are_kept(first, tmp_path):
    results, record = first
    kept = report.reproduce(
        "table", table(), "cpu", tmp_path / "second", results, finished_only=True, keep_recorded=True
    )
    assert kept["trainings"] == json.loads(json.dumps(record["trainings"]))
    assert kept["values"] == record["values"]
    assert not (tmp_path / "second").exists()


def test_a_training_of_another_config_is_not_kept(first, tmp_path):
    results, _ = first
    other = table(batch_size=16)
    found = report.reproduce(
        "table", other, "cpu", tmp_path / "second", results, finished_only=True, keep_recorded=True
    )
    assert found["values"] == {}
    assert [row["ours"] for row in found["rows"]] == ["", ""]


def test_recorded_trainings_do_not_count_unasked(first, tmp_path):
    results, _ = first
    found = report.reproduce("table", table(), "cpu", tmp_path / "second", results, finished_only=True)
    assert found["values"] == {}
