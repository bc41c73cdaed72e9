"""The six tasks of MAD (Poli et al. 2024, arXiv:2403.17844), as its released code makes them.

Where code and text of the benchmark differ, this is the code's way. Tokens in [0, U/2) are keys and those in
[U/2, U) values, U being the vocabulary without its special tokens.
"""

import functools
from collections.abc import Callable

import numpy as np

from deltanet.synthetic.tokens import IGNORE, Benchmark, TokenSet, next_tokens
from training.errors import UserError, nearest

_MOTIF = 3  # the longest key or value of fuzzy recall


def _recall(
    rng: np.random.Generator, count: int, training: bool, vocabulary: int, length: int, noise: float, noise_tokens: int
) -> TokenSet:
    """In-context recall; with `noise`, a share of the pairs are two noise tokens each.

    Each pair has a random key, whose value is drawn when it first appears in the sequence; the last pair's key is one
    that has appeared. In training every next token is to be predicted, in the test only values of keys seen before.
    """
    half, pairs = (vocabulary - noise_tokens) // 2, length // 2 - 1
    rows = np.arange(count)[:, None]
    value_of = half + rng.integers(0, half, (count, half))
    keys = rng.integers(0, half, (count, pairs))
    quiet = rng.random((count, pairs)) >= noise
    quiet[rows[:, 0], rng.integers(0, pairs, count)] = True
    present = np.zeros((count, half), bool)
    present[np.nonzero(quiet)[0], keys[quiet]] = True
    last = np.where(present, rng.random((count, half)), -1).argmax(1)  # uniformly one of those present
    keys, quiet = np.column_stack([keys, last]), np.pad(quiet, ((0, 0), (0, 1)), constant_values=True)

    sequence = np.stack([keys, value_of[rows, keys]], 2).reshape(count, -1)
    if noise:
        noisy = rng.integers(2 * half, 2 * half + noise_tokens, sequence.shape)
        sequence = np.where(quiet.repeat(2, 1), sequence, noisy)
    tokens, labels = next_tokens(sequence)
    if not training:
        seen = _seen_before(np.where(quiet, keys, -1))
        labels = np.where(np.repeat(seen, 2, 1)[:, :-1] & (np.arange(tokens.shape[1]) % 2 == 0), labels, IGNORE)
    return TokenSet(tokens, labels)


def _seen_before(keys: np.ndarray) -> np.ndarray:
    """Whether a key, a number that is not negative, is in an earlier column of its row, [rows, columns]."""
    earlier = np.tril(keys[:, :, None] == keys[:, None, :], -1).any(2)
    return earlier & (keys >= 0)


def _fuzzy_recall(rng: np.random.Generator, count: int, training: bool, vocabulary: int, length: int) -> TokenSet:
    """Recall of keys and values that are motifs: ordered tuples of 1 to 3 distinct tokens. At the test keys have 3.

    The last pair is the probe: it also stands at the first boundary past a random place, where one comes in time.
    """
    half, pad = (vocabulary - 1) // 2, vocabulary - 1
    pairs = length // 2
    key_sizes = rng.integers(1, _MOTIF + 1, (count, pairs + 1)) if training else np.full((count, pairs + 1), _MOTIF)
    value_sizes = rng.integers(1, _MOTIF + 1, (count, pairs + 1))
    tokens = np.full((count, length), pad, np.int16)
    labels = np.full((count, length), IGNORE, np.int16)
    for row in range(count):
        motifs = [
            [
                tuple(low + order[:size])
                for order, size in zip(rng.random((pairs + 1, half)).argsort(1), sizes, strict=True)
            ]
            for low, sizes in ((0, key_sizes[row]), (half, value_sizes[row]))
        ]
        sequence, is_value = _fuzzy_sequence(rng, length, list(zip(*motifs, strict=True)))
        start = length + 1 - len(sequence)
        padded = np.full(length + 1, pad)
        padded[start:] = sequence
        tokens[row] = padded[:-1]
        if training:
            labels[row] = padded[1:]
        else:
            asked = np.zeros(length + 1, bool)
            asked[start:] = is_value
            labels[row] = np.where(asked[1:], padded[1:], IGNORE)
    return TokenSet(tokens, labels)


def _fuzzy_sequence(
    rng: np.random.Generator, length: int, pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
) -> tuple[list[int], list[bool]]:
    """Tokens, at most `length + 1`, and which of them are values of keys that have appeared before.

    Args:
      rng: of the probe's place.
      length: see `_fuzzy_recall`.
      pairs: the probe, then as many as could be needed; of the values of a key only the first counts.
    """
    (probe_key, probe_value), *others = pairs
    values = {probe_key: probe_value}
    sequence, repeated, presented = [], [], set()

    def append(key: tuple[int, ...]) -> None:
        sequence.extend((*key, *values[key]))
        repeated.extend((*[False] * len(key), *[key in presented] * len(values[key])))
        presented.add(key)

    size = len(probe_key) + len(probe_value)
    place, waiting = rng.integers(0, length - 2 * size), True
    drawn = iter(others)
    while len(sequence) <= length - size - 2 * _MOTIF:
        if waiting and len(sequence) >= place:
            append(probe_key)
            waiting = False
            continue
        key, value = next(drawn)
        values.setdefault(key, value)
        append(key)
    append(probe_key)
    return sequence, repeated


def _selective_copying(
    rng: np.random.Generator, count: int, training: bool, vocabulary: int, length: int, copied: int
) -> TokenSet:
    """Tokens among blanks, a copy token, and as many blanks, on which the tokens are to be predicted in their order.

    Blanks come before tokens, never after the last one, which stands right before the copy token.
    """
    copy, blank = vocabulary - 1, vocabulary - 2
    content = rng.integers(0, blank, (count, copied))
    blanks = length - 2 * copied - 1
    before = rng.multinomial(blanks, np.full(copied, 1 / copied), count)  # blanks before each token
    tokens = np.full((count, length), blank, np.int16)
    tokens[np.arange(count)[:, None], np.arange(copied) + before.cumsum(1)] = content
    tokens[:, copied + blanks] = copy
    labels = np.full((count, length), IGNORE, np.int16)
    labels[:, -copied:] = content
    return TokenSet(tokens, labels)


def _compression(rng: np.random.Generator, count: int, training: bool, vocabulary: int, length: int) -> TokenSet:
    """Random tokens and the compression token, all of which are to be decoded from the output of the last."""
    tokens = rng.integers(0, vocabulary - 1, (count, length), np.int16)
    tokens[:, -1] = vocabulary - 1
    return TokenSet(tokens, tokens.copy())


_MAPPING_SEED = 12345


def _memorization(rng: np.random.Generator, count: int, training: bool, vocabulary: int, length: int) -> TokenSet:
    """Keys, each followed by the insert token, on which the key's value is to be predicted: one fixed bijection."""
    half, insert = (vocabulary - 1) // 2, vocabulary - 1
    value_of = half + np.random.default_rng(_MAPPING_SEED).permutation(half)
    keys = rng.integers(0, half, (count, length // 2))
    tokens = np.full((count, length), insert, np.int16)
    labels = np.full((count, length), IGNORE, np.int16)
    tokens[:, ::2], labels[:, 1::2] = keys, value_of[keys]
    return TokenSet(tokens, labels)


TASKS: dict[str, tuple[Callable[..., TokenSet], dict[str, float]]] = {
    "compression": (_compression, {"vocabulary": 16, "length": 32, "train": 12_800}),
    "fuzzy_recall": (_fuzzy_recall, {"vocabulary": 16, "length": 128, "train": 12_800}),
    "in_context_recall": (
        functools.partial(_recall, noise=0.0, noise_tokens=0),
        {"vocabulary": 16, "length": 128, "train": 12_800},
    ),
    "memorization": (_memorization, {"vocabulary": 256, "length": 32, "train": 256}),
    "noisy_recall": (
        functools.partial(_recall, noise_tokens=16),
        {"vocabulary": 32, "length": 128, "train": 12_800, "noise": 0.2},
    ),
    "selective_copying": (_selective_copying, {"vocabulary": 16, "length": 256, "train": 12_800, "copied": 16}),
}
"""The tasks with the arguments of their baseline settings."""

_VOCABULARIES, _LENGTHS, _SIZES = (32, 64, 128), (256, 512, 1024), (6400, 3200, 1600, 800)

CHANGES: dict[str, dict[str, tuple[float, ...]]] = {
    "compression": {"vocabulary": _VOCABULARIES, "length": (64, 128, 256), "train": _SIZES},
    "fuzzy_recall": {"vocabulary": _VOCABULARIES, "length": _LENGTHS, "train": _SIZES},
    "in_context_recall": {"vocabulary": _VOCABULARIES, "length": _LENGTHS, "train": _SIZES},
    "memorization": {"vocabulary": (512, 1024, 2048, 4096, 8192)},
    "noisy_recall": {"vocabulary": (48, 80, 144), "length": _LENGTHS, "train": _SIZES, "noise": (0.4, 0.6, 0.8)},
    "selective_copying": {
        "vocabulary": _VOCABULARIES,
        "length": (512, 1024),
        "train": _SIZES,
        "copied": (32, 64, 96),
    },
}
"""What the benchmark changes, one argument at a time; 66 settings with the baselines."""


@functools.lru_cache(maxsize=2)
def mad(task: str, *, test: int = 1280, seed: int = 12345, **changes: float) -> Benchmark:
    """A task of MAD at its baseline setting, some arguments changed.

    Args:
      task: a key of `TASKS`.
      test: test examples.
      seed: of the examples; the mapping to be memorised has its own.
      **changes: instead of the baseline's arguments.

    Raises:
      UserError: no such task or argument.
    """
    if task not in TASKS:
        raise UserError(f"MAD has no task {task!r}: {nearest(task, TASKS)}")
    make, arguments = TASKS[task]
    for name in changes:
        if name not in arguments:
            raise UserError(f"MAD's {task} has no argument {name!r}: {nearest(name, arguments)}")
    arguments = {**arguments, **changes}
    train = arguments.pop("train")
    rngs = np.random.default_rng(seed).spawn(2)
    sets = [
        make(rng, count, training=training, **arguments)
        for rng, count, training in zip(rngs, (train, test), (True, False), strict=True)
    ]
    return Benchmark(sets[0], {"test": sets[1]}, int(arguments["vocabulary"]))
