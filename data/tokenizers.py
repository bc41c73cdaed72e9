"""Tokenisers: bytes, and byte-level BPE trained on a corpus (the package `tokenizers`), kept as one JSON file."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from training.errors import UserError


class Tokenizer(Protocol):
    """Text to numbers below `vocabulary_size` and back."""

    vocabulary_size: int
    document: int  # the token before each document

    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, [tokens], int32."""

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode`, for many texts at once."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; those between documents are left out."""


class Bytes:
    """The bytes of UTF-8, and one token more."""

    vocabulary_size = 257
    document = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(int(t) for t in tokens if t != self.document).decode(errors="replace")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"model": {"type": "bytes"}}) + "\n")


class Bpe:
    """Byte-level BPE with GPT-2's division into words. Any text can be encoded, and is decoded exactly.

    Args:
      inner: a `tokenizers.Tokenizer`.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.vocabulary_size = inner.get_vocab_size() + 1
        self.document = self.vocabulary_size - 1

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._inner.encode(text).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(encoding.ids, np.int32) for encoding in self._inner.encode_batch_fast(list(texts))]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode([int(t) for t in tokens if t != self.document])

    def save(self, path: str | Path) -> None:
        self._inner.save(str(path))


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> Bpe:
    """BPE of at most this many tokens, the one between documents included, trained on a corpus.

    Raises:
      UserError: fewer tokens than bytes, or the package is missing.
    """
    if vocabulary_size < Bytes.vocabulary_size:
        raise UserError(f"a vocabulary of {vocabulary_size} is less than the {Bytes.vocabulary_size} of bytes")
    tokenizers = _package()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary_size - 1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Bpe(inner)


def trained(texts: Sequence[str], vocabulary_size: int, cache: str | Path) -> Tokenizer:
    """`train_bpe`, or what it returned for the same corpus and size; 257 is `Bytes`.

    Args:
      texts: the corpus, a document each.
      vocabulary_size: of the tokeniser.
      cache: folder of tokenisers, named after the hash of what they were trained on.
    """
    if vocabulary_size == Bytes.vocabulary_size:
        return Bytes()
    digest = hashlib.sha256(f"bpe {vocabulary_size}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    path = Path(cache) / f"bpe-{vocabulary_size}-{digest.hexdigest()[:16]}.json"
    if not path.exists():
        tokenizer = train_bpe(texts, vocabulary_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tokenizer.save(partial)
        partial.replace(path)
    return load(path)


def load(path: str | Path) -> Tokenizer:
    """The tokeniser of a file that `save` wrote, or of any `tokenizer.json` of byte-level BPE.

    Raises:
      UserError: no such file, or it holds no tokeniser.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no tokeniser {path}")
    text = path.read_text()
    try:
        if json.loads(text)["model"]["type"] == "bytes":
            return Bytes()
        return Bpe(_package().Tokenizer.from_str(text))
    except UserError:
        raise
    except Exception as error:  # the package raises plain Exceptions
        raise UserError(f"{path} holds no tokeniser: {error}") from error


def _package() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError("BPE needs the package tokenizers: pip install tokenizers") from error
    return tokenizers
