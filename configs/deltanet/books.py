"""Small language models on classic books: the order of Table 1 of the DeltaNet paper (arXiv:2406.06484), in miniature.

  python scripts/prepare_data.py books --source=FOLDER         of classic_books, wikitext-2, lambada; once
  python train.py --config=configs/deltanet/books.py:mixer=deltanet --workdir=runs/books          one GPU, a minute
  python train.py --config=configs/deltanet/books.py:scale=cpu --workdir=runs/books_cpu           a laptop
  python scripts/sweep.py --config=configs/deltanet/books.py --workdir=runs/reproduce/gpu/books   all rows

45 books, 7.2 M tokens of a BPE of 16384; three other books, WikiText-2 (word-level perplexity: of other times and
subjects, so far above published ones) and LAMBADA's last words are held out. Models have 6 layers of width 512, the
depth of the single-GPU size halved, and tied embeddings. All rows have one recipe: AdamW, cosine to a tenth, weight
decay 0.1, clipping at 1, batches of 8 windows of 1024 tokens; one epoch at scale `gpu`, 874 steps, and four at `paper`.
With batches of 32 an epoch is 219 steps, after which the order was that of how fast a mixer starts to learn. Three
learning rates are trained at once, and `scripts/reproduce.py deltanet/books` trains two seeds more at each row's best.
"""

from typing import Any

from ml_collections import ConfigDict

from deltanet.books.rows import ABLATIONS, TABLE, rates
from deltanet.language import MIXERS
from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")


def sweep() -> list[dict[str, Any]]:
    """Every row of the table and the ablations."""
    return [{"model.mixer": row} for row in dict.fromkeys((*TABLE, *ABLATIONS))]


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `scale`; `mixer`, a key of `deltanet.language.MIXERS`; `data`, the prepared texts; `runlocal`."""
    options = parse_argument(
        arg, scale=("gpu", "cpu", "paper"), mixer=tuple(MIXERS), data="runs/data/books", runlocal=False
    )
    large = options.scale != "cpu"
    config = base_config()
    config.task = {
        "name": "deltanet.language_task.DeviceText",
        "folder": options.data,
        "length": 1024 if large else 256,
        "held_out": ("books", "wikitext_valid", "wikitext_test") if large else ("books",),
        "tests": ("lambada",) if large else (),
        "eval_batch": 32 if large else 8,
    }
    config.model = {
        "name": "deltanet.language.language_model",
        "size": "small" if large else "tiny",
        "mixer": options.mixer,
        "depth": 6 if large else 2,
        "vocabulary_size": 16_384,
        "tied": True,
        "dtype": "bfloat16" if large else "float32",
        "remat": "activations" if large else "none",
        "unroll": 6 if large else 1,
    }
    config.replicate = (("optimizer.learning_rate", rates(options.scale)),)
    config.on_nonfinite = "record"  # a learning rate that is too large
    config.batch_size = 8
    config.steps = {"cpu": "400 steps", "gpu": "1 epochs", "paper": "4 epochs"}[options.scale]
    config.optimizer = {
        **config.optimizer.to_dict(),
        "name": "adamw",
        "learning_rate": 1e-3,
        "options": {"b1": 0.9, "b2": 0.95, "weight_decay": 0.1},
        "decay_exclude": "step_bias|log_rate|scale",
        "schedule": "cosine",
        "final_fraction": 0.1,
        "warmup": "5%",
        "clip": "global_norm",
    }
    config.log_every, config.steps_per_dispatch = "20 steps", 20
    config.eval_every, config.keep_checkpoints = "100%", 1
    config.checkpoint_every = "25%" if large else "100%"
    if options.runlocal:
        config.model.update({"width": 64, "depth": 2, "dtype": "float32"})
        config.task.length, config.batch_size, config.steps = 64, 2, "4 steps"
        config.task.held_out, config.task.tests = (), ()
    return config
