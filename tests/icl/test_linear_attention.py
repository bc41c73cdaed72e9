"""The fast forms against the literal formulas, and the literal formulas against sums over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.linear_attention import (
    gram_transformer,
    literal_attention,
    literal_transformer,
    prompt_gram,
    sparse_transformer,
)

BATCH = 7
SIZES = [  # layers, examples, dimension, heads: each value of each with several of the others, not the product
    (1, 20, 5, 1),
    (2, 2, 5, 2),
    (3, 20, 5, 1),
    (3, 1, 2, 2),
    (4, 1, 1, 3),
    (4, 20, 2, 1),
]
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 0.05}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make_prompts(n, d, dtype="float64"):
    """Unrelated covariates and labels: the forms must agree on any tokens. The query's label entry is not 0."""
    rng = np.random.default_rng(n + 100 * d)
    shapes = {"x": (d, n, BATCH), "y": (n, BATCH), "x_query": (d, BATCH), "y_query": (BATCH,)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def make_weights(names, layers, heads, size, dtype="float64"):
    rng = np.random.default_rng(layers)
    shape = (layers, heads, size, size)
    return {name: jnp.asarray(rng.normal(size=shape) * 0.4 / size, dtype) for name in names}


def tokens_of(prompts):
    x = jnp.concatenate([prompts["x"], prompts["x_query"][:, None]], axis=1)
    y = jnp.concatenate([prompts["y"], prompts["y_query"][None]], axis=0)
    return jnp.concatenate([x, y[None]]).transpose(2, 0, 1)


def structured(a, b):
    """P and Q of eq. (11)."""
    pad = ((0, 0), (0, 0), (0, 1), (0, 1))
    return jnp.pad(b, pad).at[..., -1, -1].set(1), jnp.pad(a, pad)


def literal_sparse(prompts, weights):
    a = weights["a"]
    return literal_transformer(tokens_of(prompts), *structured(a, weights.get("b", jnp.zeros_like(a))))[:, -1, -1]


def fast_sparse(prompts, weights):
    gram = prompt_gram(prompts["x"], prompts["y"])
    return sparse_transformer(gram, prompts["x_query"], weights["a"], weights.get("b"), prompts["y_query"])


def literal_full(prompts, weights):
    tokens, p, q = tokens_of(prompts), weights["p"], weights["q"]
    depths = range(1, len(p) + 1)
    return jnp.stack([literal_transformer(tokens, p[:depth], q[:depth])[:, :, -1].T for depth in depths])


def fast_full(prompts, weights):
    query = jnp.concatenate([prompts["x_query"], prompts["y_query"][None]])
    return gram_transformer(prompt_gram(prompts["x"], prompts["y"]), query, weights["p"], weights["q"])


def value_and_gradients(form, prompts, weights):
    """The form's value, and the gradients of a random linear functional of it with respect to every input."""

    def functional(prompts, weights):
        value = form(prompts, weights)
        cotangent = np.random.default_rng(0).normal(size=value.shape)
        return (value * cotangent.astype(value.dtype)).sum(), value

    gradients, value = jax.jit(jax.grad(functional, argnums=(0, 1), has_aux=True))(prompts, weights)
    return {"value": value, "prompts": gradients[0], "weights": gradients[1]}


def assert_close(actual, expected, tolerance):
    """Root mean square of the difference, relative to that of the expected array, leaf by leaf."""

    def check(path, ours, theirs):
        assert ours.shape == theirs.shape
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        error = np.linalg.norm(ours - theirs)
        assert error <= tolerance * np.linalg.norm(theirs), f"{jax.tree_util.keystr(path)}: {error}"

    jax.tree_util.tree_map_with_path(check, actual, expected)


@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_literal_attention_is_a_sum_over_examples_and_heads(activation):
    tokens = tokens_of(make_prompts(4, 3))
    weights = make_weights("pq", 1, 2, 4)
    p, q = weights["p"][0], weights["q"][0]
    z = np.asarray(tokens)
    expected = np.zeros_like(z)
    for target in range(5):
        for example in range(4):
            for head in range(2):
                score = np.einsum("bi,ij,bj->b", z[:, :, example], q[head], z[:, :, target])
                score = score if activation is None else np.maximum(score, 0)
                expected[:, :, target] += score[:, None] * (z[:, :, example] @ np.asarray(p[head]).T)
    assert_close(literal_attention(tokens, p, q, activation), expected, 1e-14)
    layer = literal_transformer(tokens, p[None], q[None], activation)
    assert_close(layer, z + expected / 4, 1e-14)


@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize(("layers", "n", "d", "heads"), SIZES)
def test_sparse_transformer_is_the_literal_one(layers, n, d, heads, with_b):
    prompts, weights = make_prompts(n, d), make_weights("ab" if with_b else "a", layers, heads, d)
    expected = value_and_gradients(literal_sparse, prompts, weights)
    assert_close(value_and_gradients(fast_sparse, prompts, weights), expected, TOLERANCE["float64"])


@pytest.mark.parametrize(("layers", "n", "d", "heads"), SIZES)
def test_gram_transformer_is_the_literal_one_at_every_depth(layers, n, d, heads):
    prompts, weights = make_prompts(n, d), make_weights("pq", layers, heads, d + 1)
    expected = value_and_gradients(literal_full, prompts, weights)
    assert_close(value_and_gradients(fast_full, prompts, weights), expected, TOLERANCE["float64"])


@pytest.mark.parametrize("form", ["sparse", "full"])
def test_lower_precision(form):
    forms = {"sparse": ("ab", 5, literal_sparse, fast_sparse), "full": ("pq", 6, literal_full, fast_full)}
    names, size, literal, fast = forms[form]
    prompts, weights = make_prompts(20, 5), make_weights(names, 3, 2, size)
    expected = value_and_gradients(literal, prompts, weights)
    for dtype in ("float32", "bfloat16"):
        rounded = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), (prompts, weights))
        actual = value_and_gradients(fast, *rounded)
        assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype(dtype)}
        assert_close(actual, expected, TOLERANCE[dtype])


def test_the_query_is_updated_but_never_attended_to():
    prompts, weights = make_prompts(6, 3), make_weights("pq", 2, 1, 4)
    before = literal_transformer(tokens_of(prompts), **weights)
    after = literal_transformer(tokens_of(prompts | {"x_query": prompts["x_query"] + 1}), **weights)
    np.testing.assert_array_equal(before[..., :-1], after[..., :-1])
    assert not np.allclose(before[..., -1], after[..., -1])


def test_the_last_projection_has_no_influence():
    prompts, weights = make_prompts(20, 5), make_weights("ab", 3, 2, 5)
    gradient = value_and_gradients(fast_sparse, prompts, weights)["weights"]["b"]
    assert np.all(gradient[-1] == 0)
    assert np.all(np.abs(gradient[:-1]).max((-2, -1)) > 0)


def test_leading_layers_are_the_shallower_model():
    prompts, weights = make_prompts(20, 5), make_weights("ab", 4, 2, 5)
    for depth in (1, 2, 3):
        shallow = {name: blocks[:depth] for name, blocks in weights.items()}
        zeroed = {name: blocks.at[depth:].set(0) for name, blocks in weights.items()}
        assert_close(fast_sparse(prompts, shallow), fast_sparse(prompts, zeroed), 1e-14)


def test_without_b_is_b_zero():
    prompts, weights = make_prompts(20, 5), make_weights("a", 3, 2, 5)
    zero = weights | {"b": jnp.zeros_like(weights["a"])}
    assert_close(fast_sparse(prompts, weights), fast_sparse(prompts, zero), 1e-14)


def test_seeds_can_be_mapped_and_steps_scanned():
    """What training does: gradients inside a scan inside a map over seeds, here against plain loops."""
    pair = (make_prompts(20, 5), make_weights("ab", 3, 1, 5))
    pairs = [jax.tree.map(lambda leaf, scale=scale: scale * leaf, pair) for scale in (0.8, 1.0, 1.2)]

    def loss(weights, prompts):
        return jnp.square(fast_sparse(prompts, weights)).mean()

    def descend(prompts, weights):
        def step(weights, _):
            value, gradient = jax.value_and_grad(loss)(weights, prompts)
            return jax.tree.map(lambda w, g: w - 0.01 * g, weights, gradient), value

        return jax.lax.scan(step, weights, length=4)

    literal_gradient = jax.jit(jax.grad(lambda weights, prompts: jnp.square(literal_sparse(prompts, weights)).mean()))
    mapped = jax.jit(jax.vmap(descend))(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs))
    for seed, (prompts, weights) in enumerate(pairs):
        for step in range(4):
            assert_close(mapped[1][seed, step], loss(weights, prompts), 1e-12)
            gradient = literal_gradient(weights, prompts)
            weights = jax.tree.map(lambda w, g: w - 0.01 * g, weights, gradient)
        assert_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], mapped[0]), weights, 1e-12)
