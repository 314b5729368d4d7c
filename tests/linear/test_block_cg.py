"""Right-hand sides of one system under `vmap`: block conjugate gradients against dense solutions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from curvax.linear._block_cg import block_conjugate_gradient

SIZE = 120
SPECTRA = {
    "geometric": np.geomspace(1, 1e4, SIZE),
    "outliers": np.r_[np.linspace(1, 10, SIZE - 10), np.geomspace(100, 1e5, 10)],
    "small ones": np.r_[np.geomspace(1e-3, 1, 6), np.linspace(10, 100, SIZE - 6)],
    "few distinct": np.r_[np.ones(SIZE - 3), 10.0, 20.0, 30.0],
}


def operator_of(matrix):
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


@eqx.filter_jit
def solve_each(matrix, vectors, solver, **options):
    """Lineax under `vmap`, without raising; one program for all matrices."""
    run = lambda b: lx.linear_solve(operator_of(matrix), b, solver, options=options, throw=False)  # noqa: E731
    return jax.vmap(run)(jnp.asarray(vectors))


@eqx.filter_jit
def solve_alone(matrix, vector, solver):
    """The same for one right-hand side."""
    return lx.linear_solve(operator_of(matrix), vector, solver)


@pytest.fixture
def basis(rng):
    return np.linalg.qr(rng.normal(size=(SIZE, SIZE)))[0]


def with_spectrum(basis, values, dtype=float):
    return jnp.asarray(basis * values @ basis.T, dtype)


def errors(found, matrix, vectors):
    truth = np.linalg.solve(np.asarray(matrix, float), np.asarray(vectors, float).T).T
    return np.linalg.norm(found - truth, axis=1) / np.maximum(np.linalg.norm(truth, axis=1), 1e-300)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_forward_error_and_fewer_products(spectrum, basis, rng):
    matrix = with_spectrum(basis, SPECTRA[spectrum])
    vectors = jnp.asarray(rng.normal(size=(8, SIZE)))
    solver = cx.linear.CG(rtol=1e-6)
    solution = solve_each(matrix, vectors, solver)
    assert jnp.all(solution.result == lx.RESULTS.successful)
    assert errors(solution.value, matrix, vectors).max() < 1e-6
    alone = solve_alone(matrix, vectors[0], solver)
    fewest = 1 if spectrum == "few distinct" else 1.5
    assert fewest * int(solution.stats["num_steps"].max()) <= int(alone.stats["num_steps"])


def test_estimates_of_the_spectrum(basis, rng):
    values = SPECTRA["geometric"]
    stats = solve_each(with_spectrum(basis, values), rng.normal(size=(8, SIZE)), cx.linear.CG(1e-8)).stats
    # From above, as every Ritz value; and found incrementally, so not the smallest of them.
    assert np.all(
        (stats["curvature_min"] >= values[0] * (1 - 1e-9)) & (stats["curvature_min"] < 1.6 * values[0])
    )
    assert np.all((stats["curvature_max"] > 0.5 * values[-1]) & (stats["curvature_max"] < 8 * values[-1]))


@pytest.mark.parametrize("spectrum", ["geometric", "few distinct"])
def test_dependent_zero_and_nonfinite_right_hand_sides(spectrum, basis, rng):
    matrix = with_spectrum(basis, SPECTRA[spectrum])
    vectors = rng.normal(size=(7, SIZE))
    vectors[1], vectors[2], vectors[3] = vectors[0], 0, 1e-9 * vectors[0] + 1e-30
    vectors[5, 3], vectors[6, 0] = np.nan, np.inf
    solution = solve_each(matrix, jnp.asarray(vectors), cx.linear.CG(rtol=1e-6))
    good = solution.result == lx.RESULTS.successful
    np.testing.assert_array_equal(good, [True] * 5 + [False] * 2)
    assert errors(solution.value[:5], matrix, vectors[:5]).max() < 1e-6
    np.testing.assert_array_equal(solution.value[2], 0)


def test_right_hand_sides_of_any_size(basis, rng):
    matrix = with_spectrum(basis, SPECTRA["geometric"], jnp.float32)
    vectors = jnp.asarray(
        rng.normal(size=(4, SIZE)) * np.array([1e-30, 1.0, 1e30, 1e-12])[:, None], jnp.float32
    )
    solution = solve_each(matrix, vectors, cx.linear.CG(rtol=1e-3))
    assert solution.value.dtype == jnp.float32
    assert jnp.all(solution.result == lx.RESULTS.successful)
    assert errors(np.asarray(solution.value, float), matrix, vectors).max() < 3e-3


@pytest.mark.parametrize(("lowest", "result"), [(-1.0, "breakdown"), (0.0, "singular"), (np.nan, "singular")])
def test_curvature_that_is_not_definite(lowest, result, basis, rng):
    values = np.geomspace(1, 1e3, SIZE)
    values[0] = lowest
    solution = solve_each(with_spectrum(basis, values), rng.normal(size=(5, SIZE)), cx.linear.CG(rtol=1e-6))
    assert jnp.all(solution.result == getattr(lx.RESULTS, result))


def test_budget(basis, rng):
    matrix = with_spectrum(basis, SPECTRA["geometric"])
    solution = solve_each(matrix, rng.normal(size=(4, SIZE)), cx.linear.CG(rtol=1e-6, max_steps=20))
    assert jnp.all(solution.result == lx.RESULTS.max_steps_reached)
    np.testing.assert_array_equal(solution.stats["num_steps"], 20)


def test_preconditioner_and_start(basis, rng):
    scales = np.geomspace(1, 1e3, SIZE)
    matrix = with_spectrum(basis, np.linspace(1, 3, SIZE)) * scales[:, None] * scales
    vectors = jnp.asarray(rng.normal(size=(6, SIZE)))
    jacobi = operator_of(jnp.diag(1 / jnp.diagonal(matrix)))
    solver = cx.linear.CG(rtol=1e-6)
    solution = solve_each(matrix, vectors, solver, preconditioner=jacobi)
    assert errors(solution.value, matrix, vectors).max() < 1e-6
    assert int(solution.stats["num_steps"].max()) < 25

    near = solution.value * (1 + 1e-4)

    def started(b, y0):
        options = {"preconditioner": jacobi, "y0": y0}
        return lx.linear_solve(operator_of(matrix), b, solver, options=options)

    again = jax.jit(jax.vmap(started))(vectors, near)
    assert errors(again.value, matrix, vectors).max() < 1e-6
    assert int(again.stats["num_steps"].max()) < int(solution.stats["num_steps"].max())
    shared = jax.jit(jax.vmap(started, in_axes=(0, None)))(vectors, near[0])
    assert errors(shared.value, matrix, vectors).max() < 1e-6


def test_more_than_one_block_and_batches_of_blocks(basis, rng):
    matrices = jnp.stack([with_spectrum(basis, SPECTRA[name]) for name in ("geometric", "outliers")])
    vectors = jnp.asarray(rng.normal(size=(40, SIZE)))
    solve = lambda a, b: lx.linear_solve(operator_of(a), b, cx.linear.CG(rtol=1e-6)).value  # noqa: E731
    both = jax.jit(jax.vmap(jax.vmap(solve, (None, 0)), (0, None)))(matrices, vectors)
    for matrix, found in zip(matrices, both, strict=True):
        assert errors(found, matrix, vectors).max() < 1e-6
    # Where every system has a matrix of its own nothing is shared, and nothing is wrong.
    own = jax.jit(jax.vmap(solve))(matrices, vectors[:2])
    for matrix, found, vector in zip(matrices, own, vectors, strict=False):
        assert errors(found[None], matrix, vector[None]).max() < 1e-6


def test_few_unknowns(rng):
    matrix = jnp.asarray([[4.0, 1.0], [1.0, 3.0]])
    vectors = jnp.asarray(rng.normal(size=(5, 2)))
    assert errors(solve_each(matrix, vectors, cx.linear.CG(rtol=1e-8)).value, matrix, vectors).max() < 1e-8
    _, info = block_conjugate_gradient(lambda v: v @ matrix, vectors, rtol=1e-8, max_steps=10)
    assert jnp.all(info.status == 1)


def test_pytrees_and_derivatives(rng):
    curvature = {"a": jnp.asarray(rng.uniform(1, 5, (3, 4))), "b": jnp.asarray(rng.uniform(1, 5, 8))}
    vectors = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(4, *leaf.shape))), curvature)

    def total(scale, vectors):
        def solve(b):
            weights = jax.tree.map(lambda c: c + scale, curvature)
            operator = lx.FunctionLinearOperator(
                lambda v: jax.tree.map(jnp.multiply, weights, v),
                jax.eval_shape(lambda: b),
                lx.positive_semidefinite_tag,
            )
            return lx.linear_solve(operator, b, cx.linear.CG(rtol=1e-9)).value

        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.vmap(solve)(vectors)))

    def closed(scale, vectors):
        return sum(
            jnp.sum((b / (c + scale)) ** 2)
            for b, c in zip(*map(jax.tree.leaves, (vectors, curvature)), strict=True)
        )

    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f)), lambda f: jax.grad(f, 1)):
        found, truth = (jax.jit(derivative(f))(0.5, vectors) for f in (total, closed))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, truth)


def test_adjoints_of_several_outputs_share_their_products(rng):
    """`jax.jacrev` of an implicit solution: one block of adjoints, against the Jacobian in closed form."""
    a, b = jnp.asarray(rng.uniform(1, 50, SIZE)), jnp.asarray(rng.normal(size=SIZE))
    outputs = jnp.asarray(rng.normal(size=(6, SIZE)))
    loss = lambda w, lam: 0.5 * jnp.sum(a * w**2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2) - jnp.dot(b, w)  # noqa: E731

    def predictions(lam):
        solver, rule = optx.BFGS(1e-9, 1e-9), cx.Implicit(linear_solver=cx.linear.CG(rtol=1e-8))
        return outputs @ optx.minimise(loss, solver, jnp.zeros(SIZE), lam, adjoint=rule, max_steps=2000).value

    lam = jnp.asarray(rng.normal(size=SIZE))
    found = jax.jit(jax.jacrev(predictions))(lam)
    truth = -outputs * (jnp.exp(lam) * b / (a + jnp.exp(lam)) ** 2)
    np.testing.assert_allclose(found, truth, atol=1e-6 * jnp.abs(truth).max())
