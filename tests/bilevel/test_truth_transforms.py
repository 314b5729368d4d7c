"""The same hypergradient under `jit`, under `vmap`, warm, and with modules and half precision."""

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
from helpers.polish import polisher
from helpers.regression import ridge_features
from helpers.tasks import quadratic_tasks, task_inner, task_outer

RULE = cx.Implicit(rtol=1e-6, max_sweeps=20)


def test_eager_equals_jit():
    case = problems.MINIMA["ridge, features"]()
    eager = run.hypergradient(case, RULE)
    inside = eqx.filter_jit(lambda: run.hypergradient(case, RULE))()
    assert compare.relative_error(inside.grad, eager.grad) <= 1e-12
    assert bool(inside.result == cx.RESULTS.successful)
    jitted = jax.jit(lambda phi: run.hypergradient(_with_phi(case, phi), RULE).grad)(case.phi)
    assert compare.relative_error(jitted, case.truth.grad) <= 1e-6


def _with_phi(case, phi):
    return dataclasses.replace(case, phi=phi)


def test_vmap_over_tasks():
    """Six iMAML tasks in one call: each equals its own truth, and their mean the meta-gradient."""
    case = quadratic_tasks()
    problem = cx.Bilevel(inner=task_inner, outer=task_outer)
    solver = optx.BFGS(rtol=1e-9, atol=1e-9)

    def one(inner_data, outer_data):
        return cx.hypergradient(
            problem,
            case.phi,
            case.theta0,
            inner_solver=solver,
            rule=RULE,
            inner_data=inner_data,
            outer_data=outer_data,
        )

    hg = jax.jit(jax.vmap(one))(case.inner_data, case.outer_data)
    assert hg.grad.shape == (6, 5)
    truth = case.truth
    for got, expected in zip(hg.grad, truth.grad, strict=True):
        assert compare.relative_error(got, expected) <= 1e-6
    assert compare.relative_error(hg.theta, truth.theta) <= 1e-5
    assert float(jnp.sum(hg.value)) == pytest.approx(truth.value, rel=1e-6)
    assert bool(jnp.all(hg.result == cx.RESULTS.successful))


def test_vmap_keeps_failures_apart():
    """One task of three is a saddle: it alone is reported."""
    good, bad = problems.definite(), problems.indefinite()
    data = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), good.inner_data, bad.inner_data)
    outer = jax.tree.map(lambda a, b: jnp.stack([a, b, a]), good.outer_data, bad.outer_data)
    start = jnp.stack([jnp.asarray(case.truth.theta) for case in (good, bad, good)])
    problem = run.problem(good.kind, good.inner, good.outer)
    stay = cx.Steps(optax.sgd(0.0), 1)

    def one(theta0, inner_data, outer_data):
        return cx.hypergradient(
            problem,
            good.phi,
            theta0,
            inner_solver=stay,
            rule=RULE,
            inner_data=inner_data,
            outer_data=outer_data,
            throw=False,
        )

    hg = jax.jit(jax.vmap(one))(start, data, outer)
    succeeded = np.asarray(hg.result == cx.RESULTS.successful)
    assert succeeded.tolist() == [True, False, True]
    assert np.asarray(hg.result == cx.RESULTS.indefinite_curvature).tolist() == [False, True, False]
    for i in (0, 2):
        assert compare.relative_error(hg.grad[i], good.truth.grad) <= 1e-6


def test_warm_state_is_cheaper_and_as_exact():
    case = problems.MINIMA["ridge, features"]()
    cold = run.hypergradient(case, RULE)
    moved = _with_phi(case, case.phi + 1e-3)
    warm = run.hypergradient(moved, RULE, state=cold.state)
    assert compare.relative_error(warm.grad, moved.truth.grad) <= 1e-6
    assert bool(warm.result == cx.RESULTS.successful)
    fresh = run.hypergradient(moved, RULE)
    assert int(warm.stats.num_inner_steps) <= int(fresh.stats.num_inner_steps)


def test_warm_state_of_another_problem_does_no_harm():
    """A state from far away may cost steps, never accuracy."""
    case = problems.MINIMA["ridge, features"]()
    far = _with_phi(case, case.phi + 3.0)
    state = run.hypergradient(far, RULE).state
    hg = run.hypergradient(case, RULE, state=state)
    assert bool(hg.result == cx.RESULTS.successful)
    assert compare.relative_error(hg.grad, case.truth.grad) <= 1e-6


def test_warm_chain_in_a_scan():
    """The state has one structure, so that it can be carried through `lax.scan`."""
    case = problems.MINIMA["ridge, features"]()
    problem = run.problem(case.kind, case.inner, case.outer)
    solver = run.inner_solver(case.kind)
    state = cx.bilevel.initial_state(problem, case.phi, case.theta0, inner_solver=solver, rule=RULE)
    offsets = jnp.linspace(0.0, 0.2, 4)

    def step(state, offset):
        hg = run.hypergradient(_with_phi(case, case.phi + offset), RULE, state=state)
        return hg.state, hg.grad

    _, grads = jax.jit(lambda s: jax.lax.scan(step, s, offsets))(state)
    for offset, grad in zip(np.asarray(offsets), grads, strict=True):
        expected = case.reference(np.asarray(case.phi) + offset).grad
        assert compare.relative_error(grad, expected) <= 1e-6


def test_awkward_tree_structure():
    """`grad` mirrors φ: None at strings, integers and None; an empty leaf is no missing influence."""
    case = problems.MINIMA["awkward tree"]()
    hg = run.hypergradient(case, RULE)
    assert set(hg.grad) == set(case.phi)
    assert hg.grad["steps"] is None and hg.grad["name"] is None and hg.grad["none"] is None
    assert hg.grad["empty"].shape == (0,)
    assert hg.grad["shift"].shape == ()
    assert hg.theta["empty"].shape == (0, 3) and hg.theta["none"] is None
    assert compare.relative_error(hg.grad, case.truth.grad) <= 1e-6


def test_equinox_module_as_theta():
    """θ is a module with a static activation and an integer; truth is that of the bare array."""
    case = problems.MINIMA["ridge, features"]()

    class Linear(eqx.Module):
        weight: jax.Array
        calls: jax.Array
        activation: object = eqx.field(static=True)

        def __call__(self, x):
            return self.activation(x @ self.weight)

    def inner(model, phi, batch):
        fit = 0.5 * jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        return fit + 0.5 * jnp.sum(jnp.exp(phi) * model.weight**2)

    def outer(model, phi, batch):
        return 0.5 * jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    model = Linear(case.theta0, jnp.asarray(3), lambda x: x)
    hg = cx.hypergradient(
        cx.Bilevel(inner=inner, outer=outer),
        case.phi,
        model,
        inner_solver=run.inner_solver("minimum"),
        rule=RULE,
        inner_data=case.inner_data,
        outer_data=case.outer_data,
    )
    assert isinstance(hg.theta, Linear)
    assert int(hg.theta.calls) == 3
    assert compare.relative_error(hg.grad, case.truth.grad) <= 1e-6


def test_equinox_mlp_as_theta():
    """`eqx.nn.MLP` holds functions among its leaves; Optimistix alone refuses it."""
    model = eqx.nn.MLP(2, "scalar", 2, 1, activation=jnp.tanh, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (12, 2))
    y = jnp.sin(2.0 * x[:, 0]) + x[:, 1] ** 2

    def inner(model, phi, batch):
        fit = jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)
        params = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
        return fit + jnp.exp(phi) * sum(jnp.sum(p**2) for p in params)

    def outer(model, phi, batch):
        return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

    hg = cx.hypergradient(
        cx.Bilevel(inner=inner, outer=outer),
        jnp.asarray(-4.0),
        model,
        inner_solver=optx.BFGS(rtol=1e-8, atol=1e-8),
        rule=cx.Implicit(rtol=1e-4, max_sweeps=10),
        inner_data=(x, y),
        outer_data=(x[:6], y[:6]),
    )
    params, static = eqx.partition(hg.theta, eqx.is_inexact_array)
    polish = polisher(
        lambda p, phi, b: inner(eqx.combine(p, static), phi, b),
        lambda p, phi, b: outer(eqx.combine(p, static), phi, b),
        params,
        jnp.asarray(-4.0),
    )
    truth = polish(params, jnp.asarray(-4.0), (x, y), (x[:6], y[:6]))
    assert float(truth.smallest_eigenvalue) > 0 and float(truth.distance) < 1e-2
    assert compare.relative_error(hg.grad, truth.grad[0]) <= 2e-4


def test_half_precision_parameters():
    """bf16 θ and φ: the data and φ are rounded, the truth is that of the rounded problem."""
    case = problems.MINIMA["ridge, features"](np.float32)
    phi = case.phi.astype(jnp.bfloat16)

    def inner(theta, phi, batch):
        return ridge_features(theta.astype(jnp.float32), phi.astype(jnp.float32), batch)

    def outer(theta, phi, batch):
        return 0.5 * jnp.mean((batch["x"] @ theta.astype(jnp.float32) - batch["y"]) ** 2)

    hg = cx.hypergradient(
        cx.Bilevel(inner=inner, outer=outer),
        phi,
        case.theta0.astype(jnp.bfloat16),
        inner_solver=optx.BFGS(rtol=1e-4, atol=1e-4),
        rule=cx.Implicit(rtol=5e-2, max_sweeps=20),
        inner_data=case.inner_data,
        outer_data=case.outer_data,
    )
    expected = case.reference(np.asarray(phi, np.float64)).grad
    assert hg.grad.dtype == jnp.bfloat16
    assert compare.relative_error(hg.grad, expected) <= 5e-2


def test_no_second_compile():
    """Other values, a warm state, another tolerance: the user's function is not traced again."""
    case = problems.MINIMA["ridge, features"]()
    traces = []

    def inner(theta, phi, batch):
        traces.append(None)
        return ridge_features(theta, phi, batch)

    problem = cx.Bilevel(inner=inner, outer=case.outer)
    solver = optx.LBFGS(rtol=1e-9, atol=1e-9)
    arguments = {"inner_solver": solver, "inner_data": case.inner_data, "outer_data": case.outer_data}
    hg = cx.hypergradient(problem, case.phi, case.theta0, rule=RULE, **arguments)
    first = len(traces)
    assert first > 0
    again = cx.hypergradient(problem, case.phi + 0.1, case.theta0 + 1.0, rule=RULE, **arguments)
    looser = cx.Implicit(rtol=1e-4, max_sweeps=20)
    cx.hypergradient(problem, case.phi, case.theta0, rule=looser, **arguments)
    cx.hypergradient(problem, case.phi, case.theta0, rule=RULE, state=hg.state, **arguments)
    cx.hypergradient(problem, case.phi, case.theta0, rule=RULE, state=again.state, **arguments)
    assert len(traces) == first
    # Benign control, traced and not compiled: the counter does count.
    narrow = lambda phi, theta0: cx.hypergradient(problem, phi, theta0, rule=RULE, **_narrow(arguments)).grad  # noqa: E731
    jax.eval_shape(narrow, case.phi[:4], case.theta0[:4])
    assert len(traces) > first


def _narrow(arguments):
    def cut(data):
        return {"x": data["x"][:, :4], "y": data["y"]}

    narrowed = {"inner_data": cut(arguments["inner_data"]), "outer_data": cut(arguments["outer_data"])}
    return arguments | narrowed


def test_minibatch_sampler_needs_a_key():
    case = problems.MINIMA["ridge, features"]()
    sampler = cx.Minibatches(case.inner_data, 8)
    problem = run.problem(case.kind, case.inner, case.outer)
    steps = cx.Steps(optax.sgd(0.1), 3)
    arguments = {"inner_solver": steps, "rule": cx.Implicit(rtol=None), "outer_data": case.outer_data}
    with pytest.raises(ValueError, match="key"):
        cx.hypergradient(problem, case.phi, case.theta0, inner_data=sampler, **arguments)
    hg = cx.hypergradient(
        problem, case.phi, case.theta0, inner_data=sampler, key=jax.random.key(0), **arguments
    )
    assert np.all(np.isfinite(np.asarray(hg.grad)))


@pytest.mark.parametrize("solver", [cx.linear.CG, cx.linear.Auto], ids=lambda solver: solver.__name__)
def test_another_tolerance_is_no_other_program(solver):
    """Neither of the rule nor of the linear solver within it."""
    traced = []

    def inner(theta, phi, batch):
        traced.append(1)
        return jnp.sum((theta - phi) ** 2)

    problem = cx.Bilevel(inner=inner, outer=lambda theta, phi, batch: jnp.sum(theta**2))
    counts = []
    for tolerance in (1e-3, 1e-4, 1e-5):
        rule = cx.Implicit(rtol=tolerance, linear_solver=solver(rtol=tolerance))
        cx.hypergradient(
            problem, jnp.ones(3), jnp.zeros(3), inner_solver=optx.BFGS(tolerance, tolerance), rule=rule
        )
        counts.append(len(traced))
    assert counts[0] == counts[2]
