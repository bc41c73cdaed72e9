"""Against a set that TFDS itself has prepared; see prepared/README.md."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import prepared_images
from data.prepared_images import Batches, centre_crop, encoded, evaluation_images, opened, training_crop
from training.errors import UserError

FOLDER = Path(__file__).parent / "prepared"


@pytest.fixture(scope="module")
def train():
    return encoded("tiny_images", FOLDER, "train")


def batches(train, index=0, count=1, **options):
    defaults = {"size": 16, "batch_size": 6, "copies": 1, "least": 0.3, "seed": 0, "workers": 0}
    return Batches(train.source, **{**defaults, **options}, process_index=index, process_count=count)


def encode(array, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def ramp(height, width):
    """A picture whose first channel is the column and whose second is the row."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, 0 * x], -1).astype(np.uint8)


def test_examples_keep_their_images_encoded(train):
    assert train.classes == 3
    assert len(train.source) == 12
    for example in (train.source[i] for i in range(12)):
        image = np.asarray(opened(example["image"]))
        assert image.dtype == np.uint8
        assert image.mean((0, 1)).argmax() == 2 - example["label"]  # the classes are blue, green and red
    assert "tensorflow" not in sys.modules


def test_a_batch_has_square_images_and_their_labels(train):
    batch = next(batches(train))
    assert batch["image"].shape == (6, 16, 16, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"].mean((1, 2)).argmax(-1), 2 - batch["label"])


def test_an_epoch_has_each_example_once_and_its_copies_differ(train):
    stream = batches(train, copies=3, least=0.6)
    images = np.concatenate([next(stream)["image"] for _ in range(6)]).reshape(12, 3, -1).astype(int)
    assert len(np.unique(images[:, 0], axis=0)) == 12
    assert (images[:, 0] != images[:, 1]).any(1).sum() > 6  # some draws end in the whole image
    near = np.abs(images[:, 0] - images[:, 1]).mean(1)
    far = np.abs(images[:, None, 0] - images[None, :, 1]).mean(2) + 1e3 * np.eye(12)
    assert (near < far.min(1)).all()


def test_orders_differ_between_epochs_and_seeds(train):
    first = [batch["label"] for batch, _ in zip(batches(train), range(4), strict=False)]
    assert sorted(np.concatenate(first[:2])) == sorted(np.concatenate(first[2:]))
    assert not np.array_equal(np.concatenate(first[:2]), np.concatenate(first[2:]))
    other = [batch["label"] for batch, _ in zip(batches(train, seed=1), range(4), strict=False)]
    assert not np.array_equal(np.concatenate(first), np.concatenate(other))


def test_processes_share_each_batch(train):
    whole = next(batches(train))["label"]
    parts = [next(batches(train, index, 2))["label"] for index in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    assert sorted(np.concatenate(parts)) == sorted(whole)


def test_a_stream_goes_on_where_it_was(train):
    stream = batches(train)
    next(stream)
    state, wanted = stream.get_state(), next(stream)
    again = batches(train)
    again.set_state(state)
    got = next(again)
    np.testing.assert_array_equal(got["image"], wanted["image"])
    np.testing.assert_array_equal(got["label"], wanted["label"])


def test_training_crops_are_parts_of_the_image():
    content = encode(ramp(60, 90))
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(200):
        got = training_crop(content, 20, rng).astype(float)
        across, down = (got[10, 15, 0] - got[10, 5, 0]) / 10 * 20, (got[15, 10, 1] - got[5, 10, 1]) / 10 * 20
        shares.append(across * down / (60 * 90))
        assert 0.6 < across / down < 1.6
        assert got[..., 0].min() >= 0
        assert got[..., 0].max() <= 89
    assert min(shares) < 0.2
    assert max(shares) > 0.8
    assert training_crop(encode(ramp(4, 90)), 20, rng, least=1.0).shape == (20, 20, 3)  # no crop of this ratio fits


def test_the_centre_crop():
    got = centre_crop(encode(ramp(64, 128)), 56).astype(float)  # the shorter side becomes 64
    assert got.shape == (56, 56, 3)
    np.testing.assert_allclose(got[30, :, 0], np.arange(36, 92), atol=1)
    np.testing.assert_allclose(got[:, 30, 1], np.arange(4, 60), atol=1)
    assert centre_crop(encode(ramp(30, 30)[..., 0]), 24).shape == (24, 24, 3)  # grey, and smaller than the model's


def test_evaluation_images(train):
    images, labels = evaluation_images(train.source, 32, 7)
    assert images.shape == (7, 32, 32, 3)
    np.testing.assert_array_equal(images.mean((1, 2)).argmax(-1), 2 - labels)


def test_what_is_no_image():
    with pytest.raises(UserError, match=r"9 bytes, beginning with b'not an i', are no image .*prepare the set again"):
        opened(b"not an im")
    with pytest.raises(UserError, match="are no image"):
        opened(encode(ramp(40, 40), "JPEG")[:300])


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("imagenet2012", "train", "holds no prepared imagenet2012; prepare it with `tfds build imagenet2012 --file"),
        ("tiny_images", "test", "tiny_images has no split 'test'; it has train, validation"),
    ],
)
def test_what_is_not_there(name, split, message):
    with pytest.raises(UserError, match=message):
        encoded(name, FOLDER, split)


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "tiny_images" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"tiny_images cannot be read from|not prepared as array_record"):
        encoded("tiny_images", tmp_path, "train")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match="need the package grain: pip install grain"):
        prepared_images._grain()
