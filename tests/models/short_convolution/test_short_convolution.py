"""The short convolution against its oracle: in plain XLA, in kernels, and what is refused."""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import mosaic_gpu
from models.short_convolution import Part, api, pallas_gpu, short_convolution
from tests.models.short_convolution.cases import BARS, FAST_COMPILE, Case, oracle, problem, results, worst_error

GPU_KERNELS = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")
HEADS = (Part(8, 4), Part(4), Part(4, 2))
QKV = (Part(512, 128), Part(512, 128), Part(512))
slow = partial(pytest.param, marks=pytest.mark.slow)

KERNEL_CASES = (
    Case(32, (Part(512, 64), Part(512)), segments=(14, 1, 2, 15), batch=1),
    slow(Case(16, QKV, batch=1)),
    slow(Case(32, (Part(768), Part(256)))),
    slow(Case(32, QKV, segments=(17, 14, 1))),
    slow(Case(16, QKV)),
    slow(Case(48, (Part(1024),), silu=False)),
    slow(Case(272, (Part(512, 64), Part(512)), size=3, batch=1)),
    slow(Case(64, (Part(512, 128),), size=5, scale=1e-5)),
    slow(Case(32, (Part(512, 64), Part(512, 64)), size=2, scale=30.0)),
)


def check(function, case):
    assert worst_error(results(function, case), oracle(case)) <= BARS[case.dtype]


def at(case, implementation=None):
    def function(x, kernel, segment_ids):
        return short_convolution(x, kernel, case.parts, segment_ids, silu=case.silu, implementation=implementation)

    return function


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(parts=HEADS),
        Case(1, HEADS),
        Case(2, size=3, silu=False),
        Case(7, size=1),
        Case(9, HEADS, segments=(5, 1, 3)),
        Case(9, HEADS, scale=1e-5),
        Case(9, HEADS, scale=30.0),
        Case(300, HEADS, batch=1),
    ],
)
def test_xla(case, dtype):
    check(at(case), case._replace(dtype=dtype))


def test_a_long_sum_of_the_kernels_gradient_is_not_rounded_on_the_way():
    case = Case(8192, (Part(3),), dtype="bfloat16", batch=1, silu=False)
    x, _, _, (d,) = problem(case)
    d_kernel = results(at(case), case)[-1]
    past = np.pad(x.astype(np.float64)[0], ((3, 0), (0, 0)))
    wanted = [(past[i : i + 8192] * d.astype(np.float64)[0]).sum(0) for i in range(4)]
    np.testing.assert_allclose(d_kernel, wanted, rtol=1e-4, atol=1e-3)


def test_vmap_is_a_loop():
    case = Case(9, HEADS, segments=(5, 4))
    replicas = [problem(case._replace(scale=scale))[:2] for scale in (1.0, 2.0)]
    x, kernel = (jnp.stack(arrays) for arrays in zip(*replicas, strict=True))

    def d_both(x, kernel):
        return jax.grad(lambda *z: sum((part**2).sum() for part in at(case)(*z, problem(case)[2])), (0, 1))(x, kernel)

    compiled = partial(jax.jit, compiler_options=FAST_COMPILE)
    mapped, alone = compiled(jax.vmap(d_both))(x, kernel), compiled(d_both)
    for i in range(2):
        for found, wanted in zip(mapped, alone(x[i], kernel[i]), strict=True):
            np.testing.assert_allclose(found[i], wanted, rtol=1e-4, atol=1e-5)


@GPU_KERNELS
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_gpu_kernels_interpreted(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = plgpu.InterpretGPUParams(detect_races=True)

    def function(x, kernel, segment_ids):
        return pallas_gpu.pallas_short_convolution(x, kernel, segment_ids, case.parts, case.silu, interpret)

    check(function, case._replace(dtype="bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*KERNEL_CASES, Case(2048, QKV, batch=4)])
def test_gpu_kernels_compiled(case):
    if reason := mosaic_gpu.refusal():
        pytest.skip(reason)
    check(at(case, "pallas_gpu"), case._replace(dtype="bfloat16"))


@GPU_KERNELS
@pytest.mark.parametrize("replicas", [(), (3,)])
def test_gpu_kernels_lower(replicas):
    """A kernel for each pass, also for replicas under `vmap`."""
    x, kernel, _, cotangents = problem(Case(16, QKV, dtype="bfloat16"))

    def run(x, kernel, cotangents):
        def function(x, kernel):
            return pallas_gpu.pallas_short_convolution(x, kernel, None, QKV, True)

        y, pull = jax.vjp(function, x, kernel)
        return y, pull(cotangents)

    arguments = jax.tree.map(lambda z: jnp.zeros((*replicas, *z.shape), z.dtype), (x, kernel, cotangents))
    run = jax.vmap(run) if replicas else run
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall("stablehlo.custom_call @mosaic_gpu", text)) == 2


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(16, QKV), "take bfloat16, not float32"),
        (Case(17, QKV, dtype="bfloat16"), "multiples of 16 tokens, not 17"),
        (Case(16, (Part(512, 64), Part(256)), dtype="bfloat16"), "multiples of 512 channels, not of 256"),
        (Case(16, (Part(384),), dtype="bfloat16"), "multiples of 256 channels, not of 384"),
        (Case(16, (Part(512, 256),), dtype="bfloat16"), r"heads of 64 or of 128 channels, not of \[256\]"),
        (Case(16, QKV, size=6, dtype="bfloat16"), "see 2 to 5 tokens, not 6"),
    ],
)
def test_what_the_gpu_kernels_leave_to_xla(case, message):
    x, kernel, *_ = problem(case)
    assert re.search(message, pallas_gpu.refusal(x, kernel, case.parts))


def test_the_fallback_says_why(caplog):
    case = Case()
    with caplog.at_level(logging.DEBUG, logger="models.short_convolution.api"):
        at(case)(*problem(case)[:3])
    assert caplog.messages[-1].startswith("short_convolution runs xla; pallas_gpu: ")
    with pytest.raises(NotImplementedError, match=r"x of shape \(2, 9, 6\): pallas_gpu: "):
        at(case, "pallas_gpu")(*problem(case)[:3])
    assert list(api.IMPLEMENTATIONS) == ["pallas_gpu", "xla"]


@pytest.mark.parametrize(
    ("x", "kernel", "parts", "segment_ids", "error", "message"),
    [
        ((2, 3), (4, 3), (Part(3),), None, ValueError, r"\[batch, time, channels\]"),
        ((1, 5, 3), (4, 2), (Part(3),), None, ValueError, r"kernel must have shape \[size, 3\]"),
        ((1, 5, 3), (4, 3), (Part(2),), None, ValueError, r"parts \[2\] do not make up the 3 channels"),
        ((1, 5, 3), (4, 3), (Part(3, 2),), None, ValueError, "3 channels do not split into heads of 2"),
        ((1, 5, 3), (4, 3), (Part(3),), np.zeros((1, 4), int), ValueError, r"segment_ids must have shape \(1, 5\)"),
        ((1, 5, 3), (4, 3), (Part(3),), np.zeros((1, 5)), TypeError, "segment_ids must be integers"),
    ],
)
def test_errors(x, kernel, parts, segment_ids, error, message):
    with pytest.raises(error, match=message):
        short_convolution(jnp.ones(x), jnp.ones(kernel), parts, segment_ids)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="no implementation 'xlaa': choose from pallas_gpu, xla"):
        short_convolution(jnp.ones((1, 5, 3)), jnp.ones((4, 3)), (Part(3),), implementation="xlaa")
