"""Small vision transformers on real images: the ablations of tables 13, 14 and 16 on Fashion-MNIST or EuroSAT.

  python train.py --config=configs/lion/images.py:dataset=eurosat,mixer=lion_s,folder=data/eurosat --workdir=runs/lion

The model has the paper's Tiny width and depth, and patches of 4 pixels (Fashion-MNIST, 49 tokens and the class token)
or 8 (EuroSAT, 64 and the class token). Written for one GPU; `size=small` is for a CPU. These are not the paper's data:
its tables are on CIFAR-100, with a resolution and a schedule that it does not state.
"""

from ml_collections import ConfigDict

from training.config import base_config, parse_argument

PATCH = {"fashion_mnist": 4, "eurosat": 8}
OPTIONS = {
    "paper": {},
    "frozen_gate": {"freeze_gate": True},
    "elu": {"feature_map": "elu"},
    "forward": {"direction": "forward"},
    "backward": {"direction": "backward"},
    "alternating": {"direction": "alternating"},
    "doubled_diagonal": {"double_diagonal": True},
}
POSITIONS = {"default": None, "on": True, "off": False}


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `dataset`, `folder` of its files, `mixer` (of `lion.vision.MIXERS`), `option`, `positions`, `size`."""
    argument = parse_argument(
        arg,
        dataset=tuple(PATCH),
        folder="data/fashion_mnist",
        mixer="lion_s",
        option=tuple(OPTIONS),
        positions=tuple(POSITIONS),
        size=("tiny", "small"),
    )
    config = base_config()
    config.task = {
        "name": "lion.vision_task.ImageClassification",
        "dataset": argument.dataset,
        "folder": argument.folder,
        "crop": 4,
        "flip": True,
        "jitter": 0.3,
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "smoothing": 0.1,
        "repeats": 1,
    }
    config.model = {
        "name": "lion.vision.vision_transformer",
        "size": "Ti",
        "mixer": argument.mixer,
        "mixer_options": OPTIONS[argument.option],
        "position_embedding": POSITIONS[argument.positions],
        "patch": PATCH[argument.dataset],
        "drop_path": 0.1,
    }
    config.precision = "bfloat16"
    config.steps = "100 epochs"
    config.batch_size = 512
    config.optimizer.name = "adamw"
    config.optimizer.options = {"weight_decay": 0.05}
    config.optimizer.decay_exclude = "bias|scale|fixed|class_token|positions"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.01
    config.optimizer.warmup = "5%"
    config.steps_per_dispatch = 10
    config.log_every = "10 steps"
    if argument.size == "small":
        config.model.update({"width": 48, "heads": 3, "depth": 2})
        config.precision = "float32"
        config.steps = "20 steps"
        config.batch_size = 32
        config.optimizer.warmup = "2 steps"
    return config
