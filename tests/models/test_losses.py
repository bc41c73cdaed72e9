import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.losses import chunked_cross_entropy

KEYS = jax.random.split(jax.random.key(0), 5)
HIDDEN = jax.random.normal(KEYS[0], (2, 11, 6))
HEAD = jax.random.normal(KEYS[1], (6, 20))
LABELS = jax.random.randint(KEYS[2], (2, 11), 0, 20).at[:, 3].set(-100)
WEIGHTS = jax.random.uniform(KEYS[3], (2, 11)).at[:, 3].set(0.0)


def plain(hidden, head):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, jnp.maximum(LABELS, 0))
    return 0.3 * (WEIGHTS * losses).sum()


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_is_cross_entropy_with_its_gradients(chunk):
    def chunked(hidden, head):
        return 0.3 * chunked_cross_entropy(hidden, head, LABELS, WEIGHTS, chunk=chunk)[0]

    np.testing.assert_allclose(chunked(HIDDEN, HEAD), plain(HIDDEN, HEAD), rtol=1e-5)
    found = jax.grad(chunked, (0, 1))(HIDDEN, HEAD)
    for x, y in zip(found, jax.grad(plain, (0, 1))(HIDDEN, HEAD), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_counts():
    _, total, correct = chunked_cross_entropy(HIDDEN, HEAD, LABELS, WEIGHTS, chunk=6)
    right = (HIDDEN @ HEAD).argmax(-1) == LABELS
    np.testing.assert_allclose([total, correct], [WEIGHTS.sum(), (WEIGHTS * right).sum()], rtol=1e-6)


def test_no_program_holds_all_logits():
    hidden, head = jnp.zeros((2, 512, 8), jnp.bfloat16), jnp.zeros((8, 4096), jnp.bfloat16)
    labels, weights = jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512))
    gradient = jax.jit(jax.grad(lambda h, w: chunked_cross_entropy(h, w, labels, weights, chunk=64)[0], (0, 1)))
    temporary = gradient.lower(hidden, head).compile().memory_analysis().temp_size_in_bytes
    assert temporary < hidden.shape[0] * hidden.shape[1] * head.shape[1] * 2


def test_bfloat16_is_close():
    def chunked(hidden, head):
        return 0.3 * chunked_cross_entropy(hidden, head, LABELS, WEIGHTS, chunk=6)[0]

    low = jax.grad(chunked, (0, 1))(HIDDEN.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16))
    for x, y in zip(low, jax.grad(plain, (0, 1))(HIDDEN, HEAD), strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.linalg.norm(x.astype(jnp.float32) - y) <= 0.02 * np.linalg.norm(y)
