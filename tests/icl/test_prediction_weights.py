"""The vector that the prediction is linear in, for dense and diagonal matrices, against the literal transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icl.linear_attention import literal_transformer, prediction_weights
from icl.models import DiagonalLinearTransformer, LinearTransformer

N, D, BATCH = 9, 4, 5


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_tokens():
    tokens = np.random.default_rng(0).normal(size=(BATCH, D + 1, N + 1))
    return jnp.asarray(tokens)


def gram_of(tokens):
    return jnp.einsum("bin,bjn->ijb", tokens[..., :-1], tokens[..., :-1])


def literal_prediction(tokens, p, q):
    return -literal_transformer(tokens, p, N * q)[:, -1, -1]


def fast_prediction(tokens, p, q):
    return jnp.einsum("ib,bi->b", prediction_weights(gram_of(tokens), p, q), tokens[..., -1])


def dense(diagonal):
    return diagonal[..., None] * jnp.eye(D + 1)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (4, 1)])
def test_values_and_gradients(layers, heads, diagonal):
    tokens = make_tokens()
    shape = (2, layers, heads, D + 1) if diagonal else (2, layers, heads, D + 1, D + 1)
    p, q = jnp.asarray(np.random.default_rng(1).normal(size=shape) * 0.2 / D)
    widen = dense if diagonal else lambda matrix: matrix

    def literal(tokens, p, q):
        value = literal_prediction(tokens, widen(p), widen(q))
        return (value * jnp.arange(1, BATCH + 1)).sum(), value

    def fast(tokens, p, q):
        value = fast_prediction(tokens, p, q)
        return (value * jnp.arange(1, BATCH + 1)).sum(), value

    expected = jax.jit(jax.grad(literal, (0, 1, 2), has_aux=True))(tokens, p, q)
    actual = jax.jit(jax.grad(fast, (0, 1, 2), has_aux=True))(tokens, p, q)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("reads_labels", [True, False])
def test_models(reads_labels):
    """Shallower readouts, and the products of the diagonal model's numbers."""
    tokens = make_tokens()
    diagonal = DiagonalLinearTransformer(3, D, heads=2, reads_labels=reads_labels, init_std=0.1, rngs=nnx.Rngs(0))
    p, q = diagonal.matrices()
    full = LinearTransformer(3, D, heads=2, rngs=nnx.Rngs(0))
    full.p[...], full.q[...] = dense(p), dense(q)
    for layers in (None, 1, 2):
        weights = diagonal.weights(gram_of(tokens), layers)
        assert weights.shape == (D, BATCH)
        np.testing.assert_allclose(weights, full.weights(gram_of(tokens), layers), rtol=1e-9, atol=1e-12)
    omegas = diagonal.omegas()
    np.testing.assert_allclose(omegas["yx"], (diagonal.p_y[...] * diagonal.q_x[...]).sum(-1), rtol=1e-12)
    assert np.any(omegas["yy"] != 0) == reads_labels
    assert np.any(omegas["xy"] != 0) == reads_labels
