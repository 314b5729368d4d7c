"""MINRES against dense solutions and SciPy's minres."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse.linalg as sparse

from curvax.linear import MINRES
from helpers.dense import refined_solve
from helpers.matrices import definite, indefinite, kkt, singular

N, M = 40, 12


@functools.cache
def _program(rtol, max_steps):
    @jax.jit
    def solve(matrix, vector, preconditioner):
        operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
        options = {"preconditioner": lx.DiagonalLinearOperator(preconditioner)}
        solver = MINRES(rtol=rtol, max_steps=max_steps)
        solution = lx.linear_solve(operator, vector, solver, options=options, throw=False)
        return solution.value, solution.result, solution.stats

    return solve


def _solve(matrix, vector, *, preconditioner=None, rtol=1e-10, max_steps=None):
    if preconditioner is None:
        preconditioner = np.ones_like(vector)
    return _program(rtol, max_steps)(jnp.asarray(matrix), jnp.asarray(vector), jnp.asarray(preconditioner))


@pytest.mark.parametrize("condition", [1e1, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("scaled", [False, True])
def test_kkt_systems_better_than_scipy(condition, scaled, rng):
    """The residual asked for is reached, and the error is no larger than SciPy's at the same rtol."""
    matrix = kkt(N, M, condition)
    assert np.sum(np.linalg.eigvalsh(matrix) < 0) == M
    vector = matrix @ rng.standard_normal(N + M)
    preconditioner = rng.uniform(0.2, 5.0, N + M) if scaled else np.ones(N + M)
    value, result, stats = _solve(matrix, vector, preconditioner=preconditioner)
    assert result == lx.RESULTS.successful
    residual = np.linalg.norm(vector - matrix @ value)
    assert residual <= 1.001e-10 * np.linalg.norm(vector)
    np.testing.assert_allclose(stats["residual_norm"], residual, rtol=1e-2)
    truth = refined_solve(matrix, vector)
    bound = residual / np.abs(np.linalg.eigvalsh(matrix)).min()
    assert np.linalg.norm(value - truth) <= 1.1 * bound
    theirs, _ = sparse.minres(matrix, vector, rtol=1e-10, maxiter=20_000, M=np.diag(preconditioner))
    assert np.linalg.norm(value - truth) <= 2 * np.linalg.norm(theirs - truth)


@pytest.mark.parametrize("make", [definite, indefinite])
def test_as_many_steps_as_scipy(make, rng):
    matrix = make(N, 30.0)
    vector = rng.standard_normal(N)
    counted = []
    # SciPy's test is ‖r‖ ≤ rtol ‖A‖‖x‖: the same residual from its side of the equation.
    value, _, stats = _solve(matrix, vector)
    target = np.linalg.norm(vector - matrix @ value)
    scale = np.linalg.norm(matrix, 2) * np.linalg.norm(value)
    sparse.minres(matrix, vector, rtol=target / scale, callback=counted.append)
    assert stats["num_steps"] <= len(counted) + 4


def test_error_falls_with_the_condition_number_in_float32(rng):
    matrix = indefinite(N, 100.0).astype(np.float32)
    vector = rng.standard_normal(N).astype(np.float32)
    value, result, _ = _solve(matrix, vector, rtol=1e-4)
    assert value.dtype == np.float32 and result == lx.RESULTS.successful
    truth = refined_solve(matrix, vector)
    assert np.linalg.norm(np.asarray(value) - truth) <= 1e-2 * np.linalg.norm(truth)


@pytest.mark.parametrize("signs", [False, True])
def test_singular_systems(signs, rng):
    """Consistent: the solution of least norm. Inconsistent: flagged, and said why."""
    matrix, null = singular(N, 2, signs=signs)
    consistent = matrix @ rng.standard_normal(N)
    value, result, _ = _solve(matrix, consistent)
    assert result == lx.RESULTS.successful
    np.testing.assert_allclose(value, np.linalg.pinv(matrix) @ consistent, atol=1e-8)
    value, result, stats = _solve(matrix, consistent + null[:, 0] * np.linalg.norm(consistent))
    assert result == lx.RESULTS.singular
    assert stats["num_steps"] < 5 * N  # noticed, not run into the budget


def test_tolerance_below_rounding_is_stagnation(rng):
    matrix = indefinite(N, 1e6)
    vector = rng.standard_normal(N)
    _, result, _ = _solve(matrix, vector, rtol=1e-6)
    assert result == lx.RESULTS.successful
    _, result, stats = _solve(matrix, vector, rtol=1e-16)
    assert result == lx.RESULTS.stagnation
    assert stats["residual_norm"] <= 1e-7 * np.linalg.norm(vector)


def test_preconditioner_that_is_not_definite_is_breakdown(rng):
    matrix = indefinite(N, 10.0)
    vector = rng.standard_normal(N)
    preconditioner = np.ones(N)
    assert _solve(matrix, vector, preconditioner=preconditioner)[1] == lx.RESULTS.successful
    preconditioner[3] = -2.0
    assert _solve(matrix, vector, preconditioner=preconditioner)[1] == lx.RESULTS.breakdown


def test_out_of_steps(rng):
    matrix = indefinite(N, 1e4)
    vector = rng.standard_normal(N)
    _, result, stats = _solve(matrix, vector, max_steps=7)
    assert result == lx.RESULTS.max_steps_reached
    assert 7 <= stats["num_steps"] <= 8


def test_a_preconditioner_without_tag_is_refused():
    operator = lx.MatrixLinearOperator(jnp.eye(2), lx.symmetric_tag)
    options = {"preconditioner": lx.MatrixLinearOperator(jnp.eye(2))}
    with pytest.raises(ValueError, match="preconditioner.*positive_semidefinite_tag"):
        lx.linear_solve(operator, jnp.ones(2), MINRES(rtol=1e-6), options=options)
