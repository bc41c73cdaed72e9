"""The entry that lists and runs reproductions, as a user meets it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def call(*arguments):
    command = [sys.executable, "scripts/reproduce.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_list_names_entries_scales_and_results(tmp_path):
    folder = tmp_path / "icl" / "preconditioned_gd"
    folder.mkdir(parents=True)
    rows = [{"passed": True}, {"passed": False}, {"passed": None}]
    record = {"rows": rows, "trainings": {"t": {"seconds": 70.0, "device": "1 x Abacus"}}}
    (folder / "figure1.cpu.json").write_text(json.dumps(record))
    measured = {"rows": rows, "trainings": {}, "seconds": 5.0, "device": "1 x Abacus"}
    (folder / "figure1.gpu.json").write_text(json.dumps(measured))
    listed = call("--list", f"--results={tmp_path}").stdout
    assert "icl/preconditioned_gd/figure1\n    Figure 1" in listed
    assert "1 of 2 criteria met; 1m10s of training on 1 x Abacus" in listed
    assert "1 of 2 criteria met; 5s on 1 x Abacus" in listed
    assert "no result yet" in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["icl/preconditioned_gd/figur1"], "did you mean 'icl/preconditioned_gd/figure1'?"),
        (["icl/preconditioned_gd/figure1", "--scale=paper"], "has no scale 'paper'; it has cpu, gpu"),
        ([], "name an entry, or use --list"),
    ],
)
def test_bad_input_ends_in_one_message(arguments, message):
    done = call(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
