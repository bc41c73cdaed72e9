import pytest

from training.durations import format_seconds, to_steps
from training.errors import UserError


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (300, 300),
        ("300", 300),
        ("1 step", 1),
        ("3000 steps", 3000),
        ("1e4 steps", 10_000),
        ("10_000 steps", 10_000),
        ("2 epochs", 20),
        ("0.25 epochs", 3),  # 2.5 steps, rounded up
        ("1000 examples", 10),
        ("1001 examples", 11),
        ("10%", 50),
        ("0 steps", 0),
    ],
)
def test_every_unit(duration, steps):
    assert to_steps(duration, batch_size=100, examples_per_epoch=1000, total_steps=500) == steps


@pytest.mark.parametrize("text", ["", "ten steps", "10 parsecs", "-3 steps", "10 steps more"])
def test_no_duration(text):
    with pytest.raises(UserError, match="is not a duration"):
        to_steps(text, batch_size=1)


@pytest.mark.parametrize(("text", "need"), [("1 epoch", "data set"), ("10%", "length of the run")])
def test_a_unit_that_this_run_does_not_have(text, need):
    with pytest.raises(UserError, match=need):
        to_steps(text, batch_size=10)


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3s"), (75, "1m15s"), (7320, "2h02m")])
def test_times_are_readable(seconds, text):
    assert format_seconds(seconds) == text
