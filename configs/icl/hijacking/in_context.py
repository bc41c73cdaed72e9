"""Figure 5: GPT-2-style models that classify in context, 4 to 7 layers.

  python train.py --config=configs/icl/hijacking/in_context.py:scale=paper,layers=4 --workdir=runs/in_context4
  python scripts/sweep.py --config=configs/icl/hijacking/in_context.py:scale=paper --workdir=runs/in_context

At scale paper as the paper: width 256, 8 heads, batch 64, Adam at 2e-4 halved every 200000 of 600000 steps, 3 seeds.
At scale gpu a tenth of the steps. The paper's curves end in a cliff at 40 tokens, which looks like a position that was
never trained; here the query's position after 40 pairs is trained, and the evaluator reads every length.
"""

from ml_collections import ConfigDict

from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")
DEPTHS = (4, 5, 6, 7)


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, layers=4)
    config = base_config()
    small = options.scale == "cpu"
    config.task = ConfigDict(
        {
            "name": "icl.hijacking.in_context.InContextClassification",
            "dimension": 5 if small else 20,
            "examples": 10 if small else 40,
            "spread": 0.1,
        }
    )
    config.model = ConfigDict(
        {
            "name": "icl.hijacking.in_context.InContextGPT2",
            "layers": options.layers,
            "width": 32 if small else 256,
            "heads": 4 if small else 8,
        }
    )
    config.batch_size, config.seeds = 64, (0,) if small else (0, 1, 2)
    steps = {"cpu": 1000, "gpu": 60_000, "paper": 600_000}[options.scale]
    config.steps = f"{steps} steps"
    config.optimizer.learning_rate, config.optimizer.clip = 2e-4, "global_norm"
    config.optimizer.schedule, config.optimizer.halve_every = "halving", f"{steps // 3} steps"
    config.log_every, config.checkpoint_every, config.eval_every = "100 steps", "2%", "10%"
    return config


def sweep() -> list[dict]:
    return [{"model.layers": layers} for layers in DEPTHS]
