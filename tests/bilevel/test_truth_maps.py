"""`solution_map` as a function: every order and mode, nested, and used twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from helpers import chains, compare, problems, run
from helpers.problem import as_numpy

RULE = cx.Implicit(rtol=1e-6)
SOLVER = optx.BFGS(rtol=1e-11, atol=1e-11)


def _map(case, solver=SOLVER):
    theta_star = cx.solution_map(run.problem(case.kind, case.inner, case.outer), solver, RULE)
    return lambda phi: theta_star(phi, case.theta0, case.inner_data)


CASES = {
    "minimum": (problems.MINIMA["condition 1e1"], SOLVER),
    "root": (problems.ROOTS["non-symmetric"], optx.Newton(rtol=1e-11, atol=1e-11)),
    "fixed point": (
        problems.FIXED_POINTS["quadratic as map"],
        optx.FixedPointIteration(rtol=1e-13, atol=1e-13),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_jacobian_forward_and_reverse(name):
    """w* = H⁻¹(Bφ + b): the Jacobian is H⁻¹B in either mode."""
    build, solver = CASES[name]
    case = build()
    theta_star = _map(case, solver)
    inner = as_numpy(case.inner_data)
    slope = np.linalg.solve(inner["H"], inner["B"])
    rng = np.random.default_rng(3)
    v, u = rng.standard_normal(slope.shape[1]), rng.standard_normal(slope.shape[0])

    @jax.jit
    def both(phi, u, v):
        return jax.jvp(theta_star, (phi,), (v,)), jax.vjp(theta_star, phi)[1](u)

    (value, tangent), (cotangent,) = both(case.phi, jnp.asarray(u), jnp.asarray(v))
    assert compare.relative_error(value, case.truth.theta) <= 1e-6
    assert compare.relative_error(tangent, slope @ v) <= 1e-6
    assert compare.relative_error(cotangent, slope.T @ u) <= 1e-6


SECOND = {
    "forward over reverse": lambda f: lambda x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "reverse over reverse": lambda f: lambda x, v: jax.grad(lambda y: jax.grad(f)(y) @ v)(x),
    "reverse over forward": lambda f: lambda x, v: jax.grad(lambda y: jax.jvp(f, (y,), (v,))[1])(x),
    "forward over forward": lambda f: lambda x, v: jax.jacfwd(lambda y: jax.jvp(f, (y,), (v,))[1])(x),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_of_a_nonlinear_map(name):
    """Log penalties make w* nonlinear in φ; truth by differences of the closed-form gradient."""
    case = problems.ridge("features")
    theta_star = _map(case)

    def loss(phi):
        return case.outer(theta_star(phi), phi, case.outer_data)

    rng = np.random.default_rng(4)
    v = rng.standard_normal(len(case.phi))
    phi, step = as_numpy(case.phi), 1e-4

    def difference(h):
        return (case.reference(phi + h * v).grad - case.reference(phi - h * v).grad) / (2 * h)

    expected = (4 * difference(step) - difference(2 * step)) / 3
    got = jax.jit(SECOND[name](loss))(case.phi, jnp.asarray(v))
    assert compare.relative_error(got, expected) <= 1e-5


def test_one_map_used_twice():
    """The same `theta_star` at φ, at 2φ and at its own output, in one function."""
    case = problems.MINIMA["condition 1e1"]()
    theta_star = _map(case)
    a = jnp.linspace(-1.0, 1.0, len(case.phi))

    def loss(phi):
        first = theta_star(phi)
        return 0.5 * jnp.sum((first - a) ** 2) + first @ theta_star(theta_star(2.0 * phi))

    value, grad = jax.jit(jax.value_and_grad(loss))(case.phi)
    expected_value, expected = chains.twice_truth(
        as_numpy(case.phi), as_numpy(case.inner_data), np.asarray(a)
    )
    assert float(value) == pytest.approx(expected_value, rel=1e-7)
    assert compare.relative_error(grad, expected) <= 1e-6


# A quasi-Newton solve on top of another one stops where the lower one's noise is: at 1e-6, not at 1e-11.
NESTED = cx.Implicit(rtol=1e-4)


def _three_levels(data):
    """The outer loss of the chain by nested solution maps."""
    low = cx.solution_map(cx.Bilevel(inner=chains.lowest, outer=lambda z, p, b: jnp.sum(z)), SOLVER, NESTED)

    def middle_inner(y, x, batch):
        return chains.middle(y, x, batch, low((y, x), jnp.zeros(3), batch))

    mid = cx.solution_map(cx.Bilevel(inner=middle_inner, outer=lambda y, p, b: jnp.sum(y)), SOLVER, NESTED)

    def loss(x):
        y = mid(x, jnp.zeros(3), data)
        return chains.top(x, y, low((y, x), jnp.zeros(3), data), data)

    return loss


def test_three_levels_by_nested_maps():
    data = chains.chain()
    x = np.array([0.4, -1.1, 0.8])
    value, grad, _ = chains.chain_truth(x, data)
    loss = _three_levels(jax.tree.map(jnp.asarray, data))
    got_value, got = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x))
    assert float(got_value) == pytest.approx(value, rel=1e-5)
    assert compare.relative_error(got, grad) <= 1e-5


@pytest.mark.slow
def test_three_levels_forward_mode():
    data = chains.chain()
    x, v = np.array([0.4, -1.1, 0.8]), np.array([1.0, 0.5, -0.3])
    _, grad, _ = chains.chain_truth(x, data)
    loss = _three_levels(jax.tree.map(jnp.asarray, data))
    _, tangent = jax.jit(lambda x, v: jax.jvp(loss, (x,), (v,)))(jnp.asarray(x), jnp.asarray(v))
    assert float(tangent) == pytest.approx(grad @ v, rel=1e-5)


def test_three_levels_by_hypergradient():
    """The two upper levels by `hypergradient`, the lowest inside by a solution map."""
    data = jax.tree.map(jnp.asarray, chains.chain())
    low = cx.solution_map(cx.Bilevel(inner=chains.lowest, outer=lambda z, p, b: jnp.sum(z)), SOLVER, RULE)

    def inner(y, x, batch):
        return chains.middle(y, x, batch, low((y, x), jnp.zeros(3), batch))

    def outer(y, x, batch):
        return chains.top(x, y, low((y, x), jnp.zeros(3), batch), batch)

    x = np.array([0.4, -1.1, 0.8])
    hg = cx.hypergradient(
        cx.Bilevel(inner=inner, outer=outer),
        jnp.asarray(x),
        jnp.zeros(3),
        inner_solver=SOLVER,
        rule=cx.Implicit(rtol=1e-6, max_sweeps=5),
        inner_data=data,
        outer_data=data,
    )
    value, grad, _ = chains.chain_truth(x, chains.chain())
    assert float(hg.value) == pytest.approx(value, rel=1e-6)
    assert compare.relative_error(hg.grad, grad) <= 1e-6


def test_vmap_of_a_map():
    case = problems.MINIMA["condition 1e1"]()
    theta_star = _map(case)
    points = jnp.stack([case.phi, 2.0 * case.phi, -case.phi])
    got = jax.jit(jax.vmap(jax.grad(lambda phi: jnp.sum(theta_star(phi) ** 2))))(points)
    inner = as_numpy(case.inner_data)
    slope = np.linalg.solve(inner["H"], inner["B"])
    for point, grad in zip(np.asarray(points), got, strict=True):
        theta = np.linalg.solve(inner["H"], inner["B"] @ point + inner["b"])
        assert compare.relative_error(grad, 2.0 * slope.T @ theta) <= 1e-6


def test_map_of_awkward_tree():
    case = problems.MINIMA["awkward tree"]()
    theta_star = cx.solution_map(run.problem(case.kind, case.inner, case.outer), SOLVER, RULE)

    def loss(l2, shift):
        phi = case.phi | {"l2": l2, "shift": shift}
        return case.outer(theta_star(phi, case.theta0, case.inner_data), phi, case.outer_data)

    l2, shift = jax.grad(loss, argnums=(0, 1))(case.phi["l2"], case.phi["shift"])
    assert compare.relative_error(l2, case.truth.grad["l2"]) <= 1e-6
    assert float(shift) == pytest.approx(float(case.truth.grad["shift"]), rel=1e-6)
