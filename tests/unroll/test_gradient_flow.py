"""Gradient flow as the inner solver, against the closed form of linear flows and the limit of small steps."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare

diffrax = pytest.importorskip("diffrax")

CURVATURES = np.asarray([0.5, 2.0, 8.0])


def inner(theta, phi, batch):
    """Half of Σ h θ² − θ·b(φ): θ(T) = (1 − e^(−hT)) b/h from zero."""
    curvatures = jnp.asarray(CURVATURES, theta.dtype) if batch is None else batch
    return 0.5 * jnp.sum(curvatures * theta**2) - theta @ jnp.tanh(phi["b"])


def outer(theta, phi, batch):
    return jnp.sum((theta - 0.3) ** 2) + 0.1 * jnp.sum(phi["b"] ** 2)


PROBLEM = cx.Bilevel(inner=inner, outer=outer)
PHI = {"b": jnp.asarray([1.0, -0.4, 2.0]), "log horizon": jnp.asarray(-0.3), "name": "fixed"}


def horizon(phi):
    return jnp.exp(phi["log horizon"])


FLOW = cx.GradientFlow(horizon, rtol=1e-7, atol=1e-9)


def exact(phi, curvatures=CURVATURES):
    """The outer loss by the closed form."""
    theta = (1 - jnp.exp(-curvatures * jnp.exp(phi["log horizon"]))) / curvatures * jnp.tanh(phi["b"])
    return outer(theta, phi, None)


def differentiable(phi):
    return {k: v for k, v in phi.items() if k != "name"}


def on_flow(phi=PHI, flow=FLOW, rule=None, theta=None, **kwargs):
    theta = jnp.zeros(3) if theta is None else theta
    return cx.hypergradient(PROBLEM, phi, theta, inner_solver=flow, rule=rule or cx.Unrolled(), **kwargs)


def test_closed_form():
    hg = on_flow()
    value, grad = jax.value_and_grad(exact)(differentiable(PHI))
    assert hg.result == cx.RESULTS.successful and hg.grad["name"] is None
    assert float(hg.value) == pytest.approx(float(value), rel=1e-6)
    for name in grad:
        assert compare.relative_error(hg.grad[name], grad[name]) <= 1e-6, name


def test_measured_error_covers_the_true_one():
    """At loose tolerances, and under vmap over tasks that differ in their data and horizons."""
    flow = cx.GradientFlow(horizon, rtol=1e-3, atol=1e-4)
    scales = jnp.asarray([1.0, 0.6])

    def one(scale):
        phi = {**differentiable(PHI), "log horizon": jnp.log(scale)}
        return on_flow(phi, flow, cx.Unrolled(measure_error=True), inner_data=scale * CURVATURES)

    hg = jax.vmap(one)(scales)
    for i, scale in enumerate(scales):
        phi = {**differentiable(PHI), "log horizon": jnp.log(scale)}
        grad = jax.grad(exact)(phi, scale * CURVATURES)
        error = compare.absolute_error(jax.tree.map(lambda leaf, i=i: leaf[i], hg.grad), grad)
        assert 0.5 <= float(hg.stats.error_estimate[i]) / error <= 2


def test_measured_error_of_a_low_order():
    """Of order one a third of the error is left with tolerances ten times smaller."""
    flow = cx.GradientFlow(horizon, rtol=1e-4, atol=1e-4, solver=diffrax.HalfSolver(diffrax.Euler()))
    hg = on_flow(flow=flow, rule=cx.Unrolled(measure_error=True))
    error = compare.absolute_error(differentiable(hg.grad), jax.grad(exact)(differentiable(PHI)))
    assert 0.85 <= float(hg.stats.error_estimate) / error <= 1.2


def test_many_hyperparameters():
    """Twenty of them take two solves; a fixed horizon; float32."""
    weights = jnp.asarray(np.random.default_rng(0).standard_normal((3, 20)), jnp.float32)
    problem = cx.Bilevel(
        inner=lambda t, p, b: inner(t, {"b": weights @ p}, b), outer=lambda t, p, b: jnp.sum(t**3)
    )
    phi = jnp.linspace(-0.5, 0.5, 20, dtype=jnp.float32)
    flow = cx.GradientFlow(0.8, rtol=1e-5, atol=1e-6)
    hg = cx.hypergradient(
        problem, phi, jnp.zeros(3, jnp.float32), inner_solver=flow, rule=cx.Unrolled("forward")
    )

    def loss(phi):
        return jnp.sum(((1 - jnp.exp(-0.8 * CURVATURES)) / CURVATURES * jnp.tanh(weights @ phi)) ** 3)

    with jax.numpy_dtype_promotion("standard"):
        expected = jax.grad(loss)(phi)
    assert hg.grad.dtype == jnp.float32 and compare.relative_error(hg.grad, expected) <= 1e-4


def test_small_steps_tend_to_the_flow():
    """A nonlinear flow; gradient descent is off by O(rate), and twice as many steps by half as much."""
    problem = cx.Bilevel(
        inner=lambda t, p, _: jnp.sum(jnp.cos(t * p) + 0.1 * t**4), outer=lambda t, p, _: jnp.sum(t)
    )
    phi, theta = jnp.asarray([1.0, 0.7]), jnp.asarray([0.5, -0.2])
    flow = cx.GradientFlow(1.0, rtol=1e-8, atol=1e-8)
    wanted = cx.hypergradient(problem, phi, theta, inner_solver=flow, rule=cx.Unrolled()).grad

    def steps(number):
        solver = cx.Steps(optax.sgd(1 / number), number)
        return cx.hypergradient(problem, phi, theta, inner_solver=solver, rule=cx.Unrolled("forward")).grad

    errors = [compare.relative_error(steps(number), wanted) for number in (50, 100)]
    assert errors[0] < 0.05 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_rules_that_ask_for_the_end_alone():
    """A long horizon arrives: the implicit derivative there; the first-order one is what it is."""
    flow = cx.GradientFlow(40.0, rtol=1e-8, atol=1e-10)
    phi = {"b": PHI["b"]}
    hg = on_flow(phi, flow, cx.Implicit(rtol=1e-6))
    grad = jax.grad(lambda p: outer(jnp.tanh(p["b"]) / CURVATURES, p, None))(phi)
    assert compare.relative_error(hg.grad, grad) <= 1e-5
    first = on_flow(phi, flow, cx.FirstOrder())
    assert compare.relative_error(first.grad, {"b": 0.2 * PHI["b"]}) <= 1e-12


def test_a_learned_horizon():
    """Descent on the horizon alone finds where the outer loss is least, by the closed form on a grid."""
    problem = cx.Bilevel(
        inner=lambda t, p, _: 0.5 * jnp.sum(CURVATURES * t**2) - t @ jnp.ones(3),
        outer=lambda t, p, _: jnp.sum((t - 0.3) ** 2),
    )
    solution = cx.minimise(
        problem,
        jnp.asarray(-1.0),
        jnp.zeros(3),
        inner_solver=cx.GradientFlow(jnp.exp, rtol=1e-5, atol=1e-7),
        rule=cx.Unrolled(),
        optimizer=optax.sgd(1.0),
        num_steps=40,
    )
    grid = np.linspace(-3, 1, 4001)
    ends = (1 - np.exp(-CURVATURES * np.exp(grid)[:, None])) / CURVATURES
    best = grid[np.argmin(np.sum((ends - 0.3) ** 2, axis=1))]
    assert float(solution.phi) == pytest.approx(best, abs=5e-3)


@pytest.mark.parametrize("what", ["too few steps", "a horizon below zero"])
def test_what_does_not_arrive_is_a_failure(what):
    if what == "too few steps":
        flow = cx.GradientFlow(horizon, rtol=1e-7, atol=1e-9, max_steps=3)
    else:
        flow = cx.GradientFlow(lambda phi: phi["log horizon"], rtol=1e-7, atol=1e-9)
    assert on_flow(flow=flow, throw=False).result == cx.RESULTS.flow_not_finished
    with pytest.raises(RuntimeError, match="did not get to its horizon"):
        on_flow(flow=flow)


def test_no_influence():
    with pytest.raises(RuntimeError, match="log horizon"):
        on_flow(flow=cx.GradientFlow(1.0, rtol=1e-4, atol=1e-4))


def test_the_second_call_compiles_nothing():
    traces = []

    def counted(theta, phi, batch):
        traces.append(None)
        return inner(theta, phi, batch)

    problem = cx.Bilevel(inner=counted, outer=outer)
    for rtol in (1e-3, 1e-4):
        flow = cx.GradientFlow(horizon, rtol=rtol, atol=rtol)
        cx.hypergradient(problem, PHI, jnp.zeros(3), inner_solver=flow, rule=cx.Unrolled())
        if rtol == 1e-3:
            first = len(traces)
    assert len(traces) == first


def with_solver(name):
    return cx.GradientFlow(1.0, rtol=1e-4, atol=1e-4, solver=getattr(diffrax, name)())


USE = {
    "truncate": (lambda: on_flow(rule=cx.Unrolled(truncate=3)), ValueError, "`truncate`"),
    "mixed": (lambda: on_flow(rule=cx.Unrolled("mixed")), ValueError, "`mode`"),
    "memory": (lambda: on_flow(rule=cx.Unrolled(checkpoint="sqrt")), ValueError, "`checkpoint`"),
    "one step": (lambda: on_flow(rule=cx.OneStep()), ValueError, "cx.Steps"),
    "difference": (lambda: on_flow(rule=cx.FiniteDifference()), ValueError, "cx.Steps"),
    "two horizons": (
        lambda: on_flow(flow=cx.GradientFlow(lambda p: p["b"], rtol=1e-4, atol=1e-4)),
        TypeError,
        "one real number",
    ),
    "solution map": (lambda: cx.solution_map(PROBLEM, FLOW, cx.Implicit()), TypeError, "solution maps"),
    "horizon": (lambda: cx.GradientFlow(-1.0, rtol=1e-4, atol=1e-4), ValueError, "`horizon`"),
    "text": (lambda: cx.GradientFlow("1", rtol=1e-4, atol=1e-4), TypeError, "`horizon`"),
    "tolerance": (lambda: cx.GradientFlow(1.0, rtol=0.0, atol=1e-4), ValueError, "`rtol`"),
    "steps": (lambda: cx.GradientFlow(1.0, rtol=1e-4, atol=1e-4, max_steps=0), ValueError, "`max_steps`"),
    "endless": (lambda: cx.GradientFlow(np.inf, rtol=1e-4, atol=1e-4), ValueError, "`horizon`.*finite"),
    "no error of its own": (lambda: with_solver("Euler"), ValueError, "`solver`.*error estimate"),
    "two vector fields": (
        lambda: with_solver("SemiImplicitEuler"),
        ValueError,
        "`solver`.*single vector field",
    ),
    "explicit and implicit": (lambda: with_solver("KenCarp4"), ValueError, "`solver`.*single vector field"),
    "solver": (lambda: cx.GradientFlow(1.0, rtol=1e-4, atol=1e-4, solver=3), TypeError, "`solver`"),
}


@pytest.mark.parametrize("name", USE)
def test_wrong_use_says_what_to_do(name):
    call, error, message = USE[name]
    with pytest.raises(error, match=message):
        call()


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"curvax\[ode\]"):
        cx.GradientFlow(1.0, rtol=1e-4, atol=1e-4)
