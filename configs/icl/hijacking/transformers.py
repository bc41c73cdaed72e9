"""Figures 3, 4 and 6: linear transformers on clean prompts, one to eight layers; hijacking happens at test time.

  python train.py --config=configs/icl/hijacking/transformers.py:scale=gpu,layers=4 --workdir=runs/hijacking4
  python scripts/sweep.py --config=configs/icl/hijacking/transformers.py:scale=gpu --workdir=runs/hijacking

At scales cpu and gpu d = 10 and n = 20 with 2000 or 20000 steps; spreads 0.1 and sqrt(0.1) and all seeds are trained at
once. At scale paper d = 20, n = 40 (`examples=`), batch 5000 and 600000 steps, as in the paper; `reduced=true` takes a
tenth of the steps with ten times the learning rate, and one seed. Expected: one excess for all depths, within 1 % from
two layers on (0.0055 and 0.041 at d = 10).
"""

from ml_collections import ConfigDict

from icl.hijacking.models import FORMS
from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")
DEPTHS = tuple(range(1, 9))
SPREADS = (0.1, 0.1**0.5)


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, form=FORMS, layers=4, examples=0, varied=False, reduced=False)
    paper = options.scale == "paper"
    config = base_config()
    config.task = ConfigDict(
        {
            "name": "icl.hijacking.task.HijackedClassification",
            "dimension": 20 if paper else 10,
            "examples": options.examples or (40 if paper else 20),
            "spread": 0.1,
            "varied": options.varied,
            "validation_prompts": 2**13,
        }
    )
    config.model = ConfigDict(
        {
            "name": "icl.hijacking.models.linear_transformer",
            "form": options.form,
            "layers": options.layers,
            "init_std": 0.05,
        }
    )
    config.replicate = (("task.spread", (0.05, 0.1) if paper else SPREADS),)
    config.seeds = (0, 1) if options.scale == "cpu" else (0, 1, 2, 3, 4)
    config.on_nonfinite = "record"
    config.optimizer.clip, config.optimizer.clip_threshold = "finite_global_norm", 1.0
    if paper:
        factor = 10 if options.reduced else 1
        config.seeds = (0,) if options.reduced else config.seeds
        config.batch_size, config.steps = 5000, f"{600_000 // factor} steps"
        config.optimizer.learning_rate = 2e-4 * factor
        config.optimizer.schedule, config.optimizer.halve_every = "halving", f"{50_000 // factor} steps"
    else:
        config.batch_size, config.steps = 512, "2000 steps" if options.scale == "cpu" else "20000 steps"
        config.optimizer.learning_rate, config.optimizer.final_fraction = 2e-3, 0.01
        config.optimizer.schedule = "cosine"
    config.log_every, config.eval_every, config.checkpoint_every = "100 steps", "5%", "5%"
    return config


def sweep() -> list[dict]:
    return [{"model.layers": layers} for layers in DEPTHS]
