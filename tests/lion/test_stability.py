"""The stability table (E2), at a size that shows all of it."""

import numpy as np
import pytest

from lion.stability import measure


@pytest.mark.parametrize(
    ("time", "mean_decay"),
    [(196, 0.5), *(pytest.param(t, m, marks=pytest.mark.slow) for t, m in ((1024, 0.5), (4096, 0.9), (4096, 0.999)))],
)
def test_only_differences_in_float32_survive(time, mean_decay):
    table = measure(time, mean_decay)
    ours = table["this op, float32"]
    assert ours["error"] < 2e-6
    assert ours["error"] <= table["difference of sums, float32"]["error"] < 1e-4
    assert ours["bad_gradients"] == table["difference of sums, float32"]["bad_gradients"] == 0
    if mean_decay < 0.99:
        assert table["difference of sums, bfloat16"]["error"] > 0.1
        assert not np.isfinite(table["ratio of products, float32"]["error"])
        assert table["ratio of products, float32"]["bad_gradients"] > 0
        assert table["ratio with 1e-7 added, float32"]["error"] > 0.5
