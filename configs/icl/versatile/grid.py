"""Table 1 and the figures 1 to 3 and 5 to 7: three models, one to seven layers, ten noise problems, five seeds.

  python train.py --config=configs/icl/versatile/grid.py:scale=gpu,form=diagonal,layers=4 --workdir=runs/diagonal4
  python scripts/sweep.py --config=configs/icl/versatile/grid.py:scale=gpu --workdir=runs/grid

The sweep has the 21 points of Table 1; figure 7 also trains eight layers. Each point trains all noise problems and
seeds at once: 50 replicas, whose steps share one dispatch. At scale paper these are the paper's steps,
batch and learning rate; at scale gpu a fifth of the steps with a larger rate that decays, and a tenth
from four layers on, which need no more: it is three layers that are slow. `optimizer=lbfgs` is the
second-order route: L-BFGS with a line search, on sets of prompts so large that their tails are those of the law.

Expected: the losses of Table 1 within about 15 % for up to five layers; three layers may stop in a local minimum.
"""

from ml_collections import ConfigDict

from icl.versatile.models import FORMS
from icl.versatile.paper import PROBLEMS
from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")
DEPTHS = tuple(range(1, 8))
CPU_PROBLEMS = ("uniform:2", "uniform:5", "levels:1,3")


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, form=FORMS, layers=4, optimizer=("adam", "lbfgs"))
    config = base_config()
    problems = CPU_PROBLEMS if options.scale == "cpu" else PROBLEMS
    config.task = ConfigDict(
        {
            "name": "icl.versatile.task.NoisyRegression",
            "problems": problems,
            "problem": 0,
            "examples": 20,
            "dimension": 10,
            "resample_every": 1,
            "chunk": 0,
            "validation_prompts": 2**14,
        }
    )
    config.model = ConfigDict(
        {
            "name": "icl.versatile.models.linear_transformer",
            "form": options.form,
            "layers": options.layers,
            "heads": 1,
            "init_std": 0.01,
        }
    )
    config.replicate = (("task.problem", tuple(range(len(problems)))),)
    config.seeds = (0, 1) if options.scale == "cpu" else (0, 1, 2, 3, 4)
    config.on_nonfinite = "record"  # a rare prompt can overflow; the step is then without a gradient
    if options.optimizer == "lbfgs":
        _second_order(config, options.scale)
    else:
        _adam(config, options.scale, options.layers)
    return config


def _adam(config: ConfigDict, scale: str, layers: int) -> None:
    config.batch_size, steps, rate = {
        "cpu": (256, 10_000, 3e-3),
        "gpu": (1024, 40_000 if layers <= 3 else 20_000, 2e-3),
        "paper": (2048, 200_000, 1e-4),
    }[scale]
    config.steps, config.optimizer.learning_rate = f"{steps} steps", rate
    config.optimizer.schedule = "constant" if scale == "paper" else "cosine"
    config.optimizer.clip, config.optimizer.clip_threshold = "finite_global_norm", 1.0
    config.log_every, config.eval_every, config.checkpoint_every = "100 steps", "5%", "5%"


def _second_order(config: ConfigDict, scale: str) -> None:
    config.batch_size, config.task.chunk = (2**14, 2**9) if scale == "cpu" else (2**17, 2**12)
    config.optimizer.name, config.optimizer.learning_rate = "lbfgs", 1.0
    config.optimizer.options = ConfigDict({"memory_size": 30})
    config.steps, config.task.resample_every = "200 steps", 200
    config.steps_per_dispatch = 20
    config.eval_every = config.checkpoint_every = "20 steps"


def sweep() -> list[dict]:
    return [{"model.form": form, "model.layers": layers} for layers in DEPTHS for form in FORMS]
