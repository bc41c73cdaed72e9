"""Image classification as a task of the training loop, with DeiT's augmentation on the device."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from data.augment import Moments, Recipe
from data.images import ImageSet, load
from training.config import build
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageClassification:
    """Images and labels that stay on the device; softmax cross-entropy with label smoothing.

    Args:
      model: the model's import path and arguments; it is also given `image_size`, `channels` and `classes`.
      batch_size: images per step.
      dataset: a key of `data.images.SOURCES`.
      folder: where its files are.
      augment: arguments of `data.augment.Recipe`.
      repeats: copies of an image in a batch, each augmented on its own (repeated augmentation).
      eval_batch: images that are evaluated at once.
      resident: what `residents` gave, on the device; given by the loop.
    """

    model: Mapping[str, Any]
    batch_size: int
    dataset: str
    folder: str
    augment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    repeats: int = 1
    eval_batch: int = 500
    resident: Mapping[str, Any] | None = None

    resample_every = 1
    batch_axis = 0

    @property
    def data(self) -> ImageSet:
        return load(self.dataset, self.folder)

    @property
    def examples_per_epoch(self) -> int:
        return len(self.data.images)

    def init(self, key: jax.Array) -> nnx.Module:
        _, height, width, channels = self.data.images.shape
        if height != width:
            raise UserError(f"images are square; those of {self.dataset} are {height} x {width}")
        return build(
            self.model, image_size=height, channels=channels, classes=self.data.classes, rngs=nnx.Rngs(params=key)
        )

    def residents(self) -> dict[str, Any]:
        """The training images and labels as they are, and the test images in batches."""
        if self.batch_size % self.repeats or not 0 < self.batch_size // self.repeats <= len(self.data.images):
            raise UserError(
                f"a batch of {self.batch_size} with {self.repeats} copies of each image does not fit the "
                f"{len(self.data.images)} images of {self.dataset}; change batch_size or task.repeats"
            )
        labels = self.data.labels.astype(np.int32)
        test = in_batches(self.data.test_images, self.data.test_labels.astype(np.int32), self.eval_batch)
        return {"images": self.data.images, "labels": labels, "test": test}

    def batch(self, key: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """uint8 images and their labels: each image once in an epoch, in a fresh order, its copies side by side."""
        count, distinct = len(self.resident["images"]), self.batch_size // self.repeats
        epoch, place = jnp.divmod(index, count // distinct)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), count)
        rows = jnp.repeat(jax.lax.dynamic_slice(order, (place * distinct,), (distinct,)), self.repeats)
        return {"image": self.resident["images"][rows], "label": self.resident["labels"][rows]}

    def loss(self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array) -> tuple[jax.Array, dict]:
        return classification_loss(model, batch, key, Recipe(**self.augment), self.data.classes, self.moments)

    def evaluators(self) -> dict[str, Callable[..., dict[str, jax.Array]]]:
        """Accuracy and loss on the test images, as they are."""
        return {"test": lambda model, key: tested(model, self.resident["test"], self.moments)}

    @property
    def moments(self) -> Moments:
        return _moments(self.dataset, self.folder)


def classification_loss(
    model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array, recipe: Recipe, classes: int, moments: Moments
) -> tuple[jax.Array, dict]:
    """Cross-entropy of a model in training with the targets of an augmented batch, and no further metrics."""
    model.train()
    augmentation, drop = jax.random.split(key)
    images, targets = recipe.apply(augmentation, batch["image"], batch["label"], classes, moments, _dtype(model))
    logits = model(images, nnx.Rngs(drop)).astype(jnp.float32)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1)), {}


def in_batches(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images, labels and weights with a leading axis over batches; weight 0 for what fills up the last one."""
    size = min(size, len(images))

    def cut(x: np.ndarray) -> np.ndarray:
        x = np.concatenate([x, np.zeros((-len(x) % size, *x.shape[1:]), x.dtype)])
        return x.reshape(-1, size, *x.shape[1:])

    return cut(images), cut(labels), cut(np.ones(len(images), np.float32))


def tested(
    model: nnx.Module, batches: tuple[jax.Array, jax.Array, jax.Array], moments: Moments
) -> dict[str, jax.Array]:
    """Accuracy and mean loss of a model on uint8 images in batches, as `in_batches` makes them."""
    model.eval()
    graph, state = nnx.split(model)

    def sums(batch: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images, labels, weights = batch
        logits = nnx.merge(graph, state)(moments.scaled(images).astype(_dtype(model))).astype(jnp.float32)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        return jnp.sum(weights * (logits.argmax(-1) == labels)), jnp.sum(weights * losses)

    right, losses = jax.lax.map(sums, batches)
    total = batches[2].sum()
    return {"accuracy": right.sum() / total, "loss": losses.sum() / total}


def _dtype(model: nnx.Module) -> jnp.dtype:
    """The dtype that the loop has cast the parameters to."""
    return jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype


@functools.cache
def _moments(dataset: str, folder: str) -> Moments:
    """Of the training images, from counts of the 256 values."""
    images = load(dataset, folder).images
    values = np.arange(256)
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    mean = counts @ values / counts.sum(-1)
    deviation = np.sqrt(counts @ values**2 / counts.sum(-1) - mean**2)
    return Moments(mean.astype(np.float32), deviation.astype(np.float32))
