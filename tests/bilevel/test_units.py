"""Outer losses so small or so large that squares of their gradients have no floating-point number."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx


def inner(theta, phi, batch):
    return jnp.sum((theta - 1.0) ** 2) + phi * jnp.sum(theta**2)


def scaled(theta, phi, factor):
    return factor * jnp.sum(theta**2)


PROBLEM = cx.Bilevel(inner=inner, outer=scaled)


@pytest.mark.parametrize("size", [3, 60])
def test_the_scale_of_the_outer_loss_changes_no_digit(size):
    """In float32, with a decomposition and with conjugate gradients; warm and cold."""
    phi, start = jnp.asarray(0.5, jnp.float32), jnp.zeros(size, jnp.float32)
    method = {"inner_solver": optx.BFGS(1e-5, 1e-5), "rule": cx.Implicit(rtol=1e-4)}
    truth = -2 * size / 1.5**3
    usual = None
    for exponent in (0, -100, 80):
        factor = jnp.asarray(2.0**exponent, jnp.float32)
        cold = cx.hypergradient(PROBLEM, phi, start, outer_data=factor, **method)
        warm = cx.hypergradient(PROBLEM, phi + 1e-3, start, outer_data=factor, state=cold.state, **method)
        assert cold.result == cx.RESULTS.successful
        np.testing.assert_allclose(cold.grad / factor, truth, rtol=2e-6)
        assert 0 < cold.stats.relative_error < 1e-4
        numbers = [float(x) for hg in (cold, warm) for x in (hg.grad / factor, hg.stats.relative_error)]
        numbers += [float(cold.value / factor), float(cold.stats.error_estimate / factor)]
        usual = usual or numbers
        np.testing.assert_allclose(numbers, usual, rtol=1e-6)


def test_vanishing_adjoint_is_not_taken_for_zero():
    """Separated validation data: the loss is below 1e-20, its gradient too, and still it has one."""
    problem = cx.Bilevel(
        inner=lambda t, p, _: jnp.sum((t - 50.0) ** 2) + p * jnp.sum(t**2),
        outer=lambda t, p, _: jnp.mean(jnp.logaddexp(0.0, -t)),
    )
    hg = cx.hypergradient(
        problem,
        jnp.asarray(1e-3, jnp.float32),
        jnp.zeros(3, jnp.float32),
        inner_solver=optx.BFGS(1e-5, 1e-5),
        rule=cx.Implicit(max_sweeps=4),
    )
    theta = 50 / 1.001
    np.testing.assert_allclose(hg.grad, theta / 1.001 / (1 + np.exp(theta)), rtol=1e-3)


def test_adjoint_of_nan_in_the_state_is_forgotten():
    phi, start = jnp.asarray(0.5), jnp.zeros(60)
    method = {"inner_solver": optx.BFGS(1e-8, 1e-8), "rule": cx.Implicit(), "outer_data": jnp.asarray(1.0)}
    state = cx.hypergradient(PROBLEM, phi, start, **method).state
    for poison in (jnp.nan, jnp.inf):
        bad = jax.tree.map(lambda x: x, state)
        object.__setattr__(bad, "adjoint", state.adjoint.at[3].set(poison))
        hg = cx.hypergradient(PROBLEM, phi, start, state=bad, throw=False, **method)
        assert hg.result == cx.RESULTS.successful
        np.testing.assert_allclose(hg.grad, -2 * 60 / 1.5**3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_counts_the_rounding_of_what_it_returns(dtype):
    problem = cx.Bilevel(
        inner=lambda t, p, _: jnp.sum((t - 1) ** 2) + jnp.sum(jnp.exp(p) * t**2),
        outer=lambda t, p, _: jnp.sum((t - 0.3) ** 2),
    )
    phi = jnp.linspace(-1, 1, 7).astype(dtype)
    rule = cx.Implicit(rtol=1e-5, max_sweeps=4)
    hg = cx.hypergradient(problem, phi, jnp.zeros(7, dtype), inner_solver=optx.BFGS(1e-6, 1e-6), rule=rule)
    p = np.asarray(phi, float)
    theta = 1 / (1 + np.exp(p))
    truth = -2 * (theta - 0.3) * np.exp(p) * theta / (1 + np.exp(p))
    error = np.linalg.norm(np.asarray(hg.grad, float) - truth)
    assert hg.grad.dtype == dtype
    estimate = float(hg.stats.error_estimate)
    assert 0.5 * estimate <= error <= 2 * estimate


def test_a_zero_hypergradient_is_not_blamed_on_the_precision():
    """The inner solver has not moved, and where it stands the hypergradient is zero."""
    problem = cx.Bilevel(
        inner=lambda t, p, _: jnp.sum((t - 1) ** 2) + jnp.exp(p) * jnp.sum(t**2),
        outer=lambda t, p, _: jnp.sum((t - 0.3) ** 2),
    )
    hg = cx.hypergradient(
        problem,
        jnp.asarray(0.0),
        jnp.zeros(7),
        inner_solver=cx.Steps(optax.sgd(0.0), 1),
        rule=cx.Implicit(),
        throw=False,
    )
    assert hg.result == cx.RESULTS.inner_not_converged


@pytest.mark.parametrize("rule", [cx.Implicit(rtol=None), cx.Unrolled()], ids=["implicit", "unrolled"])
def test_data_that_are_not_arrays_reach_the_steps_as_they_are(rule):
    def of_data(theta, phi, batch):
        if batch["flag"]:
            theta = theta[: batch["count"]]
        return batch["function"](theta - 1.0) + phi * jnp.sum(theta**2) + 0.0 * len(batch["name"])

    problem = cx.Bilevel(inner=of_data, outer=lambda t, p, _: jnp.sum(t**2))
    data = {"flag": True, "count": 3, "name": "mse", "function": lambda x: jnp.sum(x**2)}
    solver = cx.Steps(optax.sgd(0.1), 100)
    hg = cx.hypergradient(
        problem, jnp.asarray(0.5), jnp.zeros(3), inner_solver=solver, rule=rule, inner_data=data, throw=False
    )
    np.testing.assert_allclose(hg.grad, -2 * 3 / 1.5**3, rtol=1e-4)


def test_settings_that_are_no_numbers_and_data_that_are_none():
    for wrong in ({"rtol": jnp.ones(2)}, {"atol": None}, {"damping": [1.0]}):
        (name,) = wrong
        with pytest.raises(TypeError, match=f"`{name}` of `Implicit` must be a number"):
            cx.Implicit(**wrong)
    with pytest.raises(TypeError, match=r"`inner_data\['x'\]` is an array of"):
        cx.hypergradient(
            PROBLEM,
            jnp.asarray(0.5),
            jnp.zeros(3),
            inner_solver=optx.BFGS(1e-8, 1e-8),
            rule=cx.Implicit(),
            inner_data={"x": np.array(["a", "b"])},
        )
    root = cx.Bilevel(inner=cx.Root(lambda x, c, _: x**3 - c), outer=lambda x, c, _: jnp.sum(x))
    with pytest.raises(ValueError, match="`recycle=4` of `Implicit`"):
        cx.hypergradient(
            root,
            jnp.full(3, 2.0),
            jnp.ones(3),
            inner_solver=optx.Newton(1e-8, 1e-8),
            rule=cx.Implicit(recycle=4),
        )
