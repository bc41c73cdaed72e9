r"""Small vision transformers on real images: the ablations of Tables 13, 14 and 16 on Fashion-MNIST or EuroSAT.

  python train.py --config=configs/lion/images.py:dataset=eurosat,arm=s --workdir=runs/lion_s
  python scripts/sweep.py --config=configs/lion/images.py:dataset=eurosat,scale=gpu \
      --workdir=runs/reproduce/gpu/ablations/eurosat --workers=9
  python scripts/reproduce.py lion/ablations/eurosat --scale=gpu

The sweep trains all arms of `lion.ablations`, nine at a time here and three seeds of each at once, and leaves them
where the entry finds them; without it the entry trains one arm after another. The model has the paper's Tiny width, and
patches of 4 pixels (Fashion-MNIST, 49 tokens and the class token) or 8 (EuroSAT, 64 and the class token). These are not
the paper's data: its tables are on CIFAR-100, with a resolution and a schedule that it does not state.

`folder` holds the publisher's files (of `tfds_fashion_mnist` TFDS's); by default it is where
`scripts/prepare_data.py` puts them. Scale `cpu` is a tiny model and a few hundred steps, which shows that everything
runs; `gpu` has half of Tiny's depth, and fits all arms of a data set into minutes of one GPU; `paper` has the whole
depth and a hundred epochs (EuroSAT: three hundred) with RandAugment.
"""

from ml_collections import ConfigDict

from lion.ablations import ARMS
from training.config import base_config, parse_argument

SCALES = ("cpu", "gpu", "paper")
FOLDERS = {"eurosat": "eurosat", "fashion_mnist": "fashion_mnist", "tfds_fashion_mnist": "tfds"}
PATCH = {"eurosat": 8, "fashion_mnist": 4}
EPOCHS = {
    "cpu": {"eurosat": 1, "fashion_mnist": 0.1},
    "gpu": {"eurosat": 60, "fashion_mnist": 8},
    "paper": {"eurosat": 300, "fashion_mnist": 100},
}
BATCH = {"cpu": 50, "gpu": 250, "paper": 500}
DEPTH = {"cpu": 2, "gpu": 6, "paper": 12}


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `dataset`, `folder` of its files, `arm` (of `lion.ablations.ARMS`) and `scale`."""
    argument = parse_argument(arg, dataset=tuple(FOLDERS), folder="", arm="s", scale=SCALES)
    dataset, scale = argument.dataset.removeprefix("tfds_"), argument.scale
    config = base_config()
    config.task = {
        "name": "lion.vision_task.ImageClassification",
        "dataset": argument.dataset,
        "folder": argument.folder or f"runs/data/{FOLDERS[argument.dataset]}",
        "augment": {
            "crop": 4,
            "rand_layers": 0,
            "jitter": 0.3,
            "erase": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "smoothing": 0.1,
        },
        "repeats": 1,
    }
    config.model = {
        "name": "lion.ablations.model",
        "arm": argument.arm,
        "size": "Ti",
        "patch": PATCH[dataset],
        "depth": DEPTH[scale],
        "drop_path": 0.1,
        "implementation": "xla",  # three seeds at once, and fewer tokens than the kernels are made for
    }
    config.seeds = (0, 1, 2)
    config.on_nonfinite = "record"  # an arm that diverges is a result
    config.precision = "bfloat16"
    config.steps = f"{EPOCHS[scale][dataset]} epochs"
    config.batch_size = BATCH[scale]
    config.optimizer.name = "adamw"
    config.optimizer.options = {"weight_decay": 0.05}
    config.optimizer.decay_exclude = "bias|scale|fixed|class_token|positions"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.01
    config.optimizer.warmup = "5%"
    config.log_every = "20 steps"
    config.eval_every, config.checkpoint_every, config.keep_checkpoints = "25%", "50%", 1
    if scale == "paper":
        config.task.augment.update({"rand_layers": 2, "jitter": 0.0})
    if scale == "cpu":
        config.model.update({"width": 24, "heads": 3})
        config.seeds = (0, 1)
        config.precision = "float32"
    return config


def sweep() -> list[dict]:
    return [{"model.arm": arm} for arm in ARMS]
