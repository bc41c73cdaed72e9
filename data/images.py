"""Small labelled image sets, read from their publishers' own files, whose checksums are checked."""

import functools
import gzip
import hashlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from training.errors import UserError, nearest


class ImageSet(NamedTuple):
    """Images `[count, height, width, channels]` and labels `[count]`, both uint8, of training and of testing."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int


class Checksums(NamedTuple):
    """The publisher's files of an image set."""

    files: dict[str, str]  # name -> SHA-256
    origin: str
    any_one: bool = False  # whether one of the files is enough


CHECKSUMS = {
    "fashion_mnist": Checksums(
        {
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        "github.com/zalandoresearch/fashion-mnist, data/fashion/",
    ),
    "eurosat": Checksums(
        {
            "EuroSAT.zip": "8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
            "EuroSAT_subset_600_per_class.zip": "122a88f1b2eaa71d1dd62f6cf13f96cf2fb70bd329092d1c43927aa69da9c700",
        },
        "zenodo.org/records/7711810 (the RGB version)",
        any_one=True,
    ),
}


def fashion_mnist(folder: str | Path) -> ImageSet:
    """Fashion-MNIST, 60000 + 10000 grey images of 28 x 28 pixels in 10 classes (Xiao et al. 2017).

    Args:
      folder: holds the four gzipped IDX files of the publisher.

    Raises:
      UserError: a file is missing or is another one.
    """
    files, origin, _ = CHECKSUMS["fashion_mnist"]
    arrays = [_read_idx(checked(Path(folder) / name, checksum, origin)) for name, checksum in files.items()]
    train, labels, test, test_labels = arrays
    return ImageSet(train[..., None], labels, test[..., None], test_labels, classes=10)


def eurosat(folder: str | Path) -> ImageSet:
    """EuroSAT RGB, satellite images of 64 x 64 pixels in 10 classes (Helber et al. 2019).

    The publisher defines no split; the last sixth of each class, by number, is for testing.

    Args:
      folder: holds `EuroSAT.zip` (27000 images), or `EuroSAT_subset_600_per_class.zip`, the first 600 of each class.

    Raises:
      UserError: neither file is there, or it is another one.
    """
    files, origin, _ = CHECKSUMS["eurosat"]
    found = [name for name in files if (Path(folder) / name).exists()]
    name = found[0] if found else next(iter(files))
    return read_class_folders(zipfile.ZipFile(io.BytesIO(checked(Path(folder) / name, files[name], origin))))


def read_class_folders(archive: zipfile.ZipFile) -> ImageSet:
    """The images `.../<Class>/<Class>_<number>.jpg` of an archive; the last sixth of each class is for testing."""
    members: dict[str, list[tuple[int, str]]] = {}
    for name in archive.namelist():
        if name.endswith(".jpg"):
            path = Path(name)
            members.setdefault(path.parent.name, []).append((int(path.stem.rpartition("_")[2]), name))
    parts: dict[bool, tuple[list[np.ndarray], list[int]]] = {False: ([], []), True: ([], [])}
    for label, class_name in enumerate(sorted(members)):
        numbered = sorted(members[class_name])
        for place, (_, name) in enumerate(numbered):
            images, labels = parts[place >= len(numbered) * 5 // 6]
            images.append(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
            labels.append(label)
    (train, labels), (test, test_labels) = parts[False], parts[True]
    as_labels = functools.partial(np.asarray, dtype=np.uint8)
    return ImageSet(np.stack(train), as_labels(labels), np.stack(test), as_labels(test_labels), len(members))


def tfds_fashion_mnist(folder: str | Path) -> ImageSet:
    """The same Fashion-MNIST as TFDS has prepared it in its folder; see `scripts/prepare_data.py`.

    Raises:
      UserError: it is not prepared there.
    """
    from data.prepared_images import in_memory  # which imports TFDS

    arrays, classes = in_memory("fashion_mnist", folder)
    return ImageSet(*arrays, classes=classes)


SOURCES: dict[str, Callable[[str | Path], ImageSet]] = {
    "fashion_mnist": fashion_mnist,
    "eurosat": eurosat,
    "tfds_fashion_mnist": tfds_fashion_mnist,
}


@functools.cache
def load(name: str, folder: str) -> ImageSet:
    """The image set of that name, kept in memory.

    Raises:
      UserError: an unknown name, or files that are missing or wrong.
    """
    if name not in SOURCES:
        raise UserError(f"there is no image set {name!r}: {nearest(name, SOURCES)}")
    return SOURCES[name](folder)


def checked(path: Path, checksum: str, origin: str) -> bytes:
    """The content of a file with this SHA-256.

    Raises:
      UserError: there is no such file, or it is another one; `origin` says where to get it.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; get {path.name} from {origin}")
    content = path.read_bytes()
    if (got := hashlib.sha256(content).hexdigest()) != checksum:
        raise UserError(
            f"{path} has the SHA-256 {got[:12]}..., not {checksum[:12]}...: it is damaged or another file; "
            f"get {path.name} from {origin}"
        )
    return content


def _read_idx(content: bytes) -> np.ndarray:
    """The uint8 array of a gzipped IDX file: magic number 0x0000 08 <rank>, sizes in big-endian 32 bits, bytes."""
    data = gzip.decompress(content)
    rank = data[3]
    shape = np.frombuffer(data, ">u4", rank, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
