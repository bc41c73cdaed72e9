import gzip
import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import images
from training.errors import UserError


def write_idx(path, array):
    """Writes a gzipped IDX file of bytes; returns its SHA-256."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """A folder with four small files whose checksums are the expected ones, and the arrays in them."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, np.uint8) for shape in ((6, 28, 28), (6,), (2, 28, 28), (2,))]
    known = images.CHECKSUMS["fashion_mnist"]
    checksums = {name: write_idx(tmp_path / name, a) for name, a in zip(known.files, arrays, strict=True)}
    monkeypatch.setitem(images.CHECKSUMS, "fashion_mnist", known._replace(files=checksums))
    return tmp_path, arrays


def test_fashion_mnist(fashion):
    folder, arrays = fashion
    got = images.fashion_mnist(folder)
    assert got.classes == 10
    for x, y in zip(got[:4], arrays, strict=True):
        np.testing.assert_array_equal(x.reshape(y.shape), y)
    assert got.images.shape == (6, 28, 28, 1)


def test_a_damaged_file(fashion):
    folder, _ = fashion
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no")
    with pytest.raises(
        UserError, match=r"t10k-labels.*has the SHA-256.*damaged or another file; get t10k.* from github"
    ):
        images.fashion_mnist(folder)


@pytest.mark.parametrize(
    ("name", "file"), [("fashion_mnist", "train-images-idx3-ubyte.gz"), ("eurosat", "EuroSAT.zip")]
)
def test_a_missing_folder(name, file):
    with pytest.raises(UserError, match=f"there is no file /nowhere/{file}; get {file} from"):
        images.load(name, "/nowhere")


def test_an_unknown_name():
    with pytest.raises(UserError, match="there is no image set 'eurosad': did you mean 'eurosat'"):
        images.load("eurosad", "/nowhere")


def test_eurosat(tmp_path, monkeypatch):
    path = tmp_path / "EuroSAT_subset_600_per_class.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for class_name, grey in (("River", 200), ("Forest", 50)):
            for number in range(1, 13):  # 10 and 12 come after 9, although their names do not
                stream = io.BytesIO()
                Image.new("RGB", (64, 64), (grey + number,) * 3).save(stream, "JPEG")
                archive.writestr(f"2750/{class_name}/{class_name}_{number}.jpg", stream.getvalue())
        archive.writestr("2750/README", "no image")
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(images.CHECKSUMS["eurosat"].files, path.name, checksum)
    got = images.eurosat(tmp_path)
    assert got.classes == 2
    assert got.images.shape == (20, 64, 64, 3)
    assert got.labels.tolist() == [0] * 10 + [1] * 10
    assert got.test_labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(got.test_images[:, 0, 0, 0], [61, 62, 211, 212], atol=2)
