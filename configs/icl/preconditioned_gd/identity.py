"""The authors' demonstration with identity covariance: three layers, A and B trained, fresh prompts every step.

  python train.py --config=configs/icl/preconditioned_gd/identity.py:scale=gpu --workdir=runs/identity

Expected: loss 1.30e-3, A = -0.72, -2.65, -7.18 and B = 0.34, 0.34 times the identity. This is basin 2 of the stationary
family: another critical point than that of figures 3 to 5, with about twice the loss.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES)
    config = regression_config(layers=3, project=True, learning_rate=1e-3, b1=0.9, b2=0.9)
    config.task.variances, config.task.rotated, config.task.resample_every = (1.0,) * 5, False, 1
    config.optimizer.clip, config.optimizer.clip_threshold = "global_norm", 1000.0  # never reached
    config.batch_size, config.steps = 4000, "10000 steps"
    if options.scale == "cpu":
        config.batch_size, config.seeds = 1000, (0,)
    return config
