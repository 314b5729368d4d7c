"""Truncated paths, one-step, first-order and finite-difference rules, and what they say of their error."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import compare, paths, problems, run
from helpers.problem import as_numpy
from helpers.sweep import sweep

CASE = problems.MINIMA["condition 1e1"]()
DATA, OUTER = as_numpy(CASE.inner_data), as_numpy(CASE.outer_data)
VALUES = np.linalg.eigvalsh(DATA["H"])


def on_case(rule, optimizer, steps, start=None, case=CASE, **kwargs):
    return cx.hypergradient(
        run.problem(case.kind, case.inner, case.outer),
        case.phi,
        case.theta0 + 0.5 if start is None else start,
        inner_solver=cx.Steps(optimizer, steps),
        rule=rule,
        inner_data=case.inner_data,
        outer_data=case.outer_data,
        **kwargs,
    )


@pytest.mark.parametrize("mode", sweep(["mixed", "reverse", "forward"], always=["mixed", "forward"]))
def test_truncated_path(mode):
    """The first steps frozen, by plain reverse mode through the plain loop."""
    hg = paths.hypergradient(cx.Unrolled(mode, truncate=4))
    _, grad = paths.truth(paths.adam, frozen=paths.STEPS - 4)
    for name in grad:
        assert compare.relative_error(hg.grad[name], grad[name]) <= 1e-11, name
    taken = np.isfinite(np.asarray(hg.stats.path.derivative_norms))
    first = paths.STEPS - 4
    assert not taken[:first].any() and taken[first + (mode == "forward") :].all()
    assert np.isfinite(np.asarray(hg.stats.path.gradient_norms)).all()


def test_truncation_at_the_solution_is_a_neumann_series():
    """K steps from θ*: ηΣ(I − ηH)ᵗ, t < K, in place of H⁻¹; with all terms the implicit derivative."""
    rate, steps = 1.0 / VALUES[-1], 7
    theta = np.asarray(CASE.truth.theta)
    pull = OUTER["M"] @ (theta - OUTER["t"]) + OUTER["c"]
    series, term = np.zeros(12), rate * pull
    for _ in range(steps):
        series, term = series + term, term - rate * DATA["H"] @ term
    expected = OUTER["rho"] * np.asarray(CASE.phi) + DATA["B"].T @ series
    hg = on_case(cx.Unrolled("mixed", truncate=steps), optax.sgd(rate), 50, start=jnp.asarray(theta))
    assert compare.relative_error(hg.grad, expected) <= 1e-9


@pytest.mark.parametrize(
    "name",
    sweep(["condition 1e1", "condition 1e2", "ridge, half"], always=["condition 1e2", "ridge, half"]),
)
def test_estimated_bias(name):
    """Of gradient descent on quadratics, 20 of 200 steps: the estimate is not much below the bias."""
    case = problems.MINIMA[name]()
    hessian = jax.hessian(lambda t: case.inner(t, case.phi, case.inner_data))(case.theta0)
    optimizer = optax.sgd(1.0 / float(np.linalg.eigvalsh(np.asarray(hessian))[-1]))
    whole = on_case(cx.Unrolled("mixed"), optimizer, 200, case=case)
    part = on_case(cx.Unrolled("mixed", truncate=20), optimizer, 200, case=case)
    error = compare.absolute_error(part.grad, whole.grad)
    assert np.isnan(float(whole.stats.error_estimate))
    assert error / 2 <= float(part.stats.error_estimate) <= 6 * error
    norm = np.linalg.norm(compare.flat(part.grad))
    assert float(part.stats.relative_error) == pytest.approx(float(part.stats.error_estimate) / norm)


@pytest.mark.parametrize(("mode", "truncate"), [("mixed", 3), ("mixed", 5), ("forward", 3), ("forward", 8)])
def test_estimated_bias_of_parts_that_decay_at_different_rates(mode, truncate):
    """Curvatures over a range of 50, 120 steps: θ_n = c + (1 − ηh)ⁿ(θ_0 − c), the steps before the last K dropped."""
    curvatures, steps = np.geomspace(0.02, 1.0, 9), 120
    problem = cx.Bilevel(
        inner=lambda theta, phi, _: 0.5 * jnp.sum(jnp.asarray(curvatures) * (theta - phi) ** 2),
        outer=lambda theta, phi, _: jnp.sum((theta - 2.0) ** 2),
    )
    phi, start, decay = np.linspace(-1.0, 1.0, 9), np.full(9, 0.3), 1 - 0.9 * curvatures
    pull = 2 * (phi + decay**steps * (start - phi) - 2.0)
    cut = (1 - decay**truncate) * pull
    missing = np.linalg.norm((1 - decay**steps) * pull - cut)
    solver, rule = cx.Steps(optax.sgd(0.9), steps), cx.Unrolled(mode, truncate=truncate)
    hg = cx.hypergradient(problem, jnp.asarray(phi), jnp.asarray(start), inner_solver=solver, rule=rule)
    np.testing.assert_allclose(hg.grad, cut, rtol=1e-10)
    assert 0.5 <= float(hg.stats.error_estimate) / missing <= 6


def test_nothing_left_out_is_no_bias():
    """As many steps as the path has: the whole derivative, for which no error is estimated."""
    hg = paths.hypergradient(cx.Unrolled("mixed", truncate=paths.STEPS))
    assert compare.relative_error(hg.grad, paths.truth(paths.adam)[1]) <= 1e-11
    assert np.isnan(float(hg.stats.error_estimate))


def one_step_truth(rate, theta, phi):
    """∂f/∂φ + ηBᵀ∇f(θ) by NumPy, for a gradient step that ends at θ."""
    pull = OUTER["M"] @ (theta - OUTER["t"]) + OUTER["c"]
    return OUTER["rho"] * phi + rate * DATA["B"].T @ pull, pull


def test_one_step_of_gradient_descent():
    """Against its formula, and its estimate against the error from the implicit derivative."""
    rate = 1.0 / VALUES[-1]
    hg = on_case(cx.OneStep(), optax.sgd(rate), 200)
    expected, _ = one_step_truth(rate, np.asarray(hg.theta), np.asarray(CASE.phi))
    assert hg.result == cx.RESULTS.successful
    assert compare.relative_error(hg.grad, expected) <= 1e-12
    error = compare.absolute_error(hg.grad, CASE.truth.grad)
    assert 0.2 * error <= float(hg.stats.error_estimate) <= 5 * error


def newton(hessian):
    """θ − H(θ)⁻¹∇g as an Optax transformation."""

    def update(gradient, state, theta):
        return -jnp.linalg.solve(hessian(theta), gradient), state

    return optax.GradientTransformation(lambda theta: optax.EmptyState(), update)


def test_one_step_after_newton_is_as_accurate_as_its_start():
    """Error O(‖θ − θ*‖) for θ the point that the last Newton step starts from: halving one halves the other."""

    def inner(theta, phi, batch):
        return jnp.sum(jnp.cosh(theta)) + 0.5 * jnp.sum(theta**2) - theta @ (phi + 0.3 * phi**2)

    def outer(theta, phi, batch):
        return jnp.sum(jnp.sin(theta))

    phi = jnp.asarray([0.7, -1.1])
    solver = cx.Steps(newton(lambda t: jnp.diag(jnp.cosh(t) + 1.0)), 1)
    theta = np.zeros(2)
    right = np.asarray(phi) + 0.3 * np.asarray(phi) ** 2
    for _ in range(30):
        theta = theta - (np.sinh(theta) + theta - right) / (np.cosh(theta) + 1)
    exact = np.cos(theta) * (1 + 0.6 * np.asarray(phi)) / (np.cosh(theta) + 1)

    def error(distance):
        start = jnp.asarray(theta + distance * np.asarray([0.6, 0.8]))
        problem = cx.Bilevel(inner=inner, outer=outer)
        hg = cx.hypergradient(problem, phi, start, inner_solver=solver, rule=cx.OneStep())
        return compare.absolute_error(hg.grad, exact)

    errors = [error(d) for d in (1e-2, 5e-3, 2.5e-3)]
    assert errors[0] <= 1e-2
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.05)


def test_one_step_of_a_fixed_point():
    """∂f/∂φ + (∂T/∂φ)ᵀ∂f/∂θ at the fixed point; its solution map has the same derivative, forward too."""
    weights = jnp.asarray([[0.1, 0.2], [-0.1, 0.05]])

    def mapping(x, phi, batch):
        return jnp.tanh(weights @ x + phi)

    problem = cx.Bilevel(inner=cx.FixedPoint(mapping), outer=lambda x, phi, _: jnp.sum(x**2))
    phi = jnp.asarray([0.5, -0.3])
    solver = optx.FixedPointIteration(1e-12, 1e-12)
    hg = cx.hypergradient(problem, phi, jnp.zeros(2), inner_solver=solver, rule=cx.OneStep())
    x = np.zeros(2)
    for _ in range(100):
        x = np.tanh(np.asarray(weights) @ x + np.asarray(phi))
    slope = 1 - x**2
    jacobian = slope[:, None] * np.asarray(weights)
    np.testing.assert_allclose(np.asarray(hg.grad), slope * 2 * x, rtol=1e-9)
    exact = slope * np.linalg.solve(np.eye(2) - jacobian.T, 2 * x)
    error = np.linalg.norm(np.asarray(hg.grad) - exact)
    assert 0.5 * error <= float(hg.stats.error_estimate) <= 5 * error

    theta_star = cx.solution_map(problem, solver, cx.OneStep())
    by_map = jax.grad(lambda p: jnp.sum(theta_star(p, jnp.zeros(2)) ** 2))(phi)
    np.testing.assert_allclose(np.asarray(by_map), np.asarray(hg.grad), rtol=1e-9)
    forward = jax.jvp(lambda p: theta_star(p, jnp.zeros(2)), (phi,), (jnp.ones(2),))[1]
    np.testing.assert_allclose(np.asarray(forward), slope, rtol=1e-9)


def test_one_step_needs_a_step():
    with pytest.raises(ValueError, match="(?s)OneStep.*Implicit"):
        run.hypergradient(CASE, cx.OneStep())
    with pytest.raises(ValueError, match="(?s)OneStep.*Implicit"):
        cx.solution_map(run.problem(CASE.kind, CASE.inner, CASE.outer), optx.BFGS(1e-6, 1e-6), cx.OneStep())


def test_first_order():
    """∂f/∂φ at the end of the path, ρφ here."""
    hg = on_case(cx.FirstOrder(), optax.sgd(0.3), 20)
    assert hg.result == cx.RESULTS.successful and np.isnan(float(hg.stats.error_estimate))
    np.testing.assert_allclose(np.asarray(hg.grad), OUTER["rho"] * np.asarray(CASE.phi), rtol=1e-12)
    by_newton = run.hypergradient(CASE, cx.FirstOrder())
    np.testing.assert_allclose(np.asarray(by_newton.grad), np.asarray(hg.grad), rtol=1e-12)


def test_first_order_without_a_direct_term_is_a_failure():
    """The outer loss has no rates: zero for sure, and reported, leaf by leaf."""
    with pytest.raises(RuntimeError, match="(?s)no influence.*rates"):
        paths.hypergradient(cx.FirstOrder())
    hg = paths.hypergradient(cx.FirstOrder(), throw=False)
    assert hg.result == cx.RESULTS.no_influence
    assert float(jnp.sum(jnp.abs(hg.grad["rates"]))) == 0.0
    np.testing.assert_allclose(np.asarray(hg.grad["weights"]), 0.2 * np.asarray(paths.start()[0]["weights"]))


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    sweep(
        itertools.product([paths.momentum, paths.adam], [np.float64, np.float32]),
        always=[(paths.momentum, np.float32), (paths.adam, np.float64)],
    ),
)
def test_finite_difference_is_one_step(optimizer, dtype):
    """Also in float32, with the step that is chosen by default: truth by plain reverse mode in float64."""
    hg = paths.hypergradient(cx.FiniteDifference(), optimizer, dtype=dtype)
    _, grad = paths.truth(optimizer, frozen=paths.STEPS - 1)
    tolerance = 1e-8 if dtype is np.float64 else 3e-3
    for name in ("weights", "log l2", "rates"):
        assert compare.relative_error(hg.grad[name], grad[name]) <= tolerance, name
    one = paths.hypergradient(cx.OneStep(), optimizer)
    assert float(hg.stats.error_estimate) == pytest.approx(float(one.stats.error_estimate), rel=0.05)


def test_finite_difference_of_large_slopes():
    """In float32 with a slope of the outer loss of 42 and far more, an ε that is not scaled leaves the linear range."""

    def inner(theta, phi, batch):
        return jnp.sum(jnp.cosh(theta) * phi)

    def outer(theta, phi, batch):
        return 1e4 * jnp.sum(theta)

    problem = cx.Bilevel(inner=inner, outer=outer)
    phi, theta = jnp.asarray([0.7, 1.3], jnp.float32), jnp.asarray([0.5, -0.8], jnp.float32)

    def error(rule):
        solver = cx.Steps(optax.sgd(0.1), 1)
        hg = cx.hypergradient(problem, phi, theta, inner_solver=solver, rule=rule)
        return compare.relative_error(hg.grad, -0.1 * 1e4 * np.sinh([0.5, -0.8]))

    assert error(cx.FiniteDifference()) <= 1e-3
    # The controls: a displacement that is far too long, and one that float32 does not resolve.
    assert error(cx.FiniteDifference(2.0)) > 1e-2
    assert error(cx.FiniteDifference(1e-7)) > 1e-2


def test_finite_difference_with_an_optimiser_that_reads_the_loss():
    """`reduce_on_plateau` scales by a comparison of values, Polyak's step by the value itself."""

    def polyak(phi):
        return optax.polyak_sgd(max_learning_rate=10.0, f_min=-3.0)

    difference = paths.hypergradient(cx.FiniteDifference(), solver=cx.Steps(polyak, 2), throw=False)
    one = paths.hypergradient(cx.OneStep(), solver=cx.Steps(polyak, 2), throw=False)
    assert compare.relative_error(difference.grad, one.grad) <= 1e-7


@pytest.mark.parametrize("value", [0.0, -1.0, "small"])
def test_wrong_displacements(value):
    with pytest.raises(ValueError, match="epsilon.*positive"):
        cx.FiniteDifference(value)


@pytest.mark.parametrize("rule", ["every tangent", "random directions"])
def test_estimated_bias_in_forward_mode(rule):
    """Gradient descent with its rate and target as hyperparameters: the estimate beside what is missing."""
    steps, truncate, rate = 60, 16, 0.35 / VALUES[-1]
    if rule == "every tangent":
        options, key = {"truncate": truncate}, None
    else:
        options, key = {"truncate": truncate, "directions": 64}, jax.random.key(1)
    hg = on_case(cx.Unrolled("forward", **options), optax.sgd(rate), steps, key=key)
    cut = on_case(cx.Unrolled("mixed", truncate=truncate), optax.sgd(rate), steps)
    whole = on_case(cx.Unrolled("mixed"), optax.sgd(rate), steps)
    missing = compare.absolute_error(cut.grad, whole.grad)
    estimate = float(hg.stats.error_estimate)
    if rule == "every tangent":
        assert compare.relative_error(hg.grad, cut.grad) <= 1e-10
        assert 1 / 3 <= estimate / missing <= 3
    else:
        # The bias, and the spread of the directions beside it.
        spread = np.sqrt((hg.grad.size - 1) / 64) * np.linalg.norm(cut.grad)
        assert 0.3 * (missing + spread) <= estimate <= 3 * (missing + spread)


def test_one_step_in_forward_mode_has_no_estimate():
    """It takes two to tell how contributions change."""
    hg = on_case(cx.Unrolled("forward", truncate=1), optax.sgd(0.1 / VALUES[-1]), 8)
    assert np.isnan(float(hg.stats.error_estimate)) and hg.result == cx.RESULTS.successful
