"""The statements of Ahn et al. 2023 (arXiv:2306.00297) that numbers can check, with the controls that must fail.

Where a statement is about an expectation, it is taken over blocks of prompts, and the test is a bound on z-scores: the
average over blocks, in units of its own standard error. The draws are fixed, so a test passes always or never.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icl.gradient_descent import gradient_descent
from icl.linear_attention import Gram, gram_transformer, literal_transformer, prompt_gram, sparse_transformer
from icl.preconditioned_gd import stationary, theory
from icl.regression import diagonal_covariance, rotated_covariance, sample_prompts, token_matrices

VARIANCES = (1.0, 1.0, 0.25, 0.0625, 1.0)
N, D = 20, 5
BLOCKS = 64
HIGHEST_Z = 4.5


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def paper_covariance():
    return rotated_covariance(jax.random.key(7), jnp.array(VARIANCES))


def identity_covariance():
    return diagonal_covariance(jnp.ones(D))


def random_blocks(seed, *shape, scale=0.3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale)


def over_blocks(function, prompts_per_block):
    """Averages and standard errors, over blocks, of the arrays that `function(key, prompts_per_block)` returns."""
    keys = jax.random.split(jax.random.key(11), BLOCKS)
    values = jax.jit(lambda keys: jax.lax.map(lambda key: function(key, prompts_per_block), keys))(keys)
    means = jax.tree.map(lambda leaf: np.asarray(leaf.mean(0)), values)
    errors = jax.tree.map(lambda leaf: np.asarray(leaf.std(0, ddof=1)) / np.sqrt(BLOCKS), values)
    return means, errors


@jax.jit
def residual_matrices(gram_xx, covariance, a, b=None):
    """The sparse model's residual for white tasks e_i and white queries e_j, [d, d, batch], w ~ N(0, Sigma^-1).

    The residual is bilinear in the two, so its sum of squares is the loss, averaged over task and query analytically.
    """
    d = gram_xx.shape[0]

    def residual(task, query):
        w, x = covariance.inverse_sqrt @ task, covariance.sqrt @ query
        cross = jnp.einsum("ijb,j->ib", gram_xx, w)
        queries = jnp.broadcast_to(x[:, None], cross.shape)
        return sparse_transformer(Gram(gram_xx, cross, jnp.zeros_like(cross[0])), queries, a, b, w @ x)

    by_query = jax.vmap(residual, in_axes=(None, 0))
    return jax.vmap(by_query, in_axes=(0, None))(jnp.eye(d), jnp.eye(d))


def mean_loss(key, covariance, batch, a, b=None, n=N):
    prompts = sample_prompts(key, covariance, n, batch)
    gram = prompt_gram(prompts.x, prompts.y)
    return jnp.square(residual_matrices(gram.xx, covariance, a, b)).sum((0, 1)).mean()


def family_blocks(covariance, a, b):
    """A point of the stationary family as blocks [layers, heads=1, d, d]."""
    inverse, identity = covariance.inverse, jnp.eye(covariance.scales.shape[0])
    return jnp.asarray(a)[:, None, None, None] * inverse, jnp.asarray(b)[:, None, None, None] * identity


# Theorem 1: one layer, all of P and Q free, w ~ N(0, I).


@functools.partial(jax.jit, static_argnums=2)
def full_single_layer_loss(key, covariance, batch, p_row, q_columns):
    """Eq. (5) for one layer; only the last row of P [d + 1] and the first columns of Q [d + 1, d] matter."""
    prompts = sample_prompts(key, covariance, N, batch, task_prior="identity")
    p = jnp.zeros((1, 1, D + 1, D + 1)).at[0, 0, -1].set(p_row)
    q = jnp.zeros((1, 1, D + 1, D + 1)).at[0, 0, :, :-1].set(q_columns)
    query = jnp.concatenate([prompts.x_query, jnp.zeros((1, batch))])
    output = gram_transformer(prompt_gram(prompts.x, prompts.y), query, p, q)[-1, -1]
    return jnp.square(output + prompts.y_query).mean()


def finite_difference_gradient(function, matrix, step=1e-5):
    gradient = np.zeros_like(matrix)
    for index in np.ndindex(matrix.shape):
        shift = np.zeros_like(matrix)
        shift[index] = step
        gradient[index] = (function(matrix + shift) - function(matrix - shift)) / (2 * step)
    return gradient


def test_theorem1_second_moment_of_the_gram_matrix():
    covariance = paper_covariance()

    def squares(key, batch):
        gram = prompt_gram(*sample_prompts(key, covariance, N, batch)[:2]).xx
        return jnp.einsum("ijb,jkb->ik", gram, gram) / batch

    means, errors = over_blocks(squares, 500)
    expected = theory.second_moment_of_gram(np.asarray(covariance.matrix), N)
    assert np.abs((means - expected) / errors).max() < HIGHEST_Z
    for n, d in ((20, 5), (3, 5), (7, 2)):
        isotropic = theory.second_moment_of_gram(np.eye(d), n)
        assert np.trace(isotropic) == pytest.approx(float(theory.wishart_moments(n, d, 2)[2]), rel=1e-14)


def test_theorem1_optimum_is_stationary_and_has_the_stated_loss():
    covariance = np.asarray(paper_covariance().matrix)
    optimum = theory.theorem1_optimum(covariance, N)
    gradient = finite_difference_gradient(lambda a: theory.theorem1_loss(a, covariance, N), optimum)
    assert np.linalg.norm(gradient) < 1e-7
    minimum = theory.theorem1_minimum(covariance, N)
    assert theory.theorem1_loss(optimum, covariance, N) == pytest.approx(minimum, abs=1e-12)
    assert minimum == pytest.approx(0.68175638, abs=5e-9)


def test_theorem1_other_closed_forms_lose_visibly():
    covariance = np.asarray(paper_covariance().matrix)
    minimum = theory.theorem1_minimum(covariance, N)
    scale = -np.trace(covariance @ covariance) / np.trace(covariance @ theory.second_moment_of_gram(covariance, N))
    controls = {
        "inverse": -np.linalg.inv(covariance),
        "shrunk inverse": -N / (N + D + 1) * np.linalg.inv(covariance),
        "best multiple of the identity": scale * np.eye(D),
        "without (n + 1) / n": -np.linalg.inv(covariance + np.trace(covariance) / N * np.eye(D)),
    }
    excess = {name: theory.theorem1_loss(a, covariance, N) / minimum - 1 for name, a in controls.items()}
    assert list(excess.values()) == pytest.approx([0.458, 0.121, 0.105, 0.0069], abs=5e-4)


@pytest.mark.parametrize(("n", "d"), [(20, 5), (2, 5), (3, 1)])
def test_theorem1_isotropic_case(n, d):
    optimum = theory.theorem1_optimum(np.eye(d), n)
    np.testing.assert_allclose(optimum, -n / (n + d + 1) * np.eye(d), rtol=1e-14)
    np.testing.assert_allclose(optimum, -1 / ((n - 1) / n + (d + 2) / n) * np.eye(d), rtol=1e-14)
    assert theory.theorem1_minimum(np.eye(d), n) == pytest.approx(d * (d + 1) / (n + d + 1), rel=1e-14)


def test_theorem1_optimum_is_stationary_in_all_of_p_and_q():
    covariance = paper_covariance()
    sigma = np.asarray(covariance.matrix)
    p_row = jnp.zeros(D + 1).at[-1].set(1)
    q_columns = jnp.zeros((D + 1, D)).at[:D].set(theory.theorem1_optimum(sigma, N))

    def loss_and_gradients(key, batch):
        return jax.value_and_grad(full_single_layer_loss, argnums=(3, 4))(key, covariance, batch, p_row, q_columns)

    (loss, gradients), (loss_error, errors) = over_blocks(loss_and_gradients, 4000)
    assert abs(loss - theory.theorem1_minimum(sigma, N)) < HIGHEST_Z * loss_error
    for gradient, error in zip(gradients, errors, strict=True):
        assert np.abs(gradient / error).max() < HIGHEST_Z


def test_theorem1_minimiser_is_not_unique():
    """Scaling P against Q changes nothing; with d = 1, neither does swapping the row of P with the column of Q."""
    key, covariance = jax.random.key(0), paper_covariance()
    p_row, q_columns = random_blocks(0, D + 1), random_blocks(1, D + 1, D)
    loss = full_single_layer_loss(key, covariance, 100, p_row, q_columns)
    assert full_single_layer_loss(key, covariance, 100, 3 * p_row, q_columns / 3) == pytest.approx(
        float(loss), rel=1e-12
    )
    prompts = sample_prompts(key, diagonal_covariance(jnp.ones(1)), N, 100)
    tokens = token_matrices(prompts)
    row, column = random_blocks(2, 2), random_blocks(3, 2)
    outputs = [
        literal_transformer(
            tokens, jnp.zeros((1, 1, 2, 2)).at[0, 0, -1].set(p), jnp.zeros((1, 1, 2, 2)).at[0, 0, :, 0].set(q)
        )
        for p, q in ((row, column), (column, row))
    ]
    np.testing.assert_allclose(outputs[0][:, -1, -1], outputs[1][:, -1, -1], atol=1e-13)


# Lemma 1: the forward pass is preconditioned gradient descent.


def test_lemma1_needs_the_transpose():
    prompts = sample_prompts(jax.random.key(0), paper_covariance(), N, 100)
    gram = prompt_gram(prompts.x, prompts.y)
    a = random_blocks(0, 4, 2, D, D, scale=1.0)
    steps = -a.sum(1)
    with_transpose, without = (
        jnp.einsum("lib,ib->lb", gradient_descent(gram, m), prompts.x_query) for m in (steps.mT, steps)
    )
    for depth in range(1, 5):
        output = sparse_transformer(gram, prompts.x_query, a[:depth])
        np.testing.assert_allclose(-output, with_transpose[depth - 1], rtol=1e-10, atol=1e-12)
        assert np.abs(output + without[depth - 1]).max() > 1


# Theorem 2: two layers, isotropic, symmetric blocks.


def test_theorem2_wishart_moments():
    moments = [float(moment) for moment in theory.wishart_moments(N, D, 8)]
    listed = [5, 5, 6.5, 10.05, 17.45, 32.9265, 66.2607, 140.62096125, 312.5121615]
    assert moments == pytest.approx(listed, rel=1e-14)


@pytest.mark.parametrize(("n", "d"), [(20, 5), (1, 1), (2, 5), (9, 3)])
def test_wishart_moments_as_polynomials(n, d):
    _, first, second, third, fourth = theory.wishart_moments(n, d, 4)
    assert first == d
    assert second * n == d * n + d + d**2
    assert third * n**2 == d * n**2 + 3 * d * n + 3 * d**2 * n + 4 * d + 3 * d**2 + d**3
    polynomial = d * n**3 + 6 * d * n**2 + 6 * d**2 * n**2 + 21 * d * n + 17 * d**2 * n + 6 * d**3 * n
    assert fourth * n**3 == polynomial + 20 * d + 21 * d**2 + 6 * d**3 + d**4


def test_wishart_moments_of_one_dimension_are_those_of_chi_square():
    for k, moment in enumerate(theory.wishart_moments(7, 1, 26)):
        assert moment == np.prod([7 + 2 * i for i in range(k)], dtype=object) / theory.Fraction(7) ** k


def test_theorem2_a_multiple_of_the_identity_is_a_minimum_among_all_matrices():
    """Off the multiples of I the gradient vanishes and the curvature is positive, in every kind of direction."""
    (optimum,) = stationary.optima(2, N, D, with_b=False, tail=0.0, starts=5)
    directions = {
        "traceless diagonal": np.diag([1.0, -1, 0, 0, 0]),
        "symmetric": np.eye(D)[[1, 0, 2, 3, 4]] - np.diag([0.0, 0, 1, 1, 1]),
        "antisymmetric": np.diag([1.0, 0, 0, 0], 1) - np.diag([1.0, 0, 0, 0], -1),
    }
    covariance = identity_covariance()
    a, _ = family_blocks(covariance, optimum.a, optimum.b)

    def derivatives(key, batch):
        def along(direction):
            def loss(t):
                return mean_loss(key, covariance, batch, a + t[:, None, None, None] * direction / np.sqrt(2))

            return jax.grad(loss)(jnp.zeros(2)), jax.jacrev(jax.grad(loss))(jnp.zeros(2))

        return {name: along(direction) for name, direction in directions.items()}

    means, errors = over_blocks(derivatives, 300)
    curvatures = {name: np.linalg.eigvalsh(hessian) for name, (_, hessian) in means.items()}
    for name, (gradient, _) in means.items():
        assert np.abs(gradient / errors[name][0]).max() < HIGHEST_Z
        assert curvatures[name][0] > 0.2
    # Rotations turn one symmetric traceless direction into another.
    np.testing.assert_allclose(curvatures["traceless diagonal"], curvatures["symmetric"], rtol=0.1)


# Theorems 3 and 4: the stationary families, w ~ N(0, Sigma^-1).

GENERIC = ((-0.5, -1.0, -2.0), (0.4, 0.3, 0.0))


def family_gradients(a, b, with_b):
    """Averages and standard errors of the gradients that ought to be multiples of Sigma (A) and I (B).

    One pair for A and one for B: the gradient [layers, d, d], and what is left of it after projection on the multiples.
    The last B has no gradient and is left out.
    """
    covariance = paper_covariance()

    def split(gradient, along):
        gradient = gradient[:, 0]
        multiple = jnp.einsum("lij,ij->l", gradient, along) / jnp.sum(along**2)
        return gradient, gradient - multiple[:, None, None] * along

    def gradients(key, batch):
        if not with_b:
            return [split(jax.grad(lambda a: mean_loss(key, covariance, batch, a))(a), covariance.matrix)]
        of_a, of_b = jax.grad(lambda a, b: mean_loss(key, covariance, batch, a, b), argnums=(0, 1))(a, b)
        return [split(of_a, covariance.matrix), split(of_b[:-1], jnp.eye(D))]

    return over_blocks(gradients, 300)


def shares(gradient, rest):
    """Norm of the rest relative to that of the gradient, for each layer."""
    return np.linalg.norm(rest, axis=(1, 2)) / np.linalg.norm(gradient, axis=(1, 2))


@pytest.mark.parametrize("with_b", [False, True])
def test_theorems_3_and_4_gradients_stay_inside_the_family(with_b):
    means, errors = family_gradients(*family_blocks(paper_covariance(), *GENERIC), with_b)
    for (gradient, rest), (_, error) in zip(means, errors, strict=True):
        assert np.abs(rest / error).max() < HIGHEST_Z
        assert shares(gradient, rest).max() < 0.15


@pytest.mark.parametrize("with_b", [False, True])
def test_theorems_3_and_4_control_outside_the_family(with_b):
    _, b = family_blocks(paper_covariance(), *GENERIC)
    a = jnp.asarray(GENERIC[0])[:, None, None, None] * jnp.eye(D)
    means, _ = family_gradients(a, b, with_b)
    assert shares(*means[0]).min() > 0.5


@pytest.mark.parametrize(("layers", "with_b"), [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_theorems_3_and_4_the_optimum_of_the_family_is_stationary(layers, with_b):
    """Inside the family by the exact loss, whose mean no sample sees (its tails are heavy); outside it by sampling."""
    optimum = stationary.optima(layers, N, D, with_b, tail=0.0)[0]
    scalars = np.array([*optimum.a, *optimum.b[:-1]] if with_b else optimum.a)

    def log_loss(logarithms):
        point = scalars * np.exp(logarithms)
        return np.log(stationary.family_loss(point[:layers], (*point[layers:], 0.0) if with_b else optimum.b, N, D))

    assert np.abs(finite_difference_gradient(log_loss, np.zeros(len(scalars)))).max() < 1e-4
    means, errors = family_gradients(*family_blocks(paper_covariance(), optimum.a, optimum.b), with_b)
    for (_, rest), (_, error) in zip(means, errors, strict=True):
        assert np.abs(rest / error).max() < HIGHEST_Z


@pytest.mark.parametrize("covariance", [identity_covariance, paper_covariance])
def test_on_the_family_the_loss_depends_on_the_whitened_eigenvalues_only(covariance):
    covariance = covariance()
    a, b = GENERIC
    prompts = sample_prompts(jax.random.key(3), covariance, N, 200)
    gram = prompt_gram(prompts.x, prompts.y).xx
    losses = jnp.square(residual_matrices(gram, covariance, *family_blocks(covariance, a, b))).sum((0, 1))
    white = jnp.einsum("ik,ijb,jl->bkl", covariance.inverse_sqrt, gram, covariance.inverse_sqrt)
    eigenvalues = np.linalg.eigvalsh(white)
    np.testing.assert_allclose(losses, np.sum(stationary.residual(eigenvalues, a, b) ** 2, axis=-1), rtol=1e-10)


def test_theorem3_prior_decides_the_single_layer_optimum():
    """Under w ~ N(0, Sigma^-1) the best layer has no ridge: -(n / (n + d + 1)) Sigma^-1, whatever Sigma."""
    assert stationary.optima(1, N, D, with_b=False)[0].a == pytest.approx((-N / (N + D + 1),), rel=1e-5)
    covariance = np.asarray(paper_covariance().matrix)
    ridge_free = -N / (N + D + 1) * np.linalg.inv(covariance)
    assert not np.allclose(theory.theorem1_optimum(covariance, N), ridge_free, rtol=0.1)


def test_lemma4_order_of_the_steps_is_immaterial_only_without_b():
    covariance = paper_covariance()
    prompts = sample_prompts(jax.random.key(0), covariance, N, 200)
    gram = prompt_gram(prompts.x, prompts.y)
    a, b = family_blocks(covariance, (-0.4, -0.7, -1.7), (0.4, 0.3, 0.0))
    permuted = a[jnp.array([2, 0, 1])]
    forward = functools.partial(sparse_transformer, gram, prompts.x_query)
    np.testing.assert_allclose(forward(a), forward(permuted), atol=1e-11)
    assert np.abs(forward(a, b) - forward(permuted, b)).max() > 0.1


def test_lemma5_the_true_label_in_the_query_slot_gives_the_residual_of_sparse_models_only():
    prompts = sample_prompts(jax.random.key(0), paper_covariance(), N, 200)
    gram = prompt_gram(prompts.x, prompts.y)
    a, b = random_blocks(0, 3, 2, D, D), random_blocks(1, 3, 2, D, D)
    residual = sparse_transformer(gram, prompts.x_query, a, b) + prompts.y_query
    labelled = sparse_transformer(gram, prompts.x_query, a, b, prompts.y_query)
    np.testing.assert_allclose(labelled, residual, rtol=1e-12, atol=1e-12)

    p, q = random_blocks(2, 3, 1, D + 1, D + 1), random_blocks(3, 3, 1, D + 1, D + 1)
    empty, full = (
        gram_transformer(gram, jnp.concatenate([prompts.x_query, label[None]]), p, q)[-1, -1]
        for label in (jnp.zeros(200), prompts.y_query)
    )
    assert np.abs(full - (empty + prompts.y_query)).max() > 1


# Theorem 5: one layer of ReLU attention, isotropic.


def relu_loss(key, batch, p_row, q_top):
    """Eq. (5) for one layer of ReLU attention whose Q has the last row 0."""
    prompts = sample_prompts(key, identity_covariance(), N, batch)
    p = jnp.zeros((1, 1, D + 1, D + 1)).at[0, 0, -1].set(p_row)
    q = jnp.zeros((1, 1, D + 1, D + 1)).at[0, 0, :D].set(q_top)
    output = literal_transformer(token_matrices(prompts), p, q, jax.nn.relu)[:, -1, -1]
    return jnp.square(output + prompts.y_query).mean()


def with_label_column(a):
    return jnp.pad(jnp.asarray(a), ((0, 0), (0, 1)))


def test_theorem5_constants():
    c = theory.theorem5_step(N, D)
    assert c == pytest.approx(1.212121, abs=5e-7)
    assert c == pytest.approx(1 / ((N - 1) / (2 * N) + (D + 2) / N), rel=1e-14)
    minimum = theory.theorem5_loss(-c * np.eye(D), N)
    assert minimum == pytest.approx(D * (1 - c / 2), rel=1e-14)
    assert minimum == pytest.approx(1.969697, abs=5e-7)
    assert minimum > theory.theorem1_minimum(np.eye(D), N)  # linear attention is better on these data
    gradient = finite_difference_gradient(lambda a: theory.theorem5_loss(a, N), -c * np.eye(D))
    assert np.linalg.norm(gradient) < 1e-7
    for factor in (0.8, 1.2):
        assert theory.theorem5_loss(-factor * c * np.eye(D), N) > 1.005 * minimum


def test_theorem5_loss_of_any_matrix():
    matrices = [
        -theory.theorem5_step(N, D) * np.eye(D),
        -0.9 * np.eye(D) + np.asarray(random_blocks(0, D, D, scale=0.2)),
    ]
    p_row = jnp.zeros(D + 1).at[-1].set(1)

    def losses(key, batch):
        return [relu_loss(key, batch, p_row, with_label_column(a)) for a in matrices]

    for a, mean, error in zip(matrices, *over_blocks(losses, 1000), strict=True):
        assert abs(mean - theory.theorem5_loss(a, N)) < HIGHEST_Z * error


def test_theorem5_optimum_is_stationary_in_all_of_p_and_q():
    p_row = jnp.zeros(D + 1).at[-1].set(1)
    q_top = with_label_column(-theory.theorem5_step(N, D) * np.eye(D))

    def gradients(key, batch):
        return jax.grad(relu_loss, argnums=(2, 3))(key, batch, p_row, q_top)

    for gradient, error in zip(*over_blocks(gradients, 1000), strict=True):
        free = error > 0  # the query's label entry is 0, so Q's last column does nothing
        assert np.abs(gradient[free] / error[free]).max() < HIGHEST_Z
        assert np.all(gradient[~free] == 0)


def test_theorem5_the_mirrored_pair_is_as_good():
    """(-e, +cI) is not the same function as (e, -cI), but has the same loss by the symmetry of the covariates."""
    p_row = jnp.zeros(D + 1).at[-1].set(1)
    q_top = with_label_column(-theory.theorem5_step(N, D) * np.eye(D))

    def difference(key, batch):
        return relu_loss(key, batch, p_row, q_top) - relu_loss(key, batch, -p_row, -q_top)

    mean, error = over_blocks(difference, 500)
    assert abs(mean) < HIGHEST_Z * error


# Section 4.3: the distance of the figures.


def test_distance_is_the_least_over_multiples_of_the_identity():
    matrices = random_blocks(0, 4, D, D, scale=1.0)
    multiples = jnp.linspace(-3, 3, 6001)[:, None, None]
    for matrix, distance in zip(matrices, theory.dist_to_identity(matrices), strict=True):
        tried = jnp.linalg.norm(matrix - multiples * jnp.eye(D), axis=(1, 2)) / jnp.linalg.norm(matrix)
        assert distance == pytest.approx(float(tried.min()), abs=1e-6)
    np.testing.assert_allclose(theory.dist_to_identity(-3 * matrices), theory.dist_to_identity(matrices), rtol=1e-14)
    assert theory.dist_to_identity(-2 * jnp.eye(D)) == 0


def test_distance_of_raw_and_whitened_blocks_at_the_optimum():
    covariance = paper_covariance()
    assert float(theory.dist_to_identity(covariance.inverse)) == pytest.approx(0.7844, abs=5e-5)
    matrix = random_blocks(0, D, D)
    symmetric_root = covariance.rotation @ jnp.diag(covariance.scales) @ covariance.rotation.T
    whitened = [root.T @ matrix @ root for root in (covariance.sqrt, symmetric_root)]
    distances = [float(theory.dist_to_identity(block)) for block in whitened]
    assert distances[0] == pytest.approx(distances[1], rel=1e-12)  # the two roots differ by a rotation
