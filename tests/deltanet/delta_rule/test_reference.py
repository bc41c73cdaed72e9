"""The oracle against the definition in plain NumPy, token by token, and against its special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet.delta_rule.reference import delta_rule

BATCH, TIME, HEADS, DIM, VALUE_DIM = 2, 7, 3, 5, 4


@pytest.fixture
def arguments():
    rng = np.random.default_rng(1)
    tokens = (BATCH, TIME, HEADS)
    return {
        "q": rng.standard_normal((*tokens, DIM)),
        "k": rng.standard_normal((*tokens, DIM)) / 3,
        "v": rng.standard_normal((*tokens, VALUE_DIM)),
        "beta": rng.uniform(0, 2, tokens),
        "g": -rng.exponential(0.5, tokens),
        "initial_state": rng.standard_normal((BATCH, HEADS, DIM, VALUE_DIM)),
    }


def run(arguments, **options):
    with jax.enable_x64(True):
        output, state = delta_rule(**{name: jnp.asarray(x) for name, x in arguments.items()}, **options)
        return np.asarray(output), np.asarray(state)


def householder(arguments, b, h, start=0, stop=TIME, state=None):
    """Section 2.2 with explicit transition matrices; outputs without scale, and the last state."""
    outputs = []
    for t in range(start, stop):
        q, k, v, beta, g = (arguments[name][b, t, h] for name in ("q", "k", "v", "beta", "g"))
        state = np.exp(g) * (np.eye(DIM) - beta * np.outer(k, k)) @ state + beta * np.outer(k, v)
        outputs.append(state.T @ q)
    return np.stack(outputs), state


def test_equals_products_of_transition_matrices(arguments):
    output, state = run(arguments, scale=0.7)
    for b in range(BATCH):
        for h in range(HEADS):
            wanted, last = householder(arguments, b, h, state=arguments["initial_state"][b, h])
            np.testing.assert_allclose(output[b, :, h], 0.7 * wanted, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(state[b, h], last, rtol=1e-12, atol=1e-12)


def test_segments_start_from_zero(arguments):
    ids = np.array([[4, 4, 4, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 5]], np.int32)
    output, state = run(arguments, scale=1.0, segment_ids=jnp.asarray(ids))
    first, _ = householder(arguments, 0, 1, 0, 3, arguments["initial_state"][0, 1])
    second, last = householder(arguments, 0, 1, 3, TIME, np.zeros((DIM, VALUE_DIM)))
    np.testing.assert_allclose(output[0, :, 1], np.concatenate([first, second]), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(state[0, 1], last, rtol=1e-12, atol=1e-12)
    _, last = householder(arguments, 1, 2, 6, TIME, np.zeros((DIM, VALUE_DIM)))
    np.testing.assert_allclose(state[1, 2], last, rtol=1e-12, atol=1e-12)


def test_step_size_one_stores_the_value(arguments):
    """With unit keys and beta 1, reading with the key that was just written returns its value."""
    k = arguments["k"] / np.linalg.norm(arguments["k"], axis=-1, keepdims=True)
    output, _ = run(arguments | {"q": k, "k": k, "beta": np.ones((BATCH, TIME, HEADS))}, scale=1.0)
    np.testing.assert_allclose(output, arguments["v"], rtol=1e-12, atol=1e-12)


def test_normalises_and_scales_by_default(arguments):
    def unit(x):
        return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)

    normalised = arguments | {"q": unit(arguments["q"]), "k": unit(arguments["k"])}
    for actual, wanted in zip(run(arguments, l2_normalize=True), run(normalised, scale=DIM**-0.5), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)
