"""Tokenised texts on disk: `.npy` files of a stream of documents, and a JSON file that describes them.

Each document begins with the tokeniser's token for that. A file is read through memory mapping, so that a corpus may
be larger than the memory.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from data.tokenizers import Tokenizer
from training.errors import UserError, nearest

_FILE = "set.json"
_BATCH = 256  # documents that are encoded at once


@dataclasses.dataclass(frozen=True)
class Split:
    """What is known of a split besides its tokens: words are separated by white space, each line's end is one more."""

    shards: tuple[str, ...]
    tokens: int
    documents: int
    words: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """A prepared corpus.

    Attributes:
      folder: of its files.
      vocabulary_size: of its tokeniser.
      document: the token that each document begins with.
      splits: by name.
    """

    folder: Path
    vocabulary_size: int
    document: int
    splits: dict[str, Split]

    def shards(self, split: str) -> list[np.ndarray]:
        """The files of a split, each [tokens], uint16 or uint32, mapped into memory.

        Raises:
          UserError: no such split, or a file is missing.
        """
        paths = [self.folder / name for name in self.split(split).shards]
        for path in paths:
            if not path.is_file():
                raise UserError(f"{path} is missing; prepare the texts again")
        return [np.load(path, mmap_mode="r") for path in paths]

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise UserError(f"{self.folder} has no split {name!r}: {nearest(name, self.splits)}")
        return self.splits[name]


def load(folder: str | Path) -> TokenSet:
    """The prepared corpus of a folder.

    Raises:
      UserError: there is none.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise UserError(f"there are no prepared texts in {folder}; see python scripts/prepare_data.py --list")
    record = json.loads(path.read_text())
    splits = {name: Split(tuple(split.pop("shards")), **split) for name, split in record["splits"].items()}
    return TokenSet(Path(folder), record["vocabulary_size"], record["document"], splits)


def count_words(text: str) -> int:
    """Words, separated by white space, and ends of lines: what word-level perplexities are per."""
    return len(text.split()) + text.count("\n")


def write(
    folder: str | Path,
    tokenizer: Tokenizer,
    splits: Mapping[str, Iterable[str]],
    words: Mapping[str, int] | None = None,
    size: int = 2**26,
) -> TokenSet:
    """Tokenises texts and writes them.

    Args:
      folder: to write to.
      tokenizer: its file is written too.
      splits: documents by the name of their split.
      words: of splits whose texts were published as other words than are written here.
      size: tokens in a file, about.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer.json")
    written = {name: _write_split(folder, name, tokenizer, documents, size) for name, documents in splits.items()}
    for name, count in (words or {}).items():
        written[name] = dataclasses.replace(written[name], words=count)
    record = {
        "vocabulary_size": tokenizer.vocabulary_size,
        "document": tokenizer.document,
        "splits": {name: dataclasses.asdict(split) for name, split in written.items()},
    }
    (folder / _FILE).write_text(json.dumps(record, indent=1) + "\n")
    return load(folder)


def _write_split(folder: Path, name: str, tokenizer: Tokenizer, documents: Iterable[str], size: int) -> Split:
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.uint32
    shards: list[str] = []
    waiting: list[np.ndarray] = []
    totals = dict.fromkeys(("tokens", "documents", "words", "bytes"), 0)

    def flush() -> None:
        shards.append(f"{name}-{len(shards):05d}.npy")
        np.save(folder / shards[-1], np.concatenate(waiting))
        waiting.clear()

    for texts in _grouped(documents, _BATCH):
        for text, tokens in zip(texts, tokenizer.encode_all(texts), strict=True):
            waiting.append(np.concatenate([[tokenizer.document], tokens]).astype(dtype))
            totals["tokens"] += len(waiting[-1])
            totals["documents"] += 1
            totals["words"] += count_words(text)
            totals["bytes"] += len(text.encode())
        if sum(map(len, waiting)) >= size:
            flush()
    if waiting:
        flush()
    if not shards:
        raise UserError(f"the split {name!r} has no documents")
    return Split(tuple(shards), **totals)


def _grouped(items: Iterable[str], size: int) -> Iterable[Sequence[str]]:
    group: list[str] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
