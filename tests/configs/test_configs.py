"""Every config file at every scale: it loads, its task and model exist, and its sweep fits it."""

from pathlib import Path

import jax
import pytest

from training import config as configs
from training.loop import Compiled, make_program

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "configs").rglob("*.py")
    if "def get_config(" in path.read_text()
)
# Their programs need the user's data.
ON_FILES = {"configs/lion/images.py", "configs/deltanet/books.py", "configs/deltanet/language.py"}
PARAMETERS = {"theorem1": 72, "theorem2": 50, "theorem3": 75, "theorem4": 150}


@pytest.mark.parametrize("file", FILES)
def test_a_config_describes_a_program_at_each_of_its_scales(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = configs.load_module(file)
    for scale in getattr(module, "SCALES", (None,)):
        config = configs.load(f"{file}:scale={scale}" if scale else file)
        if file in ON_FILES:
            continue
        make_program(config)
        for overrides in getattr(module, "sweep", lambda: [])():
            make_program(configs.override(config, overrides))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configs.load(f"configs/icl/preconditioned_gd/{name}.py:scale=paper")
    state = Compiled(make_program(config)).abstract_state
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == PARAMETERS[name] * len(config.seeds)
