"""Failures are told apart, raise useful text by default, and never fire on a benign neighbour."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, problems, run
from helpers.dense import rotated
from helpers.quadratics import conditioned, quadratic_case
from helpers.sweep import sweep

RULE = cx.Implicit(rtol=1e-4, max_sweeps=5)
STAY = cx.Steps(optax.sgd(0.0), 1)


def at_solution(case):
    """The case with its start at the stationary point, so that only the curvature can be wrong."""
    theta = jnp.asarray(case.truth.theta, case.theta0.dtype)
    return dataclasses.replace(case, theta0=theta)


def solved(case, rule=RULE, **kwargs):
    return run.hypergradient(case, rule, throw=False, **kwargs)


def good(case, hg, rtol=1e-4):
    assert hg.result == cx.RESULTS.successful, hg.result
    assert compare.relative_error(hg.grad, case.truth.grad) <= rtol


SIZES = (8, 40)  # below and above the size at which the matrix is formed


def curvature(values, size):
    """These eigenvalues, filled up with values in [0.5, 2], rotated."""
    rest = np.linspace(0.5, 2.0, size - len(values))
    return rotated(np.concatenate([values, rest]), np.random.default_rng(5))


# -- curvature ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_indefinite(size):
    bad = at_solution(quadratic_case(curvature([-0.4], size)))
    hg = solved(bad, solver=STAY)
    assert hg.result == cx.RESULTS.indefinite_curvature, hg.result
    benign = at_solution(quadratic_case(curvature([0.4], size)))
    good(benign, solved(benign, solver=STAY))


@pytest.mark.parametrize("size", SIZES)
def test_slightly_indefinite(size):
    """One eigenvalue of −1e-3: nothing that a few CG steps stumble on."""
    bad = at_solution(quadratic_case(curvature([-1e-3], size)))
    hg = solved(bad, solver=STAY)
    assert hg.result == cx.RESULTS.indefinite_curvature, hg.result
    benign = at_solution(quadratic_case(curvature([1e-3], size)))
    good(benign, solved(benign, solver=STAY))


@pytest.mark.parametrize("size", SIZES)
def test_singular(size):
    """A zero eigenvalue: no unique solution. Control: 1e-4 instead."""
    zero = np.diag(np.concatenate([[0.0], np.linspace(0.5, 2.0, size - 1)]))
    case = quadratic_case(zero)
    hg = solved(case, solver=STAY)
    assert hg.result == cx.RESULTS.singular_curvature, hg.result
    benign = quadratic_case(zero + 1e-4 * np.eye(size))
    good(benign, solved(benign, cx.Implicit(rtol=1e-4, max_sweeps=20), solver=STAY))


def test_zero_curvature():
    """H = 0: an inner problem that is linear in θ."""
    hg = solved(quadratic_case(np.zeros((6, 6))), solver=STAY)
    assert hg.result == cx.RESULTS.singular_curvature, hg.result


@pytest.mark.parametrize("value", [1e-13, 1e-15])
@pytest.mark.parametrize("size", SIZES)
def test_nearly_singular_is_never_a_wrong_success(value, size):
    """Between singular and solvable the answer may be either, but not a silent wrong number."""
    case = quadratic_case(curvature([value], size))
    hg = solved(case, solver=STAY)
    if hg.result == cx.RESULTS.successful:
        assert compare.relative_error(hg.grad, case.truth.grad) <= 2e-4


def test_singular_root():
    """A singular Jacobian of a root problem."""
    matrix = np.eye(6)
    matrix[2] = matrix[1]
    hg = solved(quadratic_case(matrix, kind="root"), solver=optx.LevenbergMarquardt(rtol=1e-8, atol=1e-8))
    assert hg.result == cx.RESULTS.singular_curvature, hg.result
    benign = problems.ROOTS["non-symmetric"]()
    good(benign, solved(benign))


def test_indefinite_root_is_fine():
    """A root problem has no sign: the same matrix that is a saddle for a minimum is well posed here."""
    case = quadratic_case(curvature([-0.4], 8), kind="root")
    good(case, solved(case))


@pytest.mark.parametrize("solver", [cx.linear.MINRES(rtol=1e-8), cx.linear.Auto(rtol=1e-8)])
def test_saddle_under_a_solver_that_does_not_mind(solver):
    """MINRES solves with an indefinite matrix; the stationary point is still no minimum."""
    bad = at_solution(quadratic_case(curvature([-0.4], 8)))
    rule = cx.Implicit(rtol=1e-4, linear_solver=solver, max_sweeps=5)
    hg = solved(bad, rule, solver=STAY)
    assert hg.result == cx.RESULTS.indefinite_curvature, hg.result
    benign = at_solution(quadratic_case(curvature([0.4], 8)))
    good(benign, solved(benign, rule, solver=STAY))


# -- non-finite values --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["phi", "inner data", "outer data", "theta0"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite(where, value):
    case = problems.definite()
    good(case, solved(case))
    if where == "phi":
        bad = dataclasses.replace(case, phi=case.phi.at[2].set(value))
    elif where == "theta0":
        bad = dataclasses.replace(case, theta0=case.theta0.at[2].set(value))
    elif where == "inner data":
        bad = dataclasses.replace(
            case, inner_data=case.inner_data | {"b": case.inner_data["b"].at[1].set(value)}
        )
    else:
        bad = dataclasses.replace(
            case, outer_data=case.outer_data | {"c": case.outer_data["c"].at[1].set(value)}
        )
    hg = solved(bad)
    assert hg.result == cx.RESULTS.nonfinite, hg.result


def test_non_finite_only_in_the_cross_derivative():
    """Everything but ∂²g/∂θ∂φ is finite: √φ at φ = 0."""

    def inner(theta, phi, batch):
        return 0.5 * jnp.sum((theta - 1.0) ** 2) + jnp.sum(jnp.sqrt(phi) * theta)

    def outer(theta, phi, batch):
        return jnp.sum(theta**2)

    problem = cx.Bilevel(inner=inner, outer=outer)
    arguments = {"inner_solver": STAY, "rule": RULE, "throw": False}
    hg = cx.hypergradient(problem, jnp.zeros(3), jnp.ones(3), **arguments)
    assert hg.result == cx.RESULTS.nonfinite, hg.result
    hg = cx.hypergradient(problem, jnp.ones(3), jnp.ones(3), **arguments)
    assert hg.result == cx.RESULTS.successful
    # θ* = 1 − √φ, d/dφ Σ θ² = −θ/√φ = 0 at φ = 1 … at φ = 4: θ = −1, −θ/√φ = ½.
    hg = cx.hypergradient(problem, jnp.full(3, 4.0), jnp.ones(3), **arguments)
    np.testing.assert_allclose(np.asarray(hg.grad), 0.5, rtol=1e-4)


# -- budgets and accuracy -----------------------------------------------------------------------


def test_adjoint_budget():
    """Five products are not enough at condition 1e4 in 40 dimensions; a thousand are."""
    case = conditioned(1e4, n=40)
    few = cx.Implicit(rtol=1e-4, linear_solver=cx.linear.CG(rtol=1e-4, max_steps=5), max_sweeps=3)
    start = at_solution(case)
    hg = solved(start, few, solver=STAY)
    assert hg.result == cx.RESULTS.adjoint_not_converged, hg.result
    many = cx.Implicit(rtol=1e-4, linear_solver=cx.linear.CG(rtol=1e-4, max_steps=5000), max_sweeps=3)
    good(start, solved(start, many, solver=STAY))


def test_inner_not_converged():
    """Three gradient steps and one sweep of a nonlinear problem; the estimate is what tells."""
    case = problems.MINIMA["scalar logistic"]()
    early = cx.Steps(optax.sgd(0.5), 3)
    hg = solved(case, cx.Implicit(rtol=1e-6), solver=early)
    assert hg.result == cx.RESULTS.inner_not_converged, hg.result
    assert float(hg.stats.error_estimate) >= 0.5 * compare.absolute_error(hg.grad, case.truth.grad)
    good(case, solved(case, cx.Implicit(rtol=1e-6, max_sweeps=20), solver=early), 1e-6)


def test_precision_limited():
    """1e-14 at condition 1e6 is beyond float64; 1e-6 is not."""
    case = problems.MINIMA["condition 1e6"]()
    hg = solved(case, cx.Implicit(rtol=1e-15, max_sweeps=20))
    assert hg.result == cx.RESULTS.precision_limited, hg.result
    good(case, solved(case, cx.Implicit(rtol=1e-6, max_sweeps=20)), 1e-6)


def outer_optimum():
    """f = ½ ‖w − w*(φ₀)‖² at φ₀: the hypergradient is zero, as at the end of every successful run."""
    case = problems.definite()
    theta = jnp.asarray(case.truth.theta)
    outer = case.outer_data | {"t": theta, "c": 0.0 * theta, "rho": jnp.zeros(())}
    return dataclasses.replace(case, outer_data=outer)


def test_zero_hypergradient_with_an_absolute_tolerance():
    """No relative accuracy of zero exists: `atol` decides, and without it the request is over-ambitious."""
    case = outer_optimum()
    hg = solved(case, cx.Implicit(rtol=1e-4, atol=1e-6, max_sweeps=5))
    assert hg.result == cx.RESULTS.successful, hg.result
    assert np.linalg.norm(np.asarray(hg.grad)) <= 1e-6
    strict = solved(case, cx.Implicit(rtol=1e-4, atol=0.0, max_sweeps=5))
    if strict.result == cx.RESULTS.successful:
        assert np.linalg.norm(np.asarray(strict.grad)) == 0.0


# -- raising ------------------------------------------------------------------------------------


FAILING = at_solution(problems.indefinite())


def test_throw_eager():
    with pytest.raises(Exception, match="negative curvature"):
        run.hypergradient(FAILING, RULE, solver=STAY)
    case = at_solution(problems.definite())
    good(case, run.hypergradient(case, RULE, solver=STAY))


FIELDS = {
    "grad": lambda hg: hg.grad,
    "value": lambda hg: hg.value,
    "theta": lambda hg: hg.theta,
    "error estimate": lambda hg: hg.stats.error_estimate,
    "state": lambda hg: jax.tree.leaves(eqx.filter(hg.state, eqx.is_inexact_array)),
}


@pytest.mark.parametrize("field", sweep(FIELDS, always=list(FIELDS)[:2]))
def test_throw_inside_jit_whatever_is_kept(field):
    """Only one field is used: XLA drops the rest, so that the check must hang on every one."""

    @jax.jit
    def kept(theta0, inner_data):
        case = dataclasses.replace(FAILING, theta0=theta0, inner_data=inner_data)
        return FIELDS[field](run.hypergradient(case, RULE, solver=STAY))

    bad, benign = FAILING, at_solution(problems.definite())
    with pytest.raises(Exception, match="negative curvature"):
        jax.block_until_ready(kept(bad.theta0, bad.inner_data))
    jax.block_until_ready(kept(benign.theta0, benign.inner_data))


def test_no_throw_reports_and_raises_nothing():
    hg = eqx.filter_jit(lambda: run.hypergradient(FAILING, RULE, solver=STAY, throw=False))()
    assert bool(hg.result == cx.RESULTS.indefinite_curvature)


def saddle_inner(theta, phi, batch):
    return 0.5 * jnp.sum((theta[:-1] - phi) ** 2) - theta[-1] ** 2 + theta[-1] ** 4


def saddle_outer(theta, phi, batch):
    return jnp.sum(theta[:-1] ** 2) + phi * theta[-1] ** 2


@pytest.mark.parametrize("size", sweep([20, 100], always=[20]))
def test_saddle_that_no_right_hand_side_sees(size):
    """Gradient, outer gradient and corrections have no part in the last unknown, whose curvature is −2."""
    problem = cx.Bilevel(inner=saddle_inner, outer=saddle_outer)
    method = {"inner_solver": optx.BFGS(1e-8, 1e-8), "rule": cx.Implicit(rtol=1e-4), "throw": False}
    hg = cx.hypergradient(problem, jnp.asarray(0.5), jnp.zeros(size), **method)
    assert hg.result == cx.RESULTS.indefinite_curvature
    assert hg.stats.curvature_min < 0
    # Control: the same from a start that leads to the minimum.
    hg = cx.hypergradient(problem, jnp.asarray(0.5), jnp.full(size, 0.5), **method)
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(hg.grad, 2 * 0.5 * (size - 1) + 0.5, rtol=1e-4)


def test_large_fixed_point_estimate_at_rounding_level():
    """Judged by contraction: the change of the sweep before is no noise, and no error either."""
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(150, 150))
    weights *= 0.9 / np.abs(np.linalg.eigvals(weights)).max()
    bias, target = 0.3 * draw.normal(size=150), draw.normal(size=150)
    theta = np.zeros(150)
    for _ in range(60):
        out = np.tanh(weights @ theta + bias)
        jacobian = np.eye(150) - (1 - out**2)[:, None] * weights
        theta = theta - np.linalg.solve(jacobian, theta - out)
    truth = (1 - out**2) * np.linalg.solve(jacobian.T, theta - target)
    problem = cx.Bilevel(
        inner=cx.FixedPoint(lambda x, b, w: jnp.tanh(w @ x + b)),
        outer=lambda x, b, _: 0.5 * jnp.sum((x - target) ** 2),
    )
    hg = cx.hypergradient(
        problem,
        jnp.asarray(bias),
        jnp.zeros(150),
        inner_solver=optx.Newton(1e-4, 1e-4),
        rule=cx.Implicit(max_sweeps=4),
        inner_data=jnp.asarray(weights),
    )
    error = np.linalg.norm(hg.grad - truth)
    assert 0.5 * error <= hg.stats.error_estimate
    assert hg.stats.error_estimate <= 100 * max(error, 1e-15 * np.linalg.norm(truth))
