"""What `Auto` finds out by itself: symmetry that nobody tagged, tags that are false, and when GMRES is not enough."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.sparse

from curvax.linear import Auto, Method, Reason
from curvax.linear._bicgstab_core import bicgstab
from helpers.matrices import indefinite, rotation_and_decay

N = 200


def _function(matrix, tags=()):
    matrix = jnp.asarray(matrix)
    return lx.FunctionLinearOperator(
        lambda v: matrix @ v, jax.ShapeDtypeStruct((len(matrix),), matrix.dtype), tags
    )


def _solve(operator, vector, **options):
    solution = lx.linear_solve(operator, jnp.asarray(vector), Auto(**({"rtol": 1e-8} | options)), throw=False)
    return solution, Method(int(solution.stats["method"])), Reason(int(solution.stats["reason"]))


def test_symmetry_without_a_tag(rng):
    vector = rng.standard_normal(N)
    matrix = indefinite(N, 100.0)
    for dtype, rtol in ((np.float64, 1e-8), (np.float32, 1e-4)):
        solution, method, reason = _solve(
            _function(matrix.astype(dtype)), vector.astype(dtype), rtol=rtol, fallback_size=0
        )
        assert (method, reason) == (Method.minres, Reason.first_choice)
        assert np.linalg.norm(
            matrix @ np.asarray(solution.value, float) - vector
        ) <= 2 * rtol * np.linalg.norm(vector)
    solution, method, _ = _solve(_function(matrix), vector, probe=False, restart=N, fallback_size=0)
    assert method == Method.gmres
    for asymmetry in (1.0, 1e-4):
        skew = matrix + asymmetry * np.triu(rng.standard_normal((N, N)), 1) / N
        solution, method, _ = _solve(_function(skew), vector, restart=N, fallback_size=0)
        assert method == Method.gmres
        assert np.linalg.norm(skew @ solution.value - vector) <= 1e-8 * np.linalg.norm(vector)


def test_preconditioner_that_is_not_definite_rules_minres_out(rng):
    matrix, vector = indefinite(N, 100.0), rng.standard_normal(N)
    inverse = _function(np.linalg.inv(matrix))
    solution = lx.linear_solve(
        _function(matrix), jnp.asarray(vector), Auto(rtol=1e-8), options={"preconditioner": inverse}
    )
    assert Method(int(solution.stats["method"])) == Method.gmres
    assert int(solution.stats["num_steps"]) <= 4


def test_false_tag_of_symmetry(rng):
    matrix, vector = rotation_and_decay(N), rng.standard_normal(N)
    lies = _function(matrix, lx.symmetric_tag)
    solution, _, _ = _solve(lies, vector, check_tags=True)
    assert solution.result == lx.RESULTS.breakdown
    assert int(solution.stats["num_steps"]) == 2
    # Not asked, MINRES fails on it and the matrix is written out: slower, never wrong.
    solution, method, _ = _solve(lies, vector)
    assert method == Method.lu_fallback
    np.testing.assert_allclose(matrix @ solution.value, vector, atol=1e-6)
    honest = _function(indefinite(N, 100.0), lx.symmetric_tag)
    assert _solve(honest, vector, check_tags=True)[0].result == lx.RESULTS.successful


def test_bicgstab_where_restarts_stall(rng):
    """Convection and diffusion on a line: restarted GMRES crawls, and there is nothing to write out."""
    n = 400
    step = 1 / (n + 1)
    matrix = scipy.sparse.diags([-1 - 0.2 * step, 2.0, -1 + 0.2 * step], [-1, 0, 1], (n, n)).toarray()
    vector = rng.standard_normal(n)
    solution, method, reason = _solve(_function(matrix), vector, restart=5, fallback_size=0, max_steps=2000)
    assert method == Method.bicgstab
    assert reason in (Reason.budget, Reason.stalled)
    assert solution.result == lx.RESULTS.successful
    assert np.linalg.norm(matrix @ solution.value - vector) <= 1e-8 * np.linalg.norm(vector)


def test_false_symmetry_is_not_followed_for_long(rng):
    """A symmetric block so large that the other one drowns in the rounding of the probe."""
    root = rng.standard_normal((100, 100))
    matrix = 10 * np.eye(300)
    matrix[:100, :100] = 1e12 * (root @ root.T / 100 + np.eye(100))
    matrix[100:, 100:] += 0.05 * rng.standard_normal((200, 200))
    vector = rng.standard_normal(300)
    solution, method, _ = _solve(_function(matrix), vector, restart=300)
    assert solution.result == lx.RESULTS.successful
    assert method == Method.lu_fallback
    assert int(solution.stats["num_steps"]) <= 300  # thousands, if it were


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_bicgstab_in_float32(sign, rng):
    """It knows no breakdown where inner products are merely negative."""
    n = 300
    matrix = (sign * (3 * np.eye(n) + rng.standard_normal((n, n)) / np.sqrt(n))).astype(np.float32)
    vector = rng.standard_normal(n).astype(np.float32)
    x, r, info = bicgstab(
        lambda v: jnp.asarray(matrix) @ v,
        jnp.asarray(vector),
        jnp.zeros(n, jnp.float32),
        jnp.asarray(vector),
        target=jnp.asarray(3e-6 * np.linalg.norm(vector), jnp.float32),
        max_steps=1000,
    )
    residual = np.linalg.norm(matrix.astype(float) @ np.asarray(x, float) - vector)
    assert residual <= 1e-5 * np.linalg.norm(vector)
    np.testing.assert_allclose(info.residual_norm, np.linalg.norm(r), rtol=1e-5)
    assert 10 <= info.num_matvecs <= 120
    # A breakdown in the first step, and one that nothing helps.
    skew = jnp.asarray(np.kron(np.eye(3), [[0.0, 1.0], [-1.0, 0.0]]))
    b = jnp.ones(6)
    x, r, info = bicgstab(lambda v: skew @ v, b, jnp.zeros(6), b, target=jnp.asarray(1e-8), max_steps=1000)
    assert info.stalled or info.residual_norm <= 1e-8
    assert info.num_matvecs < 100 and np.all(np.isfinite(x))


def test_zero_one_and_nothing():
    for matrix, vector, value in (
        (np.eye(3), np.zeros(3), np.zeros(3)),
        (np.array([[2.0]]), np.array([4.0]), np.array([2.0])),
        (np.zeros((0, 0)), np.zeros(0), np.zeros(0)),
    ):
        solution, _, _ = _solve(_function(matrix), vector, dense_size=0)
        assert solution.result == lx.RESULTS.successful
        np.testing.assert_allclose(solution.value, value, rtol=1e-12)
    solution, _, _ = _solve(_function(np.full((40, 40), np.nan)), np.ones(40), dense_size=0)
    assert solution.result != lx.RESULTS.successful
