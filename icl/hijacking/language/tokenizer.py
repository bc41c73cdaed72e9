"""GPT-2's byte-level byte-pair encoding, from the `vocab.json` and `merges.txt` of a checkpoint folder."""

import itertools
import json
import re
from pathlib import Path

from training.errors import UserError

# Letters, digits, other signs, each with a space before it; Python's \d is a little narrower than all numerals.
_WORDS = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Tokenizer:
    """Text to tokens.

    Raises:
      UserError: a file is missing or of another form.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            self._tokens: dict[str, int] = json.loads((folder / "vocab.json").read_text())
            lines = (folder / "merges.txt").read_text().splitlines()
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{folder} holds no tokenizer: vocab.json or merges.txt is missing or damaged") from error
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._letters = _byte_letters()

    def encode(self, text: str) -> list[int]:
        """Raises a UserError where the vocabulary lacks a piece."""
        tokens = []
        for word in _WORDS.findall(text):
            for piece in self._merge([self._letters[byte] for byte in word.encode()]):
                if piece not in self._tokens:
                    raise UserError(f"vocab.json has no token for {piece!r}")
                tokens.append(self._tokens[piece])
        return tokens

    def _merge(self, pieces: list[str]) -> list[str]:
        """Joins the pair of the lowest rank, wherever it stands, until no known pair is left."""
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                joined = i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best
                merged.append(pieces[i] + pieces[i + 1] if joined else pieces[i])
                i += 2 if joined else 1
            pieces = merged
        return pieces


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte: itself where it is printable, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    letters, following = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else following))
        following += byte not in printable
    return letters
