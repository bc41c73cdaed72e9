"""Every entry runs, at toy size, and leaves its three files; every config is one that the loop takes."""

import json

import numpy as np
import pytest

from configs.icl.versatile import grid, one_layer
from icl.versatile import measure, reproduce
from icl.versatile.paper import PROBLEMS, TABLE1, TABLE1_BASELINES, problem_name
from training import report
from training.config import override
from training.errors import UserError
from training.loop import make_program

TINY = {"steps": "4 steps", "batch_size": 32, "task.validation_prompts": 64, "seeds": (0, 1)}
LONG = ("gd_plus_plus", "one_layer", "second_order", *(f"figure{n}" for n in range(1, 8)), "algorithm")


def _at_most(value, most):
    if isinstance(value, tuple):
        return tuple(_at_most(v, most) for v in value)
    return min(value, most) if isinstance(value, int) else value


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    train = report.Context.train

    def tiny(self, name, config, overrides=None):
        chunked = {"task.chunk": 16} if "lbfgs" in config else {}
        return train(self, name, config, {**(overrides or {}), **TINY, **chunked})

    monkeypatch.setattr(report.Context, "train", tiny)
    monkeypatch.setattr(reproduce, "_prompts", lambda context: {"tuning": 2000, "test": 2000})
    monkeypatch.setattr(reproduce, "_by_scale", lambda context, cpu, larger: _at_most(cpu, 2000))
    monkeypatch.setattr(reproduce, "PROBLEMS", ("uniform:0", "uniform:5"))
    measure.tuned_baselines.cache_clear()
    measure.baselines.cache_clear()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in reproduce.ENTRIES]
)
def test_an_entry_leaves_json_table_and_figure(name, runs, tmp_path):
    entry = reproduce.ENTRIES[name]
    record = report.reproduce(f"paper/{name}", entry, "cpu", runs, tmp_path)
    path = tmp_path / "paper" / f"{name}.cpu.json"
    assert json.loads(path.read_text())["rows"] == record["rows"]
    assert len(record["rows"]) >= 2
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert entry.claim in path.with_suffix(".md").read_text()


def test_table1_is_complete():
    assert len(TABLE1) == 7 * 3 * 10
    assert len(TABLE1_BASELINES) == 3 * 10
    assert TABLE1[4, "diagonal", "uniform:5"] == 0.059
    assert TABLE1[7, "full", "levels:1,3,5"] == 0.035
    assert [problem_name(p) for p in PROBLEMS[-3:]] == ["U(0, 7)", "{1, 3}", "{1, 3, 5}"]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize("scale", grid.SCALES)
def test_configs_are_valid(scale, optimizer):
    config = grid.get_config(f"scale={scale},optimizer={optimizer}")
    problems = len(grid.CPU_PROBLEMS if scale == "cpu" else PROBLEMS)
    assert make_program(config).count == problems * len(config.seeds)
    points = [override(config, point) for point in grid.sweep()]
    assert len({(p.model.form, p.model.layers) for p in points}) == len(points) == 21


def test_one_layer_configs_are_valid():
    for point in one_layer.sweep():
        assert make_program(override(one_layer.get_config(), point)).total_steps == 3000
    with pytest.raises(UserError, match="did you mean 'full'"):
        one_layer.get_config("form=fulll")


def table(best, scale="gpu"):
    """What `_run_table` returns, with one loss for every cell."""
    seeds = [{"mean": best, "nonfinite": 0.0}]
    cells = [
        {"layers": layers, "form": form, "problem": problem, "best": best, "trimmed": best, "seeds": seeds}
        for layers, form, problem in TABLE1
    ]
    baselines = {problem: {name: {"mean": 1.0} for name in ("ConstRR", "AdaRR", "TunedRR")} for problem in PROBLEMS}
    return {"scale": scale, "problems": list(PROBLEMS), "cells": cells, "baselines": baselines}


def test_rows_judge_the_cells():
    rows = reproduce._rows_table(table(0.0))
    assert rows[0].passed
    assert rows[0].ours == "201 of 201"  # nine noise-free cells are below float32
    assert len(rows) == 1 + 210 + 4
    assert not reproduce._rows_table(table(10.0))[0].passed
    assert reproduce._rows_table(table(10.0, "cpu"))[0].passed is None
    orderings = {row.quantity.split(",")[0]: row.passed for row in rows[-4:]}
    assert orderings == {
        "Full and Diag below GD++": False,
        "GD++ within 5 % of ConstRR": False,
        "Full and Diag below AdaRR": True,
        "Full and Diag below 1.05 x TunedRR": True,
    }


def test_the_bound_is_looser_for_deep_models():
    assert reproduce._bound(5, "full", "uniform:5") == pytest.approx(1.15 * 0.048 + 0.002)
    assert reproduce._bound(6, "full", "uniform:5") == pytest.approx(1.25 * 0.044 + 0.003)
    assert np.isfinite([reproduce._bound(*key) for key in TABLE1]).all()
