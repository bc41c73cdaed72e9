"""The mapped models against their causal recurrences, run in both directions with the diagonal counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lion import mixers

FAST_COMPILE = {"xla_backend_optimization_level": 0}
BATCH, TIME, WIDTH, HEADS = 2, 6, 12, 3


def recurrences(q, k, v, log_decay):
    """Numerators and row sums, token by token, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    decay = np.exp(np.asarray(log_decay, np.float64))
    decay = np.broadcast_to(decay[..., None] if decay.ndim < 4 else decay, q.shape)
    numerator, row_sum = -(q * k).sum(-1, keepdims=True) * v, -(q * k).sum(-1)
    for way in (range(TIME), range(TIME)[::-1]):
        state, keys, left = np.zeros((BATCH, HEADS, WIDTH // HEADS, WIDTH // HEADS)), 0, np.ones_like(q[:, 0])
        for i in way:
            state = left[..., None] * state + k[:, i, ..., None] * v[:, i, ..., None, :]
            keys = left * keys + k[:, i]
            numerator[:, i] += np.einsum("bhd,bhdv->bhv", q[:, i], state)
            row_sum[:, i] += (q[:, i] * keys).sum(-1)
            left = decay[:, i]
    return numerator, row_sum


READ = {
    "GatedRfa": lambda numerator, row_sum: numerator / row_sum[..., None],
    "MLstm": lambda numerator, row_sum: numerator / np.maximum(np.abs(row_sum[..., None]), 1),
}


@pytest.mark.parametrize("name", ["RetNet", "GatedRfa", "Mamba2", "MLstm", "Hgrn2", "Rwkv6"])
def test_recurrence(name):
    mixer = getattr(mixers, name)(WIDTH, HEADS, stddev=1.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    got, (q, k, v, decay) = jax.jit(lambda x: (mixer(x), mixer.terms(x)), compiler_options=FAST_COMPILE)(x)
    decay = np.broadcast_to(decay, (BATCH, TIME, HEADS)) if decay.ndim == 1 else decay
    assert (decay <= 0).all()
    heads = READ.get(name, lambda numerator, row_sum: mixers.head_norm(jnp.asarray(numerator, jnp.float32)))
    y = np.asarray(heads(*recurrences(q, k, v, decay))).reshape(x.shape)
    wanted = y @ np.asarray(mixer.out.kernel[...], np.float64)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def stepped(q, k, v, step):
    """A causal delta rule, token by token, in the interface of the op."""
    state, outputs = np.zeros((BATCH, HEADS, WIDTH // HEADS, WIDTH // HEADS)), []
    for i in range(TIME):
        error = v[:, i] - np.einsum("bhd,bhdv->bhv", k[:, i], state)
        state = state + step[:, i, :, None, None] * k[:, i, ..., None] * error[..., None, :]
        outputs.append(np.einsum("bhd,bhdv->bhv", q[:, i], state))
    return np.stack(outputs, 1)


def deltanet(**options):
    op = "deltanet.delta_rule.delta_rule"
    return mixers.DeltaNet(WIDTH, HEADS, op=op, stddev=1.0, rngs=nnx.Rngs(0), **options)


def test_deltanet_is_the_sum_of_both_directions_with_its_own_value_once():
    mixer = deltanet()
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    got, terms = jax.jit(lambda x: (mixer(x), mixer.terms(x)), compiler_options=FAST_COMPILE)(x)
    q, k, v, step = (np.asarray(z, np.float64) for z in terms)
    np.testing.assert_allclose(np.linalg.norm(k, axis=-1), 1, atol=1e-4)
    backward = stepped(*(z[:, ::-1] for z in (q, k, v, step)))[:, ::-1]
    y = stepped(q, k, v, step) + backward - (step * (q * k).sum(-1))[..., None] * v
    heads = np.asarray(mixers.head_norm(jnp.asarray(y, jnp.float32))).reshape(x.shape)
    wanted = heads @ np.asarray(mixer.out.kernel[...], np.float64)
    np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_deltanet_ignores_padding():
    mixer = deltanet()
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    mask = jnp.broadcast_to(jnp.arange(TIME) < TIME - 2, (BATCH, TIME))
    run = jax.jit(lambda x: (mixer(x, mask)[:, :-2], mixer(x[:, :-2])), compiler_options=FAST_COMPILE)
    np.testing.assert_allclose(*run(x), atol=1e-5)
