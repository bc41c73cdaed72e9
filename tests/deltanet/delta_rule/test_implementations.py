"""One test body for every implementation: values and all gradients against the float64 oracle."""

from functools import partial

import jax
import pytest

from deltanet.delta_rule import api, pallas_gpu, pallas_tpu
from deltanet.delta_rule.hopper import layout
from tests.deltanet.delta_rule.cases import Case, check

GPU_CASES = "the GPU kernels need JAX 0.11"

# Every length around a chunk, sizes that need padding, and packed rows whose boundaries fall on and off chunks.
FLOAT32 = (
    Case(time=1),
    Case(time=130, dim=60, value_dim=36, gated=True, segments=(1, 63, 10, 56), batch=2, normalize=True),
    Case(time=100, keys=0.99, beta=2.0, segments=(64, 36)),
    Case(time=65, keys=1.0, beta=2.0),
)
BFLOAT16 = (
    Case(time=65, keys=0.5, beta="zero"),
    Case(time=130, keys=0.9, beta="one", gated=True, segments=(30, 70, 30), normalize=True),
)
# What is too slow for every day on a CPU: the lengths and sizes of the paper.
LONG = (
    *(Case(time=time, dim=64, value_dim=64) for time in (15, 63, 1000, 2048)),
    *(Case(time=130, dim=dim, value_dim=dim, gated=True) for dim in (32, 60, 64, 100, 128, 256)),
    *(Case(time=300, dim=64, value_dim=64, keys=keys, beta=2.0) for keys in (0.0, 0.5, 0.9, 0.99, 1.0)),
    Case(time=300, dim=128, value_dim=64, segments=(1, 127, 100, 72), gated=True, batch=2),
)
# Gated, with keys that are alike: most of the log-decay's gradient cancels.
ALIKE = (
    Case(time=130, dim=64, value_dim=64, keys=0.99, gated=True),
    Case(time=130, dim=64, value_dim=64, keys=1.0, beta=2.0, gated=True),
)
# Heads enough for the widest slices of value columns, and for several items a warpgroup everywhere.
MANY = (
    Case(time=700, dim=128, value_dim=128, heads=72),
    Case(time=700, dim=64, value_dim=64, heads=72, batch=2, gated=True),
    Case(time=200, dim=256, value_dim=256, heads=40),
)
# A number of segments that run side by side, and a problem of a multiple of so many chunks.
SEGMENTED = ((2, Case(time=250, dim=64, value_dim=64, heads=1, gated=True, segments=(1, 100, 99, 50))),)
SEGMENTED_LONG = (
    (3, Case(time=130, dim=64, value_dim=64, heads=1, keys=1.0, beta=2.0)),
    (2, Case(time=194, dim=64, value_dim=128, heads=1, batch=2, gated=True)),
    (4, Case(time=250, dim=128, value_dim=64, heads=1, keys=0.99, beta=2.0)),
    (4, Case(time=250, dim=64, value_dim=64, heads=1, keys=0.9, beta="one", gated=True, segments=(30, 140, 80))),
)
SEGMENTED_GPU = (
    *((count, Case(time=2048, dim=64, value_dim=64)) for count in (2, 4, 8)),
    *((4, Case(time=1000, dim=dim, value_dim=dim, gated=True)) for dim in (64, 128, 256)),
    *((4, Case(time=1000, dim=128, value_dim=128, keys=keys, beta=2.0)) for keys in (0.5, 0.9, 0.99)),
    (4, Case(time=250, dim=64, value_dim=64, keys=1.0, beta=2.0)),
    (4, Case(time=1000, dim=128, value_dim=64, segments=(1, 127, 500, 372), gated=True, batch=2)),
    # The widest blocks, more of them than multiprocessors.
    (2, Case(time=760, dim=128, value_dim=128, heads=40, gated=True)),
)


def _low(cases: tuple[Case, ...]) -> list[Case]:
    return [Case(**{**case.__dict__, "dtype": "bfloat16"}) for case in cases]


# Of the second, 8e-3 are the rounding of normalised queries and keys, which every implementation shares.
OVER_THE_BAR = pytest.mark.xfail(strict=True, reason="the log-decay's gradient is 1.0e-2 to 2.2e-2 off on a GPU")
GPU_LONG = [
    pytest.param(case, marks=OVER_THE_BAR if case in _low((*ALIKE, BFLOAT16[1])) else ())
    for case in _low((*FLOAT32, *BFLOAT16, *LONG, *ALIKE, *MANY))
]


def _interpreted(monkeypatch: pytest.MonkeyPatch, module, interpret) -> None:
    """Makes the public function run a module's kernels in an interpreter, on whatever device there is."""
    run = partial(api.run_kernels, module, interpret=interpret)
    monkeypatch.setitem(api.IMPLEMENTATIONS, module.__name__.rpartition(".")[2], (lambda problem: None, run))


@pytest.mark.parametrize("case", [*FLOAT32, *_low(BFLOAT16)], ids=str)
@pytest.mark.parametrize("name", ["recurrent", "chunked", "pallas_tpu"])
def test_matches_the_oracle(name, case, monkeypatch):
    if name == "pallas_tpu":
        _interpreted(monkeypatch, pallas_tpu, interpret=True)
    check(partial(api.delta_rule, implementation=name), case)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason=GPU_CASES)
@pytest.mark.parametrize(
    "case",
    _low(
        (
            Case(time=130, dim=32, value_dim=64, heads=1, keys=1.0, beta=2.0),
            Case(time=70, dim=64, value_dim=128, heads=1, gated=True, segments=(1, 40, 29), normalize=True),
        )
    ),
    ids=str,
)
def test_gpu_kernels_interpreted(case, monkeypatch, capsys):
    # One multiprocessor, so that a block has more than one item.
    monkeypatch.setattr(layout, "MULTIPROCESSORS", 1)
    _check_interpreted(case, monkeypatch, capsys)


def _check_interpreted(case, monkeypatch, capsys):
    """Shared memory starts as NaN there, and unordered accesses to it are reported."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    _interpreted(monkeypatch, pallas_gpu, plgpu.InterpretGPUParams(detect_races=True))
    check(partial(api.delta_rule, implementation="pallas_gpu"), case)
    assert "RACE" not in capsys.readouterr().out


def _low_segmented(cases: tuple[tuple[int, Case], ...]) -> list[tuple[int, Case]]:
    return [(count, *_low((case,))) for count, case in cases]


def _in_segments(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(pallas_gpu, "pallas_delta_rule", partial(pallas_gpu.pallas_delta_rule, count=count))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason=GPU_CASES)
@pytest.mark.parametrize(
    ("count", "case"),
    [
        *_low_segmented(SEGMENTED),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in _low_segmented(SEGMENTED_LONG)),
    ],
    ids=str,
)
def test_segmented_gpu_kernels_interpreted(count, case, monkeypatch, capsys):
    _in_segments(monkeypatch, count)
    _check_interpreted(case, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*LONG, *ALIKE, *_low((*LONG, *ALIKE))], ids=str)
@pytest.mark.parametrize("name", ["recurrent", "chunked", "pallas_tpu"])
def test_matches_the_oracle_on_all_sizes(name, case, monkeypatch, request):
    if name == "pallas_tpu":
        if case in _low(ALIKE[1:]):
            reason = "the log-decay's gradient is 1.9e-2 off: the states that the kernel keeps are bfloat16"
            request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
        _interpreted(monkeypatch, pallas_tpu, interpret=True)
    check(partial(api.delta_rule, implementation=name), case)


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason=GPU_CASES)
@pytest.mark.parametrize("case", _low([case for case in LONG if case.time <= 300]), ids=str)
def test_gpu_kernels_interpreted_on_all_sizes(case, monkeypatch, capsys):
    _check_interpreted(Case(**{**case.__dict__, "heads": 1, "batch": 1}), monkeypatch, capsys)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize("case", GPU_LONG, ids=str)
def test_gpu_kernels_compiled(case):
    check(partial(api.delta_rule, implementation="pallas_gpu"), case)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU here")
@pytest.mark.parametrize(("count", "case"), _low_segmented((*SEGMENTED, *SEGMENTED_LONG, *SEGMENTED_GPU)), ids=str)
def test_segmented_gpu_kernels_compiled(count, case, monkeypatch):
    _in_segments(monkeypatch, count)
    check(partial(api.delta_rule, implementation="pallas_gpu"), case)
