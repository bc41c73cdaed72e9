"""Theorem 4's setting with L-BFGS on one fixed batch: the authors' second-order variant of figure 3.

  python train.py --config=configs/icl/preconditioned_gd/lbfgs.py:scale=gpu --workdir=runs/lbfgs

Expected: training loss 5e-4 to 6.6e-4, below the population optimum 6.73e-4 because the batch is fixed; test loss about
8.5e-4. optax's L-BFGS with a zoom line search stands in for PyTorch's. Its memory, like the authors' of 600, exceeds
the 150 parameters.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES)
    config = regression_config(layers=3, project=True, learning_rate=1.0, b1=0.0, b2=0.0)
    config.optimizer.name, config.optimizer.options = "lbfgs", ConfigDict({"memory_size": 200})
    config.steps, config.task.resample_every = "2000 steps", 2000
    if options.scale == "cpu":
        config.batch_size, config.seeds = 4000, (0,)
    return config
