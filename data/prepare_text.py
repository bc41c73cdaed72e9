"""Puts texts where the configs look for them, tokenised, from files that are already here. Nothing is downloaded."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from data import corpora, text, token_shards, tokenizers
from data.scored_tests import continuations, save
from training.errors import UserError

HELD_OUT_BOOKS = ("George Eliot/Silas Marner", "Jane Austen/Persuasion", "Mark Twain/The Prince and the Pauper")
BOOKS_VOCABULARY = 16_384
CORPUS_VOCABULARY = 32_000
TOKENIZER_DOCUMENTS = 100_000
HELD_OUT_EVERY = 1000


def books(source: Path, data: Path) -> Path:
    """The classic books for training, three of them held out; WikiText-2's validation and test text and LAMBADA.

    WikiText is written without its marks for word-level models; its words are counted as published.

    Args:
      source: a folder with the folders `classic_books`, `wikitext-2` and `lambada`.
      data: folder of all data sets; the tokeniser is trained on the books for training, and cached there.
    """
    archive = text.read(source / "classic_books", text.CLASSIC_BOOKS)
    wikitext = text.read(source / "wikitext-2", text.WIKITEXT2)
    lambada = text.read(source / "lambada", text.LAMBADA)
    everything = text.books(next(iter(archive.values())))
    training = [body for title, body in everything.items() if title not in HELD_OUT_BOOKS]
    tokenizer = tokenizers.trained(training, BOOKS_VOCABULARY, data / "tokenizers")
    splits = {"train": training, "books": [everything[title] for title in HELD_OUT_BOOKS]}
    words = {}
    for name in ("valid", "test"):
        articles = text.wikitext_articles(wikitext[f"{name}.txt"].decode())
        splits[f"wikitext_{name}"] = [text.detokenized(article) for article in articles]
        words[f"wikitext_{name}"] = sum(map(token_shards.count_words, articles))
    folder = data / "books"
    token_shards.write(folder, tokenizer, splits, words)
    passages = text.lambada_passages(lambada["lambada_test.jsonl"])
    save(folder / "lambada.npz", continuations(tokenizer, passages))
    return folder


def tiny_shakespeare(source: Path, data: Path) -> Path:
    """Tiny Shakespeare as bytes, divided 90 : 5 : 5 by position as TFDS does."""
    whole = text.read(source, text.TINY_SHAKESPEARE)["input.txt"].decode()
    ends = [0, len(whole) * 9 // 10, len(whole) * 19 // 20, len(whole)]
    parts = {
        name: [whole[begin:end]]
        for name, begin, end in zip(("train", "validation", "test"), ends, ends[1:], strict=False)
    }
    return token_shards.write(data / "tiny_shakespeare", tokenizers.Bytes(), parts).folder


def plain_text(source: Path, data: Path) -> Path:
    """Any folder of `*.txt` or `*.md` files, a document each, as bytes; every twentieth is held out as `validation`.

    Raises:
      UserError: less than two such files.
    """
    files = sorted(path for path in source.rglob("*") if path.suffix in (".txt", ".md"))
    if len(files) < 2:
        raise UserError(f"{source} has {len(files)} files *.txt and *.md; a training and a validation split need two")
    held_out = files[::20]
    splits = {"train": (f.read_text() for f in files if f not in held_out)}
    splits["validation"] = (f.read_text() for f in held_out)
    return token_shards.write(data / source.resolve().name, tokenizers.Bytes(), splits).folder


def corpus(source: Path, data: Path) -> Path:
    """A folder of SlimPajama's or C4's shards, see `data.corpora`, with a BPE of the paper's size."""
    return _large(source, data / source.resolve().name, data, lambda: corpora.documents(source))


def tfds_text(source: Path, data: Path) -> Path:
    """A set that TFDS has prepared as `array_record` in the folder `source`, whose name is the set's."""
    return _large(source, data / source.name, data, lambda: corpora.tfds_documents(source.name, source.parent, "train"))


def _large(source: Path, folder: Path, data: Path, read: Callable[[], Iterator[str]]) -> Path:
    """Tokenises a stream of documents; every `HELD_OUT_EVERY`-th is held out as `validation`.

    The tokeniser is trained on the first documents for training: it need not see them all.
    """
    if folder.resolve() == source.resolve():
        raise UserError(f"--data={data} would put the tokens among the texts; choose another folder")

    def chosen(held_out: bool) -> Iterator[str]:
        return (text for i, text in enumerate(read()) if (i % HELD_OUT_EVERY == 0) == held_out)

    sample = list(itertools.islice(chosen(False), TOKENIZER_DOCUMENTS))
    tokenizer = tokenizers.trained(sample, CORPUS_VOCABULARY, data / "tokenizers")
    return token_shards.write(folder, tokenizer, {"train": chosen(False), "validation": chosen(True)}).folder


PREPARATIONS: dict[str, Callable[[Path, Path], Path]] = {
    "books": books,
    "tiny_shakespeare": tiny_shakespeare,
    "plain_text": plain_text,
    "corpus": corpus,
    "tfds_text": tfds_text,
}
"""By name: what turns a folder of files into a prepared set below the data folder, and returns where it is."""
