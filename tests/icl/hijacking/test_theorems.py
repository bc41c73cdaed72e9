"""The statements of the paper in float64, at the tolerances of rounding or sampling, with failing variants."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.hijacking import theory
from icl.hijacking.data import clean_gram, mean_direction, sample_hijack, sample_tasks
from icl.hijacking.theory import KAPPA, SIGN_MEAN
from icl.linear_attention import literal_transformer


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def relative(actual, expected):
    return float(np.linalg.norm(np.asarray(actual) - np.asarray(expected)) / np.linalg.norm(expected))


def within(samples, expected, errors=4):
    """The mean over the first axis, against its own standard error."""
    return np.all(np.abs(samples.mean(0) - expected) <= errors * samples.std(0) / np.sqrt(len(samples)))


def descent(x, y, start, steps):
    """Plain loops: `w <- w - Gamma^T sum_i (<w, x_i> - y_i) x_i`."""
    iterates = [start]
    for gamma in steps:
        w = iterates[-1]
        iterates.append(w - gamma.T @ (x @ (x.T @ w - y)))
    return iterates


@pytest.mark.parametrize(("d", "n", "layers"), [(3, 5, 1), (5, 12, 4), (20, 40, 8)])
def test_a_linear_transformer_does_gradient_descent(d, n, layers):
    """T1, proposition 4.1, every layer: query and residuals. Without the transpose it fails for asymmetric Gamma."""
    rng = np.random.default_rng(d)
    for _ in range(3):
        x, query, start = rng.normal(size=(d, n)), rng.normal(size=d), rng.normal(size=d)
        y = np.sign(rng.normal(size=d) @ x)
        gammas = rng.normal(size=(layers, d, d)) * 0.3 / (n * math.sqrt(d))
        embedding = np.eye(d + 1)
        embedding[-1, :-1] = -start
        p, q = np.zeros((2, layers, 1, d + 1, d + 1))
        p[:, 0, -1, -1], q[:, 0, :-1, :-1] = 1, -n * gammas  # the literal layer divides by n
        tokens = embedding @ np.vstack([np.hstack([x, query[:, None]]), np.append(y, 0)])
        right, wrong = descent(x, y, start, gammas), descent(x, y, start, gammas.transpose(0, 2, 1))
        for depth in range(1, layers + 1):
            state = np.asarray(literal_transformer(jnp.asarray(tokens), jnp.asarray(p[:depth]), jnp.asarray(q[:depth])))
            scale = max(1.0, np.abs(state[-1]).max())
            assert abs(state[-1, -1] + right[depth] @ query) < 1e-10 * scale
            assert np.abs(state[-1, :-1] - (y - right[depth] @ x)).max() < 1e-10 * scale
        assert abs(wrong[-1] @ query - right[-1] @ query) > 1e-6


def test_rates_commute_and_the_closed_form_holds():
    """T2, proposition 4.2 and Lemma B.1."""
    rng = np.random.default_rng(0)
    d, n, rates = 8, 30, np.array([0.002, 0.01, 0.03, 0.005, 0.02, 0.001])
    x, start = rng.normal(size=(d, n)), rng.normal(size=d)
    y = np.sign(rng.normal(size=d) @ x)
    expected = descent(x, y, start, [a * np.eye(d) for a in rates])[-1]
    reversed_ = descent(x, y, start, [a * np.eye(d) for a in rates[::-1]])[-1]
    assert relative(reversed_, expected) < 1e-12
    s, b = x @ x.T, x @ y
    assert relative(theory.closed_form(s, b, start, rates), expected) < 1e-10
    ordered = theory.closed_form(s, b, start, rates) + sum(  # k! - 1 further copies, as v1 prints it
        (math.factorial(k) - 1) * sum(map(math.prod, itertools.combinations(rates, k)))
        * np.linalg.matrix_power(-s, k - 1) @ b
        for k in range(1, len(rates) + 1)
    )  # fmt: skip
    assert relative(ordered, expected) > 0.1
    matrices = rng.normal(size=(6, d, d)) * 0.01
    assert relative(descent(x, y, start, matrices)[-1], descent(x, y, start, matrices[::-1])[-1]) > 1e-3
    spectra = theory.Spectra(
        *(v[:, None] for v in in_eigenbasis(s, b, start / np.linalg.norm(start), rng.normal(size=d)))
    )
    alpha, layers = 0.01, 5
    best = theory.best_start(spectra, alpha, layers)
    plain = descent(x, y, best.c * start / np.linalg.norm(start), [alpha * np.eye(d)] * layers)[-1]
    u = np.linalg.eigh(s)[1]
    assert np.sum((u.T @ plain - SIGN_MEAN * spectra.w[:, 0]) ** 2) == pytest.approx(best.excess, rel=1e-9)


def in_eigenbasis(s, b, beta, w):
    eigenvalues, u = np.linalg.eigh(s)
    return eigenvalues, u.T @ b, u.T @ w, u.T @ beta


def clean_prompts(d, n, spread, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    w = sample_tasks(keys[0], d, spread, count, jnp.float64)
    gram = np.asarray(jax.jit(clean_gram, static_argnums=2)(keys[1], w, n))
    return np.asarray(w), gram[:-1, :-1], gram[:-1, -1], np.asarray(jax.random.normal(keys[2], w.shape, jnp.float64))


def test_risk_identity():
    """T3, Lemma C.1: the irreducible part is 1 - 2/pi."""
    w, _, b, query = clean_prompts(5, 12, 0.3, 100_000)
    u = 0.05 * b + 0.2
    errors = ((u * query).sum(0) - np.sign((w * query).sum(0))) ** 2
    expected = ((u - SIGN_MEAN * w) ** 2).sum(0) + 1 - KAPPA
    assert within(errors - expected, 0)
    assert not within(errors - expected - 0.05, 0)


def test_moments():
    """T4, Lemmas E.1 to E.3."""
    d, n = 5, 12
    w, s, b, _ = clean_prompts(d, n, 0.3, 40_000)
    beta = np.asarray(mean_direction(d, jnp.float64))
    m = (beta @ w).mean()
    square = np.einsum("ijb,jkb->bik", s, s)
    assert within(square, n * (n + d + 1) * np.eye(d), 4.5)
    cube = np.einsum("bij,jkb->bik", square, s)
    assert within(np.trace(cube, axis1=1, axis2=2) / d, n * (n**2 + 3 * n * (d + 1) + d**2 + 3 * d + 4))
    assert within(beta @ b, n * SIGN_MEAN * m, 5)
    assert within((b**2).sum(0), n * d + n * (n - 1) * KAPPA)
    assert within(np.einsum("ib,ijb,jb->b", w, s, b), SIGN_MEAN * n * (n + d))
    assert not within((b**2).sum(0), n * d + n * n * KAPPA)


def test_one_step_is_exact():
    """T5 and T7 for L = 1: closed risk, start and step size against sampled prompts."""
    d, n, spread = 10, 20, math.sqrt(0.1)
    m = theory.prior(d, spread).m
    spectra = theory.sample_spectra(0, d, spread, n, 6000)
    sampled, exact = theory.optimum(spectra, 1, n), theory.one_step_optimum(n, d, m)
    assert sampled.alpha == pytest.approx(exact.alpha, rel=0.02)
    assert sampled.excess == pytest.approx(exact.excess, rel=0.03)
    assert abs(exact.c - SIGN_MEAN * m) < 0.005
    assert abs(sampled.c - SIGN_MEAN * m) < 0.005
    assert abs(sampled.c - SIGN_MEAN) > 0.02  # v1's constant
    assert theory.one_step_rate(n, theory.prior(d, spread)) == pytest.approx(exact.alpha, rel=0.02)
    for factor in (0.8, 1.2):
        assert theory.one_step_excess(factor * exact.alpha, exact.c, n, d, m) > exact.excess


def test_where_noise_limits_the_step_it_does_not_depend_on_the_context():
    """T7 b and d: alpha L is constant in L, and alpha is not proportional to 1 / n."""
    d, spread = 20, 0.1
    found = {}
    for n in (10, 50):
        spectra = theory.sample_spectra(1, d, spread, n, 4000)
        found[n] = [layers * theory.optimum(spectra, layers, n).alpha for layers in (1, 2, 4, 8)]
        assert max(found[n]) / min(found[n]) < 1.25
    assert found[50][0] / found[10][0] == pytest.approx(1, abs=0.1)  # 1 / n would give 0.2
    assert found[10][0] == pytest.approx(8.0e-4, rel=0.05)


def test_the_theorems_own_regime():
    """T7 c: many examples in few dimensions."""
    d, n = 5, 200
    spectra = theory.sample_spectra(2, d, math.sqrt(0.1), n, 3000)
    for layers in (4, 16):
        best = theory.optimum(spectra, layers, n)
        assert 0.8 <= best.alpha * n * layers <= 4
        assert 0.25 <= best.excess * n / d <= 0.45


def test_the_best_step_hardly_moves_along_the_mean():
    """T6: isotropic rates are not optimal under an anisotropic prior."""
    d, n = 10, 20
    spectra = theory.sample_spectra(3, d, math.sqrt(0.1), n, 20_000)
    isotropic = theory.optimum(spectra, 1, n)
    along, across, excess = theory.anisotropic_optimum(spectra)
    assert excess < isotropic.excess
    assert excess == pytest.approx(0.04178, rel=0.02)
    assert isotropic.excess == pytest.approx(0.04241, rel=0.02)
    assert across == pytest.approx(1.10e-2, rel=0.05)
    assert along < 0.2 * across


def test_hijacked_iterate():
    """T8, Lemma D.1, against gradient descent on the repeated token, for both signs of sigma."""
    d, c, alpha = 20, 0.79, 1e-3
    for sigma, count, layers in itertools.product((0.3, -0.3), (0, 1, 7), (1, 4)):
        w = sample_tasks(jax.random.key(1), d, 0.1, 3, jnp.float64)
        hijack = sample_hijack(jax.random.key(2), w, sigma)
        beta = np.asarray(mean_direction(d, jnp.float64))
        token, query = np.asarray(hijack.x_token), np.asarray(hijack.x_query)
        geometry = theory.Geometry((token**2).sum(0), beta @ token, beta @ np.asarray(w))
        scores = theory.hijacked_score(geometry, sigma, theory.Optimum(alpha, c, 0.0), count, layers)
        for i in range(3):
            x = np.tile(token[:, i : i + 1], count)
            labels = np.full(count, -float(hijack.y_query[i]))
            expected = descent(x, labels, c * beta, [alpha * np.eye(d)] * layers)[-1] @ query[:, i]
            assert scores[i] == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert (hijack.y_query[i] > 0) == (np.asarray(w)[:, i] @ query[:, i] > 0)


def test_geometry_has_its_law():
    """Lemma E.6, corrected: v1's variance 1 - <w, beta> fails."""
    d, spread, count = 20, 0.3, 40_000
    w = sample_tasks(jax.random.key(1), d, spread, count, jnp.float64)
    token = np.asarray(sample_hijack(jax.random.key(2), w, 0.1).x_token)
    beta = np.asarray(mean_direction(d, jnp.float64))
    drawn = theory.Geometry((token**2).sum(0), beta @ token, beta @ np.asarray(w))
    ours = theory.sample_geometry(0, d, spread, count)
    for statistic in (
        lambda g: g.r,
        lambda g: g.r**2,
        lambda g: g.zeta**2,
        lambda g: g.r * g.zeta**2,
        lambda g: g.aligned,
    ):
        first, second = statistic(drawn), statistic(ours)
        error = math.hypot(first.std(), second.std()) / math.sqrt(count)
        assert abs(first.mean() - second.mean()) < 4 * error
    assert within(drawn.zeta**2 - (1 - drawn.aligned**2), 0)
    assert not within(drawn.zeta**2 - (1 - drawn.aligned), 0)


def test_error_formula():
    """T9, against scores of sampled distances."""
    d, count = 20, 200_000
    geometry = theory.sample_geometry(1, d, 0.1, count)
    best = theory.Optimum(7.9e-4, 0.794, 0.0)
    sigma = np.random.default_rng(0).uniform(0, 2, count)
    for tokens, layers in ((0, 1), (5, 1), (20, 4)):
        errors = theory.hijacked_score(geometry, sigma, best, tokens, layers) < 0
        formula = theory.error_formula(geometry, lambda z: np.clip(z / 2, 0, 1), best, tokens, layers)
        assert abs(errors.mean() - formula) < 4 * errors.std() / math.sqrt(count) + 1e-4


def test_depth_helps_against_many_tokens_only():
    """T11 at equal clean shrinkage: the sign of the effect changes at N r = n."""

    def at(ratio):
        return [theory.equal_shrink(ratio, math.log(2), layers) for layers in (1, 2, 4, 8, 64)]

    assert at(0.5) == pytest.approx([0.750, 0.729, 0.718, 0.713, 0.708], abs=6e-4)
    assert at(2.0) == pytest.approx([0.0, 0.172, 0.216, 0.234, 0.248], abs=6e-4)
    assert np.ptp(at(1.0)) < 1e-12


def test_at_the_exact_optimum_depth_lowers_accuracy_in_the_theorems_regime():
    """T11: d = 20, n = 1600, sigma = 0.4; a fixed constant alpha = K / (n L) gives the paper's order instead."""
    d, n, spread = 20, 1600, math.sqrt(0.1)
    spectra = theory.sample_spectra(4, d, spread, n, 600)
    geometry = theory.sample_geometry(5, d, spread, 100_000)
    optimal = [theory.robust_accuracy(geometry, 0.4, theory.optimum(spectra, l, n), 20, l) for l in (1, 2, 4, 8)]
    start = SIGN_MEAN * theory.prior(d, spread).m
    fixed = [
        theory.robust_accuracy(geometry, 0.4, theory.Optimum(1 / (n * l), start, math.nan), 20, l) for l in (1, 2, 4, 8)
    ]
    assert np.all(np.diff(optimal) < 0)
    assert optimal[0] == pytest.approx(0.653, abs=0.03)
    assert optimal[-1] == pytest.approx(0.2055, abs=0.03)
    assert np.all(np.diff(fixed) > 0)
    assert fixed == pytest.approx([0.6257, 0.6577, 0.6705, 0.6765], abs=0.01)


def test_divergence_depends_on_the_parity_of_the_depth():
    """T11: beyond alpha N r = 2 even depths answer right and odd ones wrong; nothing tends to a half."""
    d, n, spread = 20, 40, math.sqrt(0.1)
    geometry = theory.sample_geometry(6, d, spread, 50_000)
    constants = theory.prior(d, spread)
    found = [
        theory.robust_accuracy(
            geometry, 0.1, theory.Optimum(theory.one_step_rate(n, constants) / l, SIGN_MEAN * constants.m, 0), 160, l
        )
        for l in (1, 2, 3)
    ]
    assert found[0] < 0.01
    assert found[1] > 0.95
    assert found[2] < 0.05


def test_more_tokens_are_worse_and_more_examples_are_better():
    """T10 and T11 in N (while alpha N d < 0.8) and in n."""
    d, spread, layers = 20, math.sqrt(0.1), 4
    geometry = theory.sample_geometry(7, d, spread, 100_000)
    by_n = []
    for n in (20, 100, 400):
        best = theory.optimum(theory.sample_spectra(8, d, spread, n, 1000), layers, n)
        counts = [count for count in range(30) if best.alpha * count * d < 0.8]
        accuracies = [theory.robust_accuracy(geometry, 0.4, best, count, layers) for count in counts]
        assert np.all(np.diff(accuracies) < 0.003)
        by_n.append(theory.robust_accuracy(geometry, 0.4, best, 5, layers))
    assert np.all(np.diff(by_n) > 0)
    errors = [  # n = 400, one token: E(N) - E(0) is at most 0.3 N d^(3/2) / n
        theory.error_formula(geometry, lambda z: np.clip(z / 2, 0, 1), best, count, layers) for count in (0, 1)
    ]
    assert 0 < errors[1] - errors[0] <= 0.3 * d**1.5 / 400


def test_concentration():
    """T12, Lemmas E.4 and E.5: the rates, and that nothing is concentrated at the paper's sizes."""
    d, spread = 20, 0.1
    medians = []
    for n in (50, 200, 800, 3200):
        w, s, b, _ = clean_prompts(d, n, spread, 60, seed=n)
        norms = np.linalg.norm(np.moveaxis(s, -1, 0) / n - np.eye(d), ord=2, axis=(1, 2))
        medians.append((np.median(norms), np.median(np.linalg.norm(b - n * SIGN_MEAN * w, axis=0))))
    first, second = np.log(np.array(medians)).T
    assert np.diff(first[1:]) / math.log(4) == pytest.approx(-0.5, abs=0.08)
    assert np.diff(second[1:]) / math.log(4) == pytest.approx(0.5, abs=0.06)
    assert math.exp(second[-1]) == pytest.approx(math.sqrt(3200 * (d - KAPPA)), rel=0.05)
    assert medians[0][0] > 1


def test_tokens_to_flip():
    """T13: the flip point where noise limits the step, within 25 % of the formula and almost free of n."""
    d, spread, sigma = 20, 0.1, 0.4
    shallow, deep = theory.tokens_to_flip(sigma, d, theory.prior(d, spread))
    geometry = theory.sample_geometry(9, d, spread, 20_000)

    def flip(n, layers):
        best = theory.optimum(theory.sample_spectra(10, d, spread, n, 2000), layers, n)
        return next(k for k in range(100) if theory.robust_accuracy(geometry, sigma, best, k, layers) < 0.5)

    found = {(n, layers): flip(n, layers) for n in (20, 50) for layers in (1, 8)}
    for (_, layers), count in found.items():
        assert count == pytest.approx(shallow if layers == 1 else deep, rel=0.25)
    assert found[20, 1] == pytest.approx(found[50, 1], rel=0.1)
