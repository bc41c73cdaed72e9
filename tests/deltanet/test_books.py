import pytest

from deltanet.books import reproduce
from deltanet.books.rows import SEEDS, TABLE, rates
from deltanet.language import MIXERS
from training.config import load, load_module, override
from training.report import Run
from training.step import replica_points

CONFIG = reproduce.CONFIG


class Trainings:
    """Stands for `training.report.Context`: losses by row, rate and seed, without training."""

    scale = "gpu"

    def __init__(self, missing=()):
        self.runs, self.missing = {}, missing

    def metrics(self, name, config, overrides):
        row = overrides["model.mixer"]
        if row in self.missing or name in self.missing:
            return None
        config = override(load(config), overrides)
        self.runs[name] = Run(config, None)
        losses = [
            4 + abs(values["optimizer.learning_rate"] - (2e-3 if row == "gla" else 1e-3)) + 0.01 * seed
            for seed, values in replica_points(config)
        ]
        keys = [key for key, _ in reproduce.MEASURES.values()]
        return {key: losses for key in keys} | {
            "books/loss": losses,
            "books/loss_by_position": [[9.0, loss] for loss in losses],
        }


@pytest.mark.parametrize("name", list(reproduce.ENTRIES))
def test_entries(name, tmp_path):
    context, entry = Trainings(), reproduce.ENTRIES[name]
    values = entry.run(context)
    rows = reproduce.ROWS[name]["gpu"]
    assert len(context.runs) == 2 * len(rows)
    assert set(values["rows"]) == set(rows) <= set(MIXERS)
    for row, found in values["rows"].items():
        assert found["rate"] == (2e-3 if row == "gla" else 1e-3)
        assert found["measures"]["last"] == [pytest.approx(4 + 0.01 * seed) for seed in SEEDS]
        assert list(found["tried"]) == [str(rate) for rate in rates("gpu")]
    table = entry.rows(values)
    assert len(table) == len(rows) * (len(reproduce.MEASURES) + 1)
    entry.draw(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size


def test_what_is_not_finished_is_left_out(tmp_path):
    entry = reproduce.ENTRIES["table1"]
    values = entry.run(Trainings(missing=("gla", "books/seeds/model.mixer=softmax")))
    assert set(values["rows"]) == set(TABLE) - {"gla"}
    assert len(values["rows"]["softmax"]["measures"]["books"]) == 1
    entry.draw(values, tmp_path / "figure.png")


def test_all_rows_have_one_recipe():
    points = load_module(CONFIG).sweep()
    configs = [override(load(CONFIG), point).to_dict() for point in points]
    assert len({c["model"].pop("mixer") for c in configs}) == len(points)
    assert all(config == configs[0] for config in configs)
