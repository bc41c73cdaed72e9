import numpy as np
import pytest

from data import token_shards
from data.tokenizers import Bytes
from training.errors import UserError


def test_what_is_written_is_read(tmp_path):
    documents = ["ab c\n", "d"] * 300
    token_shards.write(tmp_path, Bytes(), {"train": documents, "test": ["xyz"]}, words={"test": 7}, size=100)
    texts = token_shards.load(tmp_path)
    assert (texts.vocabulary_size, texts.document) == (257, 256)
    train = texts.split("train")
    assert (train.documents, train.words, train.bytes, train.tokens) == (600, 300 * 4, 300 * 6, 300 * 8)
    assert texts.split("test").words == 7
    shards = texts.shards("train")
    assert len(shards) == 3
    tokens = np.concatenate(shards)
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens[:8], [256, *b"ab c\n", 256, *b"d"])
    assert len(tokens) == train.tokens


def test_errors(tmp_path):
    with pytest.raises(UserError, match="there are no prepared texts"):
        token_shards.load(tmp_path)
    with pytest.raises(UserError, match="the split 'train' has no documents"):
        token_shards.write(tmp_path, Bytes(), {"train": []})
    texts = token_shards.write(tmp_path, Bytes(), {"train": ["a"]})
    with pytest.raises(UserError, match="has no split 'trian': did you mean 'train'"):
        texts.shards("trian")
    (tmp_path / "train-00000.npy").unlink()
    with pytest.raises(UserError, match="is missing; prepare the texts again"):
        texts.shards("train")
