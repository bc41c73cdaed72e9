import jax
import numpy as np
import pytest
from flax import nnx

from deltanet.language import language_model

LONGEST = 16


@pytest.fixture(scope="session")
def model():
    """A language model of bytes, untrained."""
    return nnx.jit(
        lambda: language_model("tiny", "softmax", width=64, depth=1, vocabulary_size=257, rngs=nnx.Rngs(0))
    )()


@pytest.fixture(scope="session")
def logits(model):
    """The model's logits after each token of a row of at most 16, float64; compiled once."""
    graph, state = nnx.split(model)
    forward = jax.jit(lambda tokens: nnx.merge(graph, state)(tokens))

    def call(row):
        padded = np.zeros((1, LONGEST), np.int32)
        padded[0, : len(row)] = row
        return np.asarray(forward(padded), np.float64)[0, : len(row)]

    return call
