"""What the tables of the in-context papers share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.report import Context, Row


def config_file(folder: str, name: str, context: Context, /, **arguments: Any) -> str:
    """The config `folder/name.py` at the context's scale, with further arguments."""
    options = {"scale": context.scale, **arguments}
    return f"{folder}/{name}.py:" + ",".join(f"{key}={value}" for key, value in options.items())


def numbers(values: Sequence[float] | np.ndarray, digits: int = 3) -> str:
    """Numbers in a row."""
    return ", ".join(f"{float(v):.{digits}g}" for v in np.ravel(values))


def judged(scale: str, quantity: str, paper: str, ours: str, target: str, passed: Any) -> Row:
    """A row with a criterion. A run at scale cpu is smaller than the paper's and is not judged by it."""
    if scale == "cpu":
        return Row(quantity, paper, ours, f"at scale gpu: {target}")
    return Row(quantity, paper, ours, target, bool(passed))
