"""Figure 1: the entry runs, and the recurrent kernel that it times computes the delta rule."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltanet import reproduce
from deltanet.delta_rule import recurrent_gpu, reference
from tests.deltanet.delta_rule.cases import Case, make, relative_rms
from training import report
from training.errors import UserError


def test_figure1_at_scale_cpu(tmp_path: Path) -> None:
    record = report.reproduce("figure1", reproduce.ENTRIES["figure1"], "cpu", tmp_path, tmp_path)
    assert [row["passed"] for row in record["rows"]] == [None, None, None, True]
    assert (tmp_path / "figure1.cpu.png").exists()


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_figure1_at_scale_gpu_needs_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        report.reproduce("figure1", reproduce.ENTRIES["figure1"], "gpu", tmp_path, tmp_path)


def test_rows_are_judged_at_scale_gpu() -> None:
    chunkwise = [1.0] * 6
    sizes = {
        str(dim): {
            "chunkwise": chunkwise,
            "recurrent": [float(x) for x in paper],
            "difference": [0.0],
        }
        for dim, paper in reproduce.PAPER.items()
    }
    rows = reproduce.ENTRIES["figure1"].rows({"scale": "gpu", "lengths": list(reproduce.LENGTHS), "sizes": sizes})
    assert all(row.passed is not False for row in rows)
    assert rows[-1].ours == "32.8"


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the GPU kernels need JAX 0.11")
def test_recurrent_kernel_interpreted() -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    problem = make(Case(time=64, dim=64, value_dim=128, heads=1, state=False, dtype="bfloat16"))
    arguments = [jnp.asarray(x) for x in problem.arguments.values()]
    output = recurrent_gpu.recurrent_forward(*arguments, 0.125, plgpu.InterpretGPUParams(detect_races=True))
    wanted = reference.delta_rule(*(x.astype(jnp.float32) for x in arguments), scale=0.125)[0]
    assert relative_rms(np.asarray(output), np.asarray(wanted)) < 0.006
