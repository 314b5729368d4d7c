"""`Implicit` as `adjoint=` of Optimistix: every solve, every mode, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, problems
from helpers.problem import as_numpy
from helpers.quadratics import quadratic_inner, quadratic_map, quadratic_residual

RULE = cx.Implicit(rtol=1e-6)
TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def _minimise(phi, data, rule):
    return optx.minimise(
        lambda w, a: quadratic_inner(w, a[0], a[1]),
        optx.BFGS(**TIGHT),
        jnp.zeros(12),
        (phi, data),
        adjoint=rule,
    ).value


def _root_find(phi, data, rule):
    return optx.root_find(
        lambda w, a: quadratic_residual(w, a[0], a[1]),
        optx.Newton(**TIGHT),
        jnp.zeros(12),
        (phi, data),
        adjoint=rule,
    ).value


def _fixed_point(phi, data, rule):
    solver = optx.FixedPointIteration(rtol=1e-13, atol=1e-13)
    return optx.fixed_point(
        lambda w, a: quadratic_map(w, a[0], a[1]),
        solver,
        jnp.zeros(12),
        (phi, data),
        adjoint=rule,
        max_steps=4000,
    ).value


def _least_squares(phi, data, rule):
    return optx.least_squares(
        lambda w, a: quadratic_residual(w, a[0], a[1]),
        optx.LevenbergMarquardt(**TIGHT),
        jnp.zeros(12),
        (phi, data),
        adjoint=rule,
    ).value


SOLVES = {
    "minimise": (_minimise, problems.MINIMA["condition 1e1"]),
    "root_find": (_root_find, problems.ROOTS["non-symmetric"]),
    "fixed_point": (_fixed_point, problems.FIXED_POINTS["quadratic as map"]),
    "least_squares": (_least_squares, problems.MINIMA["condition 1e1"]),
    "least_squares, non-symmetric": (_least_squares, problems.ROOTS["non-symmetric"]),
}


@pytest.mark.parametrize("name", SOLVES)
def test_forward_and_reverse(name):
    solve, build = SOLVES[name]
    case = build()
    data = as_numpy(case.inner_data)
    slope = np.linalg.solve(data["H"], data["B"])
    u, v = np.random.default_rng(0).standard_normal((2, 12))

    def solution(phi):
        return solve(phi, case.inner_data, RULE)

    @jax.jit
    def both(phi, u, v):
        return jax.jvp(solution, (phi,), (v,)), jax.vjp(solution, phi)[1](u)

    (value, tangent), (cotangent,) = both(case.phi, jnp.asarray(u), jnp.asarray(v))
    assert compare.relative_error(value, case.truth.theta) <= 1e-6
    assert compare.relative_error(tangent, slope @ v) <= 1e-6
    assert compare.relative_error(cotangent, slope.T @ u) <= 1e-6


@pytest.mark.parametrize("name", ["minimise", "root_find"])
def test_second_order(name):
    """`L(φ) = Σ w⁴`: Hessian `12 SᵀD(w²)S` with S = H⁻¹B, forward or reverse over reverse."""
    solve, build = SOLVES[name]
    case = build()
    data = as_numpy(case.inner_data)
    slope = np.linalg.solve(data["H"], data["B"])
    v = np.random.default_rng(0).standard_normal(12)
    expected = 12.0 * slope.T @ (case.truth.theta**2 * (slope @ v))

    def loss(phi):
        return jnp.sum(solve(phi, case.inner_data, RULE) ** 4)

    @jax.jit
    def both(phi, direction):
        forward = jax.jvp(jax.grad(loss), (phi,), (direction,))[1]
        return forward, jax.grad(lambda phi: jax.grad(loss)(phi) @ direction)(phi)

    forward, reverse = both(case.phi, jnp.asarray(v))
    assert compare.relative_error(forward, expected) <= 1e-5
    assert compare.relative_error(reverse, expected) <= 1e-5


def test_data_are_differentiated_too():
    """`d/dH ½‖w‖² = −q wᵀ` with `q = H⁻¹ w`: everything in `args` is a hyperparameter."""
    case = problems.MINIMA["condition 1e1"]()

    def loss(data):
        return 0.5 * jnp.sum(_minimise(case.phi, data, RULE) ** 2)

    grad = jax.grad(loss)(case.inner_data)
    data, theta = as_numpy(case.inner_data), case.truth.theta
    q = np.linalg.solve(data["H"], theta)
    # `jax.grad` sees wᵀHw with H as it stands: the derivative is the symmetric part.
    assert compare.relative_error(grad["H"], -0.5 * (np.outer(q, theta) + np.outer(theta, q))) <= 1e-6
    assert compare.relative_error(grad["b"], q) <= 1e-6
    assert compare.relative_error(grad["B"], np.outer(q, np.asarray(case.phi))) <= 1e-6


def test_vmap_and_jit_of_a_gradient():
    case = problems.MINIMA["condition 1e1"]()
    points = jnp.stack([case.phi, -case.phi])
    grads = jax.jit(jax.vmap(jax.grad(lambda phi: jnp.sum(_minimise(phi, case.inner_data, RULE) ** 2))))(
        points
    )
    data = as_numpy(case.inner_data)
    slope = np.linalg.solve(data["H"], data["B"])
    for point, grad in zip(np.asarray(points), grads, strict=True):
        theta = np.linalg.solve(data["H"], data["B"] @ point + data["b"])
        assert compare.relative_error(grad, 2.0 * slope.T @ theta) <= 1e-6


def test_single_precision():
    case = problems.MINIMA["condition 1e1"](np.float32)
    rule = cx.Implicit(rtol=1e-3)

    def loss(phi):
        solver = optx.BFGS(rtol=1e-6, atol=1e-6)
        solution = optx.minimise(
            lambda w, a: quadratic_inner(w, a[0], a[1]),
            solver,
            case.theta0,
            (phi, case.inner_data),
            adjoint=rule,
        )
        return case.outer(solution.value, phi, case.outer_data)

    grad = jax.grad(loss)(case.phi)
    assert grad.dtype == jnp.float32
    assert compare.relative_error(grad, case.truth.grad) <= 2e-3


def test_rule_with_arrays_is_not_differentiated():
    """Tolerances and damping that depend on φ carry no derivative, and do not break one."""
    case = problems.MINIMA["condition 1e1"]()

    def loss(phi):
        rule = cx.Implicit(rtol=1e-6 + 0.0 * jnp.sum(phi))
        return jnp.sum(_minimise(phi, case.inner_data, rule))

    data = as_numpy(case.inner_data)
    expected = data["B"].T @ np.linalg.solve(data["H"], np.ones(12))
    assert compare.relative_error(jax.grad(loss)(case.phi), expected) <= 1e-6


def test_damping_is_the_damped_formula():
    """`dw/dφ = (H + δI)⁻¹B`, in both modes."""
    case = problems.MINIMA["condition 1e1"]()
    rule = cx.Implicit(rtol=1e-6, damping=0.1)
    data = as_numpy(case.inner_data)
    slope = np.linalg.solve(data["H"] + 0.1 * np.eye(12), data["B"])
    v = np.random.default_rng(0).standard_normal(12)
    _, tangent = jax.jvp(lambda phi: _minimise(phi, case.inner_data, rule), (case.phi,), (jnp.asarray(v),))
    assert compare.relative_error(tangent, slope @ v) <= 1e-6
    grad = jax.grad(lambda phi: _minimise(phi, case.inner_data, rule) @ jnp.asarray(v))(case.phi)
    assert compare.relative_error(grad, slope.T @ v) <= 1e-6
