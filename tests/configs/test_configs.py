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
PARAMETERS = {"theorem1": 72, "theorem2": 50, "theorem3": 75, "theorem4": 150}


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
@pytest.mark.parametrize("file", FILES)
def test_a_config_describes_a_program(file, scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = configs.load(f"{file}:scale={scale}")
    state = Compiled(make_program(config)).abstract_state
    replicas = len(config.seeds)
    expected = PARAMETERS.get(Path(file).stem)
    if expected is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == expected * replicas
    for overrides in getattr(configs.load_module(file), "sweep", lambda: [])():
        make_program(configs.override(config, overrides))
