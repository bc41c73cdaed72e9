"""Durations in steps, epochs, examples or percent of the run, as configs write them.

`"3000"`, `"3000 steps"`, `"90 epochs"`, `"1e6 examples"` and `"10%"` are durations; so is a plain integer (steps).
"""

import math
import re

from training.errors import UserError

_FORM = re.compile(r"\s*([0-9][0-9_]*\.?[0-9]*(?:[eE][+-]?[0-9]+)?)\s*(%|[a-z]*)\s*")
_UNITS = ("steps", "epochs", "examples", "%")


def to_steps(
    duration: str | int,
    *,
    batch_size: int | None = None,
    examples_per_epoch: int | None = None,
    total_steps: int | None = None,
) -> int:
    """The number of optimiser steps in `duration`, rounded up to whole steps.

    Args:
      duration: see the module's docstring. Zero means "never" wherever an interval is asked for.
      batch_size: examples per step, needed for epochs and examples.
      examples_per_epoch: size of the training set, needed for epochs.
      total_steps: length of the run, needed for percent.

    Raises:
      UserError: the text is no duration, or its unit needs something that this run does not have.
    """
    match = _FORM.fullmatch(str(duration))
    if match is None or (unit := _unit(match[2])) is None:
        raise UserError(f"{duration!r} is not a duration; write '300 steps', '2 epochs', '1e6 examples' or '10%'")
    amount = float(match[1].replace("_", ""))
    if unit == "steps":
        steps = amount
    elif unit == "%":
        steps = amount / 100 * _need(total_steps, duration, "the length of the run, which it cannot be itself")
    elif unit == "examples":
        steps = amount / _need(batch_size, duration, "a batch size")
    else:
        per_epoch = _need(examples_per_epoch, duration, "a data set with a known number of examples")
        steps = amount * per_epoch / _need(batch_size, duration, "a batch size")
    return math.ceil(steps - 1e-9)


def _unit(word: str) -> str | None:
    if not word:
        return "steps"
    return next((unit for unit in _UNITS if word in (unit, unit.removesuffix("s"))), None)


def _need(value: int | None, duration: str | int, what: str) -> int:
    if not value:
        raise UserError(f"the duration {duration!r} needs {what}; give it in steps instead")
    return value


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`, `7300` -> `2h02m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
