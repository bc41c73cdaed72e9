import builtins
import hashlib

import pytest

from data import images, prepare_images
from data.images import Checksums
from training.errors import UserError


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder with the files of two invented sets, `all` of two files and `one` of which one is enough."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_text(name)
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abcd"}
    monkeypatch.setitem(images.CHECKSUMS, "all", Checksums({n: sums[n] for n in "ab"}, "a place"))
    monkeypatch.setitem(images.CHECKSUMS, "one", Checksums({n: sums[n] for n in "dc"}, "a place", any_one=True))
    return folder


@pytest.mark.parametrize(("name", "files"), [("all", ["a", "b"]), ("one", ["c"])])
def test_files_are_copied(source, tmp_path, name, files):
    folder = prepare_images.publishers_files(name)(source, tmp_path / "data")
    assert folder == tmp_path / "data" / name
    assert sorted(path.name for path in folder.iterdir()) == files


def test_nothing_is_copied_if_a_file_is_missing_or_wrong(source, tmp_path):
    (source / "b").write_text("x")
    with pytest.raises(UserError, match=r"/b has the SHA-256 .* damaged or another file; get b from a place"):
        prepare_images.publishers_files("all")(source, tmp_path / "data")
    (source / "c").unlink()
    with pytest.raises(UserError, match=r"there is no file .*/d; get d from a place"):
        prepare_images.publishers_files("one")(source, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_tfds_without_tensorflow(source, tmp_path, monkeypatch):
    monkeypatch.setitem(images.CHECKSUMS, "fashion_mnist", images.CHECKSUMS["all"])
    found = builtins.__import__

    def without(name, *arguments, **options):
        if name == "tensorflow":
            raise ModuleNotFoundError("no", name=name)
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="with the package tensorflow, which reading does not need: run this in an env"):
        prepare_images.tfds_fashion_mnist(source, tmp_path / "data")
