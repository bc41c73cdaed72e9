"""MQAR: every property that its description states."""

import numpy as np
import pytest

from deltanet.synthetic.mqar import POWER, examples, mqar
from deltanet.synthetic.tokens import IGNORE, distinct, successive
from training.errors import UserError

PAIRS, LENGTH, VOCABULARY = 6, 40, 64


def made(count=200, **changes):
    options = {"length": LENGTH, "pairs": PAIRS, "vocabulary": VOCABULARY, "random_fillers": False, **changes}
    return examples(np.random.default_rng(0), count, **options)


def test_pairs_come_first_with_distinct_keys_below_and_distinct_values_above_the_middle():
    pairs = made().tokens[:, : 2 * PAIRS].reshape(-1, PAIRS, 2)
    keys, values = pairs[..., 0], pairs[..., 1]
    assert keys.min() >= 1
    assert keys.max() < VOCABULARY // 2 <= values.min()
    assert values.max() < VOCABULARY
    assert all(len(set(row)) == PAIRS for row in (*keys, *values))


def test_every_key_is_asked_once_at_an_even_place_and_labelled_there_with_its_value():
    data = made()
    for tokens, labels in zip(data.tokens, data.labels, strict=True):
        value_of = dict(tokens[: 2 * PAIRS].reshape(PAIRS, 2))
        places = np.flatnonzero(labels != IGNORE)
        assert sorted(tokens[places]) == sorted(value_of)
        assert (places >= 2 * PAIRS).all()
        assert (places % 2 == 0).all()
        assert [value_of[key] for key in tokens[places]] == list(labels[places])
        others = np.setdiff1d(np.arange(2 * PAIRS, LENGTH), places)
        assert (tokens[others] == 0).all()  # so the answers are never in the input
    assert data.labelled == PAIRS


def test_fillers_can_be_random():
    tokens, labels = made(random_fillers=True)[:2]
    rest = tokens[:, 2 * PAIRS :][labels[:, 2 * PAIRS :] == IGNORE]
    assert len(np.unique(rest)) == VOCABULARY


def test_the_first_key_is_asked_at_distances_of_a_power_law():
    data = made(4000)
    first = (data.tokens[:, 2 * PAIRS :: 2] == data.tokens[:, :1]).argmax(1)
    slots = (LENGTH - 2 * PAIRS) // 2
    expected = POWER * np.arange(1, slots + 1) ** (POWER - 1)
    np.testing.assert_allclose(np.bincount(first, minlength=slots) / 4000, expected / expected.sum(), atol=0.03)


def test_slots_are_drawn_one_after_the_other_without_replacement():
    weights = np.array([5.0, 3.0, 1.0, 1.0])
    mine = successive(np.random.default_rng(0), 20_000, weights, 2)
    p = weights / weights.sum()
    for first in range(4):
        for second in range(4):
            share = (mine == (first, second)).all(1).mean()
            expected = 0 if first == second else p[first] * p[second] / (1 - p[first])
            assert share == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("count", [3, 30])
def test_distinct_numbers_are_uniform(count):
    drawn = distinct(np.random.default_rng(1), 6000, 10, 50, count)
    assert all(len(set(row)) == count for row in drawn[:100])
    for column in (0, count - 1):
        np.testing.assert_allclose(np.bincount(drawn[:, column] - 10, minlength=40) / 6000, 1 / 40, atol=0.01)


def test_sets_are_a_function_of_the_seed_and_do_not_share_examples():
    options = {"length": 16, "pairs": 2, "vocabulary": 32, "train": 50, "test": 50}
    one, other = mqar(**options, seed=1), mqar(**options, seed=2)
    again = mqar.__wrapped__(**options, seed=1)
    np.testing.assert_array_equal(one.train.tokens, again.train.tokens)
    assert (one.train.tokens != other.train.tokens).any()
    assert (one.train.tokens != one.held_out["test"].tokens).any()


def test_training_examples_with_fewer_pairs():
    mixed = mqar(length=16, pairs=4, vocabulary=32, train=50, test=30, fewer=(1, 2), block=10)
    assert (mixed.train.labels != IGNORE).sum(1).tolist() == [pairs for pairs in (4, 1, 2, 4, 1) for _ in range(10)]
    assert ((mixed.held_out["test"].labels != IGNORE).sum(1) == 4).all()
    assert len(np.unique(mixed.train.tokens, axis=0)) > 45


@pytest.mark.parametrize(("length", "pairs"), [(511, 64), (252, 64), (512, 4096)])
def test_pairs_that_do_not_fit_are_refused(length, pairs):
    with pytest.raises(UserError, match="pairs need"):
        mqar(length, pairs)
