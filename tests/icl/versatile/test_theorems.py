"""The statements of sections 4 and 5 in float64, each with a variant that must fail."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.linear_attention import literal_transformer, prediction_weights
from icl.versatile import theory
from icl.versatile.data import mean_square

N, D, LAYERS = 12, 4, 4


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(name="tokens")
def _tokens():
    """A prompt with noisy labels; the last column is the query `(x, 0)`."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(D, N + 1)), rng.normal(size=N + 1)
    y = rng.normal(size=D) @ x + noise
    y[-1] = 0
    return jnp.asarray(np.vstack([x, y]))


def gram_of(tokens):
    return tokens[:, :-1] @ tokens[:, :-1].T


def dense(heads, seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(2, LAYERS, heads, D + 1, D + 1)) * 0.2 / (D + 1))


def omegas_of(seed=2):
    """Those of one head of a diagonal model, so `xx yy = xy yx`."""
    p_x, p_y, q_x, q_y = np.random.default_rng(seed).uniform(-0.3, 0.3, size=(4, LAYERS))
    return {"xx": p_x * q_x, "xy": p_x * q_y, "yx": p_y * q_x, "yy": p_y * q_y}, (p_x, p_y, q_x, q_y)


def diagonal_matrices(numbers):
    p_x, p_y, q_x, q_y = numbers
    ones = np.ones((LAYERS, 1, D))

    def matrices(x, y):
        diagonal = np.concatenate([ones * x[:, None, None], y[:, None, None]], axis=-1)
        return jnp.asarray(diagonal[..., None] * np.eye(D + 1))

    return matrices(p_x, p_y), matrices(q_x, q_y)


def literal_states(tokens, p, q):
    """Token matrices after each layer; the literal layer divides by n, the paper's does not."""
    return [literal_transformer(tokens, p[:depth], N * q[:depth]) for depth in range(1, len(p) + 1)]


def relative(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("heads", [1, 3])
def test_every_layer_keeps_a_linear_model(tokens, heads):
    """Theorem 4.1, Lemma 4.3."""
    p, q = dense(heads)
    views = theory.linear_views(gram_of(tokens), p, q)
    for view, state in zip(views, literal_states(tokens, p, q), strict=True):
        assert relative(view.token_map @ tokens, state) < 1e-12
        assert relative(-(view.w @ tokens[:-1, -1]), state[-1, -1]) < 1e-12


def test_the_other_sign_of_the_weight_term_fails(tokens):
    p, q = dense(1)
    state = literal_states(tokens, p, q)[1]
    first, right = itertools.islice(theory.linear_views(gram_of(tokens), p, q), 2)
    t = first.token_map
    k = jnp.einsum("hij,jk,hkl->il", p[1], t @ gram_of(tokens) @ t.T, q[1])
    wrong = right._replace(m=right.m + 2 * jnp.outer(k[:-1, -1], first.w))
    assert relative(right.token_map @ tokens, state) < 1e-12
    assert relative(wrong.token_map @ tokens, state) > 1e-4


def test_prediction_weights_are_those_of_the_view(tokens):
    p, q = dense(2)
    for depth, view in enumerate(theory.linear_views(gram_of(tokens), p, q), start=1):
        weights = prediction_weights(gram_of(tokens)[:, :, None], p[:depth], q[:depth])
        assert relative(weights[:-1, 0], view.w) < 1e-12


def test_diagonal_recurrences(tokens):
    """Lemma 4.4 and A.1 against the dense recursion, and the identity for alpha^l."""
    omegas, numbers = omegas_of()
    gram = gram_of(tokens)
    least_squares = jnp.linalg.solve(gram[:-1, :-1], gram[:-1, -1])
    rho = gram[-1, -1] - gram[:-1, -1] @ least_squares
    before = theory.initial_view(D, jnp.float64)
    expected_views = theory.linear_views(gram, *diagonal_matrices(numbers))
    for (view, terms), expected in zip(theory.diagonal_views(gram, omegas), expected_views, strict=True):
        for ours, theirs in zip(view, expected, strict=True):
            assert relative(ours, theirs) < 1e-12
        t = before.token_map
        alpha = (t @ gram @ t.T)[:-1, -1]
        identity = before.m @ terms.gradient + before.u * (least_squares @ terms.gradient) + before.a * rho * before.u
        assert relative(identity, alpha) < 1e-12
        before = view


def test_the_printed_factor_of_the_diagonal_recurrence_fails(tokens):
    """With `m + a u w*^T` in Gamma and Pi, the third layer is wrong."""
    omegas, numbers = omegas_of()
    gram = gram_of(tokens)
    least_squares = jnp.linalg.solve(gram[:-1, :-1], gram[:-1, -1])
    expected = list(theory.linear_views(gram, *diagonal_matrices(numbers)))
    views = list(theory.diagonal_views(gram, omegas))
    before, terms = views[1][0], views[2][1]
    extra = (before.a - 1) * before.u * (least_squares @ terms.gradient)
    wrong = views[2][0].w - omegas["yx"][2] * before.m.T @ extra
    assert relative(views[2][0].w, expected[2].w) < 1e-12
    assert relative(wrong, expected[2].w) > 1e-6


def test_labels_hold_no_quadratic_features():
    """Theorem 4.2: for n much larger than d, no layer's labels are near the squares of a coordinate."""
    n, d, layers = 20_000, 5, 3
    largest = 0.0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(d, n))
        tokens = np.vstack([x, rng.normal(size=d) @ x])
        p, q = rng.normal(size=(2, layers, 1, d + 1, d + 1)) * 0.3 / np.sqrt(d + 1)
        square = x[0] ** 2 / np.linalg.norm(x[0] ** 2)
        for view in theory.linear_views(jnp.asarray(tokens @ tokens.T), jnp.asarray(p), jnp.asarray(q / n)):
            labels = np.asarray(view.token_map[-1]) @ tokens
            largest = max(largest, abs(labels @ square) / np.linalg.norm(labels))
    assert largest < 0.1
    assert abs(x[0] ** 2 @ square) / np.linalg.norm(x[0] ** 2) == pytest.approx(1)  # a label that does would be seen


def test_gd_plus_plus_improves_the_condition_number():
    """Lemma A.3 and the rate of Theorem 5.1."""
    kappas = np.geomspace(1.1, 1e8, 400)
    ratios = theory.next_condition_number(kappas) / kappas
    assert ratios.max() == pytest.approx(4 / 9 / (1 - 1 / 3.3) ** 2)
    assert ratios.max() < 0.9150
    excess = np.linspace(1e-4, 0.1, 100)
    quotients = (theory.next_condition_number(1 + excess) - 1) / excess**2
    assert quotients.max() < 0.7502
    assert quotients.min() > 0.75 * 0.85


def test_condition_number_follows_the_formula():
    sigma = conditioned(1e3)[0]
    m = np.eye(10)
    for _ in range(4):
        moment = m @ sigma @ m.T
        kappa = np.linalg.cond(moment)
        m = m - moment @ m / (3 * np.linalg.eigvalsh(moment)[-1])
        assert np.linalg.cond(m @ sigma @ m.T) == pytest.approx(theory.next_condition_number(kappa), rel=1e-9)


def conditioned(kappa, d=10, n=20):
    """Sigma with this condition number, alpha of noisy labels, and the least-squares solution."""
    rng = np.random.default_rng(3)
    u, _, v = np.linalg.svd(rng.normal(size=(d, n)), full_matrices=False)
    x = u * np.geomspace(1, kappa, d) ** 0.5 @ v
    y = rng.normal(size=d) @ x + rng.normal(size=n)
    return x @ x.T, x @ y, np.linalg.solve(x @ x.T, x @ y)


@pytest.mark.parametrize(("kappa", "layers"), [(10, 9), (1e3, 15), (1e5, 21)])
def test_gd_plus_plus_finds_least_squares(kappa, layers):
    """Theorem 5.1: O(log kappa + log log 1/eps) layers; half of them are not enough."""
    sigma, alpha, solution = conditioned(kappa)
    assert relative(theory.newton_like_weights(sigma, alpha, layers), solution) < 1e-10
    assert relative(theory.newton_like_weights(sigma, alpha, layers // 2), solution) > 1e-4


def test_lemma_a2():
    """A spectrum in [1, 1 + eps] makes alpha a solution up to eps."""
    _, alpha, solution = conditioned(1.05)
    assert relative(alpha, solution) <= 0.05


def ridge_and_two_layers(n, sigma, levels, seed):
    d = 5
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(d, n)) / np.sqrt(n)
    y = rng.normal(size=d) @ x + sigma * rng.normal(size=n)
    step, scale = theory.two_level_constants(*levels)
    alpha = x @ y
    labels = y - step * alpha @ x  # after layer 1, which leaves w = step alpha
    w = step * alpha * (1 + scale / n * labels @ labels)
    return w, np.linalg.solve(x @ x.T + sigma**2 * np.eye(d), alpha)


def test_rescaling_reaches_ridge_for_two_noise_levels():
    """Theorem 5.2; convergence is slow, about n^(-1/2)."""
    assert theory.two_level_constants(1, 3) == pytest.approx((11 / 20, -1 / 11))
    step, scale = theory.two_level_constants(1, 3)
    for sigma, coefficient in ((1, 0.5), (3, 0.1)):
        assert step * (1 + scale * sigma**2) == pytest.approx(coefficient)
    errors = [
        np.mean([relative(*ridge_and_two_layers(n, s, (1, 3), seed)) for s in (1, 3) for seed in range(20)])
        for n in (100, 10_000)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.1


def test_label_feedback_adapts_the_step(tokens):
    """Section 5.3, exactly; the residuals in place of the labels are an approximation only."""
    xy, yx = -0.02, -0.03
    omegas = {"xx": [0, 0], "xy": [xy, 0], "yx": [0, yx], "yy": [0, 0]}
    gram = gram_of(tokens)
    *_, (view, _) = theory.diagonal_views(gram, omegas)
    expected = theory.adaptive_step(gram[-1, -1], xy, yx) * gram[:-1, -1]
    assert relative(view.w, expected) < 1e-12
    least_squares = jnp.linalg.solve(gram[:-1, :-1], gram[:-1, -1])
    rho = gram[-1, -1] - gram[:-1, -1] @ least_squares
    assert relative(view.w, theory.adaptive_step(rho, xy, yx) * gram[:-1, -1]) > 0.01
    assert theory.adaptive_step(9.0, xy, yx) < theory.adaptive_step(1.0, xy, yx)


@pytest.mark.parametrize(
    ("problem", "loss"), [("uniform:0", 1.7742), ("uniform:5", 0.896 + 3.1239 / 2), ("levels:1,3", 0.996 + 2.4547 / 2)]
)
def test_one_layer(problem, loss):
    """The closed form against sampled prompts: a minimum, of that loss, and independently computed adjusted numbers."""
    n, d = 20, 10
    assert theory.one_layer_loss(problem, n, d) == pytest.approx(loss, abs=2e-3)
    rng = np.random.default_rng(0)
    prompts = 40_000
    levels = rng.uniform(0, 5, prompts) if problem == "uniform:5" else rng.choice([1, 3], prompts)
    sigma = np.zeros(prompts) if problem == "uniform:0" else levels
    assert np.mean(sigma**2) == pytest.approx(mean_square(problem), rel=0.02)
    x, w = rng.normal(size=(prompts, d, n)), rng.normal(size=(prompts, d))
    y = np.einsum("bd,bdn->bn", w, x) + sigma[:, None] * rng.normal(size=(prompts, n))
    alpha = np.einsum("bdn,bn->bd", x, y)
    best = theory.one_layer_step(problem, n, d)

    def sampled(omega):
        return 0.5 * np.square(w + omega * alpha).sum(1)

    errors = sampled(best)
    assert abs(errors.mean() - theory.one_layer_loss(problem, n, d)) < 4 * errors.std() / np.sqrt(prompts)
    for other in (0.9 * best, 1.1 * best):
        assert sampled(other).mean() > errors.mean()
