"""Both entries run, at toy size, and leave their three files."""

import json

import pytest

from icl.hijacking.language import reproduce
from training import report

TINY = {"steps": "4 steps", "seeds": (0, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("name", reproduce.ENTRIES)
def test_an_entry_leaves_json_table_and_figure(name, tmp_path, monkeypatch):
    train = report.Context.train
    monkeypatch.setattr(report.Context, "train", lambda self, name, config: train(self, name, config, TINY))
    entry = reproduce.ENTRIES[name]
    record = report.reproduce(f"paper/{name}", entry, "cpu", tmp_path / "runs", tmp_path)
    path = tmp_path / "paper" / f"{name}.cpu.json"
    assert json.loads(path.read_text())["rows"] == record["rows"]
    assert len(record["rows"]) >= 4
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
