"""MAD: the tasks' definitions, read off their sequences by code that shares nothing with the generators."""

import numpy as np
import pytest

from deltanet.synthetic.mad import CHANGES, TASKS, mad
from deltanet.synthetic.tokens import IGNORE
from training.errors import UserError

SMALL = {"train": 200, "test": 200}


def both(task, **changes):
    data = mad(task, **{**SMALL, **changes})
    return data.train, data.held_out["test"]


@pytest.mark.parametrize("task", ["in_context_recall", "noisy_recall"])
def test_recall(task):
    train, test = both(task)
    usable = 16
    assert train.tokens.shape == (200, 127)
    np.testing.assert_array_equal(train.labels[:, :-1], train.tokens[:, 1:])  # every next token is a label
    noise = 0
    for tokens, labels in zip(test.tokens, test.labels, strict=True):
        sequence, value_of, expected = [*tokens, labels[-1]], {}, np.full(127, IGNORE)
        for place in range(0, 128, 2):
            key, value = sequence[place : place + 2]
            if key >= usable:
                assert task == "noisy_recall"
                assert value >= usable
                noise += 1
                continue
            assert key < usable // 2 <= value < usable
            if key in value_of:
                expected[place] = value
            assert value_of.setdefault(key, value) == value
        np.testing.assert_array_equal(labels, expected)
        assert labels[-1] != IGNORE  # the last key has appeared
    assert noise / (200 * 64) == pytest.approx(0.2 if task == "noisy_recall" else 0, abs=0.02)


def test_noise_spares_a_pair():
    train, _ = both("noisy_recall", noise=1.0)
    assert ((train.tokens[:, :126:2] < 16).sum(1) == 1).all()
    np.testing.assert_array_equal(train.tokens[:, 126], train.tokens[:, :126:2].min(1))  # the last key is that pair's


def parse_fuzzy(sequence, half, pad):
    """Keys and values, each with the place of its first token."""
    pairs, place = [], int(np.argmax(np.asarray(sequence) != pad))
    while place < len(sequence):
        start = place
        while place < len(sequence) and sequence[place] < half:
            place += 1
        middle = place
        while place < len(sequence) and half <= sequence[place] < pad:
            place += 1
        pairs.append((start, tuple(sequence[start:middle]), middle, tuple(sequence[middle:place])))
    return pairs


def test_fuzzy_recall():
    train, test = both("fuzzy_recall")
    half, pad = 7, 15
    np.testing.assert_array_equal(train.labels[:, :-1], train.tokens[:, 1:])
    placed = 0
    for tokens, labels in zip(test.tokens, test.labels, strict=True):
        if labels[-1] == IGNORE:  # the probe was not presented: its boundary would have come too late
            continue
        placed += 1
        pairs = parse_fuzzy([*tokens, labels[-1]], half, pad)
        value_of, expected = {}, np.full(129, IGNORE)
        for _, key, start, value in pairs:
            assert len(key) == len(set(key)) == 3
            assert 1 <= len(value) == len(set(value)) <= 3
            if key in value_of:
                expected[start : start + len(value)] = value
            assert value_of.setdefault(key, value) == value
        np.testing.assert_array_equal(labels, expected[1:])
        assert pairs[0][0] <= 12  # padding is short
    assert placed > 150
    sizes = {len(key) for row in train.tokens for _, key, _, _ in parse_fuzzy([*row], half, pad)[1:-1]}
    assert sizes == {1, 2, 3}


def test_selective_copying():
    _, test = both("selective_copying")
    copy, blank = 15, 14
    assert test.tokens.shape == (200, 256)
    for tokens, labels in zip(test.tokens, test.labels, strict=True):
        content = tokens[tokens < blank]
        np.testing.assert_array_equal(labels, [IGNORE] * 240 + list(content))
        assert tokens[239] == copy
        assert tokens[238] == content[-1]
        assert (tokens[240:] == blank).all()
    starts = np.argmax(test.tokens < blank, 1)
    assert starts.mean() == pytest.approx(223 / 16, abs=1)  # blanks are spread evenly over the tokens


def test_compression():
    train, _ = both("compression")
    assert (train.tokens[:, -1] == 15).all()
    assert (train.tokens[:, :-1] < 15).all()
    assert train.tokens.shape[1] == 32
    np.testing.assert_array_equal(train.tokens, train.labels)


def test_memorization_has_one_mapping():
    train, test = both("memorization", train=100, vocabulary=16)
    mapping = {}
    for data in (train, test):
        assert (data.tokens[:, 1::2] == 15).all()
        assert (data.labels[:, ::2] == IGNORE).all()
        for key, value in zip(data.tokens[:, ::2].ravel(), data.labels[:, 1::2].ravel(), strict=True):
            assert mapping.setdefault(key, value) == value
    assert sorted(mapping) == list(range(7))
    assert sorted(mapping.values()) == list(range(7, 14))


def test_baselines_and_changes_are_66_settings():
    assert sum(1 + sum(map(len, changes.values())) for changes in CHANGES.values()) == 66
    for task, changes in CHANGES.items():
        assert changes.keys() <= TASKS[task][1].keys()


def test_a_seed_decides_and_wrong_names_are_refused():
    one, again = mad("compression", train=10), mad.__wrapped__("compression", train=10)
    np.testing.assert_array_equal(one.train.tokens, again.train.tokens)
    with pytest.raises(UserError, match="no task"):
        mad("recall")
    with pytest.raises(UserError, match="no argument"):
        mad("compression", noise=0.1)
