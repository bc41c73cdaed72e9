"""The baselines of figures 6 and 7 against plain loops over sampled prompts, queries and tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.preconditioned_gd import measure
from icl.regression import diagonal_covariance, sample_prompts

VARIANCES = (1.0, 1.0, 0.25, 0.0625, 1.0)
PROMPTS = 20_000


def sampled_loss(used, step_size, steps, whitened):
    """Mean and standard error of the loss of `w <- w - eta X (X^T w - y)`, the sum of squares, prompt by prompt."""
    prompts = sample_prompts(jax.random.key(1), diagonal_covariance(jnp.array(VARIANCES)), used, PROMPTS)
    x, y = np.asarray(prompts.x, float).transpose(2, 1, 0), np.asarray(prompts.y, float).T
    scale = 1 / np.sqrt(VARIANCES) if whitened else np.ones(5)
    x, w = x * scale, np.zeros((PROMPTS, 5))
    for _ in range(steps):
        w = w - step_size * np.einsum("bnd,bn->bd", x, np.einsum("bnd,bd->bn", x, w) - y)
    errors = np.sum((w * scale - np.asarray(prompts.w).T) * np.asarray(prompts.x_query).T, axis=1) ** 2
    return errors.mean(), errors.std() / np.sqrt(PROMPTS)


@pytest.mark.parametrize(("examples", "steps"), [(3, 1), (20, 3)])
def test_baselines(examples, steps, monkeypatch):
    monkeypatch.setattr(measure, "BASELINE_PROMPTS", PROMPTS)
    found = measure.descent_baselines(examples, steps, VARIANCES, measure.COARSE_STEPS, measure.FINER_STEPS)
    for name, whitened in (("gd", False), ("pgd", True)):
        for variant, used in (("coded", examples - 1), ("all", examples)):
            loss, step_size = (found[name][variant][key] for key in ("loss", "step_size"))
            mean, error = sampled_loss(used, step_size, steps, whitened)
            assert abs(loss - mean) < 4 * error + 0.01 * mean
        assert found[name]["tuned"]["loss"] < 1.001 * found[name]["all"]["loss"]
    for variant, used in (("coded", examples - 1), ("all", examples)):
        assert found["ols"][variant]["loss"] == pytest.approx(max(0, 5 - used), abs=1e-6)


def test_the_best_equal_step_is_found():
    found = measure.descent_baselines(20, 3, VARIANCES, measure.COARSE_STEPS, measure.FINER_STEPS)
    assert found["pgd"]["tuned"]["loss"] == pytest.approx(0.268342, rel=1e-3)
