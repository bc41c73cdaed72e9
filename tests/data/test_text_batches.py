import numpy as np
import pytest

from data.packing import segments
from data.text_batches import Batches, GrainBatches, WindowSource
from training.errors import UserError

SHARDS = [np.arange(10), np.arange(10, 13), np.arange(13, 50)]
SOURCE = WindowSource(SHARDS, 4)
WHOLE = slice(0, 3)


def test_windows_reach_over_shards():
    assert len(SOURCE) == 12
    for i, window in enumerate(SOURCE):
        np.testing.assert_array_equal(window, np.arange(4 * i, 4 * i + 5))


def test_an_epoch_has_every_window_once():
    batches = Batches(SOURCE, 3, WHOLE, seed=1)
    epochs = [np.concatenate([next(batches) for _ in range(4)])[:, 0] for _ in range(2)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), 4 * np.arange(12))
    assert (epochs[0] != epochs[1]).any()


def test_two_processes_share_batches():
    whole = next(Batches(SOURCE, 4, slice(0, 4), seed=1))
    parts = [next(Batches(SOURCE, 4, slice(2 * i, 2 * i + 2), seed=1)) for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def make_grain():
    pytest.importorskip("grain", reason="reading ahead needs the package grain")
    return GrainBatches(SOURCE, 3, WHOLE, 1, lambda x: x)


@pytest.mark.parametrize("make", [lambda: Batches(SOURCE, 3, WHOLE, 1), make_grain], ids=["numpy", "grain"])
def test_batches_resume(make):
    batches = make()
    for _ in range(6):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(3)]
    resumed = make()
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(resumed), batch)


def test_too_few_windows():
    with pytest.raises(UserError, match="the texts have 12 windows, fewer than a batch of 13"):
        Batches(SOURCE, 13, slice(0, 13), 0)


def test_segments():
    tokens = np.array([[1, 9, 2, 2, 9, 9], [9, 1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(segments(tokens, 9), [[0, 1, 1, 1, 2, 3], [1, 1, 1, 1, 1, 1]])
