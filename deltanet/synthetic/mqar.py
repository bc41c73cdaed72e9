"""Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927), as Figure 4 of the DeltaNet paper uses it.

A sequence is `k1 v1 k2 v2 ...`, then each key once more, far apart more rarely than close by, and the model predicts
the key's value when it reads the key again. The value itself never follows in the input.
"""

import functools

import numpy as np

from deltanet.synthetic.tokens import IGNORE, Benchmark, TokenSet, distinct, successive
from training.errors import UserError

POWER = 0.01
"""The density of the distances between key and query is proportional to distance ** (POWER - 1)."""


@functools.lru_cache(maxsize=2)
def mqar(
    length: int = 512,
    pairs: int = 64,
    *,
    vocabulary: int = 8192,
    train: int = 100_000,
    test: int = 3000,
    seed: int = 123,
    random_fillers: bool = False,
    fewer: tuple[int, ...] = (),
    block: int = 128,
) -> Benchmark:
    """The benchmark; training and test examples are independent.

    Args:
      length: tokens in an example, even.
      pairs: of key and value, at most a quarter of `length`.
      vocabulary: half of the tokens are keys, the others values; token 0 is neither.
      train: training examples.
      test: test examples.
      seed: of everything.
      random_fillers: whether the places that are neither pair nor query hold random tokens instead of token 0.
      fewer: numbers of pairs that training examples have in turn with `pairs`.
      block: examples in succession that have the same number of pairs; a batch, so that each step weighs the same.

    Raises:
      UserError: the pairs do not fit.
    """
    if length % 2 or 4 * pairs > length or pairs >= vocabulary // 2:
        raise UserError(f"{pairs} pairs need an even length of at least {4 * pairs} and more keys; length is {length}")
    rngs = np.random.default_rng(seed).spawn(2)

    def make(rng: np.random.Generator, count: int, pairs: int) -> TokenSet:
        return examples(rng, count, length, pairs, vocabulary, random_fillers)

    blocks = [
        make(rngs[0], min(block, train - begin), (pairs, *fewer)[index % (1 + len(fewer))])
        for index, begin in enumerate(range(0, train, block))
    ]
    training = TokenSet(*(np.concatenate(arrays) for arrays in zip(*(b[:2] for b in blocks), strict=True)))
    return Benchmark(training, {"test": make(rngs[1], test, pairs)}, vocabulary)


def examples(
    rng: np.random.Generator, count: int, length: int, pairs: int, vocabulary: int, random_fillers: bool
) -> TokenSet:
    """`count` examples; arguments as of `mqar`."""
    rows = np.arange(count)[:, None]
    keys = distinct(rng, count, 1, vocabulary // 2, pairs)
    values = distinct(rng, count, vocabulary // 2, vocabulary, pairs)
    space = (length - 2 * pairs) // 2
    gaps = successive(rng, count, POWER * np.arange(1, space + 1) ** (POWER - 1), pairs)
    queries = 2 * pairs + 2 * gaps

    tokens = np.zeros((count, length), np.int16)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    tokens[rows, queries] = keys
    if random_fillers:
        tokens = np.where(tokens == 0, rng.integers(0, vocabulary, tokens.shape, np.int16), tokens)
    labels = np.full((count, length), IGNORE, np.int16)
    labels[rows, queries] = values
    return TokenSet(tokens, labels)
