"""Language models of the DeltaNet paper (arXiv:2406.06484, Table 1 and the ablations), their rivals and hybrids.

  python scripts/prepare_data.py corpus --source=FOLDER          of SlimPajama's or C4's shards; into runs/data/FOLDER
  python train.py --config=configs/deltanet/language.py:size=340M,mixer=deltanet --workdir=runs/deltanet_340M
  python scripts/prepare_data.py tiny_shakespeare --source=FOLDER
  python train.py --config=configs/deltanet/language.py:size=tiny,data=runs/data/tiny_shakespeare --workdir=runs/tiny

The last trains on a laptop in a minute; `runlocal=true` makes a few steps of anything. Data are windows of any texts
that `scripts/prepare_data.py` has prepared with a split `validation`; `python scripts/benchmark_language_model.py`
measures what steps cost, without data.

| size | parameters, with one embedding | tokens | batch, tokens | made for |
|---|---|---|---|---|
| `340M` | 341.6 M | 15 B | 0.5 M | 8 GPUs; one takes a day or two |
| `1.3B` | 1300 M | 100 B | 2 M | 64 GPUs, `mesh.fsdp` = 8 |
| `small` | 57 M | 0.5 B | 0.13 M | one GPU, under an hour |
| `tiny` | 4.6 M | 0.4 M | 2 K | a CPU |

The last two tie their head to the embedding; the counts are DeltaNet's. The recipe is the paper's as far as it is
known: AdamW, peak learning rate 3e-4 that falls along a cosine to a tenth, weight decay 0.01, clipping at 1. Warm-up
starts from zero instead of a tenth. `mixer` is a key of `deltanet.language.MIXERS`: hybrids and ablations are mixers
too.

Expected (the paper, WikiText perplexity at 340M): DeltaNet 28.24, without convolution 29.08, with sliding windows
27.06, with two layers of attention 27.51, L1 and 1 + ELU 31.12, Transformer++ 28.39, GLA 28.65, RetNet 32.33.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from deltanet.language import MIXERS
from training.config import base_config, parse_argument


class Recipe(NamedTuple):
    """What differs between the sizes; durations in tokens."""

    tokens: float
    batch: int  # sequences
    length: int  # tokens in a sequence
    warmup: float
    learning_rate: float
    vocabulary: int = 32_000


RECIPES = {
    "340M": Recipe(tokens=15e9, batch=256, length=2048, warmup=0.5e9, learning_rate=3e-4),
    "1.3B": Recipe(tokens=100e9, batch=1024, length=2048, warmup=1e9, learning_rate=3e-4),
    "small": Recipe(tokens=0.5e9, batch=64, length=2048, warmup=0.025e9, learning_rate=1e-3),
    "tiny": Recipe(tokens=0.4e6, batch=8, length=256, warmup=0.02e6, learning_rate=2e-3),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `size`, a key of `RECIPES`; `mixer`, a key of `deltanet.language.MIXERS`; `data`; `runlocal`."""
    options = parse_argument(
        arg, size=tuple(RECIPES), mixer=tuple(MIXERS), data="runs/data/SlimPajama-627B", runlocal=False
    )
    recipe = RECIPES[options.size]
    config = base_config()
    config.task = {
        "name": "deltanet.language_task.HostText",
        "folder": options.data,
        "length": recipe.length,
        "held_out": ("validation",),
        "chunk": 8192,
    }
    config.model = {
        "name": "deltanet.language.language_model",
        "size": options.size,
        "mixer": options.mixer,
        "vocabulary_size": recipe.vocabulary,
        "tied": options.size in ("small", "tiny"),
        "dtype": "float32" if options.size == "tiny" else "bfloat16",
        "remat": "activations",
    }
    config.batch_size = recipe.batch
    config.steps = f"{round(recipe.tokens / recipe.length)} examples"
    config.optimizer = {
        **config.optimizer.to_dict(),
        "name": "adamw",
        "learning_rate": recipe.learning_rate,
        "options": {"b1": 0.9, "b2": 0.95, "weight_decay": 0.01},
        "decay_exclude": "step_bias|log_rate",
        "schedule": "cosine",
        "final_fraction": 0.1,
        "warmup": f"{round(recipe.warmup / recipe.length)} examples",
        "clip": "global_norm",
    }
    config.mesh.data = -1
    config.log_every, config.steps_per_dispatch = "10 steps", 10
    config.eval_every, config.checkpoint_every = "5%", "5%"
    if options.runlocal:
        config.model.update({"width": 64, "depth": 4, "dtype": "float32"})
        config.model.vocabulary_size = 512
        config.task.length, config.batch_size, config.steps = 64, 2, "4 steps"
        config.optimizer.warmup = "1 step"
    return config
