"""One layer, all entries trained: the closed form is one gradient step.

  python train.py --config=configs/icl/versatile/one_layer.py:form=full --workdir=runs/one_layer

Expected: omega_yx within 2 % of -1 / (N + D + 1 + E sigma^2), whatever the model. Two minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.icl.versatile import grid
from icl.versatile.models import FORMS
from training.config import parse_argument

PROBLEMS = ("uniform:0", "uniform:5", "levels:1,3", "levels:1,3,5")


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, form=FORMS)
    config = grid.get_config(f"scale=gpu,form={options.form},layers=1")
    config.task.problems, config.replicate = PROBLEMS, (("task.problem", tuple(range(len(PROBLEMS)))),)
    config.seeds, config.steps, config.batch_size = (0,), "3000 steps", 1024
    config.optimizer.learning_rate = 0.01
    return config


def sweep() -> list[dict]:
    return [{"model.form": form} for form in FORMS]
