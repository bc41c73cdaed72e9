import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.config import base_config
from training.durations import to_steps
from training.errors import UserError
from training.optimizer import CLIPS, clip_by_matrix_norm, decay_mask, learning_rate, make_optimizer


def spec(**changes):
    return base_config().optimizer.to_dict() | changes


def schedule(total=100, **changes):
    rate = learning_rate(spec(learning_rate=2.0, **changes), lambda d: to_steps(d, total_steps=total), total)
    return lambda *steps: [float(rate(step)) for step in steps]


def test_schedules():
    assert schedule()(0, 50, 99) == [2.0, 2.0, 2.0]
    assert schedule(schedule="halving", halve_every="10 steps")(0, 9, 10, 25) == [2.0, 2.0, 1.0, 0.5]
    np.testing.assert_allclose(schedule(schedule="cosine", final_fraction=0.1)(0, 50, 100), [2.0, 1.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(schedule(schedule="linear")(0, 25, 100), [2.0, 1.5, 0.0], atol=1e-6)
    warm = schedule(schedule="cosine", warmup="20%")
    np.testing.assert_allclose(warm(0, 10, 20, 60, 100), [0.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adm"}, "did you mean 'adam'"),
        ({"options": {"nestrov": True}}, "takes no option 'nestrov': did you mean 'nesterov'"),
        ({"clip": "globl_norm"}, "did you mean 'global_norm'"),
    ],
)
def test_a_bad_name(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(spec(**changes), optax.constant_schedule(0.1))


def test_a_bad_schedule():
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        schedule(schedule="cosin")


def test_matrix_clip_treats_each_matrix_by_itself():
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((3, 2, 5, 5)) * np.array([1e-3, 1.0, 0.0])[:, None, None, None]
    clipped, _ = clip_by_matrix_norm(0.1).update(jnp.array(grads), optax.EmptyState())
    norms = np.linalg.norm(grads, axis=(-2, -1), keepdims=True)
    expected = grads * np.where(norms > 0.1, 0.1 / np.maximum(norms, 1e-30), 1.0)
    np.testing.assert_allclose(clipped, expected, rtol=1e-5, atol=1e-9)


def test_clips_come_before_the_optimizer():
    optimizer = make_optimizer(spec(name="sgd", clip="global_norm", clip_threshold=1.0), optax.constant_schedule(1.0))
    params = {"w": jnp.zeros(4)}
    updates, _ = optimizer.update({"w": jnp.full(4, 10.0)}, optimizer.init(params), params)
    np.testing.assert_allclose(jnp.linalg.norm(updates["w"]), 1.0, rtol=1e-6)
    assert set(CLIPS) == {"none", "global_norm", "finite_global_norm", "matrix_norm", "value"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad):
    clip = CLIPS["finite_global_norm"](1.0)
    grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array(0.0)}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["w"], [0.6, 0.8], rtol=1e-6)
    clipped, _ = clip.update(grads | {"b": jnp.array(bad)}, clip.init(grads))
    np.testing.assert_array_equal(clipped["w"], 0)
    assert clipped["b"] == 0


def test_excluded_weights_do_not_decay():
    changes = {"name": "adamw", "options": {"weight_decay": 0.5}, "decay_exclude": "bias|norm/"}
    optimizer = make_optimizer(spec(**changes), optax.constant_schedule(0.1))
    params = {"dense": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    decayed = jax.tree.map(lambda u: bool((u != 0).all()), updates)
    assert decayed == {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}}
    assert decay_mask("bias|norm/")(params) == decayed


def test_line_search_optimizers_minimise():
    optimizer = make_optimizer(spec(name="lbfgs"), optax.constant_schedule(1.0))

    def loss(params):
        return jnp.sum((params - jnp.arange(5.0)) ** 2 * jnp.arange(1.0, 6.0))

    params = jnp.zeros(5)
    state = optimizer.init(params)
    for _ in range(12):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, np.arange(5.0), atol=1e-3)
