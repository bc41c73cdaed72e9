import pytest

from deltanet.books import reproduce
from deltanet.language import MIXERS
from training.config import load, load_module, override

CONFIG = reproduce.CONFIG


class Trainings:
    """Stands for `training.report.Context`: losses by row, rate and seed, without training."""

    scale = "gpu"

    def __init__(self):
        self.names = []

    def metrics(self, name, config, overrides):
        override(load(config), overrides)
        self.names.append(name)
        row, rate, seed = (piece.partition("=")[2] for piece in name.removeprefix("books/").split(","))
        loss = 4 + abs(float(rate) - (2e-3 if row == "gla" else 1e-3)) + 0.01 * int(seed)
        keys = [key for key, _ in reproduce.MEASURES.values()]
        return {key: loss for key in keys} | {"books/loss": loss, "books/loss_by_position": [9.0, loss]}


@pytest.mark.parametrize("name", list(reproduce.ENTRIES))
def test_entries(name, tmp_path):
    context, entry = Trainings(), reproduce.ENTRIES[name]
    values = entry.run(context)
    plan = reproduce.PLANS[name]["gpu"]
    assert len(set(context.names)) == len(context.names) == len(plan.rows) * (len(plan.rates) + len(plan.seeds) - 1)
    assert set(values["rows"]) == set(plan.rows) <= set(MIXERS)
    for row, found in values["rows"].items():
        assert found["rate"] == (2e-3 if row == "gla" and len(plan.rates) > 1 else 1e-3)
        assert found["measures"]["last"] == [pytest.approx(4 + 0.01 * seed, abs=2e-3) for seed in plan.seeds]
    table = entry.rows(values)
    assert len(table) == len(plan.rows) * (len(reproduce.MEASURES) + 1)
    entry.draw(values, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size


def test_all_rows_have_one_recipe():
    points = load_module(CONFIG).sweep()
    configs = [override(load(CONFIG), point).to_dict() for point in points]
    assert len({(c["model"].pop("mixer"), c["optimizer"].pop("learning_rate")) for c in configs}) == len(points)
    assert all(config == configs[0] for config in configs)
