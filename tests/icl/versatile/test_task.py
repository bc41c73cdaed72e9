"""The task, the models by name, and what evaluation reports."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icl.versatile import gd_plus_plus, measure
from icl.versatile.baselines import oracle_losses, ridge_losses, spectral
from icl.versatile.data import interval_table, sample_sequences
from icl.versatile.models import FORMS, linear_transformer
from icl.versatile.task import NoisyRegression, half_errors
from training.errors import UserError

MODEL = {"name": "icl.versatile.models.linear_transformer", "form": "diagonal", "layers": 2, "init_std": 0.1}


def make_task(**changes):
    return NoisyRegression(model=MODEL, batch_size=32, **changes)


def test_the_loss_in_chunks_is_the_loss():
    task, chunked = make_task(), make_task(chunk=8)
    model = task.init(jax.random.key(0))
    batch = task.batch(jax.random.key(1), jnp.int32(3))

    def value_and_gradient(task):
        loss = nnx.value_and_grad(lambda model, batch: task.loss(model, batch, jax.random.key(0))[0])
        return nnx.jit(loss)(model, batch)

    for ours, theirs in zip(*map(jax.tree.leaves, map(value_and_gradient, (chunked, task))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_chunk_that_does_not_divide_the_batch_is_an_error():
    task = make_task(chunk=5)
    with pytest.raises(UserError, match=r"task\.chunk=5 does not divide batch_size=32"):
        task.loss(task.init(jax.random.key(0)), task.batch(jax.random.key(1), jnp.int32(0)), jax.random.key(0))


def test_the_problem_is_chosen_by_number():
    task = make_task(problems=("fixed:1", "levels:2,3"), problem=1)
    assert set(np.asarray(task.batch(jax.random.key(0), jnp.int32(0)).sigma).tolist()) == {2, 3}


def test_batches_depend_on_key_and_index_only():
    task = make_task()
    first, again, other = (task.batch(jax.random.key(0), jnp.int32(i)).w for i in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_the_loss_is_half_the_squared_error_over_queries():
    task = make_task(examples=12, dimension=3)
    model = task.init(jax.random.key(0))
    batch = task.batch(jax.random.key(1), jnp.int32(0))
    queries = jax.random.normal(jax.random.key(2), (3, 20_000))
    errors = jnp.square((model.weights(batch.gram) - batch.w).T @ queries).mean(1) / 2
    np.testing.assert_allclose(errors, half_errors(model, batch), rtol=0.05)


def test_forms():
    for form in FORMS:
        model = linear_transformer(form, 3, 4, rngs=nnx.Rngs(0))
        count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
        assert count == 3 * {"gdpp": 3, "diagonal": 4, "full": 2 * 25}[form]
    with pytest.raises(UserError, match="did you mean 'diagonal'"):
        linear_transformer("diag", 1, 4, rngs=nnx.Rngs(0))


def test_evaluators():
    task = make_task(validation_prompts=64)
    model = task.init(jax.random.key(0))
    results = {name: nnx.jit(evaluate)(model, jax.random.key(0)) for name, evaluate in task.evaluators().items()}
    assert set(results["structure"]) == {"xx", "xy", "yx", "yy"}
    again = nnx.jit(task.evaluators()["validation"])(model, jax.random.key(1))
    assert results["validation"]["loss"] == again["loss"]  # one fixed set for all seeds


def test_adjusted_errors_are_paired_with_the_oracle():
    models = [linear_transformer("diagonal", 2, 10, init_std=0.05, rngs=nnx.Rngs(seed)) for seed in range(2)]
    errors = measure.adjusted_errors(models, "fixed:2", 100, (0, 2))
    assert errors.shape == (2, 2, 2**11)
    assert errors.dtype == np.float64
    with jax.enable_x64(True):
        prompts = measure.prompts_of("fixed:2", measure.TEST_SEED, 100)
        untrained = 0.5 * jnp.square(prompts.w).sum(0) - oracle_losses(prompts)
        np.testing.assert_allclose(errors[0, 0], untrained, rtol=1e-9, atol=1e-9)
    assert not np.allclose(errors[0, 1], errors[1, 1])


def test_summaries_name_what_they_leave_out():
    errors = np.concatenate([np.ones(1997), [1e6, np.nan, np.inf]])
    found = measure.summarize(errors)
    assert found["mean"] == pytest.approx((1997 + 1e6) / 1998)
    assert found["trimmed"] == 1
    assert found["max"] == 1e6
    assert found["nonfinite"] == pytest.approx(0.001)
    assert measure.summarize(np.full(10, np.nan))["mean"] == np.inf


def test_diagonal_share():
    p = np.stack([np.diag([2.0, 2.0, 3.0])] * 2)
    q = p.copy()
    p[1, 0, 1] = 5  # the last layer's upper rows are not read
    q[0, 0, 2] = 4
    shares = measure.diagonal_share(p, q)
    assert shares[0]["p"] == shares[1]["p"] == shares[1]["q"] == 1
    assert shares[0]["q"] == pytest.approx(np.sqrt(17 / 33))


def test_gd_plus_plus_in_the_eigenbasis_is_the_model():
    with jax.enable_x64(True):
        intervals = jnp.asarray(interval_table(["uniform:2"])[0], jnp.float64)
        sequences = sample_sequences(jax.random.key(0), intervals, 20, 10, 6)
        model = linear_transformer("gdpp", 3, 10, init_std=0.1, rngs=nnx.Rngs(0))
        omegas = model.omegas()
        ours = gd_plus_plus.losses(spectral(sequences), omegas["yx"], omegas["xx"][:-1])
        np.testing.assert_allclose(ours, half_errors(model, sequences), rtol=1e-5)  # the model's numbers are float32


def test_gd_plus_plus_optimum():
    """Two layers without noise and with, at the values of an independent computation; one layer in closed form."""
    with jax.enable_x64(True):
        prompts = measure.prompts_of("uniform:5", 5, 20_000)
        oracle = float(oracle_losses(prompts).mean())
        one, two = (gd_plus_plus.optimum(prompts, layers) for layers in (1, 2))
        assert one.yx[0] == pytest.approx(-0.02542, rel=0.02)
        assert two.loss - oracle == pytest.approx(0.374, rel=0.04)
        assert two.yx == pytest.approx([-0.0168, -0.0672], rel=0.1)
        constant = min(float(ridge_losses(prompts, v).mean()) for v in (8.0, 8.35, 8.7))
        assert two.loss > constant  # which no linear model of this kind beats
