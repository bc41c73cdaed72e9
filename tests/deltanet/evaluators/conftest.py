import pytest
from flax import nnx

from deltanet.language import language_model


@pytest.fixture(scope="session")
def model():
    """A language model of bytes, untrained."""
    return language_model("tiny", "softmax", width=64, depth=1, vocabulary_size=257, rngs=nnx.Rngs(0))
