"""Figures 1 and 2: three layers, A trained, B = 0 (Theorem 3's setting).

  python train.py --config=configs/icl/preconditioned_gd/theorem3.py:scale=cpu --workdir=runs/theorem3

Expected: loss 0.1336 (the exact optimum of the stationary family), -A whitened = 0.4224, 0.6891, 1.7142 times the
identity in some order. The paper prints 0.42, 0.69 and 1.71. At scale gpu these are the paper's steps and batch.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES)
    config = regression_config(
        layers=3, project=False, learning_rate=0.02, b1=0.99, b2=0.9, halve_every="2000 steps", clip=0.01
    )
    config.steps = "30000 steps"
    if options.scale == "cpu":
        config.batch_size, config.seeds, config.eval_every = 4000, (0,), "1%"
    return config
