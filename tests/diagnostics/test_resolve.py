"""Tight re-solves: to rounding, dense and by iteration, and an honest flag where there is no solution."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

from curvax.diagnostics._resolve import dense_inverse, polish, tighten


def residual(theta, phi):
    """A · θ + 0.1 θ³ − φ with a matrix that is symmetric or not."""
    return {"x": phi["matrix"] @ theta["x"] + 0.1 * theta["x"] ** 3 - phi["b"]}


def root(matrix, b):
    """The same root by Newton in NumPy."""
    x = np.linalg.solve(matrix, b)
    for _ in range(50):
        x = x - np.linalg.solve(matrix + np.diag(0.3 * x**2), matrix @ x + 0.1 * x**3 - b)
    return x


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_polished_to_rounding(symmetric, dense, rng):
    matrix = 3 * np.eye(6) + 0.5 * rng.standard_normal((6, 6))
    matrix = 0.5 * (matrix + matrix.T) if symmetric else matrix
    phi = {"matrix": jnp.asarray(matrix), "b": jnp.asarray(rng.standard_normal(6))}
    moved = phi | {"b": 1.1 * phi["b"]}
    start = {"x": jnp.asarray(root(matrix, np.asarray(phi["b"])))}
    inverse = dense_inverse(residual, start, phi) if dense else None
    found = eqx.filter_jit(polish)(residual, start, moved, inverse, symmetric)
    assert bool(found.converged)
    np.testing.assert_allclose(found.theta["x"], root(matrix, np.asarray(moved["b"])), rtol=1e-14, atol=1e-15)


def test_no_solution_is_not_converged():
    """θ² + φ = 0 has no root for φ > 0; for φ < 0 it has."""
    fn = lambda theta, phi: theta**2 + phi
    theta = jnp.array([0.5])
    for phi, solvable in ((-0.3, True), (0.3, False)):
        inverse = dense_inverse(fn, theta, jnp.array([phi]))
        found = polish(fn, theta, jnp.array([phi]), inverse, False)
        assert bool(found.converged) == solvable
        assert not solvable or found.theta[0] == pytest.approx(np.sqrt(-phi), rel=1e-14)
    nan = polish(lambda theta, phi: theta * jnp.nan, theta, theta, None, True)
    assert not bool(nan.converged)


def test_above_the_limit_no_dense_matrix():
    big = jnp.zeros(2001)
    assert dense_inverse(lambda theta, phi: theta, big, big) is None
    assert jax.eval_shape(lambda: dense_inverse(lambda th, ph: th, big[:3], big)).shape == (3, 3)


def test_tolerances_are_tightened_and_nothing_else():
    solver = tighten(
        optx.BestSoFarMinimiser(optx.LBFGS(rtol=1e-3, atol=jnp.asarray(1e-2), history_length=7)), 1e-16
    )
    assert solver.solver.rtol == pytest.approx(1e-12) and solver.solver.history_length == 7
    assert isinstance(solver.solver.atol, jax.Array) and solver.solver.atol == pytest.approx(1e-12)
