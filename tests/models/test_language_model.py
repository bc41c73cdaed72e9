import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import sampling
from models.language_model import CausalLanguageModel
from models.losses import next_token_loss
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
SOFTMAX = {"name": "models.causal_attention.CausalAttention", "heads": 2}
RETNET = {"name": "models.linear_mixers.RetNet", "heads": 2}
HYBRID = {"mixers": {"soft": SOFTMAX, "retnet": RETNET}, "pattern": ("retnet", "soft"), "hidden": 24}
TOKENS = jax.random.randint(jax.random.key(1), (2, 13), 0, 11)


@functools.cache
def hybrid(depth: int = 4, **options) -> CausalLanguageModel:
    """A small model of two kinds of mixers with large weights."""

    def make() -> CausalLanguageModel:
        return CausalLanguageModel(vocabulary_size=11, width=16, depth=depth, rngs=nnx.Rngs(0), **HYBRID, **options)

    state = jax.jit(lambda: nnx.state(make()), compiler_options=FAST_COMPILE)()
    graph = nnx.graphdef(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, state))


def logits(model: CausalLanguageModel, tokens: jax.Array, ids: jax.Array | None = None) -> jax.Array:
    call = jax.jit(lambda model, tokens: model(tokens, segment_ids=ids), compiler_options=FAST_COMPILE)
    return call(model, tokens)


def gradients(model: CausalLanguageModel) -> nnx.State:
    graph, state = nnx.split(model)
    batch = {"tokens": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "weights": jnp.ones((2, 12))}

    def loss(state):
        return next_token_loss(nnx.merge(graph, state), batch, 8)[0]

    return jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state)


def test_layers_run_in_the_order_of_the_pattern():
    model = hybrid()
    assert [type(layer.mixer).__name__ for layer in model.layers()] == ["RetNet", "CausalAttention"] * 2

    def one_by_one(model):
        x = model.embedding[...][TOKENS]
        for layer in model.layers():
            x = layer(x, None)
        return model.logits(model.norm(x))

    wanted = jax.jit(one_by_one, compiler_options=FAST_COMPILE)(model)
    np.testing.assert_allclose(logits(model, TOKENS), wanted, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        ("aaaa", [(1, 4)]),
        ("abab", [(2, 2)]),
        ("abaaba", [(3, 2)]),
        ("abaab", [(1, 1), (1, 1), (1, 2), (1, 1)]),
        ("a", [(1, 1)]),
    ],
)
def test_repeated_groups_are_scanned(names, groups):
    mixers = {"a": RETNET, "b": SOFTMAX}
    model = nnx.eval_shape(
        lambda: CausalLanguageModel(
            vocabulary_size=5, width=8, depth=len(names), mixers=mixers, pattern=tuple(names), rngs=nnx.Rngs(0)
        )
    )
    assert [(len(stack.layers), stack.repeats) for stack in model.stacks] == groups


def test_what_the_backward_keeps_does_not_change_gradients():
    wanted = gradients(hybrid())
    for options in ({"remat": "full"}, {"remat": "activations", "unroll": 2}):
        for x, y in zip(jax.tree.leaves(gradients(hybrid(**options))), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)


def test_packed_sequences_do_not_touch_and_positions_start_again():
    model = hybrid(depth=2, positions=13)
    ids = jnp.broadcast_to(jnp.array([4] * 6 + [0] * 7), TOKENS.shape)
    packed = logits(model, TOKENS, ids)
    np.testing.assert_allclose(packed[:, 6:], logits(model, TOKENS[:, 6:]), rtol=2e-4, atol=1e-5)
    with pytest.raises(UserError, match="26 tokens, but the model has 13 positions"):
        model(jnp.concatenate([TOKENS, TOKENS], 1))


def test_computes_in_bfloat16_with_parameters_in_float32():
    model = hybrid(depth=2, dtype="bfloat16", tied=True, norm="layer", mlp="gelu", dropout=0.1)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(jnp.float32)}
    assert model.unembedding is None

    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def both(model, key):
        hidden = model.hidden(TOKENS, rngs=nnx.Rngs(key))
        return hidden, model.logits(hidden)

    first, second = (both(model, jax.random.key(seed)) for seed in (0, 1))
    assert (first[0].dtype, first[1].dtype) == (jnp.bfloat16, jnp.float32)
    assert (first[0] != second[0]).any()  # dropout


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0])
def test_sampling_is_the_full_forward(temperature):
    model, key = hybrid(positions=13), jax.random.key(3)
    added = sampling.generate(model, TOKENS[:, :4], tokens=9, key=key, temperature=temperature, top_k=3)
    text = jnp.concatenate([TOKENS[:, :4], added], 1)
    scores = logits(model, text)
    for t, draw in enumerate(jax.random.split(key, 9)):
        here = scores[:, 3 + t]
        if temperature:
            wanted = jax.random.categorical(draw, jnp.where(here >= jnp.sort(here)[:, -3:-2], here, -jnp.inf))
        else:
            wanted = here.argmax(-1)
        assert (added[:, t] == wanted).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": TOKENS[:, :0]}, "at least one token"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
    ],
)
def test_sampling_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        sampling.generate(hybrid(), **{"prompt": TOKENS, "tokens": 1, "key": jax.random.key(0), **arguments})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": None}, "has the mixers soft, retnet; give a pattern"),
        ({"pattern": ("retnet", "sift")}, "has 'sift', which is none of the mixers: did you mean 'soft'"),
        ({"mlp": "glu"}, "mlp='glu' does not exist: did you mean 'gelu'"),
        ({"remat": "all"}, "remat='all' does not exist"),
        ({"dtype": "float16"}, "dtype='float16' does not exist"),
        ({"mixers": {"a": {**RETNET, "head": 2}}, "pattern": None}, "head"),
    ],
)
def test_errors(options, message):
    with pytest.raises((UserError, TypeError), match=message):
        CausalLanguageModel(vocabulary_size=5, width=8, depth=2, rngs=nnx.Rngs(0), **{**HYBRID, **options})
