import gzip
import json
import types

import pytest

from data import corpora, prepare_text, prepared_images, token_shards
from training.errors import UserError

ROWS = [{"text": f"document {i}\nwith ü", "meta": {"set": "C4"}} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TEXTS = [row["text"] for row in ROWS]


def write_zstandard(path):
    package = pytest.importorskip("zstandard", reason=".zst needs the package zstandard")
    frames = [package.ZstdCompressor().compress(part) for part in (LINES[:60], LINES[60:])]
    path.write_bytes(b"".join(frames))


def write_parquet(path):
    pytest.importorskip("pyarrow", reason=".parquet needs the package pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": TEXTS, "id": list(range(5))}), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(LINES)),
        ("c4-train.00000-of-01024.json.gz", lambda path: path.write_bytes(gzip.compress(LINES))),
        ("chunk1/example_0.jsonl.zst", write_zstandard),
        ("b.parquet", write_parquet),
    ],
)
def test_shards(tmp_path, name, write):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name)
    assert list(corpora.documents(tmp_path)) == TEXTS
    with pytest.raises(UserError, match=r"no text in the field|no column"):
        list(corpora.documents(tmp_path, field="content"))


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"has no files \*\.jsonl"):
        next(corpora.documents(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(UserError, match=r"x.jsonl, line 2 is no JSON object"):
        list(corpora.documents(tmp_path))


def test_tfds(monkeypatch):
    """TFDS itself is not asked: what it returns is bytes in dicts."""
    info = types.SimpleNamespace(splits={"train": 0}, features={"text": 0})
    source = [{"text": text.encode()} for text in TEXTS]
    builder = types.SimpleNamespace(info=info, as_data_source=lambda split: source)
    monkeypatch.setattr(prepared_images, "prepared", lambda name, data_dir: builder)
    assert list(corpora.tfds_documents("c4", "data", "train")) == TEXTS
    with pytest.raises(UserError, match="c4 has no split 'dev'; it has train"):
        next(corpora.tfds_documents("c4", "data", "dev"))
    with pytest.raises(UserError, match="c4 has no field 'words'; it has text"):
        next(corpora.tfds_documents("c4", "data", "train", "words"))


def test_a_corpus_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "CORPUS_VOCABULARY", 257)
    monkeypatch.setattr(prepare_text, "HELD_OUT_EVERY", 4)
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "a.jsonl").write_bytes(LINES)
    folder = prepare_text.corpus(tmp_path / "slim", tmp_path / "data")
    texts = token_shards.load(folder)
    assert {name: split.documents for name, split in texts.splits.items()} == {"train": 3, "validation": 2}
    with pytest.raises(UserError, match="would put the tokens among the texts"):
        prepare_text.corpus(tmp_path / "slim", tmp_path)
