import hashlib
import io
import json
import zipfile

import numpy as np
import pytest

from data import text
from data.tokenizers import Bytes
from deltanet.evaluators import recall, zero_shot
from training.errors import UserError


def publish(folder, monkeypatch, constant, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(text, constant, text.Publication(sums, "a place"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """BLiMP and PIQA with the right text always the shorter one, which an untrained model finds likelier."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as files:
        row = json.dumps({"sentence_good": "He goes.", "sentence_bad": "He go to the place where he was."})
        files.writestr("data/agreement.jsonl", f"{row}\n{row}\n")
        row = json.dumps({"sentence_good": "He has gone to that place.", "sentence_bad": "He go."})
        files.writestr("data/other.jsonl", f"{row}\n")
    publish(tmp_path / "blimp", monkeypatch, "BLIMP", {"BLiMP.zip": content.getvalue()})
    rows = [{"goal": "Open it", "sol1": "Pull", "sol2": "Pull as hard as you can"}] * 2
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    publish(tmp_path / "piqa", monkeypatch, "PIQA", {"valid.jsonl": lines, "valid-labels.lst": b"0\n1\n"})
    lines = json.dumps({"text": "He opened the door"}).encode()
    publish(tmp_path / "lambada", monkeypatch, "LAMBADA", {"lambada_test.jsonl": lines})
    return tmp_path


def test_zero_shot(model, folder):
    found = {name: test(model, Bytes(), folder, 2, 64) for name, test in zero_shot.TESTS.items()}
    assert found["blimp"] == {"accuracy": 0.5, "agreement": 1.0, "other": 0.0}
    assert found["piqa"]["accuracy"] == 0.5
    np.testing.assert_allclose(np.log(found["lambada"]["perplexity"]), 5 * np.log(257), rtol=0.02)


def test_forms_of_questions(tmp_path):
    row = {"text": "The pump is blue.\nColour:", "value": "blue", "key": "Colour"}
    (tmp_path / "fda.jsonl").write_text(json.dumps(row) + "\n")
    assert recall.read(tmp_path / "fda.jsonl") == [recall.Question("The pump is blue.\nColour:", "blue")]
    assert recall.read(tmp_path / "fda.jsonl", "key_again")[0].prompt == "The pump is blue.. Colour:"
    with pytest.raises(UserError, match="there is no form 'stord'"):
        recall.read(tmp_path / "fda.jsonl", "stord")
    (tmp_path / "bad.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no records of recall questions: KeyError 'text'"):
        recall.read(tmp_path / "bad.jsonl")


def test_a_long_document_keeps_the_answer():
    question = recall.Question("x " * 300 + "the pump is blue. " + "y " * 300 + "\nColour:", "blue")
    kept = recall.window(Bytes(), question, 64)
    assert len(kept) == 64
    shown = Bytes().decode(kept)
    assert "pump is blue" in shown
    assert shown.endswith("\nColour:")
    short = recall.window(Bytes(), recall.Question("It is blue.\nColour:", "blue"), 64)
    assert Bytes().decode(short) == "It is blue.\nColour:"


@pytest.mark.parametrize(
    ("written", "right"), [(" Blue, I think\nred", True), ("\nblue", True), ("red\nblue", False), ("bl", False)]
)
def test_is_right(written, right):
    assert recall.is_right(written, "blue ") == right


def test_accuracy_runs(model):
    questions = [recall.Question("a b", ""), recall.Question("a b", "never written by this model")]
    assert recall.accuracy(model, Bytes(), questions, 8) == 0.5
