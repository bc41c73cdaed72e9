"""Models of several depths on an invented corpus of facts: does depth protect recall against true denials?

  python train.py --config=configs/icl/hijacking/facts.py:scale=cpu,layers=2 --workdir=runs/facts2
  python scripts/sweep.py --config=configs/icl/hijacking/facts.py:scale=gpu --workdir=runs/facts

The sweep is over depths; each trains all corpora (share of redrawn documents and of true denials) and seeds at once.
Expected: recall of at least 0.98 at every depth; without redrawn documents no hijacking.
"""

from ml_collections import ConfigDict

from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu")
DEPTHS = (1, 2, 4, 8)
CORPORA = ((0.4, 0.0), (0.4, 0.01), (0.4, 0.05), (0.0, 0.01), (0.2, 0.01), (0.6, 0.01))  # redrawn, denials


def get_config(arg: str | None = None) -> ConfigDict:
    options = parse_argument(arg, scale=SCALES, layers=2)
    small = options.scale == "cpu"
    config = base_config()
    config.task = ConfigDict(
        {
            "name": "icl.hijacking.language.task.FactCorpus",
            "subjects": 100 if small else 400,
            "novel": 160 if small else 600,
            "relations": 4,
            "values": 12,
            "corpora": CORPORA[:1] if small else CORPORA,
            "corpus": 0,
            "length": 64,
            "questions": 256,
        }
    )
    config.model = ConfigDict(
        {
            "name": "icl.hijacking.language.task.small_gpt2",
            "layers": options.layers,
            "width": 64 if small else 128,
            "heads": 4,
        }
    )
    config.replicate = (("task.corpus", tuple(range(len(config.task.corpora)))),)
    config.seeds = (0,) if small else (0, 1, 2, 3, 4)
    config.batch_size, config.steps = (32, "2400 steps") if small else (64, "5000 steps")
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 3e-3 if small else 2e-3
    config.optimizer.options = ConfigDict({"weight_decay": 0.01})
    config.optimizer.schedule, config.optimizer.warmup = "cosine", "5%"
    config.optimizer.clip = "global_norm"
    config.log_every = "100 steps"
    return config


def sweep() -> list[dict]:
    return [{"model.layers": layers} for layers in DEPTHS]
