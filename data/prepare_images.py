"""Puts image sets where the configs look for them, from files that are already here. Nothing is downloaded."""

import shutil
from collections.abc import Callable
from pathlib import Path

from data.images import CHECKSUMS, checked
from training.errors import UserError


def publishers_files(name: str) -> Callable[[Path, Path], Path]:
    """A preparation that checks the publisher's files of an image set and puts them into `<data>/<name>`."""

    def prepare(source: Path, data: Path) -> Path:
        checksums = CHECKSUMS[name]
        present = [file for file in checksums.files if (source / file).is_file()]
        wanted = (present[:1] or [next(iter(checksums.files))]) if checksums.any_one else list(checksums.files)
        for file in wanted:
            checked(source / file, checksums.files[file], checksums.origin)
        folder = data / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in wanted:
            shutil.copyfile(source / file, folder / file)
        return folder

    return prepare


def tfds_fashion_mnist(source: Path, data: Path) -> Path:
    """Fashion-MNIST as TFDS prepares it, without a network: TFDS takes the publisher's files and checks them itself.

    Raises:
      UserError: the files are missing or wrong, or TensorFlow is not installed (only preparing needs it).
    """
    checksums = CHECKSUMS["fashion_mnist"]
    for file, checksum in checksums.files.items():
        checked(source / file, checksum, checksums.origin)
    try:
        import tensorflow  # noqa: F401
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise UserError(
            f"TFDS prepares a set with the package {error.name}, which reading does not need: run this in an "
            "environment of its own, with pip install tensorflow-cpu importlib_resources -r requirements.txt"
        ) from error
    folder = data / "tfds"
    builder = tfds.builder("fashion_mnist", data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(source)))
    return folder / "fashion_mnist"


PREPARATIONS: dict[str, Callable[[Path, Path], Path]] = {
    "fashion_mnist": publishers_files("fashion_mnist"),
    "eurosat": publishers_files("eurosat"),
    "tfds_fashion_mnist": tfds_fashion_mnist,
}
"""By name: what turns a folder of files into a prepared set below the data folder, and returns where it is."""
