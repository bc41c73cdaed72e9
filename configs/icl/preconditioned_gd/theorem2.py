"""Theorem 2: two layers, isotropic covariates, A trained, B = 0.

  python train.py --config=configs/icl/preconditioned_gd/theorem2.py --workdir=runs/theorem2

Expected: loss 0.36124, -A = 0.5154 and 1.2496 times the identity, in either order. Two minutes on two cores.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument


def get_config(arg: str | None = None) -> ConfigDict:
    parse_argument(arg, scale=SCALES)
    config = regression_config(
        layers=2, project=False, learning_rate=0.02, b1=0.9, b2=0.99, halve_every="800 steps", clip=0.05
    )
    config.task.variances, config.task.rotated, config.task.resample_every = (1.0,) * 5, False, 1
    config.batch_size, config.steps, config.seeds = 4000, "6000 steps", (0, 1, 2)
    return config
