import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lion.attention.reference import reference_attention
from lion.layer import Lion, snake_orders, unit_silu
from training.errors import UserError

FAST_COMPILE = {"xla_backend_optimization_level": 0}
WIDTH, HEADS, GRID = 12, 3, (3, 4)
TIME = GRID[0] * GRID[1] + 1


def make(**options):
    # Large weights, so that gates and scores differ from token to token.
    return Lion(WIDTH, HEADS, grid=GRID, class_token=True, stddev=1.0, rngs=nnx.Rngs(0), **options)


def tokens(time=TIME):
    return jax.random.normal(jax.random.key(1), (2, time, WIDTH))


def gradients(layer):
    """The gradient of every parameter, by its path."""
    graph, state = nnx.split(layer)
    target = jax.random.normal(jax.random.key(2), tokens().shape)

    def loss(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) * target)

    grads = jax.jit(jax.grad(loss), compiler_options=FAST_COMPILE)(state, tokens())
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(g) for path, g in leaves}


def test_the_feature_map_is_positive_and_of_unit_length():
    y = unit_silu(3 * tokens())
    assert (y > 0).all()
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), 1, rtol=1e-6)
    assert unit_silu(tokens().astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_the_gradient_of_the_feature_map():
    with jax.enable_x64(True):
        x, d_unit = np.random.default_rng(0).normal(size=(2, 5, 7)) * [[[3]], [[1]]]

        def naive(x):
            y = x / (1 + jnp.exp(-x)) + 0.5
            return y / jnp.sqrt((y**2).sum(-1, keepdims=True))

        wanted, got = (jax.vjp(f, jnp.asarray(x))[1](jnp.asarray(d_unit))[0] for f in (naive, unit_silu))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)
    assert jax.grad(lambda x: unit_silu(x).sum())(tokens().astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_snake_orders():
    rows, columns = snake_orders((3, 3), class_token=False)
    assert rows.tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert columns.tolist() == [0, 3, 6, 7, 4, 1, 2, 5, 8]
    assert snake_orders((2, 2), class_token=True)[0].tolist() == [0, 1, 2, 4, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"decay": "none"},
        {"decay": "fixed", "direction": "alternating", "layer": 1},
        {"decay": "selective", "scans": 2},
        {"decay": "diagonal", "feature_map": "elu", "form": "recurrent"},
        {"decay": "selective", "normalize": False, "feature_map": "identity", "norm_after": True},
    ],
)
def test_the_layer_is_what_its_options_say(options):
    layer = make(**options)
    x = tokens()

    def expected(x):
        q, k, v = layer.project(x)
        feature = {"elu": lambda z: jax.nn.elu(z) + 1, "identity": lambda z: z}.get(
            options.get("feature_map"), unit_silu
        )
        decays = layer.log_decays(x)
        y = reference_attention(
            feature(q) * (1 if options.get("normalize", True) else (WIDTH // HEADS) ** -0.5),
            feature(k),
            v,
            decays if len(decays) > 1 else decays[0],
            orders=snake_orders(GRID, class_token=True) if len(decays) > 1 else None,
            normalize=options.get("normalize", True),
            direction="backward" if "layer" in options else "both",
        ).reshape(x.shape)
        return layer.out(layer.norm(y) if "norm_after" in options else y)

    got, wanted = jax.jit(lambda x: (layer(x), expected(x)), compiler_options=FAST_COMPILE)(x)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_gates():
    x = tokens()
    selective = make(decay="selective").log_decays(x)[0]
    assert selective.shape == (2, TIME, HEADS)
    assert not selective[:, 0].any()
    assert (selective[:, 1:] < 0).all()
    assert make(decay="diagonal").log_decays(x)[0].shape == (2, TIME, HEADS, WIDTH // HEADS)
    assert [a.shape for a in make(decay="fixed", scans=2).log_decays(x)] == [(HEADS,), (HEADS,)]
    assert make(decay="none", scans=2).log_decays(x) == (None,)
    wide = make(decay="selective").log_decays(x.astype(jnp.bfloat16))[0]
    assert wide.dtype == jnp.float32
    assert jnp.isfinite(make(decay="selective").log_decays(1e4 * x)[0]).all()


@pytest.mark.parametrize("decay", ["fixed", "selective", "diagonal"])
def test_every_weight_of_the_gate_learns(decay):
    gates = {
        path: g for path, g in gradients(make(decay=decay, scans=2)).items() if path.startswith(("gates", "fixed"))
    }
    assert len(gates) == (2 if decay == "fixed" else 4)
    for path, gradient in gates.items():
        assert (gradient != 0).all(), path


def test_a_frozen_gate_gets_no_gradient():
    for path, gradient in gradients(make(freeze_gate=True)).items():
        assert gradient.any() == (not path.startswith("gates")), path


def test_a_doubled_diagonal_is_the_sum_of_a_forward_and_a_backward_layer():
    x = tokens()

    def outputs(x):
        parts = {way: make(normalize=False, direction=way) for way in ("forward", "backward")}
        doubled = make(normalize=False, double_diagonal=True)
        return doubled(x), sum(layer(x) for layer in parts.values()), make(double_diagonal=True)(x)

    doubled, added, normalized = jax.jit(outputs, compiler_options=FAST_COMPILE)(x)
    np.testing.assert_allclose(doubled, added, rtol=1e-4, atol=1e-5)
    assert jnp.isfinite(normalized).all()


def test_padding_at_the_end_changes_nothing_before_it():
    layer, x = Lion(WIDTH, HEADS, stddev=1.0, rngs=nnx.Rngs(0)), tokens()
    mask = jnp.arange(TIME) < TIME - 4

    def outputs(x):
        return layer(x, jnp.broadcast_to(mask, x.shape[:2]))[:, :-4], layer(x[:, :-4])

    np.testing.assert_allclose(*jax.jit(outputs, compiler_options=FAST_COMPILE)(x), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "fix"}, "decay='fix' does not exist: did you mean 'fixed'"),
        ({"feature_map": "relu"}, "feature_map='relu' does not exist"),
        ({"direction": "up"}, "direction='up' does not exist"),
        ({"scans": 3}, "scans=3: choose 1, or 2"),
    ],
)
def test_errors(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_errors_of_sizes():
    with pytest.raises(UserError, match="a width of 10 does not split into 3 heads"):
        Lion(10, 3, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="need their grid"):
        Lion(WIDTH, HEADS, scans=2, rngs=nnx.Rngs(0))
