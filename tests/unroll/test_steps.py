"""Plain reverse through an optax loop, against product formulas and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import compare, problems, run
from helpers.problem import as_numpy

CASE = problems.MINIMA["condition 1e1"]()


def rollout(data, phi, rate, steps, start):
    """θ_K and dθ_K/dφ of K gradient steps: θ_K = P_K θ_0 + Σ …, Z_k = (I − ηH) Z_{k−1} + ηB."""
    theta, slope = start.copy(), np.zeros((len(start), len(phi)))
    decay = np.eye(len(start)) - rate * data["H"]
    for _ in range(steps):
        slope = decay @ slope + rate * data["B"]
        theta = theta - rate * (data["H"] @ theta - data["B"] @ phi - data["b"])
    return theta, slope


def outer_terms(outer, theta, phi):
    pull = outer["M"] @ (theta - outer["t"]) + outer["c"]
    return pull, outer["rho"] * phi


def unrolled(optimizer, steps, phi=None, **kwargs):
    return cx.hypergradient(
        run.problem(CASE.kind, CASE.inner, CASE.outer),
        CASE.phi if phi is None else phi,
        CASE.theta0 + 0.5,
        inner_solver=cx.Steps(optimizer, steps),
        rule=cx.Unrolled(),
        inner_data=CASE.inner_data,
        outer_data=CASE.outer_data,
        **kwargs,
    )


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_gradient_descent(steps):
    """`dF/dφ = ρφ + Z_Kᵀ∇f(θ_K)`, Z by the recursion with the newest factor on the left."""
    inner, outer, phi = as_numpy(CASE.inner_data), as_numpy(CASE.outer_data), as_numpy(CASE.phi)
    theta, slope = rollout(inner, phi, 0.4, steps, np.full(12, 0.5))
    pull, direct = outer_terms(outer, theta, phi)
    hg = unrolled(optax.sgd(0.4), steps)
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(np.asarray(hg.theta), theta, rtol=1e-12)
    assert compare.relative_error(hg.grad, direct + slope.T @ pull) <= 1e-12


def test_more_steps_approach_the_implicit_derivative():
    """The error is O(K qᴷ) with q = max |1 − ηλ|: below the bound with its factor K, for every K."""
    values = np.linalg.eigvalsh(as_numpy(CASE.inner_data)["H"])
    rate = 1.0 / values[-1]
    q = np.max(np.abs(1 - rate * values))
    errors = {
        k: compare.relative_error(unrolled(optax.sgd(rate), k).grad, CASE.truth.grad) for k in (40, 80, 160)
    }
    for k, error in errors.items():
        assert error <= 50.0 * k * q**k
    assert errors[160] < errors[80] < errors[40]


def product_inner(theta, phi, batch):
    return 0.5 * theta @ (batch["H"] @ theta) - batch["b"] @ theta


def product_outer(theta, phi, batch):
    return batch @ theta


@pytest.mark.parametrize("kind", ["one rate", "a rate a step"])
def test_learning_rate_product_formula(kind):
    """`θ_K = θ* + ∏(I − η_k H)(θ_0 − θ*)`; `dθ_K/dη_j` leaves out factor j and gains −H (θ_0 − θ*)."""
    data = as_numpy(CASE.inner_data)
    h, solution = data["H"], np.linalg.solve(data["H"], data["b"])
    steps, weights = 7, np.linspace(1.0, -1.0, 12)
    rates = np.full(steps, 0.3) if kind == "one rate" else np.linspace(0.1, 0.6, steps)
    start = np.full(12, 0.5)
    single = np.zeros(steps)
    for j in range(steps):
        vector = start - solution
        for k, rate in enumerate(rates):
            vector = -h @ vector if k == j else vector - rate * (h @ vector)
        single[j] = weights @ vector
    expected = single.sum() if kind == "one rate" else single
    phi = jnp.asarray(0.3 if kind == "one rate" else rates)

    def optimizer(phi):
        return optax.sgd(phi if kind == "one rate" else lambda count: phi[count])

    hg = cx.hypergradient(
        cx.Bilevel(inner=product_inner, outer=product_outer),
        phi,
        jnp.asarray(start),
        inner_solver=cx.Steps(optimizer, steps),
        rule=cx.Unrolled(),
        inner_data=CASE.inner_data,
        outer_data=jnp.asarray(weights),
    )
    assert hg.result == cx.RESULTS.successful
    np.testing.assert_allclose(np.asarray(hg.grad), expected, rtol=1e-10)


def test_order_of_the_product():
    """Two steps with different curvatures do not commute: the newest factor stands on the left."""
    a = np.array([[2.0, 0.7], [0.7, 1.0]])
    b = np.array([[1.0, -0.4], [-0.4, 3.0]])
    rate, weights, phi = 0.2, np.array([1.0, -2.0]), np.array([0.3, 0.8])

    # θ carries a clock, so that step 1 sees A and step 2 sees B; φ is the start of the walk through ∇g.
    def inner(theta, phi, batch):
        matrix = jnp.where(theta["clock"] < 0.5, jnp.asarray(a), jnp.asarray(b))
        walk = 0.5 * theta["w"] @ (jax.lax.stop_gradient(matrix) @ theta["w"]) - phi @ theta["w"]
        return walk - theta["clock"] / rate

    def outer(theta, phi, batch):
        return jnp.asarray(weights) @ theta["w"]

    start = {"w": jnp.zeros(2), "clock": jnp.zeros(())}
    hg = cx.hypergradient(
        cx.Bilevel(inner=inner, outer=outer),
        jnp.asarray(phi),
        start,
        inner_solver=cx.Steps(optax.sgd(rate), 2),
        rule=cx.Unrolled(),
    )
    slope = rate * np.eye(2)
    slope = (np.eye(2) - rate * b) @ slope + rate * np.eye(2)
    assert compare.relative_error(hg.grad, slope.T @ weights) <= 1e-12
    assert float(hg.theta["clock"]) == 2.0


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.2, momentum=0.9),
    "adam": lambda: optax.adam(0.05, eps=1e-3),
    "adamw": lambda: optax.adamw(0.05, eps=1e-3, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(0.02, eps=1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.2)),
}


def loosely(call):
    """Optax's Adam computes `float ** integer`, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        return call()


def difference_of(value, direction, step):
    return (value(CASE.phi + step * direction) - value(CASE.phi - step * direction)) / (2 * step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_against_finite_differences(name):
    """Truth: the plain Python loop of optax, differenced; nothing of the library in it."""
    optimizer = OPTIMIZERS[name]()

    def value(phi):
        theta = CASE.theta0 + 0.5
        state = optimizer.init(theta)
        data = CASE.inner_data
        for _ in range(6):
            slope = data["H"] @ theta - data["B"] @ phi - data["b"]
            updates, state = optimizer.update(slope, state, theta)
            theta = optax.apply_updates(theta, updates)
        return CASE.outer(theta, phi, CASE.outer_data)

    hg = loosely(lambda: unrolled(optimizer, 6))
    assert float(hg.value) == pytest.approx(float(loosely(lambda: value(CASE.phi))), rel=1e-10)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(12))
    step = 1e-5
    difference = loosely(lambda: difference_of(value, direction, step))
    assert float(hg.grad @ direction) == pytest.approx(float(difference), rel=1e-6)


def test_dead_parameter_under_adam_is_right_or_reported():
    """A parameter whose gradient is always zero: √′(0) makes the derivative of Adam's update NaN."""

    def inner(theta, phi, batch):
        return 0.5 * jnp.sum((theta[:2] - phi) ** 2) + 0.0 * theta[2]

    def outer(theta, phi, batch):
        return jnp.sum(theta**2)

    def value(phi, eps_root):
        adam = optax.adam(0.05, eps_root=eps_root)
        theta, state = jnp.ones(3), adam.init(jnp.ones(3))
        for _ in range(4):
            slope = jnp.concatenate([theta[:2] - phi, jnp.zeros(1)])
            updates, state = adam.update(slope, state, theta)
            theta = optax.apply_updates(theta, updates)
        return float(jnp.sum(theta**2))

    problem = cx.Bilevel(inner=inner, outer=outer)
    phi = jnp.asarray([0.4, -0.2])

    def unroll(eps_root):
        steps = cx.Steps(optax.adam(0.05, eps_root=eps_root), 4)
        arguments = {"inner_solver": steps, "rule": cx.Unrolled(), "throw": False}
        return loosely(lambda: cx.hypergradient(problem, phi, jnp.ones(3), **arguments))

    def check(hg, eps_root):
        for i, unit in enumerate(np.eye(2)):
            up, down = (loosely(lambda s=s, u=unit: value(phi + s * u, eps_root)) for s in (1e-5, -1e-5))
            assert float(hg.grad[i]) == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-8)

    plain = unroll(0.0)
    if plain.result == cx.RESULTS.successful:
        check(plain, 0.0)
    else:
        assert plain.result == cx.RESULTS.nonfinite
    smoothed = unroll(1e-12)
    assert smoothed.result == cx.RESULTS.successful
    check(smoothed, 1e-12)


def test_diverging_steps_are_reported():
    """η > 2/λmax: the walk blows up. Control: η = 1/λmax."""
    assert unrolled(optax.sgd(1.0), 10).result == cx.RESULTS.successful
    hg = unrolled(optax.sgd(1e40), 20, throw=False)
    assert hg.result == cx.RESULTS.nonfinite
    with pytest.raises(Exception, match="(?i)non-?finite|diverge"):
        unrolled(optax.sgd(1e40), 20)


def test_unrolled_matches_under_jit_and_vmap():
    problem = run.problem(CASE.kind, CASE.inner, CASE.outer)
    steps = cx.Steps(optax.sgd(0.4), 3)

    def one(phi):
        return cx.hypergradient(
            problem,
            phi,
            CASE.theta0,
            inner_solver=steps,
            rule=cx.Unrolled(),
            inner_data=CASE.inner_data,
            outer_data=CASE.outer_data,
        ).grad

    points = jnp.stack([CASE.phi, -CASE.phi])
    batched = jax.jit(jax.vmap(one))(points)
    for point, grad in zip(points, batched, strict=True):
        assert compare.relative_error(grad, one(point)) <= 1e-12


def test_minibatches_are_drawn_from_the_key():
    """The same key gives the same hypergradient, another key another; truth by replaying the draws."""
    data = {"x": jax.random.normal(jax.random.key(1), (20, 3)), "y": jnp.arange(20.0)}

    def inner(theta, phi, batch):
        return 0.5 * jnp.mean((batch["x"] @ theta - batch["y"]) ** 2) + 0.5 * jnp.exp(phi) * jnp.sum(theta**2)

    def outer(theta, phi, batch):
        return 0.5 * jnp.mean((batch["x"] @ theta - batch["y"]) ** 2)

    problem = cx.Bilevel(inner=inner, outer=outer)
    steps = cx.Steps(optax.sgd(0.1), 5)

    def run_with(key):
        return cx.hypergradient(
            problem,
            jnp.asarray(-1.0),
            jnp.zeros(3),
            inner_solver=steps,
            rule=cx.Unrolled(),
            inner_data=cx.Minibatches(data, 4),
            outer_data=data,
            key=key,
        )

    first, again, other = (
        run_with(jax.random.key(3)),
        run_with(jax.random.key(3)),
        run_with(jax.random.key(4)),
    )
    assert float(first.grad) == float(again.grad)
    assert float(first.grad) != float(other.grad)


def test_second_derivative_through_steps():
    """`jax.grad` of the unrolled solution map twice: quadratic, so the Hessian is ZᵀMZ + ρI."""
    problem = run.problem(CASE.kind, CASE.inner, CASE.outer)
    theta_star = cx.solution_map(problem, cx.Steps(optax.sgd(0.4), 3), cx.Unrolled())

    def loss(phi):
        return CASE.outer(theta_star(phi, CASE.theta0, CASE.inner_data), phi, CASE.outer_data)

    inner, outer, phi = as_numpy(CASE.inner_data), as_numpy(CASE.outer_data), as_numpy(CASE.phi)
    _, slope = rollout(inner, phi, 0.4, 3, np.zeros(12))
    expected = slope.T @ outer["M"] @ slope + outer["rho"] * np.eye(12)
    assert compare.relative_error(jax.hessian(loss)(CASE.phi), expected) <= 1e-12
