"""The promise of `CG`: the 2-norm of the error of x, with and without a preconditioner."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax as cx
from curvax.linear._cg_core import conjugate_gradient
from helpers.dense import rotated

N = 50


@jax.jit
def _plain(matrix, vector, rtol):
    operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
    solution = lx.linear_solve(operator, vector, cx.linear.CG(rtol=rtol), throw=False)
    return solution.value, solution.stats["num_steps"]


@jax.jit
def _preconditioned(matrix, vector, rtol, inverse):
    operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
    options = {"preconditioner": lx.MatrixLinearOperator(inverse, lx.positive_semidefinite_tag)}
    solution = lx.linear_solve(operator, vector, cx.linear.CG(rtol=rtol), options=options, throw=False)
    return solution.value, solution.stats["num_steps"]


def _cases(rng):
    """(name, A, M⁻¹): good, bad and indifferent preconditioners of matrices that are hard in different ways."""
    spread = rotated(np.geomspace(1.0, 1e4, N), rng)
    scales = np.sqrt(np.geomspace(1.0, 1e6, N))
    scaled = scales[:, None] * rotated(np.geomspace(1.0, 30.0, N), rng) * scales
    off = rotated(np.geomspace(0.2, 5.0, N), rng)
    root = np.linalg.cholesky(np.linalg.inv(spread))
    yield "Jacobi where it is right", scaled, np.diag(1 / np.diagonal(scaled))
    yield "Jacobi where it is of no use", spread, np.diag(1 / np.diagonal(spread))
    yield "within a factor of five", spread, root @ off @ root.T
    yield "exact", spread, np.linalg.inv(spread)
    yield "wrong", spread, rotated(np.geomspace(1.0, 1e2, N), rng)
    yield "a multiple of the identity", spread, 1e-3 * np.eye(N)


# At a loose tolerance the smallest Ritz value has not settled when the loop stops.
@pytest.mark.parametrize(
    ("rtol", "worst", "share"), [(1e-1, 15.0, 0.35), (1e-3, 2.0, 0.05), (1e-6, 3.0, 0.05)]
)
def test_error_under_preconditioners(rng, rtol, worst, share):
    """The share of solves that miss their tolerance is small, and none misses it by more than is said."""
    missed, solves = 0, 0
    for _ in range(5):
        for name, matrix, inverse in _cases(rng):
            for vector in (rng.normal(size=N), matrix @ rng.normal(size=N), np.eye(N)[3]):
                truth = np.linalg.solve(matrix, vector)
                for x, _ in (
                    _plain(matrix, vector, rtol),
                    _preconditioned(matrix, vector, rtol, 0.5 * (inverse + inverse.T)),
                ):
                    error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
                    assert error <= worst * rtol, (name, error)
                    missed += error > rtol
                    solves += 1
    assert missed <= share * solves, (missed, solves)


def test_a_preconditioner_pays(rng):
    steps = {}
    for name, matrix, inverse in _cases(rng):
        vector = rng.normal(size=N)
        with_it = _preconditioned(matrix, vector, 1e-6, 0.5 * (inverse + inverse.T))[1]
        steps[name] = int(with_it) / int(_plain(matrix, vector, 1e-6)[1])
    assert steps["Jacobi where it is right"] < 0.4
    assert steps["within a factor of five"] < 0.4
    assert steps["exact"] < 0.1
    assert 0.9 < steps["a multiple of the identity"] < 1.1
    assert steps["Jacobi where it is of no use"] < 1.5


def test_float32_scales(rng):
    """Large and small units: nothing in the test depends on them."""
    matrix = rotated(np.geomspace(1.0, 1e3, N), rng)
    vector = rng.normal(size=N)
    steps = set()
    for scale in (1e-12, 1.0, 1e12):
        x, count = _plain(jnp.asarray(scale * matrix, jnp.float32), jnp.asarray(vector, jnp.float32), 1e-3)
        truth = np.linalg.solve(scale * matrix, vector)
        assert np.linalg.norm(np.asarray(x) - truth) <= 1e-3 * np.linalg.norm(truth)
        steps.add(int(count))
    assert max(steps) <= 1.1 * min(steps)


def _textbook_products(matrix, vector, error):
    """Of conjugate gradients as Hestenes and Stiefel wrote them, until the true error is as small as `error`."""
    truth = np.linalg.solve(matrix, vector)
    x, r, p, count = np.zeros_like(vector), vector, vector, 0
    while np.linalg.norm(x - truth) > error * np.linalg.norm(truth):
        product = matrix @ p
        alpha = (r @ r) / (p @ product)
        x, after = x + alpha * p, r - alpha * product
        p, r, count = after + (after @ after) / (r @ r) * p, after, count + 1
    return count


@pytest.mark.parametrize("condition", [1e4, 1e6])
def test_no_more_products_than_the_textbook_needs(rng, condition):
    """In runs so long that orthogonality is lost again and again, to the same true error."""
    matrix = rotated(np.geomspace(1 / condition, 1, 150), rng)
    vector = rng.standard_normal(150)
    truth = np.linalg.solve(matrix, vector)
    for rtol in (1e-4, 1e-8):
        x, count = _plain(matrix, vector, rtol)
        error = np.linalg.norm(x - truth) / np.linalg.norm(truth)
        assert error <= rtol
        assert int(count) <= 1.05 * _textbook_products(matrix, vector, error) + 5


def test_as_far_as_the_precision_goes(rng):
    """More is wanted than rounding allows: said, at an error of a few eps · κ, in no more products than it takes."""
    matrix = rotated(np.geomspace(1e-6, 1, 150), rng)
    vector = rng.standard_normal(150)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), lx.positive_semidefinite_tag)
    solution = lx.linear_solve(operator, jnp.asarray(vector), cx.linear.CG(rtol=1e-13), throw=False)
    truth = np.linalg.solve(matrix, vector)
    assert solution.stats["precision_limited"]
    assert np.linalg.norm(solution.value - truth) <= 2e-9 * np.linalg.norm(truth)
    assert int(solution.stats["num_steps"]) <= 1.2 * _textbook_products(matrix, vector, 1e-9)


def test_norms_by_recurrence(rng):
    """‖x‖ and ‖r‖ of a run are not measured but follow from its coefficients, long after orthogonality is lost."""
    matrix = rotated(np.geomspace(1e-6, 1, 60), rng)
    rhs = rng.standard_normal(60)
    x, info = jax.jit(
        lambda b: conjugate_gradient(lambda v: jnp.asarray(matrix) @ v, b, rtol=1e-6, max_steps=3000)
    )(rhs)
    assert info.num_matvecs > 200
    np.testing.assert_allclose(info.solution_norm, np.linalg.norm(x), rtol=1e-6)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(rhs - matrix @ x), rtol=0.1)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=0, atol=1e-6 * np.linalg.norm(x))
