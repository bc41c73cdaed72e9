"""The script that prepares data, as a user meets it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*arguments):
    command = [sys.executable, "scripts/prepare_data.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_list():
    assert {"eurosat", "fashion_mnist", "tfds_fashion_mnist"} <= set(call("--list").stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eurosad", "--source=."], "there is no data set 'eurosad': did you mean 'eurosat'"),
        (["eurosat", "--source=/nowhere"], "--source=/nowhere is no folder"),
        (["eurosat", "--source=tests"], "there is no file tests/EuroSAT.zip; get EuroSAT.zip from zenodo.org"),
        (["eurosat"], "give a name and --source"),
    ],
)
def test_bad_input_ends_in_one_message(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
