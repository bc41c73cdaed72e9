"""Large prepared image sets, ImageNet above all, as a task of the training loop: batches from the host."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from data.augment import Moments, Recipe
from data.prepared_images import IMAGENET_DEVIATION, IMAGENET_MEAN, Batches, Encoded, encoded, evaluation_images
from lion.vision_task import classification_loss, in_batches, tested
from training.config import build
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class PreparedImageClassification:
    """Images that TFDS has prepared; the host decodes, cuts and resizes, the device does the rest of the recipe.

    Args:
      model: the model's import path and arguments; it is also given `image_size`, `channels` and `classes`.
      batch_size: images per step.
      dataset: name of the set in TFDS.
      data_dir: TFDS's folder.
      classes: of the set; checked against it.
      examples: in the training split; likewise. (The shapes of a program then need no data.)
      eval_split: what is evaluated.
      eval_examples: how many of it; they stay on the device, 150 kB each at 224 pixels.
      image_size: in pixels.
      augment: arguments of `data.augment.Recipe`, for what follows the crop.
      least_area: share of an image that a crop keeps at least.
      repeats: copies of an image in a batch, each cut and augmented on its own (repeated augmentation).
      workers: processes that decode; 0 decodes in threads.
      eval_batch: images that are evaluated at once.
      resident: what `residents` gave, on the device; given by the loop.
    """

    model: Mapping[str, Any]
    batch_size: int
    dataset: str
    data_dir: str
    classes: int = 1000
    examples: int = 1_281_167
    eval_split: str = "validation"
    eval_examples: int = 50_000
    image_size: int = 224
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    least_area: float = 0.08
    repeats: int = 1
    workers: int = 0
    eval_batch: int = 500
    resident: Mapping[str, Any] | None = None

    resample_every = 1
    batch_axis = 0

    @property
    def examples_per_epoch(self) -> int:
        return self.examples

    @property
    def moments(self) -> Moments:
        return Moments(np.float32(IMAGENET_MEAN), np.float32(IMAGENET_DEVIATION))

    def init(self, key: jax.Array) -> nnx.Module:
        size = {"image_size": self.image_size, "channels": 3, "classes": self.classes}
        return build(self.model, **size, rngs=nnx.Rngs(params=key))

    def residents(self) -> dict[str, Any]:
        """The images to evaluate, in batches."""
        split = self._split(self.eval_split, self.eval_examples)
        images, labels = evaluation_images(split.source, self.image_size, self.eval_examples)
        return {"test": in_batches(images, labels, self.eval_batch)}

    def batches(self, seed: int, process_index: int, process_count: int) -> Batches:
        return Batches(
            self._split("train", self.examples).source,
            size=self.image_size,
            batch_size=self.batch_size,
            copies=self.repeats,
            least=self.least_area,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
            workers=self.workers,
        )

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        return classification_loss(model, batch, key, Recipe(**self.augment), self.classes, self.moments)

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """Accuracy and loss on the images to evaluate."""
        return {"test": lambda model, key: tested(model, self.resident["test"], self.moments)}

    def _split(self, name: str, examples: int) -> Encoded:
        found = _encoded(self.dataset, self.data_dir, name)
        if found.classes != self.classes or len(found.source) < examples:
            raise UserError(
                f"{self.dataset} in {self.data_dir} has {found.classes} classes and {len(found.source)} examples in "
                f"{name!r}; the task expects {self.classes} classes and {examples} examples: set task.classes and "
                "task.examples, or task.eval_examples"
            )
        return found


_encoded = functools.cache(encoded)
