"""RegBench: automata, strings and sequences."""

import numpy as np
import pytest

from deltanet.synthetic.regbench import LETTERS, PAD, SEPARATOR, automata, legal_symbols, regbench, sequences
from deltanet.synthetic.tokens import IGNORE


@pytest.fixture(scope="module")
def data():
    return sequences(np.random.default_rng(0), 400)


def test_automata():
    machines = automata(np.random.default_rng(1), 300)
    degrees = set(machines.edges.ravel())
    assert degrees == {1, 2, 3}
    for edges, symbols, targets in zip(*machines, strict=True):
        used = {0}  # the nodes that can be reached are among those that exist
        for _ in range(12):
            used |= {targets[node, e] for node in used for e in range(edges[node])}
        for node in used:
            out = targets[node, : edges[node]]
            assert len(set(out)) == len(out) == len(set(symbols[node, : edges[node]]))
            assert node not in out
        assert len({s for node in used for s in symbols[node, : edges[node]]}) <= LETTERS
    popcount = np.bitwise_count(legal_symbols(machines))
    np.testing.assert_array_equal(popcount, machines.edges)


def strings(row):
    text = row[row != PAD]
    return [list(part) for part in np.split(text, np.flatnonzero(text == SEPARATOR))]


def test_sequences_are_10_to_19_strings_of_1_to_49_symbols(data):
    counts, sizes = [], []
    for row in data.tokens:
        parts = strings(row)
        counts.append(len(parts))
        sizes += [len(part) - (i > 0) for i, part in enumerate(parts)]
    assert (min(counts), max(counts)) == (10, 19)
    assert (min(sizes), max(sizes)) == (1, 49)
    assert (data.tokens != PAD).sum(1).mean() == pytest.approx(376, rel=0.05)


def test_labels_are_the_next_symbols_and_legal(data):
    following = np.pad(data.tokens[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    asked = (following != PAD) & (following != SEPARATOR)
    np.testing.assert_array_equal(data.labels, np.where(asked, following, IGNORE))
    assert (data.legal[asked] >> data.labels[asked] & 1).all()


def test_every_string_starts_at_one_node(data):
    for tokens, legal, labels in zip(data.tokens, data.legal, data.labels, strict=True):
        starts = tokens == SEPARATOR
        assert len(set(legal[starts])) == 1
        assert legal[starts][0] >> tokens[0] & 1
        assert set(labels[starts]) <= {s for s in range(LETTERS) if legal[starts][0] >> s & 1}


def test_symbols_are_uniform_over_edges(data):
    asked = data.labels != IGNORE
    legal, label = data.legal[asked], data.labels[asked]
    three = np.bitwise_count(legal) == 3
    lowest = (legal & -legal)[three] == 1 << label[three].astype(np.int64)
    assert lowest.mean() == pytest.approx(1 / 3, abs=0.01)


def test_held_out_automata_are_new():
    data = regbench(20, held_out=20, seed=3)
    assert {name: len(held.tokens) for name, held in data.held_out.items()} == {"valid": 10, "test": 10}
    seen = {row[:12].tobytes() for row in data.train.tokens}
    assert not seen & {row[:12].tobytes() for row in data.held_out["test"].tokens}
    np.testing.assert_array_equal(data.train.tokens, regbench.__wrapped__(20, held_out=20, seed=3).train.tokens)
