"""A derivative of a failed solve raises, however the loss uses (or drops) the solution."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, problems
from helpers.quadratics import quadratic_inner, quadratic_residual
from helpers.sweep import sweep

RULE = cx.Implicit(rtol=1e-6)
CASE = problems.MINIMA["condition 1e2"]()


def solve(phi, *, steps=256, throw=True, rule=RULE, solver=None, start=CASE.theta0):
    solver = optx.BFGS(rtol=1e-10, atol=1e-10) if solver is None else solver
    return optx.minimise(
        lambda w, a: quadratic_inner(w, a[0], a[1]),
        solver,
        start,
        (phi, CASE.inner_data),
        adjoint=rule,
        max_steps=steps,
        throw=throw,
    ).value


LOSSES = {
    "linear": lambda f: jax.grad(lambda phi: jnp.sum(f(phi))),
    "quadratic": lambda f: jax.grad(lambda phi: jnp.sum(f(phi) ** 2)),
    "value and grad, value dropped": lambda f: (
        lambda phi: jax.value_and_grad(lambda p: jnp.sum(f(p)))(phi)[1]
    ),
    "one element": lambda f: jax.grad(lambda phi: f(phi)[3]),
    "jvp, value dropped": lambda f: lambda phi: jax.jvp(f, (phi,), (jnp.ones_like(phi),))[1],
    "vjp, value dropped": lambda f: lambda phi: jax.vjp(f, phi)[1](jnp.ones_like(phi)),
    "hessian": lambda f: (
        lambda phi: jax.jvp(jax.grad(lambda p: jnp.sum(f(p))), (phi,), (jnp.ones_like(phi),))[1]
    ),
}


@pytest.mark.parametrize("compiled", sweep([False, True], always=[True]), ids=["eager", "jit"])
@pytest.mark.parametrize("name", LOSSES)
def test_out_of_steps(name, compiled):
    """Too few steps: upstream returns numbers for the linear losses. Control: enough from the solution."""

    # Some 60 steps from the start, 4 or 5 from the solution, as the program rounds.
    def derivative(phi, start):
        return LOSSES[name](lambda p: solve(p, steps=16, start=start))(phi)

    if compiled:
        derivative = jax.jit(derivative)
    with pytest.raises(Exception):  # noqa: B017 - the class differs between eager and compiled
        jax.block_until_ready(derivative(CASE.phi, CASE.theta0))
    good = derivative(CASE.phi, jnp.asarray(CASE.truth.theta))
    assert np.all(np.isfinite(np.asarray(good)))


@pytest.mark.parametrize("name", ["linear", "jvp, value dropped"])
def test_out_of_steps_without_throw(name):
    """`throw=False` asks for the value of a failed solve; its derivative still does not exist."""
    bad = LOSSES[name](lambda phi: solve(phi, steps=2, throw=False))
    assert np.all(np.isfinite(np.asarray(solve(CASE.phi, steps=2, throw=False))))
    with pytest.raises(Exception, match="(?i)inner"):
        jax.block_until_ready(jax.jit(bad)(CASE.phi))


def test_stopped_too_early_but_successful():
    """The solver claims success at a loose tolerance; the derivative there is not what was asked for."""
    loose = optx.GradientDescent(0.5, rtol=1e-2, atol=1e-2)
    bad = jax.grad(lambda phi: jnp.sum(solve(phi, solver=loose)))
    solve(CASE.phi, solver=loose)
    with pytest.raises(Exception, match="(?i)inner|early"):
        jax.block_until_ready(bad(CASE.phi))
    unchecked = jax.grad(lambda phi: jnp.sum(solve(phi, solver=loose, rule=cx.Implicit(rtol=None))))(CASE.phi)
    assert np.all(np.isfinite(np.asarray(unchecked)))


def test_solution_map_raises_too():
    problem = cx.Bilevel(inner=CASE.inner, outer=CASE.outer)
    loose = cx.solution_map(problem, optx.GradientDescent(0.5, rtol=1e-2, atol=1e-2), RULE)
    tight = cx.solution_map(problem, optx.BFGS(rtol=1e-10, atol=1e-10), RULE)

    def linear(theta_star):
        return jax.jit(jax.grad(lambda phi: jnp.sum(theta_star(phi, CASE.theta0, CASE.inner_data))))

    with pytest.raises(Exception):  # noqa: B017
        jax.block_until_ready(linear(loose)(CASE.phi))
    assert np.all(np.isfinite(np.asarray(linear(tight)(CASE.phi))))


@jax.jit
@jax.grad
def grad_from_zero(phi, data):
    """Of the sum of the solution, eight unknowns; the solver starts at zero."""
    return jnp.sum(
        optx.minimise(
            lambda w, a: quadratic_inner(w, a[0], a[1]),
            optx.GradientDescent(0.1, rtol=1e-9, atol=1e-9),
            jnp.zeros(8),
            (phi, data),
            adjoint=RULE,
        ).value
    )


@pytest.mark.parametrize("kind", ["singular", "indefinite"])
def test_bad_curvature_raises(kind):
    """Start at the stationary point: the inner solve is done, its derivative does not exist."""
    case = getattr(problems, kind)()
    data = case.inner_data | {"b": -case.inner_data["B"] @ case.phi}
    with pytest.raises(Exception):  # noqa: B017
        jax.block_until_ready(grad_from_zero(case.phi, data))
    benign = problems.definite()
    fine = benign.inner_data | {"b": -benign.inner_data["B"] @ benign.phi}
    got = grad_from_zero(benign.phi, fine)
    h, b = np.asarray(fine["H"]), np.asarray(fine["B"])
    assert compare.relative_error(got, b.T @ np.linalg.solve(h, np.ones(8))) <= 1e-6


def test_singular_jacobian_of_a_root_raises():
    matrix = jnp.eye(4).at[2].set(jnp.eye(4)[1])
    data = {"H": matrix, "B": jnp.eye(4), "b": -jnp.ones(4)}

    @jax.jit
    @jax.grad
    def gradient(phi, data):
        return jnp.sum(
            optx.root_find(
                lambda w, a: quadratic_residual(w, a[0], a[1]),
                optx.Chord(rtol=1e-8, atol=1e-8),
                jnp.zeros(4),
                (phi, data),
                adjoint=RULE,
                throw=False,
            ).value
        )

    with pytest.raises(Exception):  # noqa: B017
        jax.block_until_ready(gradient(jnp.ones(4), data))
    fine = data | {"H": 2.0 * jnp.eye(4)}
    np.testing.assert_allclose(np.asarray(gradient(jnp.ones(4), fine)), 0.5, rtol=1e-6)


PRECONDITIONERS = {
    "constant": lambda data: lx.DiagonalLinearOperator(1.0 / jnp.diagonal(data["H"])),
    "function": lambda data: lambda theta, args: lx.DiagonalLinearOperator(1.0 / jnp.diagonal(args[1]["H"])),
    "of theta": lambda data: lambda theta, args: lx.DiagonalLinearOperator(1.0 / (1.0 + theta**2)),
}


@pytest.mark.parametrize("name", sweep(PRECONDITIONERS, always=["constant", "of theta"]))
def test_preconditioners_change_no_derivative(name):
    data = CASE.inner_data
    rule = cx.Implicit(rtol=1e-6, preconditioner=PRECONDITIONERS[name](data))
    v = jnp.linspace(-1.0, 1.0, 12)
    slope = np.linalg.solve(np.asarray(data["H"]), np.asarray(data["B"]))

    @jax.jit
    def both(phi):
        grad = jax.grad(lambda p: solve(p, rule=rule) @ v)(phi)
        return grad, jax.jvp(lambda p: solve(p, rule=rule), (phi,), (v,))[1]

    grad, tangent = both(CASE.phi)
    assert compare.relative_error(grad, slope.T @ np.asarray(v)) <= 1e-5
    assert compare.relative_error(tangent, slope @ np.asarray(v)) <= 1e-5


def test_preconditioner_that_holds_phi():
    """An operator built from φ inside the differentiated function: no derivative flows through it."""
    v = jnp.linspace(-1.0, 1.0, 12)

    def loss(phi):
        operator = lx.DiagonalLinearOperator(1.0 / (1.0 + phi**2))
        return solve(phi, rule=cx.Implicit(rtol=1e-6, preconditioner=operator)) @ v

    data = CASE.inner_data
    slope = np.linalg.solve(np.asarray(data["H"]), np.asarray(data["B"]))
    assert compare.relative_error(jax.jit(jax.grad(loss))(CASE.phi), slope.T @ np.asarray(v)) <= 1e-5
    twice = jax.jit(lambda phi: jax.jvp(jax.grad(loss), (phi,), (v,))[1])(CASE.phi)
    assert np.linalg.norm(np.asarray(twice)) <= 1e-5  # the map is affine


def test_iterative_adjoint_sees_the_preconditioner():
    """Jacobi on a diagonal H: one product. A budget of three is then enough, and not without it."""
    scales = jnp.logspace(-3, 0, 12)
    start = {"H": jnp.diag(scales), "B": jnp.eye(12), "b": jnp.zeros(12)}
    few = cx.linear.CG(rtol=1e-4, max_steps=4)

    def linear(phi, rule):
        return jnp.sum(
            optx.minimise(
                lambda w, a: quadratic_inner(w, a[0], a[1]),
                optx.BFGS(rtol=1e-10, atol=1e-10),
                phi / scales,
                (phi, start),
                adjoint=rule,
            ).value
        )

    operator = lx.DiagonalLinearOperator(1.0 / scales)
    with_it = cx.Implicit(rtol=1e-4, linear_solver=few, preconditioner=operator)
    grad = jax.jit(jax.grad(lambda phi: linear(phi, with_it)))(jnp.ones(12))
    np.testing.assert_allclose(np.asarray(grad), 1.0 / np.asarray(scales), rtol=1e-4)
    without = cx.Implicit(rtol=1e-4, linear_solver=few)
    with pytest.raises(Exception):  # noqa: B017
        jax.block_until_ready(jax.jit(jax.grad(lambda phi: linear(phi, without)))(jnp.ones(12)))
