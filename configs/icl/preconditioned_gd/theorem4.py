"""Figures 3, 4 and 5: three layers, A and B trained (Theorem 4's setting).

  python train.py --config=configs/icl/preconditioned_gd/theorem4.py:scale=gpu --workdir=runs/theorem4

Expected: loss 6.73e-4 (basin 1 of the stationary family), A whitened = -0.378, -2.41, -9.65 and B = 0.908, 0.567 times
the identity. The paper prints -0.38, -2.40, -9.55 and 0.90, 0.56. At scale gpu these are the paper's steps and batch.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES)
    config = regression_config(
        layers=3, project=True, learning_rate=0.1, b1=0.99, b2=0.9, halve_every="4000 steps", clip=0.01
    )
    config.steps = "100000 steps"
    if options.scale == "cpu":
        config.batch_size, config.seeds, config.eval_every = 4000, (0,), "1%"
    return config
