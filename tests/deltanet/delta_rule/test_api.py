"""The public functions: what they refuse, which implementation they choose, batching, sharding and decoding."""

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet.delta_rule import delta_rule, delta_rule_step
from deltanet.delta_rule.chunked import chunked_delta_rule
from tests.deltanet.delta_rule.cases import Case, evaluate, expected, make, relative_rms

ROOT = Path(__file__).parents[3]


def arguments(case=None, **changes):
    """Arguments of a small problem as JAX arrays."""
    problem = make(case or Case(time=20, dim=8, value_dim=4, batch=2, gated=True))
    found = {name: jnp.asarray(x) for name, x in problem.arguments.items()}
    return found | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.ones((2, 20, 2, 8), jnp.int32)}, TypeError, "q must be of a floating dtype, not int32"),
        ({"v": jnp.ones((2, 20, 2, 4), jnp.bfloat16)}, TypeError, "one dtype, not float32, float32 and bfloat16"),
        ({"initial_state": jnp.ones((2, 2, 8, 4), jnp.bfloat16)}, TypeError, "float32 or float64, not bfloat16"),
        ({"segment_ids": jnp.ones((2, 20))}, TypeError, "segment_ids must be integers, not float32"),
        ({"q": jnp.ones((2, 20, 8))}, ValueError, r"q must be \[batch, time, heads, dim\].*\(2, 20, 8\)"),
        ({"k": jnp.ones((2, 20, 2, 6))}, ValueError, r"k must have shape \(2, 20, 2, 8\).*not \(2, 20, 2, 6\)"),
        ({"v": jnp.ones((2, 19, 2, 4))}, ValueError, r"v must have shape \(2, 20, 2, 4\)"),
        ({"beta": jnp.ones((2, 20, 2, 1))}, ValueError, r"beta must have shape \(2, 20, 2\).*not \(2, 20, 2, 1\)"),
        ({"g": jnp.ones((2, 20))}, ValueError, r"g must have shape \(2, 20, 2\)"),
        ({"initial_state": jnp.ones((2, 2, 4, 8))}, ValueError, r"initial_state must have shape \(2, 2, 8, 4\)"),
        ({"segment_ids": jnp.ones((20,), int)}, ValueError, r"segment_ids must have shape \(2, 20\)"),
        ({"implementation": "triton"}, ValueError, "no implementation 'triton': choose from pallas_gpu, pallas_tpu"),
        ({"implementation": ()}, NotImplementedError, "none was named"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        delta_rule(**arguments(**changes))


def test_a_token_has_no_time_axis():
    with pytest.raises(ValueError, match=r"beta of one token must have rank 2, not shape \(2, 20, 2\)"):
        delta_rule_step(*(jnp.ones((2, 2, 8)) for _ in range(3)), arguments()["beta"])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="is about machines without a GPU")
def test_fallback_says_why(caplog):
    problem = arguments()
    with pytest.raises(NotImplementedError, match=r"pallas_gpu: it needs an NVIDIA GPU.*; pallas_tpu: it needs a TPU"):
        delta_rule(**problem, implementation=("pallas_gpu", "pallas_tpu"))
    with caplog.at_level(logging.DEBUG, logger="deltanet.delta_rule.api"):
        output, _ = delta_rule(**problem)
    assert "runs chunked; pallas_gpu: it needs an NVIDIA GPU" in caplog.text
    np.testing.assert_array_equal(output, delta_rule(**problem, implementation="chunked")[0])


def test_reference_is_an_implementation():
    case = Case(time=20, dim=8, value_dim=4, segments=(5, 15), gated=True)
    actual = evaluate(partial(delta_rule, implementation="reference"), make(case))
    for name, wanted in expected(case).items():
        assert relative_rms(actual[name], wanted) < 1e-5, name


@pytest.mark.parametrize("chunk_size", [1, 7, 24])
def test_any_chunk_size(chunk_size):
    case = Case(time=168, dim=8, value_dim=4, gated=True, segments=(50, 118))

    def run(q, k, v, beta, g, *, initial_state, segment_ids):
        starts = jnp.zeros((1, 168)).at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
        return chunked_delta_rule(q, k, v, beta, g, starts, initial_state, 8**-0.5, chunk_size)

    actual = evaluate(run, make(case))
    for name, wanted in expected(case).items():
        assert relative_rms(actual[name], wanted) < 1e-5, name


@pytest.mark.parametrize("name", ["chunked", "recurrent"])
def test_two_halves_equal_the_whole(name):
    problem = arguments(Case(time=100, dim=16, value_dim=8, gated=True))
    run = jax.jit(partial(delta_rule, implementation=name))
    output, state = run(**problem)
    carried = problem.pop("initial_state")
    halves = []
    for part in (slice(0, 37), slice(37, None)):
        half, carried = run(**{name: x[:, part] for name, x in problem.items()}, initial_state=carried)
        halves.append(half)
    np.testing.assert_allclose(jnp.concatenate(halves, 1), output, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(carried, state, rtol=1e-5, atol=1e-5)


def test_prompt_then_steps_equal_the_whole():
    problem = arguments(Case(time=70, dim=16, value_dim=8, gated=True), l2_normalize=True)
    options = {"l2_normalize": problem.pop("l2_normalize")}
    run, run_step = (jax.jit(partial(function, **options)) for function in (delta_rule, delta_rule_step))
    output, state = run(**problem)
    prompt = {name: x[:, :65] for name, x in problem.items() if name != "initial_state"}
    _, carried = run(**prompt, initial_state=problem.pop("initial_state"))
    for t in range(65, 70):
        token = {name: x[:, t] for name, x in problem.items()}
        step, carried = run_step(**token, initial_state=carried)
        np.testing.assert_allclose(step, output[:, t], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(carried, state, rtol=1e-5, atol=1e-5)


def test_dtypes_of_results():
    low = {name: x.astype(jnp.bfloat16) for name, x in arguments().items() if name != "initial_state"}
    output, state = delta_rule(**low)
    assert (output.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arguments().items()}
        output, state = delta_rule(**wide)
    assert (output.dtype, state.dtype) == (jnp.float64, jnp.float64)


def test_vmap_equals_a_loop():
    problem = arguments(Case(time=30, dim=8, value_dim=4, batch=3, gated=True))

    def loss(problem):
        output, state = delta_rule(**problem)
        return (output**2).sum() + state.sum()

    inner = {name: x[:, None] for name, x in problem.items()}  # each row of the batch becomes a batch of one
    mapped = jax.jit(jax.vmap(jax.grad(loss)))(inner)
    for name, wanted in jax.jit(jax.grad(loss))(problem).items():
        np.testing.assert_allclose(mapped[name][:, 0], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


SHARDED = """
import json
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from deltanet.delta_rule import api, delta_rule, pallas_tpu
from tests.deltanet.delta_rule.cases import Case, make

api.IMPLEMENTATIONS["pallas_tpu"] = (lambda problem: None, partial(api.run_kernels, pallas_tpu, interpret=True))
mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
problem = make(Case(time=70, dim=16, value_dim=16, batch=2, gated=True, segments=(50, 20)))
arguments = {name: jnp.asarray(x) for name, x in problem.arguments.items()} | {"segment_ids": problem.segment_ids}
specs = {name: P("data", "heads") if name == "initial_state" else P("data", None, "heads") for name in arguments}
specs["segment_ids"] = P("data")

def loss(run, arguments, segment_ids):
    output, state = run({**arguments, "segment_ids": segment_ids})
    return (output**2).sum() + state.sum()

errors = {}
for name in ("chunked", "recurrent", "pallas_tpu"):
    def run(arguments):
        return delta_rule(**arguments, implementation=name)

    # The interpreter of Pallas kernels does not know which axes its own values vary over.
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=(P("data", None, "heads"), P("data", "heads")),
                            check_vma=name != "pallas_tpu")
    rest = dict(arguments)
    segment_ids = jnp.asarray(rest.pop("segment_ids"))
    wanted, actual = (jax.jit(jax.grad(partial(loss, f)))(rest, segment_ids) for f in (run, sharded))
    errors[name] = max(float(jnp.abs(actual[x] - wanted[x]).max()) for x in wanted)
print(json.dumps(errors))
"""


def test_shard_map_over_batch_and_heads():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert set(errors) == {"chunked", "recurrent", "pallas_tpu"}
    assert max(errors.values()) < 1e-4, errors


def test_import_needs_only_jax():
    """Nothing of the house but the helpers of kernels, nor what it needs besides JAX, comes with the op."""
    others = ("flax", "optax", "training", "models.layers")
    code = f"import sys; import deltanet.delta_rule; print([name for name in {others} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_initial_state_is_zero():
    problem = arguments()
    del problem["initial_state"]
    zero = jnp.zeros((2, 2, 8, 4))
    for actual, wanted in zip(delta_rule(**problem), delta_rule(**problem, initial_state=zero), strict=True):
        np.testing.assert_array_equal(actual, wanted)
