"""Every mixer of language models: decoding is the full forward, packed sequences do not touch, everything learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import rotate
from training.config import build
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
WIDTH = 16
MIXERS = {
    "softmax": {"name": "models.causal_attention.CausalAttention", "heads": 2},
    "window": {"name": "models.causal_attention.CausalAttention", "heads": 2, "window": 5},
    "linear": {"name": "models.linear_mixers.LinearAttention", "heads": 2, "feature_map": "elu", "convolution": 4},
    "retnet": {"name": "models.linear_mixers.RetNet", "heads": 2},
    "gla": {"name": "models.linear_mixers.Gla", "heads": 2, "rank": 4},
    "mamba2": {"name": "models.linear_mixers.Mamba2", "head_dim": 8, "state": 8},
    "deltanet": {"name": "deltanet.layer.DeltaNet", "heads": 2},
    "deltanet_no_conv": {"name": "deltanet.layer.DeltaNet", "heads": 2, "convolution": 0, "gate": True},
    "deltanet_l1": {"name": "deltanet.layer.DeltaNet", "heads": 2, "key_norm": "l1", "feature_map": "elu"},
    "gated_deltanet": {"name": "deltanet.layer.GatedDeltaNet", "heads": 2, "negative_eigenvalues": True},
}


@functools.cache
def mixer(name: str) -> nnx.Module:
    """A mixer whose weights are large enough to be seen in its output."""
    module = build(MIXERS[name], width=WIDTH, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda x: 10 * x if x.ndim == 2 else x, state))


@functools.cache
def compiled(method: str, *static: int):
    """A method of mixers, compiled once for each of them."""

    def call(module, *arguments):
        return getattr(module, method)(*arguments)

    return jax.jit(call, static_argnums=static, compiler_options=FAST_COMPILE)


def full(name: str, x: jax.Array) -> jax.Array:
    """The mixer's output for whole sequences."""
    return compiled("__call__")(mixer(name), x)


X = jax.random.normal(jax.random.key(1), (2, 70, WIDTH))


def close(x: jax.Array, y: jax.Array) -> None:
    np.testing.assert_allclose(x, y, atol=2e-5 * float(jnp.abs(y).max()))


def decode(name: str, start: int, stop: int) -> None:
    """A prompt of `start` tokens and steps up to `stop` are the full forward."""
    wanted = full(name, X)
    y, cache = compiled("prefill", 2)(mixer(name), X[:, :start], 70)
    close(y, wanted[:, :start])
    for t in range(start, stop):
        y, cache = compiled("step")(mixer(name), X[:, t], cache)
        close(y, wanted[:, t])


@pytest.mark.parametrize("name", MIXERS)
def test_prefill_and_steps_are_the_full_forward(name):
    decode(name, 1, 9)
    decode(name, 66, 70)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("start", [2, 3, 4, 5, 8, 63, 64, 65])
def test_prefills_of_all_lengths_are_the_full_forward(name, start):
    decode(name, start, start + 4)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_do_not_touch(name):
    ids = jnp.broadcast_to(jnp.repeat(jnp.arange(4), np.array([2, 31, 33, 4])), X.shape[:2])
    packed = compiled("__call__")(mixer(name), X, ids)
    for start, stop in ((33, 66), (66, 70)):
        alone = full(name, jnp.roll(X, -start, 1))  # what comes after the segment cannot matter
        close(packed[:, start:stop], alone[:, : stop - start])


@pytest.mark.parametrize(
    "name", [m if m in ("gla", "mamba2", "gated_deltanet") else pytest.param(m, marks=pytest.mark.slow) for m in MIXERS]
)
def test_every_parameter_learns(name):
    graph, state = nnx.split(mixer(name))

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state)(x)).sum()

    grads = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state, X[:, :12])
    for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
        assert jnp.isfinite(gradient).all()
        assert (gradient != 0).any(), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", MIXERS)
def test_only_the_cache_of_softmax_grows(name):
    module = mixer(name)

    def size(length: int) -> int:
        cache = jax.eval_shape(lambda x: module.prefill(x, length)[1], X[:, :8])
        return sum(leaf.size for leaf in jax.tree.leaves(cache))

    assert (size(64) > size(16)) == (name == "softmax")


def test_softmax_attention_is_the_formula():
    module = mixer("window")
    q, k, v = np.split(np.asarray(X @ module.qkv.kernel[...]).reshape(2, 70, 6, 8), 3, 2)
    q, k = (np.asarray(rotate(jnp.asarray(z), jnp.arange(70), 1e4)) for z in (q, k))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    i, j = np.indices((70, 70))
    weights = np.exp(np.where((j <= i) & (i - j < 5), scores, -np.inf))
    y = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 70, WIDTH)
    close(full("window", X), y @ module.out.kernel[...])


def test_rotation_depends_on_distances_only():
    q, k = jax.random.normal(jax.random.key(2), (2, 1, 1, 1, 8))

    def score(i, j):
        return (rotate(q, jnp.array([i]), 100.0) * rotate(k, jnp.array([j]), 100.0)).sum()

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    np.testing.assert_allclose(score(3, 3), (q * k).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({**MIXERS["softmax"], "heads": 3}, "16 does not split into 3 heads"),
        ({**MIXERS["window"], "window": 0}, "a token sees at least itself"),
        ({**MIXERS["linear"], "feature_map": "elo"}, "feature_map='elo' does not exist: did you mean 'elu'"),
        ({**MIXERS["deltanet"], "key_norm": "l3"}, "key_norm='l3' does not exist"),
        ({**MIXERS["deltanet"], "heads": 5}, "do not split into 5 heads"),
        ({**MIXERS["mamba2"], "head_dim": 5}, "heads of 5"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(UserError, match=message):
        build(spec, width=WIDTH, rngs=nnx.Rngs(0))
