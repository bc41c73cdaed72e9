"""DeltaNet's layer against the formulas of arXiv:2406.06484, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltanet.layer import DeltaNet, GatedDeltaNet

HEADS, DIM = 2, 4
X = np.random.default_rng(0).standard_normal((1, 9, HEADS * DIM)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


FEATURE_MAPS = {
    "silu": silu,
    "relu": lambda x: np.maximum(x, 0),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
}
NORMS = {"l2": lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True)), "l1": lambda x: x / x.sum(-1, keepdims=True)}


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def parameters(layer: nnx.Module) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(layer, nnx.Param))
    names = (jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value") for path, _ in leaves)
    return {name: np.asarray(x, np.float64) for name, (_, x) in zip(names, leaves, strict=True)}


def wanted(p, *, convolution, feature_map, key_norm, beta_limit, value_dim, gate, decay):
    x = X[0].astype(np.float64)
    u = x @ p["qkv/kernel"]
    if convolution:
        padded = np.pad(u, ((3, 0), (0, 0)))
        u = np.array([(padded[t : t + 4] * p["convolution/kernel"]).sum(0) for t in range(len(u))])
    width = HEADS * DIM
    q, k = (
        NORMS[key_norm](FEATURE_MAPS[feature_map](z.reshape(9, HEADS, DIM)))
        for z in (u[:, :width], u[:, width : 2 * width])
    )
    v = silu(u[:, 2 * width :]).reshape(9, HEADS, value_dim)
    beta = beta_limit * sigmoid(x @ p["beta/kernel"])
    alpha = np.ones((9, HEADS))
    if decay:
        step = np.log1p(np.exp(x @ p["step_logits/kernel"] + p["step_bias"]))
        alpha = np.exp(-np.exp(p["log_rate"]) * step)
    y = np.zeros((9, HEADS, value_dim))
    for h in range(HEADS):
        state = np.zeros((DIM, value_dim))
        for t in range(9):
            state = alpha[t, h] * (np.eye(DIM) - beta[t, h] * np.outer(k[t, h], k[t, h])) @ state
            state += beta[t, h] * np.outer(k[t, h], v[t, h])
            y[t, h] = state.T @ q[t, h] / DIM**0.5
    y = (rms(y) * p["norm/scale"]).reshape(9, -1)
    if gate:
        y *= silu(x @ p["gate/kernel"])
    return y @ p["out/kernel"]


def check(layer, **options):
    graph, state = nnx.split(layer)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda z: z + 0.3 * rng.standard_normal(z.shape).astype(np.float32), state)
    layer = nnx.merge(graph, state)
    expected = wanted(parameters(layer), **options)
    found = jax.jit(layer, compiler_options={"xla_backend_optimization_level": 0})(jnp.asarray(X))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convolution": 0, "feature_map": "relu", "gate": True},
        {"key_norm": "l1", "feature_map": "elu", "negative_eigenvalues": True},
    ],
    ids=str,
)
def test_deltanet_is_the_formula(options):
    layer = DeltaNet(HEADS * DIM, heads=HEADS, rngs=nnx.Rngs(0), **options)
    limit = 2.0 if options.pop("negative_eigenvalues", False) else 1.0
    defaults = {"convolution": 4, "feature_map": "silu", "key_norm": "l2", "gate": False}
    check(layer, **{**defaults, **options}, beta_limit=limit, value_dim=DIM, decay=False)


def test_gated_deltanet_is_the_formula():
    layer = GatedDeltaNet(HEADS * DIM, heads=HEADS, expand_k=1.0, expand_v=2.0, rngs=nnx.Rngs(0))
    options = {"convolution": 4, "feature_map": "silu", "key_norm": "l2", "gate": True}
    check(layer, **options, beta_limit=1.0, value_dim=2 * DIM, decay=True)
