"""Directions that travel from solve to solve and, in the state, from call to call."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx

N = 80
# A few stiff directions, which move a little with φ, over a spread bulk.
DIAGONAL = jnp.concatenate([jnp.linspace(1.0, 6.0, N - 5), jnp.geomspace(100.0, 1000.0, 5)])


def _inner(w, lam, rotation):
    v = rotation @ w
    energy = 0.5 * jnp.sum(DIAGONAL.astype(v.dtype) * v**2) + 0.5 * jnp.sum(jnp.exp(lam) * w**2)
    return energy + 0.1 * jnp.sum(jnp.cos(w)) - jnp.sum(w)


def _outer(w, lam, _):
    return 0.5 * jnp.sum((w - 0.1) ** 2)


PROBLEM = cx.Bilevel(inner=_inner, outer=_outer)
SOLVER = cx.Steps(optax.sgd(5e-4), 3)


@pytest.fixture
def rotation(rng):
    return jnp.asarray(np.linalg.qr(rng.normal(size=(N, N)))[0])


def _hessian(w, phi, rotation):
    """Of `_inner`, by hand."""
    rotation, penalty = np.asarray(rotation, np.float64), np.exp(np.asarray(phi, np.float64))
    return (rotation.T * np.asarray(DIAGONAL)) @ rotation + np.diag(penalty - 0.1 * np.cos(w))


def _truth(phi, rotation):
    """By Newton steps in NumPy."""
    penalty, w = np.exp(np.asarray(phi, np.float64)), np.zeros(N)
    linear = _hessian(w, phi, rotation) + 0.1 * np.eye(N)
    for _ in range(30):
        gradient = linear @ w - 0.1 * np.sin(w) - 1.0
        w = w - np.linalg.solve(_hessian(w, phi, rotation), gradient)
    assert np.linalg.norm(gradient) < 1e-12
    return -np.linalg.solve(_hessian(w, phi, rotation), w - 0.1) * w * penalty


def _walk(rule, rotation, num_steps=6, dtype=jnp.float64):
    theta0, phi = jnp.zeros(N, dtype), jnp.zeros(N, dtype)
    rotation = rotation.astype(dtype)
    method = {"inner_solver": SOLVER, "rule": rule, "inner_data": rotation}
    call = jax.jit(lambda phi, state: cx.hypergradient(PROBLEM, phi, theta0, state=state, **method))
    state = cx.bilevel.initial_state(PROBLEM, phi, theta0, inner_solver=SOLVER, rule=rule)
    products = []
    for step in range(num_steps):
        point = phi + jnp.asarray(0.1 * step, dtype)
        hg = call(point, state)
        assert jax.tree.structure(hg.state) == jax.tree.structure(state)
        state = hg.state
        products.append(int(hg.stats.num_matvecs))
    assert call._cache_size() == 1
    return products, hg, point


def test_fewer_products_cold_and_warm(rotation):
    rule = cx.Implicit(rtol=1e-6, max_sweeps=6)
    recycled, hg, point = _walk(rule, rotation)
    alone, other, _ = _walk(cx.Implicit(rtol=1e-6, max_sweeps=6, recycle=0), rotation)
    assert other.state.recycled is None
    assert recycled[0] < 0.85 * alone[0], (recycled, alone)
    assert sum(recycled[1:]) < 0.7 * sum(alone[1:]), (recycled, alone)
    truth = _truth(point, rotation)
    assert np.linalg.norm(hg.grad - truth) < 1e-6 * np.linalg.norm(truth)
    assert 0.2 < float(hg.stats.error_estimate) / np.linalg.norm(hg.grad - truth) < 10


def test_float32(rotation):
    products, hg, point = _walk(cx.Implicit(rtol=1e-3, max_sweeps=4), rotation, dtype=jnp.float32)
    alone, _, _ = _walk(cx.Implicit(rtol=1e-3, max_sweeps=4, recycle=0), rotation, dtype=jnp.float32)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(hg.state.recycled.directions))
    truth = _truth(point.astype(jnp.float64), rotation)
    assert np.linalg.norm(np.asarray(hg.grad) - truth) < 1e-3 * np.linalg.norm(truth)
    assert sum(products) < sum(alone)


def test_what_is_known_of_the_curvature_survives_deflation(rotation):
    """Later runs do not see what is deflated; the statistics and the estimate of rounding still know of it."""
    rule = cx.Implicit(rtol=1e-6, max_sweeps=6)
    _, hg, point = _walk(rule, rotation)
    values = np.linalg.eigvalsh(_hessian(np.asarray(hg.theta), point, rotation))
    assert 0.5 < float(hg.stats.curvature_max) / values[-1] < 2.5
    assert 0.5 < float(hg.stats.curvature_min) / values[0] < 2.5


def test_a_state_of_a_rule_that_recycles_otherwise(rotation):
    method = {"inner_solver": SOLVER, "inner_data": rotation}
    kept, none = cx.Implicit(rtol=1e-4, max_sweeps=6), cx.Implicit(rtol=1e-4, max_sweeps=6, recycle=0)
    first = cx.hypergradient(PROBLEM, jnp.zeros(N), jnp.zeros(N), rule=kept, **method)
    assert int(first.state.recycled.count) > 0
    second = cx.hypergradient(PROBLEM, jnp.zeros(N), jnp.zeros(N), rule=none, state=first.state, **method)
    assert second.state.recycled is None
    third = cx.hypergradient(PROBLEM, jnp.full(N, 0.1), jnp.zeros(N), rule=kept, state=second.state, **method)
    assert int(third.state.recycled.count) > 0


def test_failures_are_told_apart_as_without(rotation):
    """A saddle that only the probe sees, and a spent budget, under recycled directions."""
    # The last direction curves down, and no right-hand side ever has a component along it.
    saddle = cx.Bilevel(
        inner=lambda w, lam, r: (
            _inner(w, lam, r) - 60.0 * (r @ w)[0] ** 2 + (r @ jnp.ones(N))[0] * (r @ w)[0]
        ),
        outer=_outer,
    )
    hg = cx.hypergradient(
        saddle,
        jnp.zeros(N),
        jnp.zeros(N),
        inner_solver=SOLVER,
        rule=cx.Implicit(rtol=1e-3, max_sweeps=6),
        inner_data=rotation,
        throw=False,
    )
    assert hg.result == cx.RESULTS.indefinite_curvature
    assert np.isfinite(hg.value)
    rule = cx.Implicit(rtol=1e-6, max_sweeps=6, linear_solver=cx.linear.CG(rtol=1e-12, max_steps=8))
    hg = cx.hypergradient(
        PROBLEM, jnp.zeros(N), jnp.zeros(N), inner_solver=SOLVER, rule=rule, inner_data=rotation, throw=False
    )
    assert hg.result == cx.RESULTS.adjoint_not_converged


def test_a_long_step_and_a_new_curvature_forget(rotation):
    """Directions of another curvature are dropped: after a jump of φ the calls are as quick as before."""
    rule = cx.Implicit(rtol=1e-6, max_sweeps=6)
    method = {"inner_solver": SOLVER, "rule": rule}
    call = jax.jit(
        lambda phi, rotation, state: cx.hypergradient(
            PROBLEM, phi, jnp.zeros(N), inner_data=rotation, state=state, **method
        )
    )
    state = cx.bilevel.initial_state(PROBLEM, jnp.zeros(N), jnp.zeros(N), **method)
    before = [call(jnp.zeros(N), rotation, state)]
    for step in range(3):
        before.append(call(jnp.full(N, 0.02 * step), rotation, before[-1].state))
    # The same spectrum in other directions.
    other = rotation[:, ::-1]
    after = [call(jnp.full(N, 0.06), other, before[-1].state)]
    for step in range(4):
        after.append(call(jnp.full(N, 0.06 + 0.02 * step), other, after[-1].state))
    truth = _truth(jnp.full(N, 0.06), other)
    assert np.linalg.norm(after[0].grad - truth) < 1e-6 * np.linalg.norm(truth)
    assert int(after[-1].stats.num_matvecs) <= 1.5 * int(before[-1].stats.num_matvecs) + 5


def _quadratic(theta, phi, data):
    matrix, vector = data
    return 0.5 * theta @ (matrix @ theta) - vector @ theta + 0.5 * jnp.sum(jnp.exp(phi) * theta**2)


QUADRATIC = cx.Bilevel(inner=_quadratic, outer=lambda t, phi, _: 0.5 * jnp.sum((t - 1.0) ** 2))
RULES = {name: cx.Implicit(rtol=1e-2, max_sweeps=6, recycle=n) for name, n in (("kept", None), ("none", 0))}


@pytest.fixture(scope="module")
def calls():
    """One program a rule."""
    return {
        name: jax.jit(
            lambda phi, data, state, rule=rule: cx.hypergradient(
                QUADRATIC,
                phi,
                jnp.zeros(N),
                inner_solver=optx.LBFGS(1e-2, 1e-2),
                rule=rule,
                inner_data=data,
                state=state,
                throw=False,
            )
        )
        for name, rule in RULES.items()
    }


@pytest.mark.parametrize("change", [0.01, 0.1, 10.0])
def test_a_changed_curvature_is_noticed(rng, change, calls):
    """New data between warm calls, condition 1e8: found by a user, errors of 30 % that called themselves 1 %."""
    products = dict.fromkeys(RULES, 0)
    for _ in range(3):
        values = np.r_[np.geomspace(1.0, 0.1, 5), rng.uniform(1.0, 2.0, N - 5) / 1e8]
        basis, vector = rng.normal(size=(N, N)), jnp.asarray(rng.normal(size=N))
        phi = jnp.asarray(np.log(1e-8) - 2 + rng.normal(size=N))
        method = {"inner_solver": optx.LBFGS(1e-2, 1e-2)}
        states = {
            name: cx.bilevel.initial_state(QUADRATIC, phi, jnp.zeros(N), rule=rule, **method)
            for name, rule in RULES.items()
        }
        for _ in range(4):
            q = np.linalg.qr(basis)[0]
            matrix = (q * values) @ q.T
            matrix = 0.5 * (matrix + matrix.T)
            curvature = matrix + np.diag(np.exp(phi))
            theta = np.linalg.solve(curvature, vector)
            truth = -np.exp(phi) * theta * np.linalg.solve(curvature, theta - 1.0)
            for name, call in calls.items():
                hg = call(phi, (jnp.asarray(matrix), vector), states[name])
                states[name] = hg.state
                products[name] += int(hg.stats.num_matvecs)
                assert hg.result == cx.RESULTS.successful, name
                assert np.linalg.norm(hg.grad - truth) < 1.5e-2 * np.linalg.norm(truth), name
            basis = basis + change * rng.normal(size=(N, N))
    assert products["kept"] < products["none"], products


def test_driver_recycles_and_refuses_the_state_of_another_rule(rotation):
    method = {"inner_solver": SOLVER, "optimizer": optax.adam(1e-2), "num_steps": 2, "inner_data": rotation}
    solution = cx.minimise(PROBLEM, jnp.zeros(N), jnp.zeros(N), rule=cx.Implicit(max_sweeps=6), **method)
    assert int(solution.state.state.warm.recycled.count) > 0
    with pytest.raises(ValueError, match="`state` belongs to a run with another.*`rule`.*recycled"):
        rule = cx.Implicit(max_sweeps=6, recycle=0)
        cx.minimise(PROBLEM, jnp.zeros(N), jnp.zeros(N), rule=rule, state=solution.state, **method)


def test_saddle_that_only_deflation_shows(rng):
    """Ten steps of plain CG see nothing but the large eigenvalues; with these deflated the negative one shows."""
    values = np.r_[-2.0, np.linspace(3.0, 6.0, N - 16), np.geomspace(100.0, 1e4, 15)]
    basis = jnp.asarray(np.linalg.qr(rng.normal(size=(N, N)))[0])
    # No right-hand side of the problem has a component along the first direction.
    start = basis[:, 1:] @ jnp.asarray(rng.normal(size=N - 1))

    def inner(w, phi, _):
        v = basis.T @ w
        return (
            0.5 * jnp.sum(jnp.asarray(values) * v**2) - start @ w + 0.5 * jnp.exp(phi) * jnp.sum(v[1:] ** 2)
        )

    problem = cx.Bilevel(inner=inner, outer=lambda w, phi, _: 0.5 * jnp.sum((basis.T @ w)[1:] ** 2))
    hg = cx.hypergradient(
        problem,
        jnp.array(-2.0),
        jnp.zeros(N),
        inner_solver=cx.Steps(optax.sgd(1e-4), 50),
        rule=cx.Implicit(rtol=1e-4, max_sweeps=6),
        throw=False,
    )
    assert hg.result == cx.RESULTS.indefinite_curvature


def test_vmap_over_tasks(rotation):
    phis = jnp.stack([jnp.zeros(N), jnp.full(N, 0.5)])
    rule = cx.Implicit(rtol=1e-6, max_sweeps=6)

    def two_calls(phi):
        method = {"inner_solver": SOLVER, "rule": rule, "inner_data": rotation}
        first = cx.hypergradient(PROBLEM, phi, jnp.zeros(N), **method)
        return cx.hypergradient(PROBLEM, phi + 0.01, jnp.zeros(N), state=first.state, **method).grad

    for phi, grad in zip(phis, jax.jit(jax.vmap(two_calls))(phis), strict=True):
        truth = _truth(phi + 0.01, rotation)
        assert np.linalg.norm(grad - truth) < 1e-6 * np.linalg.norm(truth)


def test_room_is_bounded_by_default():
    def capacity(size, rule):
        theta = jnp.zeros(size)
        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - lam) ** 2), outer=lambda w, lam, _: jnp.sum(w)
        )
        state = cx.bilevel.initial_state(problem, jnp.zeros(()), theta, inner_solver=SOLVER, rule=rule)
        return 0 if state.recycled is None else state.recycled.directions.shape[0]

    assert capacity(20, cx.Implicit()) == 0  # decomposed
    assert capacity(640, cx.Implicit()) == 24
    assert 0 < capacity(16384, cx.Implicit()) < 24
    assert capacity(1_000_000, cx.Implicit()) == 0
    own = lx.DiagonalLinearOperator(jnp.ones(640))
    assert capacity(640, cx.Implicit(preconditioner=own)) == 0
    assert capacity(640, cx.Implicit(preconditioner=own, recycle=8)) == 8
    assert capacity(1_000_000, cx.Implicit(recycle=2)) == 2
    assert capacity(640, cx.Implicit(rtol=None)) == 0  # one solve, nothing to hand on
    assert capacity(640, cx.Implicit(linear_solver=lx.CG(1e-6, 1e-6))) == 24  # for the solves that judge


@pytest.mark.parametrize("value", [-1, 2.5, True, "all"])
def test_recycle_must_be_a_count(value):
    with pytest.raises(ValueError, match="`recycle` of `Implicit` must be None or an integer"):
        cx.Implicit(recycle=value)


def test_recycle_where_nothing_is_recycled_is_refused():
    root = cx.Bilevel(inner=cx.Root(lambda x, c, _: x**3 - c), outer=lambda x, c, _: jnp.sum(x**2))
    with pytest.raises(ValueError, match="`recycle=8` of `Implicit` needs an error estimate"):
        cx.hypergradient(
            root,
            jnp.ones(200),
            jnp.ones(200),
            inner_solver=optx.Newton(1e-8, 1e-8),
            rule=cx.Implicit(recycle=8),
        )
    with pytest.raises(ValueError, match="`recycle=8` of `Implicit` needs an error estimate"):
        rule = cx.Implicit(rtol=None, recycle=8)
        cx.hypergradient(PROBLEM, jnp.zeros(N), jnp.zeros(N), inner_solver=SOLVER, rule=rule)
