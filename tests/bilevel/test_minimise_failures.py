"""What `minimise` refuses, what it repairs and what it reports."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import tuning


def walled_outer(theta, phi, batch):
    """NaN beyond log penalty 2.2; the optimum at 1.9 lies before it."""
    return tuning.outer(theta, phi, batch) + jnp.where(phi > 2.2, jnp.nan, 0.0)


def blocked_outer(theta, phi, batch):
    """NaN beyond log penalty 1, where the optimum lies."""
    return tuning.outer(theta, phi, batch) + jnp.where(phi > 1.0, jnp.nan, 0.0)


WALLED = cx.Bilevel(inner=tuning.inner, outer=walled_outer)
BLOCKED = cx.Bilevel(inner=tuning.inner, outer=blocked_outer)
FAST = optax.adam(1.0)


def test_overshoot_into_nan_is_repaired():
    solution = tuning.minimise(150, problem=WALLED, optimizer=FAST)
    assert solution.result == cx.RESULTS.successful
    assert solution.history.num_retries.sum() > 0
    assert solution.history.step_scale.min() < 1
    assert np.all(np.isfinite(solution.history.value))
    np.testing.assert_allclose(solution.value, tuning.optimum()[1], rtol=1e-3)


def test_benign_control_takes_full_steps():
    solution = tuning.minimise(10, problem=WALLED, optimizer=FAST, phi0=jnp.asarray(-30.0))
    assert solution.result == cx.RESULTS.successful and len(solution.history) == 11
    assert solution.history.num_retries.sum() == 0
    assert np.all(solution.history.step_scale == 1)


def test_hopeless_run_fails_clearly_and_returns_the_last_good_point():
    with pytest.raises(
        RuntimeError, match="gave up after step .* even at 1/1024 .*Nonfinite.*smaller learning rate"
    ):
        tuning.minimise(60, problem=BLOCKED)
    solution = tuning.minimise(60, problem=BLOCKED, throw=False)
    assert solution.result == cx.RESULTS.nonfinite
    assert solution.num_steps < 60 and len(solution.history) == solution.num_steps + 1
    assert 0.9 < solution.phi <= 1.0
    theta, value = tuning.solve(float(solution.phi))
    np.testing.assert_allclose(solution.theta, theta, rtol=1e-4)
    np.testing.assert_allclose(solution.value, value, rtol=1e-6)


def test_bad_start_is_told_apart():
    with pytest.raises(RuntimeError, match="at the start, `phi0`, failed"):
        tuning.minimise(5, problem=BLOCKED, phi0=jnp.asarray(2.0))
    solution = tuning.minimise(5, problem=BLOCKED, phi0=jnp.asarray(2.0), throw=False)
    assert solution.num_steps == 0 and len(solution.history) == 0
    assert solution.phi == 2.0 and np.all(solution.theta == 0) and np.isnan(solution.value)


def test_failed_hypergradient_is_reported_with_its_own_reason():
    def saddle(theta, phi, batch):
        return tuning.inner(theta, phi, batch) - 10 * theta[0] ** 2 + theta[0] ** 4 * 0

    problem = cx.Bilevel(inner=saddle, outer=tuning.outer)
    solution = tuning.minimise(3, problem=problem, throw=False)
    assert solution.result != cx.RESULTS.successful
    assert len(solution.history) == 0


def test_optimizer_that_returns_nan():
    broken = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda grad, state, params=None: (grad * jnp.nan, state)
    )
    solution = tuning.minimise(3, optimizer=broken, throw=False)
    assert solution.result == cx.RESULTS.nonfinite
    assert solution.phi == 0 and solution.num_steps == 0 and len(solution.history) == 1


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "3", None])
def test_num_steps(num_steps):
    with pytest.raises(ValueError, match="`num_steps` must be a positive int"):
        tuning.minimise(num_steps)


@pytest.mark.parametrize("optimizer", [None, 0.1, optax.adam, optax.MultiSteps(optax.sgd(0.1), 2)])
def test_optimizer(optimizer):
    with pytest.raises(TypeError, match="`optimizer` must be an optax transformation"):
        tuning.minimise(1, optimizer=optimizer)


@pytest.mark.parametrize("name", ["phi0", "theta0"])
def test_starts(name):
    with pytest.raises(ValueError, match=f"`{name}` holds no floating-point array"):
        tuning.minimise(1, **{name: {"a": 1.0, "b": jnp.arange(3)}})
    with pytest.raises(ValueError, match=f"`{name}` holds NaN or infinity"):
        tuning.minimise(1, **{name: jnp.array([1.0, jnp.nan])})


def test_sampler_without_key():
    with pytest.raises(ValueError, match="outer_data.*key=jax.random.key"):
        tuning.minimise(1, outer_data=tuning.stochastic())


def test_other_arguments():
    with pytest.raises(TypeError, match="`checkpoint` must be a `cx.Checkpoint"):
        tuning.minimise(1, checkpoint="runs/1")
    with pytest.raises(TypeError, match="`callbacks` must hold functions"):
        tuning.minimise(1, callbacks=[3])
    with pytest.raises(TypeError, match="cx.Bilevel"):
        tuning.minimise(1, problem=tuning.inner)
    with pytest.raises(TypeError, match="rule"):
        tuning.minimise(1, rule=0.1)
    with pytest.raises(TypeError, match="`inner_solver` must be"):
        tuning.minimise(1, inner_solver=optax.sgd(0.1))
    with pytest.raises(TypeError, match="`state` must be"):
        tuning.minimise(1, state=3)


def test_not_inside_a_transformation():
    with pytest.raises(ValueError, match="called inside `jit`"):
        jax.jit(lambda phi: tuning.minimise(1, phi0=phi).value)(jnp.asarray(0.0))


def test_callbacks_of_wrong_numbers():
    for wrong in (
        lambda: cx.Every(0, print),
        lambda: cx.EarlyStopping(0),
        lambda: cx.EarlyStopping(1, min_delta=-1.0),
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError, match="callback"):
        cx.Every(1, None)
