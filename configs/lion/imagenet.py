"""ImageNet with the DeiT recipe (section 4.1, appendix C.11): LION and softmax vision transformers at 224 pixels.

  tfds build imagenet2012 --file_format=array_record --data_dir=runs/data/tfds    once; needs TensorFlow
  python train.py --config=configs/lion/imagenet.py:variant=S,mixer=lion_s --workdir=runs/imagenet_s
  python train.py --config=... --workdir=... --config.mesh.data=8 --config.task.workers=32

`variant` is Ti, S or B; `mixer` one of `lion.vision.MIXERS`, or `deltanet`, which runs in both directions. The paper's
natural signs are `lion_d_two_scans` and `lion_s_two_scans`, whose scans follow the rows and the columns of the patches
in snake order. `positions` is `default` (for mixers without another sense of position), `on` or `off`.

The recipe is the released script's: 300 epochs, AdamW with 5e-4 for 512 images, cosine to 1 % after five epochs of
warm-up, weight decay 0.05 on matrices, drop path 0.1, RandAugment, random erasing, mixup or cutmix, label smoothing and
three copies of each image in a batch. Different here: bfloat16 instead of float16 with loss scaling; warm-up begins at
zero, not at 1e-6; no ten epochs at the least rate after the cosine; RandAugment interpolates linearly. As in the
paper the parameters themselves are what counts; their moving average is evaluated beside them.

Expected (paper, top-1 %): Small LION-LIT 72.4, D 73.5, S 74.0, D♮ 79.9, S♮ 79.6; Base 74.7, 77.8, 76.3, 80.2, 79.9.
Nobody has run this configuration here; its step is compiled in the tests.
"""

from ml_collections import ConfigDict

from lion.vision import MIXERS, WITHOUT_POSITIONS
from training.config import base_config, parse_argument
from training.errors import UserError, nearest

DELTANET = {"name": "lion.mixers.DeltaNet", "op": "deltanet.delta_rule.delta_rule"}
POSITIONS = ("default", "on", "off")


def get_config(arg: str | None = None) -> ConfigDict:
    """Arguments: `variant`, `mixer`, `positions` and `data_dir`, TFDS's folder."""
    argument = parse_argument(
        arg, variant=("S", "Ti", "B"), mixer="lion_s", positions=POSITIONS, data_dir="runs/data/tfds"
    )
    if argument.mixer not in (known := {**MIXERS, "deltanet": DELTANET}):
        raise UserError(f"mixer={argument.mixer!r} does not exist: {nearest(argument.mixer, known)}")
    config = base_config()
    config.task = {
        "name": "lion.imagenet_task.PreparedImageClassification",
        "dataset": "imagenet2012",
        "data_dir": argument.data_dir,
        "classes": 1000,
        "examples": 1_281_167,
        "eval_split": "validation",
        "eval_examples": 50_000,
        "image_size": 224,
        "augment": {
            "flip": True,
            "rand_layers": 2,
            "rand_magnitude": 9.0,
            "rand_deviation": 0.5,
            "erase": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "smoothing": 0.1,
        },
        "least_area": 0.08,
        "repeats": 3,
        "workers": 16,
    }
    positions = {"default": argument.mixer in WITHOUT_POSITIONS, "on": True, "off": False}[argument.positions]
    config.model = {
        "name": "lion.vision.vision_transformer",
        "size": argument.variant,
        "mixer": DELTANET if argument.mixer == "deltanet" else argument.mixer,
        "position_embedding": positions,
        "patch": 16,
        "drop_path": 0.1,
    }
    config.precision = "bfloat16"
    config.steps = "300 epochs"
    config.batch_size = 1024
    config.ema_decay = 0.99996
    config.optimizer.name = "adamw"
    config.optimizer.options = {"weight_decay": 0.05}
    config.optimizer.decay_exclude = "bias|scale|fixed|class_token|positions"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.final_fraction = 0.01
    config.optimizer.warmup = "5 epochs"
    config.steps_per_dispatch = 4
    config.log_every = "100 steps"
    config.eval_every = "10 epochs"
    config.checkpoint_every = "1 epoch"
    return config
