"""Singular inner problems: the derivative of least norm where there is one, and a failure where there is none."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from curvax.linear import TruncatedSpectrum

BFGS = optx.BFGS(1e-10, 1e-10)
ROWS, COLUMNS = 4, 7


def run(problem, phi, theta0, solver, rtol=1e-6, inner_solver=BFGS, **options):
    rule = cx.Implicit(rtol=rtol, linear_solver=solver)
    return cx.hypergradient(
        problem, phi, theta0, inner_solver=inner_solver, rule=rule, throw=False, **options
    )


def residual(theta, phi, data):
    return data[0] @ jnp.concatenate([theta["a"].ravel(), theta["b"]]) - data[1] @ phi


LEAST_SQUARES = cx.Bilevel(
    inner=lambda theta, phi, data: jnp.sum(residual(theta, phi, data) ** 2) / 2,
    outer=lambda theta, phi, _: jnp.sum((theta["a"] - 1.0) ** 2) + jnp.sum(theta["b"] * phi),
)


def family(rng):
    """Fewer equations than unknowns, the data, and the derivative of the outer loss of X⁺Yφ."""
    matrix, targets = rng.standard_normal((ROWS, COLUMNS)), rng.standard_normal((ROWS, 1))
    slope = np.linalg.pinv(matrix) @ targets
    phi = np.array([0.7])
    theta = slope @ phi
    truth = 2 * (theta[:6] - 1) @ slope[:6] + slope[6] * phi + theta[6]
    data = jnp.asarray(matrix), jnp.asarray(targets)
    theta0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1), "none": None}
    return jnp.asarray(phi), theta0, data, truth


def test_least_squares_with_too_few_rows(rng):
    """From zero the solver finds X⁺Yφ, which moves by X⁺Y dφ; in float32, and by iteration, as for large problems."""
    phi, theta0, data, truth = family(rng)
    hg = run(LEAST_SQUARES, phi, theta0, TruncatedSpectrum(), None, inner_data=data)
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(hg.grad, truth, rtol=1e-9)
    sizes = np.linalg.svd(np.asarray(data[0]))[1] ** 2
    np.testing.assert_allclose([hg.stats.curvature_max, hg.stats.curvature_min], sizes[[0, -1]], rtol=1e-9)
    iterated = TruncatedSpectrum(1e-6, rank=6, dense_size=0, key=jax.random.key(0))
    hg = run(LEAST_SQUARES, phi, theta0, iterated, None, inner_data=data)
    np.testing.assert_allclose(hg.grad, truth, rtol=1e-5)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (phi, theta0, data))
    options = {"inner_data": single[2], "inner_solver": optx.BFGS(1e-4, 1e-4)}
    hg = run(LEAST_SQUARES, *single[:2], TruncatedSpectrum(1e-4), None, **options)
    assert hg.grad.dtype == jnp.float32
    np.testing.assert_allclose(hg.grad, truth, rtol=1e-3)


CIRCLE = cx.Bilevel(
    inner=lambda theta, phi, _: (jnp.sum(theta**2) - phi) ** 2 / 4,
    outer=lambda theta, phi, target: jnp.sum((theta - target) ** 2),
)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-3, 1e-6])
def test_error_estimate_where_the_minima_are_a_sphere(rng, tolerance):
    """‖θ‖² = φ: θ moves along its ray, dθ = θ dφ/(2φ). The inner solver stops early; the estimate says how wrong."""
    start, target = (jnp.asarray(x) for x in rng.standard_normal((2, 5)))
    phi = jnp.array(2.0)
    theta = phi**0.5 * start / jnp.linalg.norm(start)
    truth = float(2 * (theta - target) @ theta / (2 * phi))
    rule = cx.Implicit(rtol=0.5, linear_solver=TruncatedSpectrum(1e-3))
    solver, state = optx.BFGS(tolerance, tolerance), None
    for _ in range(2):  # cold and warm
        hg = cx.hypergradient(
            CIRCLE, phi, start, inner_solver=solver, rule=rule, outer_data=target, state=state
        )
        error, state = abs(float(hg.grad) - truth), hg.state
        assert 0.5 * error <= float(hg.stats.error_estimate) + 1e-13
        assert float(hg.stats.error_estimate) <= 50 * error + 1e-10


def test_it_is_not_the_derivative_of_the_solution_of_least_norm(rng):
    """Where φ turns the null space, X(φ)⁺y moves along it too; the solution that moves least does not."""
    first, second = rng.standard_normal((2, 2, 4))
    y, w = rng.standard_normal(2), jnp.asarray(rng.standard_normal(4))
    problem = cx.Bilevel(
        inner=lambda theta, phi, data: jnp.sum((data[0] @ theta + phi * (data[1] @ theta) - y) ** 2) / 2,
        outer=lambda theta, phi, _: w @ theta,
    )
    data = jnp.asarray(first), jnp.asarray(second)
    hg = run(problem, jnp.array(0.0), jnp.zeros(4), TruncatedSpectrum(), None, inner_data=data)
    least = np.linalg.pinv(first)
    theta = least @ y
    moves_least = -least @ second @ theta
    np.testing.assert_allclose(hg.grad, w @ moves_least, rtol=1e-7)
    turned = moves_least + (np.eye(4) - least @ first) @ second.T @ least.T @ theta
    step = 1e-6
    difference = np.linalg.pinv(first + step * second) @ y - np.linalg.pinv(first - step * second) @ y
    np.testing.assert_allclose(difference / (2 * step), turned, rtol=1e-6)
    assert abs(float(w @ (turned - moves_least))) > 0.1


def _nowhere(t, p, _):
    """θ₁ = φ^{1/3}: at 0 there is a minimum, but no derivative."""
    return t[0] ** 4 / 4 - p * t[0] + (t[1] - p) ** 2 / 2


def test_a_family_that_ends_has_no_derivative():
    """The pseudo-inverse drops what is infinite, and would return 1; it is refused, and the benign neighbour is not."""
    problem = cx.Bilevel(inner=_nowhere, outer=lambda t, p, _: jnp.sum(t))
    solver, start = TruncatedSpectrum(), jnp.zeros(2)
    # Not taken for a solution: what least squares leave of an adjoint equation that has none.
    lsmr = run(problem, jnp.array(0.0), start, lx.LSMR(1e-10, 1e-10), None)
    assert lsmr.result == cx.RESULTS.singular_curvature
    theta_star = cx.solution_map(problem, BFGS, cx.Implicit(linear_solver=solver))
    derivative = jax.jit(jax.grad(lambda phi, start: jnp.sum(theta_star(phi, start))))
    with pytest.raises(Exception, match="cannot be followed"):
        derivative(jnp.array(0.0), start).block_until_ready()
    np.testing.assert_allclose(derivative(jnp.array(1.0), jnp.ones(2)), 1 / 3 + 1, rtol=1e-6)
    # The outer loss does not see θ₁ to first order; φ^{2/3} has no derivative all the same.
    blind = cx.Bilevel(inner=_nowhere, outer=lambda t, p, _: t[0] ** 2 + t[1])
    with pytest.raises(RuntimeError, match="where the solutions form a family that can be followed"):
        rule = cx.Implicit(rtol=None, linear_solver=solver)
        cx.hypergradient(blind, jnp.array(0.0), start, inner_solver=BFGS, rule=rule)


def test_a_saddle_is_told_apart():
    """Flat in one direction and falling in another."""
    problem = cx.Bilevel(
        inner=lambda t, p, _: (t[0] - p) ** 2 - t[1] ** 2 + 0 * t[2], outer=lambda t, p, _: jnp.sum(t)
    )
    hg = run(problem, jnp.array(1.0), jnp.zeros(3), TruncatedSpectrum(1e-4), None)
    assert hg.result == cx.RESULTS.indefinite_curvature and np.isnan(hg.grad)


def test_a_root_that_is_not_unique(rng):
    """C(Rθ − φ) = 0 with C of full column rank and R of full row rank: dθ = R⁺ dφ, and not symmetric."""
    left, right = rng.standard_normal((6, 3)), rng.standard_normal((3, 6))
    problem = cx.Bilevel(
        inner=cx.Root(lambda t, p, data: data[0] @ (data[1] @ t - p)),
        outer=lambda t, p, _: jnp.sum(jnp.sin(t)),
    )
    data, phi = (jnp.asarray(left), jnp.asarray(right)), jnp.asarray(rng.standard_normal(3))
    start = jnp.asarray(np.linalg.pinv(right) @ np.asarray(phi))
    newton = optx.Newton(1e-8, 1e-8, linear_solver=lx.SVD())
    truth = np.cos(start) @ np.linalg.pinv(right)
    hg = run(problem, phi, start, TruncatedSpectrum(1e-8), 1e-4, newton, inner_data=data)
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(hg.grad, truth, rtol=1e-7)


def test_solution_map_forward_reverse_and_twice(rng):
    """Forward over reverse: the second derivative of a quadratic in X⁺Yφ."""
    phi, theta0, data, _ = family(rng)
    slope = np.linalg.pinv(data[0]) @ np.asarray(data[1])
    theta_star = cx.solution_map(LEAST_SQUARES, BFGS, cx.Implicit(linear_solver=TruncatedSpectrum()))

    def flat(phi):
        theta = theta_star(phi, theta0, data)
        return jnp.concatenate([theta["a"].ravel(), theta["b"]])

    loss = lambda phi: jnp.sum(flat(phi) ** 2)  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(phi), 2 * slope.T @ slope, rtol=1e-8)


def test_a_preconditioner_has_no_use(rng):
    phi, theta0, data, _ = family(rng)
    rule = cx.Implicit(
        linear_solver=TruncatedSpectrum(),
        preconditioner=lx.IdentityLinearOperator(eqx.filter(theta0, eqx.is_array)),
    )
    with pytest.raises(ValueError, match="`preconditioner` of `Implicit` has no use"):
        cx.hypergradient(LEAST_SQUARES, phi, theta0, inner_solver=BFGS, rule=rule, inner_data=data)


@pytest.mark.parametrize("solver", [lx.SVD(), lx.LSMR(1e-10, 1e-10)])
def test_least_squares_are_no_derivative_where_there_is_none(solver):
    """However little the outer loss depends on what has none; the neighbour that can be followed is solved."""

    def inner(theta, phi, data):
        return (theta[0] - phi) ** 2 / 2 + theta[1] ** 4 / 4 - data * phi * theta[1]

    problem = cx.Bilevel(inner=inner, outer=lambda theta, phi, _: theta[0] + 0.005 * theta[1])
    arguments = (problem, jnp.array(0.0), jnp.zeros(2), solver, None)
    bad = run(*arguments, inner_data=jnp.array(1.0))
    assert bad.result == cx.RESULTS.singular_curvature and np.isnan(bad.grad)
    good = run(*arguments, inner_data=jnp.array(0.0))
    assert good.result == cx.RESULTS.successful
    np.testing.assert_allclose(good.grad, 1.0, rtol=1e-9)
