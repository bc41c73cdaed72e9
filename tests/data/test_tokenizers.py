import numpy as np
import pytest

from data import tokenizers
from training.errors import UserError

TEXTS = ["the cat sat on the mat\n" * 20, "naïve café — the end", "the dog and the cat"]


@pytest.fixture
def package():
    return pytest.importorskip("tokenizers", reason="BPE needs the package tokenizers")


def test_bytes(tmp_path):
    tokenizer = tokenizers.trained(TEXTS, 257, tmp_path)
    tokens = tokenizer.encode("é!")
    np.testing.assert_array_equal(tokens, [0xC3, 0xA9, 0x21])
    assert tokenizer.decode([*tokens, tokenizer.document]) == "é!"
    tokenizer.save(tmp_path / "tokenizer.json")
    assert isinstance(tokenizers.load(tmp_path / "tokenizer.json"), tokenizers.Bytes)


def test_bpe_returns_the_text(package, tmp_path):
    tokenizer = tokenizers.trained(TEXTS, 300, tmp_path)
    assert tokenizer.vocabulary_size <= 300
    for text in [*TEXTS, "unseen: \x00\u4e2d <|document|> \t\n  x"]:
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert tokens.max() < tokenizer.document
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 3


def test_bpe_is_trained_once_for_a_corpus(package, tmp_path, monkeypatch):
    first = tokenizers.trained(TEXTS, 300, tmp_path)
    monkeypatch.setattr(tokenizers, "train_bpe", lambda *_: pytest.fail("trained again"))
    np.testing.assert_array_equal(tokenizers.trained(TEXTS, 300, tmp_path).encode(TEXTS[0]), first.encode(TEXTS[0]))
    with pytest.raises(pytest.fail.Exception):
        tokenizers.trained(TEXTS[1:], 300, tmp_path)


def test_errors(tmp_path):
    with pytest.raises(UserError, match="there is no tokeniser"):
        tokenizers.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="holds no tokeniser"):
        tokenizers.load(tmp_path / "bad.json")
    with pytest.raises(UserError, match="a vocabulary of 100 is less than the 257 of bytes"):
        tokenizers.train_bpe(TEXTS, 100)
