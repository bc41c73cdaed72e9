"""RegBench (Akyürek et al. 2024, arXiv:2401.12973): in-context learning of random regular languages.

Each sequence holds strings of a probabilistic automaton of its own; the automata of held-out sequences are new. As in
the released code, nodes have 1 to 3 outgoing edges (the text says up to 4). The released code also minimises the
automata, which changes neither the strings nor which symbols are legal, so that it is left out here.
"""

import functools
from typing import NamedTuple

import numpy as np

from deltanet.synthetic.tokens import IGNORE, Benchmark, TokenSet

LETTERS = 18
SEPARATOR, PAD = LETTERS, LETTERS + 1
VOCABULARY = LETTERS + 2
_NODES, _ALPHABET, _EDGES = (4, 12), (4, 18), (1, 3)  # least and most
_STRINGS, _SYMBOLS = (10, 19), (1, 49)  # strings in a sequence, symbols in a string


class Automata(NamedTuple):
    """Random automata, one for each sequence. Strings start at node 0 and may end anywhere.

    Attributes:
      edges: how many edges leave a node, [automata, nodes].
      symbol: of each edge, [automata, nodes, most edges].
      target: the node that it leads to, like `symbol`.
    """

    edges: np.ndarray
    symbol: np.ndarray
    target: np.ndarray


def _between(rng: np.random.Generator, limits: tuple[int, int], shape: int | tuple[int, ...]) -> np.ndarray:
    return rng.integers(limits[0], limits[1] + 1, shape)


def _ranked(keys: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` smallest entries along the last axis, in their order."""
    return keys.argsort(-1)[..., :count]


def automata(rng: np.random.Generator, count: int) -> Automata:
    """Random automata: distinct symbols of a random alphabet, and distinct targets other than the node itself."""
    most_nodes, most_edges = _NODES[1], _EDGES[1]
    nodes, letters = _between(rng, _NODES, count), _between(rng, _ALPHABET, count)
    alphabet = rng.random((count, LETTERS)).argsort(1)
    place = rng.random((count, most_nodes, LETTERS))
    place[np.broadcast_to(np.arange(LETTERS) >= letters[:, None, None], place.shape)] = np.inf
    symbol = np.take_along_axis(alphabet[:, None], _ranked(place, most_edges), 2)
    other = rng.random((count, most_nodes, most_nodes))
    other[np.broadcast_to(np.arange(most_nodes) >= nodes[:, None, None], other.shape)] = np.inf
    other[:, np.arange(most_nodes), np.arange(most_nodes)] = np.inf
    return Automata(_between(rng, _EDGES, (count, most_nodes)), symbol, _ranked(other, most_edges))


def legal_symbols(machines: Automata) -> np.ndarray:
    """The symbols that may come at each node as bits, [automata, nodes], int32."""
    there = np.arange(_EDGES[1]) < machines.edges[..., None]
    return (there * 2**machines.symbol).sum(-1).astype(np.int32)


def sequences(rng: np.random.Generator, count: int, length: int | None = None) -> TokenSet:
    """Sequences of strings, a separator between two of them, each symbol uniform over its node's edges.

    Args:
      rng: source of everything.
      count: sequences, each of an automaton of its own.
      length: tokens to which the inputs are filled up; None is that of the longest sequence.
    """
    machines = automata(rng, count)
    legal_at = legal_symbols(machines)
    strings = _between(rng, _STRINGS, count)
    sizes = _between(rng, _SYMBOLS, (count, _STRINGS[1]))
    sizes[np.arange(_STRINGS[1]) >= strings[:, None]] = 0
    total = sizes.sum(1) + strings - 1
    ends = np.cumsum(sizes + 1, 1) - 1  # where separators stand; past the end for the last string
    time = int(total.max())
    separates = np.zeros((count, time + 1), bool)
    row, column = np.nonzero(np.arange(_STRINGS[1]) < strings[:, None] - 1)
    separates[row, ends[row, column]] = True

    tokens, legal = np.full((count, time), PAD, np.int16), np.zeros((count, time), np.int32)
    node, all_rows = np.zeros(count, np.int64), np.arange(count)
    for t in range(time):
        edge = (rng.random(count) * machines.edges[all_rows, node]).astype(np.int64)
        symbol, target = (table[all_rows, node, edge] for table in (machines.symbol, machines.target))
        node = np.where(separates[:, t], 0, target)
        tokens[:, t] = np.where(separates[:, t], SEPARATOR, symbol)
        legal[:, t] = legal_at[all_rows, node]
    tokens[np.arange(time) >= total[:, None]] = PAD
    labels = np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=PAD)
    labels[(labels == PAD) | (labels == SEPARATOR)] = IGNORE
    fill = ((0, 0), (0, max((length or time) - time, 0)))
    return TokenSet(
        np.pad(tokens, fill, constant_values=PAD),
        np.pad(labels, fill, constant_values=IGNORE),
        np.pad(legal, fill),
    )


@functools.lru_cache(maxsize=2)
def regbench(train: int = 2500, *, held_out: int = 500, seed: int = 0) -> Benchmark:
    """The benchmark.

    Args:
      train: training sequences; the paper has 1,000 to 40,000.
      held_out: validation and test sequences together, half of them each.
      seed: of everything.
    """
    rngs = np.random.default_rng(seed).spawn(3)
    valid, test = (sequences(rng, held_out // 2) for rng in rngs[1:])
    return Benchmark(sequences(rngs[0], train), {"valid": valid, "test": test}, VOCABULARY)
