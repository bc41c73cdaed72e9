import itertools

import pytest

from training import timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that a call moves on by a tenth of a second."""
    ticks = itertools.count()
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += 0.1
        return next(ticks)

    return call


def test_calls_within(clock):
    assert timing.calls_within(clock, 0.55) == 5
    assert timing.calls_within(clock, 0.01) == 1
    assert timing.calls_within(clock, 100) == 50


def test_batches_wait_for_their_last_call(clock):
    waited = []
    samples = timing.batch_seconds(clock, 3, 2, waited.append)
    assert samples == pytest.approx([0.1, 0.1])
    assert waited == [2, 5]
