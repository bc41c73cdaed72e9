"""`eval.py --prompt` on a tiny model of bytes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from deltanet.throughput import RandomTokens, Shape, training_config
from training.loop import train

ROOT = Path(__file__).parents[1]


class Bytes:
    """The tokenizer of a task: bytes of UTF-8."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class RandomText(RandomTokens):
    """Random tokens that are called bytes."""

    tokenizer = Bytes()


def config(task: str) -> ConfigDict:
    model = {"vocabulary_size": 256, "width": 16, "depth": 1, "hidden": 8, "dtype": "float32"}
    made = training_config("tiny", "deltanet", Shape(1, 8), **model)
    made.task.name, made.steps, made.steps_per_dispatch = task, "1 step", 1
    return made


def sample(workdir: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "eval.py", f"--workdir={workdir}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_prompt_is_continued(tmp_path):
    train(config("tests.test_sampling_cli.RandomText"), tmp_path / "text")
    arguments = ("--prompt=It was", "--tokens=5", "--top_k=9", "--seed=2")
    first, second = (sample(tmp_path / "text", *arguments) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("It was")
    assert len(first.stdout) > len("It was")
    assert first.stdout == second.stdout
    for wrong, message in (("--prompt=", "at least one token"), ("--top_k=0", "top_k=0")):
        done = sample(tmp_path / "text", *arguments, wrong)
        assert (done.returncode, message in done.stderr) == (2, True)


def test_a_run_without_text_has_no_prompts(tmp_path):
    train(config("deltanet.throughput.RandomTokens"), tmp_path / "random")
    done = sample(tmp_path / "random", "--prompt=It was")
    assert done.returncode == 2
    assert "its task has no tokenizer" in done.stderr
