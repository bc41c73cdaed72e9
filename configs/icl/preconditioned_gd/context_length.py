"""Figure 6: three layers, A and B trained, with 2 to 20 examples in the context.

  python train.py --config=configs/icl/preconditioned_gd/context_length.py:scale=gpu,examples=10 --workdir=runs/n10
  python scripts/sweep.py --config=configs/icl/preconditioned_gd/context_length.py:scale=gpu --workdir=runs/figure6

Expected: below three steps of gradient descent, plain and preconditioned, for every length.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument

LENGTHS = tuple(range(2, 21, 2))


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, examples=20)
    config = regression_config(
        layers=3,
        project=True,
        learning_rate=_rate(options.examples),
        b1=0.99,
        b2=0.99,
        halve_every="2000 steps",
        clip=0.001,
    )
    config.task.examples, config.task.resample_every = options.examples, 1
    config.batch_size, config.steps = 40_000, "8000 steps"
    if options.scale == "cpu":
        config.batch_size, config.seeds = 2000, (0,)
    return config


def sweep() -> list[dict]:
    return [{"task.examples": n, "optimizer.learning_rate": _rate(n)} for n in LENGTHS]


def _rate(examples: int) -> float:
    return 0.001 if examples < 5 else 0.01
