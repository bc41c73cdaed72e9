import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest

from data import prepare_text, scored_tests, text, token_shards
from data.tokenizers import Bytes
from training.errors import UserError

WIKITEXT = (
    " \n = Lobsters = \n \n A lobster @-@ like animal , <unk> . \n = = Life = = \n It lives . \n"
    " = Trees = \n A tree . \n"
)
LAMBADA = [{"text": "He took the key and opened the door"}, {"text": '"Yes," said Ann'}]


def archive(books):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:xz") as tar:
        for name, body in books.items():
            data = f"# Title: x\n\n-------\n\n{body}\n".encode()
            info = tarfile.TarInfo(f"{name}.md")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return content.getvalue()


def write(folder, name, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return {name: hashlib.sha256(content).hexdigest()}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder as a user has it, with tiny files of the same formats."""
    folder = tmp_path / "source"
    titles = [*prepare_text.HELD_OUT_BOOKS, "A/B", "A/C"]
    books = write(
        folder / "classic_books", "classic_books_subset.tar.xz", archive({t: f"Text of {t}. " * 9 for t in titles})
    )
    wikitext = {}
    for name in ("valid.txt", "test.txt"):
        wikitext |= write(folder / "wikitext-2", name, WIKITEXT.encode())
    lines = "\n".join(json.dumps(row) for row in LAMBADA).encode()
    lambada = write(folder / "lambada", "lambada_test.jsonl", lines)
    for constant, files in (("CLASSIC_BOOKS", books), ("WIKITEXT2", wikitext), ("LAMBADA", lambada)):
        monkeypatch.setattr(text, constant, text.Publication(files, "a place"))
    monkeypatch.setattr(prepare_text, "BOOKS_VOCABULARY", 257)
    return folder


def test_books(source, tmp_path):
    folder = prepare_text.books(source, tmp_path / "data")
    texts = token_shards.load(folder)
    assert {name: split.documents for name, split in texts.splits.items()} == {
        "train": 2,
        "books": 3,
        "wikitext_valid": 2,
        "wikitext_test": 2,
    }
    assert texts.split("wikitext_valid").words == len(WIKITEXT.split()) + WIKITEXT.count("\n")
    train = Bytes().decode(np.concatenate(texts.shards("train")))
    assert train.startswith("Text of A/B. Text")
    assert "Title" not in train
    test = scored_tests.load(folder / "lambada.npz")
    last = [bytes(labels[weights > 0].astype(np.uint8)).decode() for labels, weights in zip(*test[1:], strict=True)]
    assert last == [" door", " Ann"]


def test_a_wrong_file(source, tmp_path):
    (source / "lambada" / "lambada_test.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"SHA-256 .*damaged or another file; get lambada_test.jsonl from a place"):
        prepare_text.books(source, tmp_path / "data")
    (source / "lambada" / "lambada_test.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no file .*lambada_test.jsonl"):
        prepare_text.books(source, tmp_path / "data")


def test_wikitext():
    articles = text.wikitext_articles(WIKITEXT)
    assert "".join(articles) == WIKITEXT
    assert len(articles) == 2
    assert "A lobster-like animal, <unk>." in text.detokenized(articles[0])


def test_tiny_shakespeare(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "TINY_SHAKESPEARE", text.Publication(write(tmp_path, "input.txt", b"x" * 100), "a place"))
    texts = token_shards.load(prepare_text.tiny_shakespeare(tmp_path, tmp_path / "data"))
    assert {name: split.bytes for name, split in texts.splits.items()} == {"train": 90, "validation": 5, "test": 5}


def test_plain_text(tmp_path):
    for i in range(3):
        write(tmp_path / "mine", f"{i}.txt", b"abc")
    texts = token_shards.load(prepare_text.plain_text(tmp_path / "mine", tmp_path / "data"))
    assert {name: split.documents for name, split in texts.splits.items()} == {"train": 2, "validation": 1}
    with pytest.raises(UserError, match="a training and a validation split need two"):
        prepare_text.plain_text(tmp_path / "data", tmp_path / "data")


def test_blimp_and_piqa():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as files:
        row = json.dumps({"sentence_good": "He goes.", "sentence_bad": "He go."})
        files.writestr("data/agreement.jsonl", f"{row}\n{row}\n")
    assert text.blimp_pairs(content.getvalue()) == {"agreement": [("He goes.", "He go.")] * 2}
    row = json.dumps({"goal": "g", "sol1": "a", "sol2": "b"}).encode()
    assert text.piqa_questions(row, b"1\n") == [("g", ("a", "b"), 1)]
    with pytest.raises(UserError, match="1 questions and 2 labels"):
        text.piqa_questions(row, b"1\n0\n")


def test_contexts_lose_their_beginning():
    test = scored_tests.continuations(Bytes(), [("abcdef", "gh"), ("", "x")], longest=4)
    assert test.tokens.shape == (2, 64)
    np.testing.assert_array_equal(test.tokens[0, :4], list(b"defg"))
    np.testing.assert_array_equal(test.labels[0, :4], list(b"efgh"))
    np.testing.assert_array_equal(test.weights[0, :5], [0, 0, 1, 1, 0])
    np.testing.assert_array_equal(test.tokens[1, :1], [256])
    np.testing.assert_array_equal(test.weights[1, :2], [1, 0])
