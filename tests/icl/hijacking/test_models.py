"""The models against their token forms, the data's laws, the task, and the measures."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.icl.hijacking import transformers
from icl.hijacking import measure, theory
from icl.hijacking.data import clean_gram, mean_direction, sample_hijack, sample_tasks
from icl.hijacking.models import FORMS, linear_transformer
from icl.hijacking.task import HijackedClassification, clean_accuracy, expected_errors
from icl.linear_attention import literal_transformer
from training.config import override
from training.errors import UserError
from training.loop import make_program

D, N = 6, 9


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_the_full_model_is_the_literal_one():
    rng = np.random.default_rng(0)
    model = linear_transformer("full", 5, D, N, init_std=0.2, rngs=nnx.Rngs(0))
    tokens = rng.normal(size=(D + 1, N + 1))
    tokens[-1, -1] = 0
    embedded = np.asarray(model.embedding[...], float) @ tokens
    expected = -literal_transformer(
        jnp.asarray(embedded), *(jnp.asarray(m[...], jnp.float64) for m in (model.p, model.q))
    )
    gram = jnp.asarray(tokens[:, :-1] @ tokens[:, :-1].T)[..., None]
    assert float(model.weights(gram)[:, 0] @ tokens[:-1, -1]) == pytest.approx(float(expected[-1, -1]), rel=1e-5)


@pytest.mark.parametrize("form", ["sparse", "scalar"])
def test_the_descent_models_descend(form):
    rng = np.random.default_rng(0)
    model = linear_transformer(form, 3, D, N, init_std=0.3, rngs=nnx.Rngs(0))
    x, y = rng.normal(size=(D, N)), rng.choice([-1.0, 1.0], N)
    w = np.asarray(model.start[...], float)
    for rate in np.asarray(model.rates[...], float):
        w = w - (rate if form == "sparse" else rate * np.eye(D)) @ (x @ (x.T @ w - y)) / N
    tokens = np.vstack([x, y])
    np.testing.assert_allclose(model.weights(jnp.asarray(tokens @ tokens.T)[..., None])[:, 0], w, rtol=1e-5)


def test_an_unknown_form_is_an_error():
    with pytest.raises(UserError, match="did you mean 'sparse'"):
        linear_transformer("spars", 1, D, N, rngs=nnx.Rngs(0))


def test_tasks_and_clean_prompts():
    w = sample_tasks(jax.random.key(0), 20, 0.1, 20_000, jnp.float64)
    np.testing.assert_allclose(jnp.linalg.norm(w, axis=0), 1, rtol=1e-12)
    assert float((mean_direction(20, jnp.float64) @ w).mean()) == pytest.approx(0.99528, abs=2e-4)
    gram = clean_gram(jax.random.key(1), w[:, :50], 7)
    np.testing.assert_array_equal(gram[-1, -1], 7)  # labels are signs
    lengths = jnp.arange(50) % 8
    np.testing.assert_array_equal(clean_gram(jax.random.key(1), w[:, :50], 7, lengths)[-1, -1], lengths)
    np.testing.assert_allclose(clean_gram(jax.random.key(1), w[:, :50], 7, jnp.full(50, 7)), gram)


@pytest.mark.parametrize("sigma", [0.1, -0.4])
def test_hijacked_prompts(sigma):
    w = sample_tasks(jax.random.key(0), D, 0.3, 100, jnp.float64)
    hijack = sample_hijack(jax.random.key(1), w, sigma)
    np.testing.assert_allclose((hijack.x_token * w).sum(0), 0, atol=1e-12)
    np.testing.assert_allclose((hijack.x_query * w).sum(0), sigma, rtol=1e-9)
    np.testing.assert_array_equal(hijack.y_query, np.sign(sigma))
    tokens = np.tile(np.vstack([hijack.x_token, -hijack.y_query])[:, None], (1, 3, 1))
    np.testing.assert_allclose(hijack.gram(3), np.einsum("inb,jnb->ijb", tokens, tokens), rtol=1e-12, atol=1e-12)


def test_the_answer_is_odd_in_the_labels():
    """So positive sigma loses nothing."""
    model = linear_transformer("full", 3, D, N, init_std=0.2, rngs=nnx.Rngs(0))
    w = sample_tasks(jax.random.key(0), D, 0.3, 10, jnp.float64)
    hijack = sample_hijack(jax.random.key(1), w, 0.2)
    gram = hijack.gram(4)
    mirrored = hijack._replace(x_token=-hijack.x_token, y_query=-hijack.y_query).gram(4)
    np.testing.assert_allclose(model.weights(mirrored), model.weights(gram), rtol=1e-12)


def test_loss_and_accuracy():
    rng = np.random.default_rng(0)
    w, u, x = rng.normal(size=(D, 3)), rng.normal(size=(D, 3)), rng.normal(size=(D, 400_000))
    w /= np.linalg.norm(w, axis=0)
    raw = (u.T @ x - np.sign(w.T @ x)) ** 2
    np.testing.assert_allclose(expected_errors(jnp.asarray(u), jnp.asarray(w)), raw.mean(1), rtol=0.02)
    right = (np.sign(u.T @ x) == np.sign(w.T @ x)).mean(1)
    np.testing.assert_allclose(clean_accuracy(jnp.asarray(u), jnp.asarray(w)), right, atol=0.004)


def descent_model(c, alpha, layers, dimension, context):
    model = linear_transformer("scalar", layers, dimension, context, rngs=nnx.Rngs(0))
    model.start[...] = c * mean_direction(dimension)
    model.rates[...] = jnp.full(layers, alpha * context, jnp.float32)
    return model


def test_measures_agree_with_the_formula():
    best = theory.Optimum(2e-3, 0.79, 0.0)
    model = descent_model(best.c, best.alpha, 4, 20, 40)
    counts = (0, 5, 20)
    found = measure.robust_accuracy([model, model], 20, 0.1, 0.4, counts, 4000)
    geometry = theory.sample_geometry(0, 20, 0.1, 100_000)
    for count, pair in zip(counts, found["accuracy"], strict=True):
        expected = theory.robust_accuracy(geometry, 0.4, best, count, 4)
        assert pair[0] == pair[1] == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4096))
    assert np.all(np.array(found["nonfinite"]) == 0)


def test_answers_that_are_not_finite_count_as_wrong():
    model = linear_transformer("full", 8, D, N, init_std=30.0, rngs=nnx.Rngs(0))
    found = measure.robust_accuracy([model], D, 0.1, 0.4, (160,), 100)
    assert found["nonfinite"][0][0] > 0.5
    assert found["accuracy"][0][0] <= 1 - found["nonfinite"][0][0]


def test_clean_quality():
    """The memory alone: its excess and the zero-shot accuracy of the prior."""
    spread, constants = 0.1, theory.prior(10, 0.1)
    model = descent_model(theory.SIGN_MEAN * constants.m, 0.0, 1, 10, 20)
    found = measure.clean_quality([model], 10, spread, (0, 20), 4000)
    assert found["excess"][1][0] == pytest.approx(0.005678, rel=0.05)
    assert found["accuracy"][0][0] == pytest.approx(0.9707, abs=0.002)


def test_bayes_ceiling():
    """Nothing is learned from no examples; with examples the posterior beats the prior."""
    none, many = measure.bayes_accuracy(10, 0.1**0.5, (0, 40), prompts=150, sweeps=40)
    assert none["mean"] == pytest.approx(0.9091, abs=4 * none["error"] + 0.003)
    assert many["mean"] > none["mean"] + 2 * many["error"]


def test_the_task_learns_what_the_theory_says():
    """One step of scalar descent by its gradient: at the exact optimum the gradient is zero, up to sampling."""
    n, d, spread = 20, 10, 0.1**0.5
    exact = theory.one_step_optimum(n, d, theory.prior(d, spread).m)
    task = HijackedClassification(model={}, batch_size=4000, dimension=d, examples=n, spread=spread)
    batch = task.batch(jax.random.key(0), jnp.int32(0))

    def excess(factor):
        model = descent_model(exact.c, factor * exact.alpha, 1, d, n)
        return float(task.loss(model, batch, jax.random.key(0))[0]) - (1 - theory.KAPPA)

    assert excess(1.0) == pytest.approx(exact.excess, rel=0.05)
    assert excess(0.5) > excess(1.0)
    assert excess(1.5) > excess(1.0)


@pytest.mark.parametrize("argument", ["scale=cpu", "scale=gpu,form=scalar,varied=true", "scale=paper,reduced=true"])
def test_configs_are_valid(argument):
    config = transformers.get_config(argument)
    points = [override(config, point) for point in transformers.sweep()]
    assert [p.model.layers for p in points] == list(range(1, 9))
    assert make_program(points[0]).count == 2 * len(config.seeds)
    assert config.model.form in FORMS
