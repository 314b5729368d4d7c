"""The truths themselves: closed forms against finite differences, without the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import chains, compare, problems
from helpers.problem import as_numpy, finite_difference
from helpers.tasks import quadratic_tasks

CASES = {("minimum", name): build for name, build in problems.MINIMA.items()}
CASES |= {("fixed point", name): build for name, build in problems.FIXED_POINTS.items()}
CASES |= {("root", name): build for name, build in problems.ROOTS.items()}
CASES |= {("minimum", "definite"): problems.definite, ("tasks", "iMAML"): quadratic_tasks}


@pytest.mark.parametrize("key", CASES, ids=":".join)
def test_gradient_of_reference(key):
    case = CASES[key]()
    phi, truth = as_numpy(case.phi), case.truth
    grad = compare.flat(truth.grad)
    if key[0] == "tasks":
        grad = truth.grad.sum(0)
    direction = np.random.default_rng(1).standard_normal(len(grad))
    # The values reach 1/λmin², so a unit in their last place limits the step from below.
    step = {"condition 1e8": 1e-1, "condition 1e6": 1e-1, "H=1e-6I": 1e-1}.get(key[1], 1e-3)
    difference = finite_difference(case.reference, phi, direction, step)
    assert difference == pytest.approx(direction @ grad, rel=1e-7, abs=1e-9 * np.linalg.norm(grad))


@pytest.mark.parametrize("key", [key for key in CASES if key[0] != "tasks"], ids=":".join)
def test_reference_solves_the_inner_problem(key):
    """The functions that the library is given and the reference speak of the same problem."""
    case = CASES[key]()
    truth = case.truth
    theta = jax.tree.map(jnp.asarray, truth.theta)
    if case.kind == "minimum":
        residual = jax.grad(case.inner)(theta, case.phi, case.inner_data)
        scale = max(
            1.0, np.linalg.norm(compare.flat(jax.grad(case.inner)(case.theta0, case.phi, case.inner_data)))
        )
    else:
        residual = case.inner(theta, case.phi, case.inner_data)
        residual = residual - theta if case.kind == "fixed_point" else residual
        scale = 1.0
    assert np.linalg.norm(compare.flat(residual)) <= 1e-9 * scale
    assert float(case.outer(theta, case.phi, case.outer_data)) == pytest.approx(truth.value, rel=1e-9)


def test_float32_truth_belongs_to_the_rounded_data():
    single, double = problems.MINIMA["condition 1e4"](np.float32), problems.MINIMA["condition 1e4"]()
    assert single.inner_data["H"].dtype == jnp.float32
    # Rounding the matrix moves the answer by about eps32 * condition; it must not be ignored.
    assert 1e-8 < compare.relative_error(single.truth.grad, double.truth.grad) < 1e-1


def test_three_level_chain_truth():
    data = chains.chain()
    x = np.array([0.4, -1.1, 0.8])
    value, grad, hessian = chains.chain_truth(x, data)
    assert np.isfinite(value)
    step = 1e-4
    for unit in np.eye(3):
        up, down = chains.chain_truth(x + step * unit, data), chains.chain_truth(x - step * unit, data)
        assert (up[0] - down[0]) / (2 * step) == pytest.approx(grad @ unit, rel=1e-8)
        np.testing.assert_allclose((up[1] - down[1]) / (2 * step), hessian @ unit, rtol=1e-8)


def test_three_level_chain_is_stationary():
    """y* minimises level 2 with z*(y) in it: its total derivative vanishes."""
    data = chains.chain()
    x = np.array([0.4, -1.1, 0.8])

    def level_two(y):
        z = np.linalg.solve(data.R, data.P @ y + data.Q @ x)
        return float(chains.middle(y, x, data, z))

    down = np.linalg.solve(data.R, data.P)
    across = np.linalg.solve(data.R, data.Q)
    y = np.linalg.solve(data.S + down.T @ down, data.C @ x + down.T @ (data.t - across @ x))
    step = 1e-4
    for unit in np.eye(3):
        assert abs(level_two(y + step * unit) - level_two(y - step * unit)) / (2 * step) < 1e-7


def test_map_used_twice_truth():
    case = problems.MINIMA["condition 1e1"]()
    inner, phi = as_numpy(case.inner_data), as_numpy(case.phi)
    a = np.linspace(-1.0, 1.0, len(phi))
    _, grad = chains.twice_truth(phi, inner, a)
    direction = np.random.default_rng(2).standard_normal(len(phi))
    step = 1e-3
    up, down = (chains.twice_truth(phi + s * direction, inner, a)[0] for s in (step, -step))
    assert (up - down) / (2 * step) == pytest.approx(grad @ direction, rel=1e-6)
