import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import get_config
from training.config import override
from training.errors import UserError
from training.loop import Compiled, make_program
from training.step import replica_points


def run(overrides, *dispatches, arg=None):
    """State and metrics of all steps, in dispatches of the given lengths."""
    program = make_program(override(get_config(arg), overrides))
    compiled = Compiled(program)
    state, step, rows = compiled.init(), 0, []
    for length in dispatches:
        state, metrics = compiled.steps(state, step, length, None)
        rows.append(np.asarray(metrics["loss"]))
        step += length
    return jax.tree.map(np.asarray, state), np.concatenate(rows, axis=-1)


def close(a, b, **tolerances):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerances), a, b)


def test_replicas_are_what_they_would_be_alone():
    together, losses = run({"seeds": (0, 1), "replicate": (("optimizer.learning_rate", (0.01, 0.1)),)}, 12)
    alone, loss = run({"seeds": (1,), "optimizer.learning_rate": 0.1}, 12)
    points = replica_points(
        override(get_config(), {"seeds": (0, 1), "replicate": (("optimizer.learning_rate", (0.01, 0.1)),)})
    )
    assert points[3] == (1, {"optimizer.learning_rate": 0.1})
    close(jax.tree.map(lambda x: x[3], together), alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses[3], loss, rtol=1e-5)


def test_arguments_of_the_task_can_be_replicated():
    _, losses = run({"replicate": (("task.noise", (0.0, 3.0)),), "steps": "60 steps"}, 60)
    assert losses[0, -1] < 0.1 < 5 < losses[1, -1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("optimizer.rate", "no config key"), ("optimizer.name", "is no number")],
)
def test_what_cannot_be_replicated(name, message):
    with pytest.raises(UserError, match=message):
        replica_points(override(get_config(), {"replicate": ((name, (1.0,)),)}))


def test_the_cut_into_dispatches_does_not_matter():
    whole, losses = run({}, 12)
    parts, again = run({}, 5, 4, 3)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    np.testing.assert_array_equal(losses, again)


def test_accumulation_equals_the_whole_batch():
    whole, losses = run({}, 6)
    pieces, again = run({"optimizer.accumulate": 4}, 6)
    close(whole.params, pieces.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, again, rtol=1e-5)


def test_bfloat16_keeps_float32_parameters():
    full, losses = run({}, 10)
    half, again = run({"precision": "bfloat16"}, 10)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("float32")}
    np.testing.assert_allclose(losses, again, rtol=0.05)
    assert not np.array_equal(losses, again)
    close(full.params, half.params, atol=0.05)


def test_steps_share_a_batch_for_as_long_as_the_task_says():
    _, losses = run({"task.resample_every": 4, "optimizer.learning_rate": 0.0}, 4, 4)
    assert len(set(losses.tolist())) == 2
    assert len(set(losses[:4].tolist())) == 1


def test_variables_that_are_no_parameters_are_carried():
    state, _ = run({}, 3)
    assert np.abs(jax.tree.leaves(state.rest)).max() > 0


def test_dropout_gets_a_fresh_key_each_step():
    _, losses = run({"model.dropout": 0.5, "task.resample_every": 8, "optimizer.learning_rate": 0.0}, 8)
    assert len(set(losses.tolist())) == 8


def test_evaluation_sees_every_replica():
    program = make_program(override(get_config(), {"seeds": (0, 1, 2)}))
    compiled = Compiled(program)
    result = compiled.evaluate(compiled.init())
    assert result["test"]["loss"].shape == (3,)
    assert jnp.isfinite(result["test"]["loss"]).all()
    assert len(program.models(compiled.init())) == 3


def test_the_moving_average_of_the_parameters():
    overrides = {"ema_decay": 0.9, "seeds": (0, 1), "model.dropout": 0.2}
    compiled = Compiled(make_program(override(get_config(), overrides)))
    state = compiled.init()
    expected = jax.tree.map(np.asarray, state.params)
    for step in range(3):
        state, _ = compiled.steps(state, step, 1, None)
        expected = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.average, expected)
    results = compiled.evaluate(state)
    swapped = compiled.evaluate(state._replace(params=state.average))
    np.testing.assert_allclose(results["test_ema"]["loss"], swapped["test"]["loss"])
    assert not np.allclose(results["test_ema"]["loss"], results["test"]["loss"])


def test_no_moving_average_unless_asked_for():
    state, _ = run({}, 2)
    assert state.average is None
    with pytest.raises(UserError, match=r"ema_decay=1.0: choose a number from 0"):
        make_program(override(get_config(), {"ema_decay": 1.0}))
