r"""RegBench (a figure in the appendix of arXiv:2406.06484): random regular languages in context.

  python train.py --config=configs/deltanet/regbench.py:scale=gpu,examples=2500 --workdir=runs/regbench
  python scripts/sweep.py --config=configs/deltanet/regbench.py:scale=gpu,examples=2500 \
      --workdir=runs/reproduce/gpu/regbench/2500
  python scripts/reproduce.py deltanet/synthetic/regbench --scale=gpu

At scale `paper` two learning rates are trained at once for 200 epochs, and the better one on the validation set counts.
Scale `gpu` has the higher one and 100,000 sequences, 40 or 20 epochs of 2,500 or 5,000; `cpu` has a few epochs.

Expected (the paper's figure, at 2,500 and 5,000 training sequences): Transformer++ 92.7 and 94.0, DeltaNet 81.3 and
87.2, without convolution 79.1 and 85.1, GLA without convolution 52.6 and 81.4.
"""

from ml_collections import ConfigDict

from deltanet.synthetic.models import MIXERS
from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")
ROWS = ("deltanet", "deltanet_no_conv", "softmax", "gla", "gla_conv", "mamba2")


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `scale`, `examples` (training sequences) and `mixer`."""
    argument = parse_argument(arg, scale=SCALES, examples=2500, mixer=("deltanet", *MIXERS))
    small = argument.scale == "cpu"
    config = base_config()
    data = {"name": "deltanet.synthetic.regbench.regbench", "train": argument.examples}
    if small:
        data |= {"train": 64, "held_out": 32}
    config.task = {"name": "deltanet.synthetic.task.SyntheticTask", "data": data, "eval_batch": 50, "chunk": 32_768}
    config.model = {
        "name": "deltanet.synthetic.models.regbench_model",
        "mixer": argument.mixer,
        "width": 64 if small else 128,
        "depth": 2 if small else 4,
        "heads": 2,
        "dtype": "float32" if small else "bfloat16",
    }
    rates = (2.5e-4, 5e-4) if argument.scale == "paper" else (5e-4,)
    config.replicate = (("optimizer.learning_rate", rates),)
    config.batch_size = 32
    config.steps = {"cpu": "4 epochs", "gpu": "100000 examples", "paper": "200 epochs"}[argument.scale]
    config.optimizer.name = "adamw"
    config.optimizer.options = {"weight_decay": 0.1}
    config.optimizer.schedule, config.optimizer.final_fraction = "cosine", 0.1
    config.optimizer.warmup = "10%"
    config.steps_per_dispatch, config.log_every = 20, "20 steps"
    config.eval_every, config.checkpoint_every = "20%", "50%"
    config.keep_checkpoints = 1
    return config


def sweep() -> list[dict]:
    return [{"model.mixer": mixer} for mixer in ROWS]
