"""Figure 7: one to four layers, A and B trained.

  python train.py --config=configs/icl/preconditioned_gd/depth.py:scale=gpu,layers=2 --workdir=runs/l2
  python scripts/sweep.py --config=configs/icl/preconditioned_gd/depth.py:scale=gpu --workdir=runs/figure7

Expected: ln loss 0.143 for one layer, -2.45 for two, -7.3 for three; the published curve ends near -8 for four layers,
far above the optimum of the stationary family, -13.5.
"""

from ml_collections import ConfigDict

from configs.icl.preconditioned_gd.common import SCALES, regression_config
from training.config import parse_argument

DEPTHS = (1, 2, 3, 4)


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, layers=3)
    config = regression_config(
        layers=options.layers, project=True, learning_rate=0.01, b1=0.99, b2=0.9, halve_every="4000 steps", clip=0.01
    )
    config.steps = "20000 steps"
    if options.scale == "cpu":
        config.batch_size, config.seeds = 4000, (0,)
    return config


def sweep() -> list[dict]:
    return [{"model.layers": layers} for layers in DEPTHS]
