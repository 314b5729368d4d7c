"""Flexible GMRES: with preconditioners that change, and its derivatives."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse.linalg as sparse

from curvax.linear import CG, FGMRES
from helpers.dense import refined_solve
from helpers.matrices import definite, indefinite, rotation_and_decay

N = 60


def _solve(matrix, vector, options=None, **settings):
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    solver = FGMRES(**({"rtol": 1e-10} | settings))
    return lx.linear_solve(operator, jnp.asarray(vector), solver, options=options or {}, throw=False)


@pytest.mark.parametrize("make", [rotation_and_decay, lambda n: indefinite(n, 50.0)])
def test_without_a_preconditioner(make, rng):
    matrix, vector = make(N), rng.standard_normal(N)
    solution = _solve(matrix, vector, restart=N)
    assert solution.result == lx.RESULTS.successful
    np.testing.assert_allclose(solution.value, refined_solve(matrix, vector), rtol=1e-6, atol=1e-8)
    counted = []
    sparse.gmres(matrix, vector, rtol=1e-10, restart=N, callback=counted.append, callback_type="pr_norm")
    assert solution.stats["num_steps"] <= len(counted) + 3


def test_inner_solver_as_a_preconditioner(rng):
    """Loose conjugate gradients, which is not a linear map: plain GMRES would not converge with it."""
    matrix, vector = definite(N, 1e4), jnp.asarray(rng.standard_normal(N))
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), lx.positive_semidefinite_tag)

    def inner(v):
        return lx.linear_solve(operator, v, CG(rtol=0.3), throw=False).value

    solution = _solve(matrix, vector, {"preconditioner": inner}, restart=20)
    assert solution.result == lx.RESULTS.successful
    assert solution.stats["num_steps"] <= 20
    np.testing.assert_allclose(
        solution.value, refined_solve(matrix, np.asarray(vector)), rtol=1e-5, atol=1e-6
    )
    residual = np.linalg.norm(matrix @ solution.value - vector)
    np.testing.assert_allclose(solution.stats["residual_norm"], residual, rtol=1e-2)


def test_derivatives_with_operators_and_functions(rng):
    """The transposed solve takes the operator transposed, or the function that is meant for it, or none."""
    matrix = rotation_and_decay(N)
    vector = jnp.asarray(rng.standard_normal(N))
    inverse = jnp.asarray(np.linalg.inv(matrix) + 1e-3 * rng.standard_normal((N, N)))
    truth = np.linalg.solve(matrix.T, 2 * np.linalg.solve(matrix, vector))
    for options in (
        {"preconditioner": lx.MatrixLinearOperator(inverse)},
        {"preconditioner": lambda v: inverse @ v, "transposed_preconditioner": lambda v: inverse.T @ v},
        {"preconditioner": lambda v: inverse @ v},
    ):
        grad = jax.grad(lambda b, options=options: jnp.sum(_solve(matrix, b, options, restart=N).value ** 2))
        np.testing.assert_allclose(grad(vector), truth, rtol=1e-6, atol=1e-8)


def test_failures_and_errors(rng):
    matrix, vector = rotation_and_decay(N), rng.standard_normal(N)
    assert _solve(matrix, vector, max_steps=3).result == lx.RESULTS.max_steps_reached
    assert _solve(np.roll(np.eye(N), 1, 0), np.eye(N)[0], restart=5).result == lx.RESULTS.stagnation
    nan = _solve(matrix, vector, {"preconditioner": lambda v: v * jnp.nan})
    assert nan.result != lx.RESULTS.successful
    assert np.all(_solve(matrix, np.zeros(N)).value == 0)
    with pytest.raises(ValueError, match="`restart` of `FGMRES`"):
        FGMRES(rtol=1e-6, restart=0)
    with pytest.raises(ValueError, match="preconditioner.*function"):
        _solve(matrix, vector, {"preconditioner": 3.0})
    with pytest.raises(ValueError, match="square"):
        lx.linear_solve(lx.MatrixLinearOperator(jnp.ones((3, 2))), jnp.ones(3), FGMRES(rtol=1e-6))
