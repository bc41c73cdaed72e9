"""What can be known of the kernels without their devices: that they lower, their inverses, and what they refuse."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet.delta_rule import pallas_gpu, pallas_tpu
from deltanet.delta_rule.chunked import unit_lower_inverse
from deltanet.delta_rule.hopper import segments
from deltanet.delta_rule.hopper.layout import Layout
from tests.deltanet.delta_rule.cases import Case, make, relative_rms

GPU_KERNELS = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")


def hard_triangle(size):
    """M of keys that are nearly alike, with step sizes up to 2: its powers grow beyond float32."""
    rng = np.random.default_rng(0)
    k = rng.standard_normal((size, 16)) * 0.05 + np.ones(16)
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    return np.tril(rng.uniform(0, 2, (size, 1)) * (k @ k.T), -1)


@pytest.mark.parametrize("size", [1, 2, 7, 24, 64])
def test_inverse_of_a_hard_triangle(size):
    m = hard_triangle(size)
    wanted = np.linalg.inv(np.eye(size) + m)
    highest = jax.lax.Precision.HIGHEST
    np.testing.assert_allclose(unit_lower_inverse(jnp.asarray(m, jnp.float32), highest), wanted, atol=1e-5)
    if size == 64:
        np.testing.assert_allclose(pallas_tpu.masked_inverse(jnp.asarray(m, jnp.float32), highest), wanted, atol=1e-5)


@GPU_KERNELS
def test_gpu_prepares_a_hard_triangle():
    """J and L are as good as bfloat16 can hold them, and so is what is kept of A for the backward, as a sum of two."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((1, 64, 1, 64)), rng.standard_normal((1, 64, 1, 64)) * 0.05 + np.ones(64)
    q, k = (jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.bfloat16) for x in (q, k))
    rows = jnp.asarray(rng.uniform(0, 2, (1, 1, 1, 64)), jnp.float32)
    layout = pallas_gpu.layout_of(q, k, 1, 1e4, plgpu.InterpretGPUParams(detect_races=True))
    j, l, split = (np.asarray(x, np.float64) for x in pallas_gpu.prepare(q, k, rows, layout, keep=True))
    q, k, beta = (np.asarray(x, np.float64) for x in (q[0, :, 0], k[0, :, 0], rows[0, 0, 0]))
    inverse = np.linalg.inv(np.eye(64) + np.tril(beta[:, None] * (k @ k.T), -1))
    assert relative_rms(split.sum(0)[0, 0], inverse) < 0.002
    assert relative_rms(j[0, :, 0], inverse.T @ k) < 0.004
    assert relative_rms(l[0, 0], 1e4 * np.tril(q @ k.T) @ inverse) < 0.004


def both_passes(kernels, problem):
    """Output, final state and all gradients as a function of the arguments."""

    def run(arguments, starts, cotangents):
        def call(arguments):
            leaves = [arguments.get(name) for name in ("q", "k", "v", "beta", "g")]
            return kernels.pallas_delta_rule(*leaves, starts, arguments["initial_state"], 0.125, False)

        results, pull = jax.vjp(call, arguments)
        return results, pull(cotangents)

    arguments = {name: jnp.asarray(x) for name, x in problem.arguments.items()}
    starts = None
    if problem.segment_ids is not None:
        starts = jnp.pad(jnp.diff(jnp.asarray(problem.segment_ids)) != 0, ((0, 0), (1, 0))).astype(jnp.float32)
    cotangents = tuple(jnp.asarray(x) for x in problem.cotangents)
    return run, (arguments, starts, cotangents)


def lowered(kernels, case, platform):
    """The program of both passes for a platform that need not be here."""
    run, arguments = both_passes(kernels, make(case))
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


PLAIN = Case(time=128, dim=64, value_dim=64, dtype="bfloat16")
LONG = Case(time=4096, dim=64, value_dim=64, heads=1, dtype="bfloat16")
FULL = Case(time=128, dim=128, value_dim=64, dtype="bfloat16", gated=True, segments=(40, 88))


@pytest.mark.parametrize("case", [PLAIN, FULL], ids=str)
def test_tpu_kernels_lower(case):
    assert len(re.findall("tpu_custom_call", lowered(pallas_tpu, case, "tpu"))) == 2


@GPU_KERNELS
@pytest.mark.parametrize(
    "case", [FULL, *(dataclasses.replace(FULL, dim=256, value_dim=256, heads=heads) for heads in (1, 40))], ids=str
)
def test_gpu_kernels_lower(case):
    text = lowered(pallas_gpu, case, "cuda")
    names = ("prepare", "output", "states", "reverse", "gradients")
    assert len(re.findall("stablehlo.custom_call @mosaic_gpu", text)) == len(names)


@GPU_KERNELS
def test_gpu_kernels_lower_in_segments():
    """The five, `maps` and another `reverse`."""
    assert len(re.findall("stablehlo.custom_call @mosaic_gpu", lowered(pallas_gpu, LONG, "cuda"))) == 7


@GPU_KERNELS
@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1, 16384, 16, 128, 128), (4, 4)),
        ((8, 2048, 16, 128, 128), (1, 1)),  # they fill the GPU
        ((1, 257 * 64, 16, 128, 128), (1, 1)),  # a prime number of chunks
        ((1, 1024, 1, 64, 64), (1, 1)),  # too short
    ],
    ids=str,
)
def test_numbers_of_segments(shape, counts):
    layout = Layout(*shape, rows=1, scale=1.0, interpret=False)
    assert tuple(segments.choose(layout, backward=backward) for backward in (False, True)) == counts


@GPU_KERNELS
def test_gpu_kernels_batch():
    """`vmap` adds an axis to the grids: no kernel runs more than once."""
    run, arguments = both_passes(pallas_gpu, make(PLAIN))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arguments)
    text = jax.jit(jax.vmap(run)).trace(*stacked).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall("stablehlo.custom_call @mosaic_gpu", text)) == 5
    assert "while" not in text


def test_refusals():
    tpu, gpu = (partial(module.refusal, dim=128, value_dim=128) for module in (pallas_tpu, pallas_gpu))
    assert tpu(jnp.dtype("float32")) is None
    assert tpu(jnp.dtype("float16")) == "the TPU kernels take float32 and bfloat16, not float16"
    assert "up to 256, not 300" in pallas_tpu.refusal(jnp.dtype("float32"), 300, 64)
    if jax.__version_info__ < (0, 11):
        assert gpu(jnp.dtype("bfloat16")).startswith("the GPU kernels need JAX 0.11")
        return
    assert gpu(jnp.dtype("bfloat16")) is None
    assert gpu(jnp.dtype("float32")) == "the GPU kernels take bfloat16, not float32"
    assert "up to 256, not 300" in pallas_gpu.refusal(jnp.dtype("bfloat16"), 64, 300)


def test_padded_sizes():
    assert [pallas_gpu.padded_size(dim) for dim in (32, 60, 64, 100, 128, 256)] == [64, 64, 64, 128, 128, 256]
    assert [pallas_tpu.padded_size(dim) for dim in (32, 60, 100, 256)] == [32, 64, 104, 256]
