"""Texts from their publishers' own files, whose checksums are checked."""

import hashlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from training.errors import UserError


class Publication(NamedTuple):
    """SHA-256 of each of its files, and where they are from."""

    files: Mapping[str, str]
    origin: str


CLASSIC_BOOKS = Publication(
    {"classic_books_subset.tar.xz": "eb7aa398de7dab63a407ef913f7af59767c5c6c37308f044b76b60ae4e7db024"},
    "github.com/mlschmitt/classic-books-markdown",
)
TINY_SHAKESPEARE = Publication(
    {"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
    "github.com/karpathy/char-rnn, data/tinyshakespeare/",
)
WIKITEXT2 = Publication(
    {
        "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    },
    "github.com/pytorch/examples, word_language_model/data/wikitext-2/",
)
LAMBADA = Publication(
    {"lambada_test.jsonl": "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226"},
    "OpenAI's GPT-2 (the test set as processed there)",
)
BLIMP = Publication(
    {"BLiMP.zip": "172a1a714d72e72a89e8384dd531483f3d0f8a9aee3d33dccaf7992d8cecbb73"},
    "github.com/alexwarstadt/blimp",
)
PIQA = Publication(
    {
        "valid.jsonl": "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d",
        "valid-labels.lst": "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb",
    },
    "github.com/ybisk/ybisk.github.io, piqa/data/",
)


def read(folder: str | Path, publication: Publication) -> dict[str, bytes]:
    """The files of a publication by name.

    Raises:
      UserError: a file is missing, or is another one.
    """
    contents = {}
    for name, checksum in publication.files.items():
        path = Path(folder) / name
        if not path.is_file():
            raise UserError(f"there is no file {path}; get {name} from {publication.origin}")
        contents[name] = path.read_bytes()
        if (got := hashlib.sha256(contents[name]).hexdigest()) != checksum:
            raise UserError(
                f"{path} has the SHA-256 {got[:12]}..., not {checksum[:12]}...: it is damaged or another file; "
                f"get {name} from {publication.origin}"
            )
    return contents


def books(archive: bytes) -> dict[str, str]:
    """The books `<Author>/<Title>.md` of an archive by `Author/Title`, sorted, without the header of each file."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".md"):
                text = tar.extractfile(member).read().decode()
                found[member.name.removeprefix("./").removesuffix(".md").strip()] = _body(text)
    return dict(sorted(found.items()))


def _body(text: str) -> str:
    """A book without the lines up to the first rule, which give title, author and year."""
    head, rule, rest = text.partition("\n-------\n")
    return (rest if rule and len(head) < 1000 else text).strip() + "\n"


def wikitext_articles(text: str) -> list[str]:
    """The articles of a file of WikiText as published: a title between single equals signs begins one."""
    first, *pieces = re.split(r"(?m)^(?= = [^=].*[^=] = $)", text)
    if not first.strip() and pieces:
        pieces[0] = first + pieces[0]
    return pieces or [first]


def detokenized(text: str) -> str:
    """WikiText as it would be written: without spaces before punctuation and the marks within words."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([:;,.!?)\]}%])", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r"\b(s) ' ", r"\1' ", text)
    return re.sub(r"(?m)^ (= )+(.*?)( =)+ $", lambda match: match[0].strip(), text)


def lambada_passages(lines: bytes) -> list[tuple[str, str]]:
    """Each passage up to its last word, and that word with the space before it."""
    texts = [json.loads(line)["text"] for line in lines.decode().splitlines() if line]
    return [(text[: text.rindex(" ")], text[text.rindex(" ") :]) for text in texts]


def blimp_pairs(archive: bytes) -> dict[str, list[tuple[str, str]]]:
    """By paradigm, pairs of the acceptable sentence and the other."""
    found = {}
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        for name in sorted(n for n in files.namelist() if n.endswith(".jsonl")):
            rows = [json.loads(line) for line in files.read(name).decode().splitlines() if line]
            found[Path(name).stem] = [(row["sentence_good"], row["sentence_bad"]) for row in rows]
    return found


def piqa_questions(lines: bytes, labels: bytes) -> list[tuple[str, tuple[str, str], int]]:
    """Goal, its two solutions, and the number of the right one.

    Raises:
      UserError: not as many labels as questions.
    """
    rows = [json.loads(line) for line in lines.decode().splitlines() if line]
    right = [int(label) for label in labels.split()]
    if len(rows) != len(right):
        raise UserError(f"PIQA has {len(rows)} questions and {len(right)} labels")
    return [(row["goal"], (row["sol1"], row["sol2"]), label) for row, label in zip(rows, right, strict=True)]
