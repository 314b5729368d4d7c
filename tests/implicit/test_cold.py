"""Calls that are known to be cold while tracing: the same result from a smaller program."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import curvax as cx

SIZE = 40
CURVATURE = jnp.linspace(1.0, 30.0, SIZE)
PROBLEM = cx.Bilevel(
    inner=lambda w, lam, _: 0.5 * jnp.sum(CURVATURE * (w - 1) ** 2) + jnp.sum(jnp.exp(lam) * w**2),
    outer=lambda w, lam, _: jnp.sum((w - 0.5) ** 2) + 0.1 * jnp.sum(lam**2),
)
PHI, THETA = jnp.zeros(SIZE), jnp.zeros(SIZE)
SOLVER = optx.BFGS(1e-8, 1e-8)


def call(phi: jax.Array, rule: cx.Implicit, state: object = None) -> cx.bilevel.Hypergradient:
    return cx.hypergradient(PROBLEM, phi, THETA, inner_solver=SOLVER, rule=rule, state=state)


@pytest.fixture(scope="module", params=[None, 1e-6], ids=["plain", "estimate"])
def runs(request: pytest.FixtureRequest) -> tuple:
    rule = cx.Implicit(rtol=request.param, max_sweeps=3)
    return rule, call(PHI, rule), eqx.filter_jit(call)(PHI, rule)


def test_traced_call_is_the_eager_one(runs: tuple) -> None:
    _, eager, traced = runs
    np.testing.assert_allclose(traced.grad, eager.grad, rtol=1e-9)
    assert jax.tree.structure(traced.state) == jax.tree.structure(eager.state)
    # Without an estimate the product with a start of zero is saved.
    saved = 1 if np.isnan(eager.stats.error_estimate) else 0
    assert int(traced.stats.num_matvecs) == int(eager.stats.num_matvecs) - saved


def test_its_state_warms_an_eager_call(runs: tuple) -> None:
    rule, eager, traced = runs
    assert bool(traced.state.warm)
    warm = call(PHI, rule, traced.state)
    np.testing.assert_allclose(warm.grad, eager.grad, rtol=1e-5)
    assert int(warm.stats.num_inner_steps) < int(eager.stats.num_inner_steps) // 4


def test_cold_calls_inside_a_loop(runs: tuple) -> None:
    rule, eager, _ = runs

    def descend(phi: jax.Array, _: None) -> tuple:
        hg = call(phi, rule)
        return phi - 0.1 * hg.grad, hg.state.warm

    (phi, warm) = eqx.filter_jit(lambda: jax.lax.scan(descend, PHI, None, length=2))()
    second = call(PHI - 0.1 * eager.grad, rule)
    assert warm.all()
    np.testing.assert_allclose(phi, PHI - 0.1 * eager.grad - 0.1 * second.grad, atol=1e-6)
