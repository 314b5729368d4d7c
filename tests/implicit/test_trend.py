"""Warm starts that follow the path of φ: right on a straight line, harmless elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.implicit._trend import extrapolate, follow, no_trend


def _steps(phis, thetas):
    """The trend after a walk along `phis`, the adjoint being twice θ."""
    trend = no_trend({"a": phis[0]}, thetas[0])
    for phi, before, after in zip(phis[1:], thetas[:-1], thetas[1:], strict=True):
        trend = follow(trend, {"a": phi}, (before, 2 * before), (after, 2 * after), jnp.asarray(True))
    return trend


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("next_phi", "expected"), [(3.0, 3.0), (2.5, 2.5), (2.0, 2.0), (1.0, 2.0), (9.0, 4.0)]
)
def test_goes_on_along_a_line_and_never_back(next_phi, expected, dtype):
    direction = jnp.array([1.0, -2.0, 0.5], dtype)
    trend = _steps([jnp.asarray([t], dtype) for t in (0.0, 1.0, 2.0)], [t * direction for t in (0, 1, 2)])
    phi = {"a": jnp.asarray([next_phi], dtype)}
    theta, adjoint = extrapolate(trend, phi, 2 * direction, 4 * direction)
    np.testing.assert_allclose(theta, expected * direction, rtol=1e-6)
    np.testing.assert_allclose(adjoint, 2 * expected * direction, rtol=1e-6)
    assert theta.dtype == dtype


def test_first_step_and_unmoved_phi_leave_the_start_alone():
    theta = jnp.ones(3)
    one, two = {"a": jnp.array([1.0])}, {"a": jnp.array([2.0])}
    cold = no_trend(one, theta)
    np.testing.assert_array_equal(extrapolate(cold, two, theta, theta)[0], theta)
    stood = _steps([jnp.array([0.0]), jnp.array([1.0]), jnp.array([1.0])], [theta, 2 * theta, 2 * theta])
    np.testing.assert_array_equal(extrapolate(stood, two, theta, theta)[0], theta)


def test_noise_is_not_followed(rng):
    """θ that jumps about a fixed point, as with minibatches: the line would double the distance."""
    noise = [jnp.asarray(rng.normal(size=50)) for _ in range(6)]
    trend = _steps([jnp.array([float(i)]) for i in range(6)], noise)
    assert not trend.trusted
    theta, _ = extrapolate(trend, {"a": jnp.array([6.0])}, noise[-1], noise[-1])
    np.testing.assert_array_equal(theta, noise[-1])
    # It is watched all the same, and followed again once it leads somewhere.
    for i in range(2):
        before, after = jnp.full(50, float(i)), jnp.full(50, i + 1.0)
        trend = follow(
            trend, {"a": jnp.array([6.0 + i])}, (before, before), (after, after), jnp.asarray(True)
        )
    assert trend.trusted


DIAGONAL = jnp.linspace(1.0, 300.0, 60)
PROBLEM = cx.Bilevel(
    inner=lambda w, lam, _: 0.5 * jnp.sum(DIAGONAL * w**2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2) - jnp.sum(w),
    outer=lambda w, lam, _: 0.5 * jnp.sum((w - 0.01) ** 2),
)
SOLVER = cx.Steps(optax.sgd(1e-3), 5)


def _walk(rule, follow_trend, num_steps=8):
    call = jax.jit(
        lambda phi, state: cx.hypergradient(
            PROBLEM, phi, jnp.zeros(60), inner_solver=SOLVER, rule=rule, state=state
        )
    )
    phi = jnp.zeros(60)
    state = cx.bilevel.initial_state(PROBLEM, phi, jnp.zeros(60), inner_solver=SOLVER, rule=rule)
    products = []
    for step in range(num_steps):
        hg = call(phi + 0.05 * step, state)
        assert jax.tree.structure(hg.state) == jax.tree.structure(state)
        state = hg.state
        if not follow_trend:
            state = state.__class__(**{**vars(state), "trend": no_trend(phi, state.theta)})
        products.append(int(hg.stats.num_matvecs))
    assert call._cache_size() == 1
    return np.mean(products[3:]), hg


def test_saves_products_on_a_path():
    rule = cx.Implicit(rtol=1e-7, max_sweeps=4)
    led, hg = _walk(rule, True)
    alone, _ = _walk(rule, False)
    assert led < 0.9 * alone, (led, alone)
    penalty = np.exp(0.05 * 7)
    theta = 1 / (np.asarray(DIAGONAL) + penalty)
    truth = -(theta - 0.01) * theta**2 * penalty
    assert np.linalg.norm(hg.grad - truth) < 1e-7 * np.linalg.norm(truth)


def test_rules_that_do_not_correct_carry_no_trend():
    rule = cx.Implicit(rtol=None)
    state = cx.bilevel.initial_state(PROBLEM, jnp.zeros(60), jnp.zeros(60), inner_solver=SOLVER, rule=rule)
    assert state.trend is None


@pytest.mark.parametrize("phi", [jnp.zeros(4), {"a": jnp.zeros(60)}])
def test_state_of_another_phi_is_refused(phi):
    method = {"inner_solver": SOLVER, "rule": cx.Implicit(rtol=1e-2)}
    state = cx.bilevel.initial_state(PROBLEM, jnp.zeros(60), jnp.zeros(60), **method)
    with pytest.raises(ValueError, match="`state` belongs to another problem: its phi"):
        cx.hypergradient(PROBLEM, phi, jnp.zeros(60), state=state, **method)
