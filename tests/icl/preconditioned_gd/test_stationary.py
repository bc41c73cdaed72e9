"""The exact eigenvalue density against exact moments, and the optima of the families against published numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from icl.preconditioned_gd.stationary import Optimum, family_loss, optima, spectrum, three_layer_basins
from icl.preconditioned_gd.theory import wishart_moments

N, D = 20, 5


@pytest.mark.parametrize(
    ("n", "d"),
    [(20, 5), (10, 5), (6, 5), (5, 5), (4, 5), (2, 5), (1, 5), (20, 6), (6, 4), (3, 4), (7, 2), (20, 1), (1, 1)],
)
def test_spectrum_has_the_exact_moments(n, d):
    """Even and odd, square, and with fewer examples than dimensions; up to the moments that three layers need."""
    nodes, weights, zeros = spectrum(n, d)
    assert weights.min() > 0
    assert weights.sum() + zeros == pytest.approx(d, rel=1e-10)
    for k, moment in enumerate(wishart_moments(n, d, 26)[1:], start=1):
        assert weights @ nodes**k == pytest.approx(float(moment), rel=1e-9)


def test_spectrum_reaches_far_enough_for_four_layers():
    """Their loss has degree 80; in one dimension s is chi-square over n and has known moments."""
    nodes, weights, _ = spectrum(20, 1)
    expected = math.exp(math.lgamma(10 + 80) - math.lgamma(10) + 80 * math.log(2 / 20))
    assert weights @ nodes**80 == pytest.approx(expected, rel=1e-10)


def test_spectrum_is_the_law_of_sampled_eigenvalues():
    x = np.random.default_rng(0).normal(size=(4000, D, 8))
    sampled = np.linalg.eigvalsh(x @ x.transpose(0, 2, 1) / 8)
    nodes, weights, _ = spectrum(8, D)
    for threshold in (0.05, 0.5, 1.0, 2.0, 4.0):
        counts = (sampled > threshold).sum(1)
        expected = weights[nodes > threshold].sum()
        assert abs(counts.mean() - expected) < 4.5 * counts.std() / np.sqrt(4000) + 0.01  # a node's weight


def exact_loss(a, b, n, d):
    """The loss as a polynomial in s with rational coefficients, against exact moments: no rounding, no quadrature."""
    product, s = [Fraction(1)], [Fraction(0), Fraction(1)]
    for a_layer, b_layer in zip(map(Fraction, a), map(Fraction, b), strict=True):
        product = times(product, [Fraction(1), *(a_layer * c for c in s[1:])])
        stretch = [Fraction(1), *(a_layer * b_layer * c for c in s[1:])]
        s = times(s, times(stretch, stretch))
    squares = times(product, product)
    moments = wishart_moments(n, d, len(squares) - 1)
    return float(sum(c * moment for c, moment in zip(squares, moments, strict=True)))


def times(left, right):
    result = [Fraction(0)] * (len(left) + len(right) - 1)
    for i, c in enumerate(left):
        for j, e in enumerate(right):
            result[i + j] += c * e
    return result


@pytest.mark.parametrize(("n", "d"), [(20, 5), (2, 5), (4, 3)])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((-0.769,), (0.0,)),
        ((-0.4, -0.7, -1.7), (0.0, 0.0, 0.0)),
        ((-0.5, -3.5), (0.9, 0.0)),
        ((-0.378, -2.41, -9.65), (0.908, 0.5665, 0.0)),
        ((-0.718, -2.65, -7.18), (0.341, 0.345, 0.0)),
    ],
)
def test_family_loss_is_exact(a, b, n, d):
    assert family_loss(a, b, n, d) == pytest.approx(exact_loss(a, b, n, d), rel=1e-8)


def test_at_zero_nothing_is_learned():
    for n in (2, 5, 20):
        assert family_loss((0.0, 0.0), (0.3, 0.0), n, D) == pytest.approx(D, rel=1e-10)


def test_one_step_baselines():
    """Preconditioned gradient descent with equal steps is the family without b."""
    assert family_loss((-0.742521,) * 2, (0.0,) * 2, N, D) == pytest.approx(0.499007, abs=1e-6)
    assert family_loss((-0.0375 * N,), (0.0,), N, D) == pytest.approx(math.exp(0.146), rel=2e-3)


@pytest.mark.parametrize(
    ("layers", "steps", "loss"),
    [
        (1, [0.769231], 1.153846),
        (2, [0.515371, 1.249572], 0.361240),
        (3, [0.422409, 0.689126, 1.714218], 0.133608),
        (4, [0.362056, 0.520496, 0.888979, 2.138849], 0.054953),
    ],
)
def test_theorem3_optima(layers, steps, loss):
    (optimum,) = optima(layers, N, D, with_b=False, tail=0.0, starts=10)  # all starts end at one, up to order
    assert sorted(-np.array(optimum.a)) == pytest.approx(steps, rel=1e-4)
    assert optimum.loss == pytest.approx(loss, abs=1e-6)
    assert optimum.full_loss == optimum.loss
    assert set(optimum.b) == {0.0}


def assert_optimum(optimum: Optimum, a, b, tolerance):
    assert optimum.a == pytest.approx(a, rel=tolerance)
    assert optimum.b == pytest.approx((*b, 0.0), rel=tolerance)


def test_theorem4_two_layers():
    """Three minima; random starts often end in the middle one, which is easily taken for the best."""
    best, middle, worst = optima(2, N, D, with_b=True, tail=0.0)
    assert_optimum(best, (-0.51676, -3.4747), (0.86846,), 1e-3)
    assert_optimum(middle, (-0.76932, -2.6440), (0.35345,), 1e-3)
    assert [best.loss, middle.loss, worst.loss] == pytest.approx([0.0575012, 0.0865479, 0.102345], rel=1e-5)


def test_theorem4_three_layers_have_the_basins_of_the_published_matrices():
    rotated, identity = three_layer_basins(N, D)
    assert_optimum(rotated, (-0.378, -2.41, -9.65), (0.908, 0.5665), 0.02)  # figures 4 and 5
    assert_optimum(identity, (-0.7176, -2.652, -7.179), (0.3409, 0.3447), 0.02)  # the identity-covariance notebook
    assert rotated.loss == pytest.approx(6.734e-4, rel=1e-3)
    assert identity.loss == pytest.approx(1.298e-3, rel=1e-3)


def test_theorem4_the_mean_over_all_prompts_is_far_from_what_training_sees():
    rotated, _ = three_layer_basins(N, D)
    assert rotated.full_loss > 50 * rotated.loss
    everything = optima(3, N, D, with_b=True, tail=0.0)[0]
    assert everything.loss == pytest.approx(9.613e-4, rel=1e-3)
    assert rotated.loss < family_loss(everything.a, everything.b, N, D, tail=1e-7) < everything.loss


def test_theorem4_four_layers():
    """Several minima within a few percent in loss; what a sampled loss finds as the best is the second, by 0.2 %."""
    best, second, *_ = optima(4, N, D, with_b=True)
    assert best.loss == pytest.approx(1.3265e-6, rel=1e-3)
    assert_optimum(second, (-0.2886, -2.063, -8.215, -26.36), (0.957, 0.580, 0.462), 0.03)
    assert second.loss < family_loss((-0.2886, -2.063, -8.215, -26.36), (0.957, 0.580, 0.462, 0.0), N, D, tail=1e-7)


def test_tail_is_an_expected_number_of_eigenvalues():
    """Leaving out everything above a quantile, in one dimension where the quantile is known."""
    tail = 0.01
    cut = stats.chi2(N).isf(tail) / N
    nodes, weights, _ = spectrum(N, 1)
    kept = (weights * (1 - 0.5 * nodes) ** 2)[nodes < cut].sum()
    assert family_loss((-0.5,), (0.0,), N, 1, tail) == pytest.approx(kept, abs=1e-4)
    losses = [family_loss((-0.378, -2.41, -9.65), (0.908, 0.5665, 0.0), N, D, tail) for tail in (1e-3, 1e-5, 1e-7, 0.0)]
    assert losses == sorted(losses)
