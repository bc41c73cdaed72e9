"""Labelled images that TensorFlow Datasets has prepared as `array_record`: read by random access, without TensorFlow.

Such a set is prepared once, for example with `tfds build imagenet2012 --file_format=array_record --data_dir=...`; what
that needs, TensorFlow among it, is needed nowhere else. The host decodes, cuts and resizes, with grain; everything
after that happens on the device (`data.augment`).
"""

import concurrent.futures
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from training.errors import UserError

Example = Mapping[str, Any]
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_DEVIATION = (58.395, 57.12, 57.375)
"""Of the channels of ImageNet's training images, in values of 0 to 255."""


class Encoded(NamedTuple):
    """A split of a prepared set; its elements are dicts with the bytes of an `image` file and a `label`."""

    source: Sequence[Example]
    classes: int


def encoded(name: str, data_dir: str | Path, split: str) -> Encoded:
    """A split of a prepared set, its images still encoded.

    Args:
      name: of the set, as TFDS has it, with a configuration or version where there are several.
      data_dir: TFDS's folder, which holds a folder of that name.
      split: of the set.

    Raises:
      UserError: the set was not prepared there, or not as `array_record`, or has no such split.
    """
    builder = prepared(name, data_dir)
    if split not in builder.info.splits:
        raise UserError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    decoders = {"image": _skip_decoding()}
    source = builder.as_data_source(split=split, decoders=decoders)
    return Encoded(source, builder.info.features["label"].num_classes)


def in_memory(name: str, data_dir: str | Path) -> tuple[list[np.ndarray], int]:
    """The splits `train` and `test` of a prepared set of small images of one size, decoded.

    Returns:
      Images and labels of the one, images and labels of the other (uint8), and the number of classes.

    Raises:
      UserError: as `encoded`, or a file that is no image.
    """
    parts = [encoded(name, data_dir, split) for split in ("train", "test")]
    arrays = []
    for part in parts:
        examples = [part.source[i] for i in range(len(part.source))]
        images = np.stack([np.asarray(opened(example["image"])) for example in examples])
        arrays += [images.reshape(*images.shape[:3], -1), np.array([e["label"] for e in examples], np.uint8)]
    return arrays, parts[0].classes


def opened(content: bytes) -> Image.Image:
    """The image of an encoded file.

    Raises:
      UserError: these bytes are no image that Pillow knows.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(
            f"{len(content)} bytes, beginning with {content[:8]!r}, are no image ({error}); prepare the set again"
        ) from error
    return image


def training_crop(content: bytes, size: int, rng: np.random.Generator, least: float = 0.08) -> np.ndarray:
    """A random part of an image as `[size, size, 3]`, uint8, with cubic interpolation (DeiT's, as torchvision's).

    Args:
      content: the encoded image.
      size: in pixels.
      rng: of the draws.
      least: share of the area that is kept at least; the ratio of its sides is between 3/4 and 4/3.
    """
    image = opened(content).convert("RGB")
    width, height = image.size
    for _ in range(10):
        area = rng.uniform(least, 1) * width * height
        root = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)) / 2)
        w, h = round(np.sqrt(area) * root), round(np.sqrt(area) / root)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:  # the whole image, as far as its ratio allows
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def centre_crop(content: bytes, size: int, kept: float = 0.875) -> np.ndarray:
    """The middle of an image whose shorter side was scaled to `size / kept`, as `[size, size, 3]`, uint8."""
    image = opened(content).convert("RGB")
    scale = size / kept / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class _Copies:
    """A grain data set in which each element stands several times in a row."""

    def __init__(self, parent: Any, copies: int) -> None:
        self._parent, self._copies = parent, copies

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Any:
        return self._parent[index // self._copies]


class _Cut:
    """Decodes an example and cuts its training image out of it."""

    def __init__(self, size: int, least: float) -> None:
        self._size, self._least = size, least

    def __call__(self, example: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        image = training_crop(example["image"], self._size, rng, self._least)
        return {"image": image, "label": np.int32(example["label"])}


class Batches:
    """Training batches without end, which can be checkpointed: a fresh order every epoch, by the seed alone.

    Args:
      source: of encoded examples.
      size: of the images, in pixels.
      batch_size: of all processes together.
      copies: of an image in a batch, each with a crop of its own.
      least: share of the area that a crop keeps at least.
      seed: of the order and the crops.
      process_index: which part of each batch is made here.
      process_count: how many parts there are.
      workers: processes that decode; 0 decodes in threads of this one.
    """

    def __init__(
        self,
        source: Sequence[Example],
        *,
        size: int,
        batch_size: int,
        copies: int,
        least: float,
        seed: int,
        process_index: int,
        process_count: int,
        workers: int,
    ) -> None:
        grain = _grain()
        order = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
        order = grain.MapDataset.source(_Copies(order, copies)).slice(slice(process_index, None, process_count))
        cut = order.seed(seed + 1).random_map(_Cut(size, least)).batch(batch_size // process_count)
        stream = cut.to_iter_dataset(grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1)))
        if workers:
            stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._iterator = iter(stream)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)


def evaluation_images(source: Sequence[Example], size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` examples: uint8 images `[count, size, size, 3]`, cut from their middle, and int32 labels."""
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty(count, np.int32)

    def one(index: int) -> None:
        example = source[index]
        images[index], labels[index] = centre_crop(example["image"], size), example["label"]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for _ in pool.map(one, range(count)):
            pass
    return images, labels


def prepared(name: str, data_dir: str | Path) -> Any:
    """TFDS's builder of a set that was prepared as `array_record`.

    Raises:
      UserError: it was not prepared there, or in another format.
    """
    tfds = _needed("tensorflow_datasets", "tensorflow-datasets")
    command = f"tfds build {name} --file_format=array_record --data_dir={data_dir}"
    if not (Path(data_dir) / name.partition("/")[0].partition(":")[0]).is_dir():
        raise UserError(f"{data_dir} holds no prepared {name}; prepare it with `{command}`")
    try:
        builder = tfds.builder(name, data_dir=str(data_dir), try_gcs=False)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(f"{name} cannot be read from {data_dir}: {str(error).splitlines()[0]}") from error
    if not builder.is_prepared() or builder.info.file_format.value != "array_record":
        raise UserError(f"{name} is in {data_dir}, but not prepared as array_record; prepare it with `{command}`")
    return builder


def _skip_decoding() -> Any:
    return _needed("tensorflow_datasets", "tensorflow-datasets").decode.SkipDecoding()


def _grain() -> Any:
    return _needed("grain", "grain")


def _needed(module: str, package: str) -> Any:
    """A module that only this reader needs, and that takes seconds to import."""
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"prepared images need the package {package}: pip install {package}") from error
