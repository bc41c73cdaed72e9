"""One test body: values and all gradients of the chunked form against the recurrence in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.linear_attention import linear_attention, linear_attention_step, reference

FAST_COMPILE = {"xla_backend_optimization_level": 0}
TOLERANCES = {"float32": 2e-5, "bfloat16": 0.008}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of a problem: `decay` is "none", "head" or "channel", `strength` its largest logarithm for a token."""

    time: int = 130
    decay: str = "none"
    strength: float = 0.1
    segments: tuple[int, ...] = ()
    dtype: str = "float32"

    def __str__(self) -> str:
        return ",".join(str(value) for value in dataclasses.astuple(self))


CASES = [
    Case(time=1, decay="head"),
    Case(time=5, decay="channel", segments=(2, 3)),
    Case(decay="none", segments=(64, 66)),
    Case(decay="head", segments=(1, 62, 67)),
    # At this strength a chunk's factors range over 300 orders of magnitude.
    Case(decay="channel", strength=20.0, segments=(70, 60)),
    Case(decay="head", strength=20.0, dtype="bfloat16"),
    Case(decay="channel", dtype="bfloat16"),
]
SLOW = [
    *(Case(time=time, decay=decay) for time in (63, 64, 65, 300) for decay in ("none", "head", "channel")),
    *(Case(time=300, decay=decay, segments=(64, 1, 63, 172)) for decay in ("none", "head", "channel")),
]


def make(case: Case) -> tuple[list[np.ndarray | None], np.ndarray | None, list[np.ndarray]]:
    """q, k, v, g and the initial state; segment ids; cotangents. In a low precision they are rounded to it."""
    rng = np.random.default_rng(0)
    batch, heads, dim, value_dim = 2, 2, 8, 12
    q, k = (rng.standard_normal((batch, case.time, heads, dim)) / dim**0.5 for _ in range(2))
    v, d_output = (rng.standard_normal((batch, case.time, heads, value_dim)) for _ in range(2))
    state, d_state = (rng.standard_normal((batch, heads, dim, value_dim)) for _ in range(2))
    g = -case.strength * rng.random((batch, case.time, heads, *((dim,) if case.decay == "channel" else ())))
    ids = np.repeat(np.arange(len(case.segments)), case.segments) if case.segments else None
    q, k, v, d_output = (np.asarray(jnp.asarray(x, case.dtype), np.float32) for x in (q, k, v, d_output))
    ids = None if ids is None else np.broadcast_to(ids, (batch, case.time))
    return [q, k, v, None if case.decay == "none" else g.astype(np.float32), state], ids, [d_output, d_state]


def results(function, arguments, ids, cotangents):
    """Output, final state and the gradients of q, k, v, g and the initial state, as one list."""

    def call(*arguments):
        return function(*arguments[:4], initial_state=arguments[4], segment_ids=ids)

    def both(arguments, cotangents):
        values, pull = jax.vjp(call, *arguments)
        return *values, *pull(tuple(c.astype(x.dtype) for c, x in zip(cotangents, values, strict=True)))

    found = jax.jit(both, compiler_options=FAST_COMPILE)(arguments, cotangents)
    return [np.asarray(x) for x in found if x is not None]


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=str)
def test_matches_the_oracle(case):
    arguments, ids, cotangents = make(case)
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(x, jnp.float64) for x in arguments]
        wanted = results(reference.linear_attention, wide, ids, [jnp.asarray(c, jnp.float64) for c in cotangents])
    dtypes = [case.dtype] * 3 + ["float32"] * 2
    low = [None if x is None else jnp.asarray(x, dtype) for x, dtype in zip(arguments, dtypes, strict=True)]
    found = results(linear_attention, low, ids, [jnp.asarray(c, jnp.float32) for c in cotangents])
    assert found[0].dtype == case.dtype
    for x, y in zip(found, wanted, strict=True):
        assert np.linalg.norm(x.astype(np.float64) - y) <= TOLERANCES[case.dtype] * np.linalg.norm(y)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_steps_are_the_sequence(decay):
    (q, k, v, g, state), _, _ = make(Case(time=5, decay=decay))
    state = jnp.asarray(state, jnp.float32)
    output, final = linear_attention(q, k, v, g, initial_state=state)
    for t in range(5):
        y, state = linear_attention_step(q[:, t], k[:, t], v[:, t], None if g is None else g[:, t], initial_state=state)
        np.testing.assert_allclose(y, output[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(state, final, rtol=1e-5, atol=1e-5)


def test_errors():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"g must have shape \(1, 4, 2\) beside q of shape .*, not \(1, 4\)"):
        linear_attention(x, x, x, jnp.zeros((1, 4)))
    with pytest.raises(TypeError, match="one dtype"):
        linear_attention(x, x, x.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="floating"):
        linear_attention(x.astype(int), x, x)
    with pytest.raises(ValueError, match="not empty"):
        linear_attention(x[:, :0], x[:, :0], x[:, :0])
