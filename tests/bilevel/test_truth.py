"""Hypergradients equal the truth to the accuracy that was requested, in both precisions."""

import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, problems, run
from helpers.sweep import sweep

RULE = cx.Implicit(rtol=1e-6, max_sweeps=20)
RULE_SINGLE = cx.Implicit(rtol=1e-2, max_sweeps=20)


def check(case, hg, rtol, *, factor=1.0):
    """Success, the error within the request, the estimate within a factor two below."""
    truth = case.truth
    assert hg.result == cx.RESULTS.successful, hg.result
    size = np.linalg.norm(compare.flat(truth.grad))
    error = compare.absolute_error(hg.grad, truth.grad)
    assert error <= factor * rtol * size, (error / size, hg.stats)
    assert float(hg.stats.error_estimate) <= rtol * size * 1.001
    # Rounding of the result counts: no slack for it.
    assert float(hg.stats.error_estimate) >= 0.5 * error
    assert float(hg.value) == pytest.approx(truth.value, rel=1e-3)


@pytest.mark.parametrize("name", problems.MINIMA)
def test_minimum_double(name):
    case = problems.MINIMA[name]()
    hg = run.hypergradient(case, RULE)
    check(case, hg, 1e-6)
    # The same point in θ: to the request, amplified by no more than the condition.
    assert compare.relative_error(hg.theta, case.truth.theta) <= 1e-5


@pytest.mark.parametrize("name", problems.FIXED_POINTS)
def test_fixed_point_double(name):
    case = problems.FIXED_POINTS[name]()
    check(case, run.hypergradient(case, RULE), 1e-6)


@pytest.mark.parametrize("name", problems.ROOTS)
def test_root_double(name):
    case = problems.ROOTS[name]()
    check(case, run.hypergradient(case, RULE), 1e-6)


WELL_CONDITIONED = (
    "H=I",
    "H=2I",
    "H=3.7I",
    "H=1e-6I",
    "H=1e6I",
    "condition 1e1",
    "condition 1e2",
    "linear loss",
    "ridge, half",
    "ridge, full",
    "ridge, features",
    "kernel ridge",
    "scalar logistic",
    "awkward tree",
)


# Programs of their own, and longer ones, that differ from those of the others in nothing but the problem.
MORE_REGRESSIONS = ("ridge, half", "ridge, full", "kernel ridge")


@pytest.mark.parametrize(
    "name",
    sweep(WELL_CONDITIONED, always=[name for name in WELL_CONDITIONED if name not in MORE_REGRESSIONS]),
)
def test_minimum_single(name):
    case = problems.MINIMA[name](np.float32)
    hg = run.hypergradient(case, RULE_SINGLE)
    assert hg.value.dtype == jnp.float32
    assert hg.stats.error_estimate.dtype == jnp.float32
    check(case, hg, 1e-2)


@pytest.mark.parametrize("name", [name for name in problems.MINIMA if name not in WELL_CONDITIONED])
def test_minimum_single_is_right_or_says_so(name):
    """Above a condition of 1e4 float32 may not reach the request; it must not claim to."""
    case = problems.MINIMA[name](np.float32)
    hg = run.hypergradient(case, RULE_SINGLE, throw=False)
    error = compare.relative_error(hg.grad, case.truth.grad)
    if hg.result == cx.RESULTS.successful:
        assert error <= 2e-2
    else:
        said = (cx.RESULTS.precision_limited, cx.RESULTS.singular_curvature, cx.RESULTS.inner_not_converged)
        assert any(bool(hg.result == one) for one in (*said, cx.RESULTS.adjoint_not_converged)), hg.result


MAPS_AND_ROOTS = {
    f"{kind}, {name}": build
    for kind, table in (("map", problems.FIXED_POINTS), ("root", problems.ROOTS))
    for name, build in table.items()
}


@pytest.mark.parametrize("name", sweep(MAPS_AND_ROOTS, always=["map, tanh layer", "root, non-symmetric"]))
def test_map_and_root_single(name):
    case = MAPS_AND_ROOTS[name](np.float32)
    if case.condition > 1e2:
        case = problems.ROOTS["non-symmetric"](np.float32)
    check(case, run.hypergradient(case, RULE_SINGLE), 1e-2)


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-5, 1e-7, 1e-9])
def test_every_request_is_met(rtol):
    """The request decides, not the inner solver: it stops at 1e-2 here and sweeps do the rest."""
    case = problems.MINIMA["condition 1e2"]()
    loose = optx.LBFGS(rtol=1e-2, atol=1e-2)
    check(case, run.hypergradient(case, cx.Implicit(rtol=rtol, max_sweeps=30), solver=loose), rtol)


def test_estimate_can_be_switched_off():
    """`rtol=None` costs no sweep, and the gradient is that of the inner solution reached."""
    case = problems.MINIMA["condition 1e2"]()
    hg = run.hypergradient(case, cx.Implicit(rtol=None))
    assert hg.result == cx.RESULTS.successful
    assert int(hg.stats.num_sweeps) == 0
    assert not np.isfinite(float(hg.stats.error_estimate))
    assert compare.relative_error(hg.grad, case.truth.grad) <= 1e-4


def test_absolute_tolerance_alone():
    case = problems.MINIMA["condition 1e2"]()
    size = np.linalg.norm(case.truth.grad)
    hg = run.hypergradient(case, cx.Implicit(rtol=0.0, atol=1e-5 * size, max_sweeps=20))
    assert hg.result == cx.RESULTS.successful
    assert compare.absolute_error(hg.grad, case.truth.grad) <= 1e-5 * size


def test_ritz_values_bracket_the_spectrum():
    case = problems.MINIMA["condition 1e2"]()
    values = np.linalg.eigvalsh(np.asarray(case.inner_data["H"]))
    hg = run.hypergradient(case, RULE)
    assert values[0] * 0.999 <= float(hg.stats.curvature_min) <= 3.0 * values[0]
    assert values[-1] / 3.0 <= float(hg.stats.curvature_max) <= values[-1] * 1.001


def test_damping_bias_counts():
    """A damped derivative is biased; the estimate is against the undamped one and must see it."""
    case = problems.MINIMA["condition 1e2"]()
    hg = run.hypergradient(case, cx.Implicit(rtol=1e-6, damping=0.05, max_sweeps=1), throw=False)
    error = compare.absolute_error(hg.grad, case.truth.grad)
    assert error > 1e-3 * np.linalg.norm(case.truth.grad)
    assert float(hg.stats.error_estimate) >= 0.5 * error
    assert hg.result != cx.RESULTS.successful


def test_damping_without_request_is_the_damped_formula():
    """With `rtol=None` the result is Bᵀ(H + δI)⁻¹∇f exactly."""
    case = problems.MINIMA["condition 1e2"]()
    data, outer = case.inner_data, case.outer_data
    damping = 0.05
    matrix = np.asarray(data["H"]) + damping * np.eye(len(case.phi))
    pull = np.asarray(outer["M"]) @ (case.truth.theta - np.asarray(outer["t"])) + np.asarray(outer["c"])
    expected = 0.3 * np.asarray(case.phi) + np.asarray(data["B"]).T @ np.linalg.solve(matrix, pull)
    hg = run.hypergradient(case, cx.Implicit(rtol=None, damping=damping))
    assert compare.relative_error(hg.grad, expected) <= 1e-2
    assert compare.relative_error(hg.grad, case.truth.grad) > 0.05


DIRECT = {
    "auto": cx.linear.Auto(rtol=1e-8),
    "minres": cx.linear.MINRES(rtol=1e-10),
}


@pytest.mark.parametrize("name", DIRECT)
def test_other_linear_solvers(name):
    case = problems.MINIMA["condition 1e2"]()
    check(
        case, run.hypergradient(case, cx.Implicit(rtol=1e-6, linear_solver=DIRECT[name], max_sweeps=20)), 1e-6
    )
