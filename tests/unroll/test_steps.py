"""Optax loops and their settings as hyperparameters, against product formulas and finite differences."""

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


def difference_of(value, direction, step):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam computes `float ** integer`
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

    hg = unrolled(optimizer, 6)
    direction = jnp.asarray(np.random.default_rng(0).standard_normal(12))
    difference = difference_of(value, direction, 1e-5)
    assert float(hg.grad @ direction) == pytest.approx(float(difference), rel=1e-6)


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


def settings(phi, step):
    """Rates for each parameter and step, momentum, decay and a schedule."""
    return optax.chain(
        optax.clip_by_global_norm(phi["clip"]),
        optax.trace(decay=phi["momentum"]),
        optax.add_decayed_weights(phi["decay"]),
        optax.GradientTransformation(
            lambda theta: optax.EmptyState(), lambda g, state, theta: (-phi["rates"][step] * g, state)
        ),
        optax.scale_by_schedule(lambda count: jnp.exp(-phi["cooling"] * count)),
    )


def plain_steps(phi):
    """The same by hand."""
    data, theta, velocity = CASE.inner_data, CASE.theta0 + 0.5, jnp.zeros(12)
    for i in range(5):
        slope = data["H"] @ theta - data["B"] @ CASE.phi - data["b"]
        slope = slope * jnp.minimum(1.0, phi["clip"] / jnp.linalg.norm(slope))
        velocity = slope + phi["momentum"] * velocity
        move = velocity + phi["decay"] * theta
        theta = theta - jnp.exp(-phi["cooling"] * i) * phi["rates"][i] * move
    return theta


def test_every_setting_is_a_hyperparameter():
    """Exactly, and each leaf on its own; the inner loss has no φ here."""
    rng = np.random.default_rng(3)
    phi = {
        "rates": jnp.asarray(0.2 + 0.1 * rng.random((5, 12))),
        "clip": jnp.asarray(0.7),
        "momentum": jnp.asarray(0.6),
        "decay": jnp.asarray(0.05),
        "cooling": jnp.asarray(0.1),
    }
    weights = jnp.asarray(rng.standard_normal(12))
    problem = cx.Bilevel(
        inner=lambda t, p, b: CASE.inner(t, CASE.phi, b), outer=lambda t, p, b: jnp.sum(jnp.sin(weights * t))
    )
    hg = cx.hypergradient(
        problem,
        phi,
        CASE.theta0 + 0.5,
        inner_solver=cx.Steps(settings, 5),
        rule=cx.Unrolled(),
        inner_data=CASE.inner_data,
    )
    expected = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(weights * plain_steps(p)))))(phi)
    assert float(expected["clip"]) != 0.0
    for name in phi:
        assert compare.relative_error(hg.grad[name], expected[name]) <= 1e-11, name


# With the steps of the differences: one accumulates in float32, another bends sharply.
STATEFUL = {
    "injected": (lambda p: optax.inject_hyperparams(optax.adam)(learning_rate=p, eps=1e-3), 1e-4),
    "several batches a step": (
        lambda p: optax.MultiSteps(optax.adam(p, eps=1e-3), 2).gradient_transformation(),
        1e-3,
    ),
    "reads the loss": (lambda p: optax.polyak_sgd(max_learning_rate=10.0, scaling=p, f_min=-20.0), 1e-6),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_optimisers_with_a_state_of_their_own(name):
    """φ in the first state; an update every other step by `cond`; a rate that depends on the loss. By differences."""
    make, step = STATEFUL[name]
    problem = cx.Bilevel(
        inner=lambda t, p, b: CASE.inner(t, CASE.phi, b), outer=lambda t, p, b: jnp.sum(jnp.cos(t))
    )

    @jax.jit
    def value(rate):
        theta = CASE.theta0 + 0.5
        optimizer = optax.with_extra_args_support(make(rate))
        state = optimizer.init(theta)
        for _ in range(6):
            loss, slope = jax.value_and_grad(CASE.inner)(theta, CASE.phi, CASE.inner_data)
            updates, state = optimizer.update(slope, state, theta, value=loss)
            theta = optax.apply_updates(theta, updates)
        return jnp.sum(jnp.cos(theta))

    rate = jnp.asarray(0.05)
    found = [
        cx.hypergradient(
            problem,
            rate,
            CASE.theta0 + 0.5,
            inner_solver=cx.Steps(make, 6),
            rule=cx.Unrolled(mode),
            inner_data=CASE.inner_data,
        )
        for mode in ("mixed", "forward")
    ]
    with jax.numpy_dtype_promotion("standard"):
        by = [value(rate + i * step) - value(rate - i * step) for i in (1, 2)]
        difference = (8 * by[0] - by[1]) / (12 * step)
        assert float(found[0].value) == pytest.approx(float(value(rate)), rel=1e-12)
    for hg in found:
        assert float(hg.grad) == pytest.approx(float(difference), rel=1e-7)


def test_a_root_of_the_users_keeps_its_derivative():
    """√′(0) = 0 is for the optimiser's own roots: a rate √φ at φ = 0 has no derivative, and that is reported."""
    problem = cx.Bilevel(inner=lambda t, p, b: 0.5 * jnp.sum(t**2), outer=lambda t, p, b: jnp.sum(t))
    solver = cx.Steps(lambda p: optax.sgd(jnp.sqrt(p)), 2)

    def run(phi):
        return cx.hypergradient(
            problem,
            jnp.asarray(phi),
            jnp.ones(2),
            inner_solver=solver,
            rule=cx.Unrolled("mixed"),
            throw=False,
        )

    assert run(0.0).result == cx.RESULTS.nonfinite
    assert float(run(0.04).grad) == pytest.approx(2 * 2 * (1 - 0.2) * -0.5 / 0.2, rel=1e-12)


RULES = {
    "mixed": cx.Unrolled("mixed"),
    "reverse": cx.Unrolled("reverse"),
    "mixed, two loops": cx.Unrolled("mixed", "sqrt"),
    "forward": cx.Unrolled("forward"),
    "truncated": cx.Unrolled("mixed", truncate=4),
    "one step": cx.OneStep(),
}


@pytest.mark.parametrize("name", RULES)
def test_stopping_early_is_taking_fewer_steps(name):
    """The step after which it stops is found by a plain loop; then as if `num_steps` had been that many."""
    data, theta, steps = as_numpy(CASE.inner_data), np.full(12, 0.5), 0
    slope = np.full(12, np.inf)
    while np.linalg.norm(slope) > 0.1:
        slope = data["H"] @ theta - data["B"] @ as_numpy(CASE.phi) - data["b"]
        theta, steps = theta - 0.4 * slope, steps + 1
    arguments = {"rule": RULES[name], "inner_data": CASE.inner_data, "outer_data": CASE.outer_data}
    problem = run.problem(CASE.kind, CASE.inner, CASE.outer)
    stopped, fixed = (
        cx.hypergradient(problem, CASE.phi, CASE.theta0 + 0.5, inner_solver=solver, **arguments)
        for solver in (cx.Steps(optax.sgd(0.4), 100, 0.1), cx.Steps(optax.sgd(0.4), steps))
    )
    assert 10 < steps < 90 and int(stopped.stats.num_inner_steps) == steps
    np.testing.assert_allclose(np.asarray(stopped.theta), theta, rtol=1e-12)
    assert compare.relative_error(stopped.grad, fixed.grad) <= 1e-12
    norms, wanted = stopped.stats.path.derivative_norms, fixed.stats.path.derivative_norms
    np.testing.assert_allclose(np.asarray(norms)[: steps + 1], np.asarray(wanted), rtol=1e-11)
    assert np.isnan(np.asarray(norms)[steps + 1 :]).all()


def test_stopping_early_under_vmap_and_in_a_solution_map():
    """Each example stops where it would alone; the map has the derivative of that path, also forward."""
    problem = run.problem(CASE.kind, CASE.inner, CASE.outer)
    solver = cx.Steps(optax.sgd(0.4), 60, 0.2)
    theta_star = cx.solution_map(problem, solver, cx.Unrolled("mixed", "sqrt"))

    def loss(scale):
        return jnp.sum(jnp.sin(theta_star(scale * CASE.phi, CASE.theta0 + 0.5 * scale, CASE.inner_data)))

    scales = jnp.asarray([1.0, 0.1])
    batched = jax.vmap(jax.grad(loss))(scales)
    forward = [jax.jvp(loss, (s,), (jnp.ones(()),))[1] for s in scales]
    np.testing.assert_allclose(np.asarray(batched), np.asarray(forward), rtol=1e-11)


def test_implicit_rule_of_steps_that_stop():
    """The implicit rule sees where they stopped, and how many there were."""
    solver = cx.Steps(optax.sgd(0.4), 1000, 1e-6)
    hg = run.hypergradient(CASE, cx.Implicit(rtol=1e-3), solver=solver)
    assert 100 < int(hg.stats.num_inner_steps) < 900
    assert compare.relative_error(hg.grad, CASE.truth.grad) <= 1e-3


def begun(start, rule=None, optimizer=None, phi=None):
    """One curvature for each number, and a start that is a hyperparameter."""
    curvatures = jnp.asarray([0.5, 1.0, 2.0])
    problem = cx.Bilevel(
        inner=lambda theta, phi, _: 0.5 * jnp.sum(curvatures * (theta - 1.0) ** 2),
        outer=lambda theta, phi, _: jnp.sum((theta + 0.5) ** 2),
    )
    return cx.hypergradient(
        problem,
        {"start": jnp.asarray([0.3, -0.2, 2.0]), "rate": jnp.asarray(0.4)} if phi is None else phi,
        jnp.zeros(3),
        inner_solver=cx.Steps(optimizer or (lambda phi: optax.sgd(phi["rate"])), 5, start=start),
        rule=rule or cx.Unrolled(),
        throw=False,
    )


@pytest.mark.parametrize("mode", ["mixed", "reverse", "forward"])
@pytest.mark.parametrize("kind", ["gradient descent", "a state that holds the start"])
def test_the_start_is_a_hyperparameter(mode, kind):
    """θ_n = 1 + (1 − ηh)ⁿ(θ_0 − 1), and schedule-free gradient descent, whose first state is θ_0, by a plain loop."""
    curvatures = np.asarray([0.5, 1.0, 2.0])
    optimizer = None

    def end(phi):
        return 1 + (1 - phi["rate"] * curvatures) ** 5 * (2 * phi["start"] - 1)

    if kind != "gradient descent":

        def optimizer(phi):
            return optax.contrib.schedule_free(optax.sgd(phi["rate"]), phi["rate"], b1=0.9)

        def end(phi):
            theta = 2 * phi["start"]
            state = optimizer(phi).init(theta)
            for _ in range(5):
                updates, state = optimizer(phi).update(curvatures * (theta - 1), state, theta)
                theta = theta + updates
            return theta

    phi = {"start": jnp.asarray([0.3, -0.2, 2.0]), "rate": jnp.asarray(0.4)}
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.grad(lambda phi: jnp.sum((end(phi) + 0.5) ** 2))(phi)
    hg = begun(lambda phi: 2 * phi["start"], cx.Unrolled(mode), optimizer, phi)
    assert hg.result == cx.RESULTS.successful
    for name in phi:
        assert compare.relative_error(hg.grad[name], expected[name]) <= 1e-12, name


def test_a_truncated_path_does_not_see_its_start():
    hg = begun(lambda phi: phi["start"], cx.Unrolled("mixed", truncate=2))
    assert hg.result == cx.RESULTS.no_influence
    # Of the rules that ask for the end alone, only where it is.
    end = begun(lambda phi: phi["start"], cx.FirstOrder()).theta
    np.testing.assert_allclose(end, begun(lambda phi: phi["start"]).theta, rtol=1e-12)


def test_integers_of_numpy_are_numbers_of_steps():
    assert cx.Steps(optax.sgd(0.1), np.int64(3)).num_steps == 3
    assert cx.MemoryBudget(np.prod((3, 4))) == cx.MemoryBudget(12)


WRONG = {
    "no steps": (lambda: cx.Steps(optax.sgd(0.1), 0), ValueError, "num_steps.*at least 1"),
    "negative tolerance": (lambda: cx.Steps(optax.sgd(0.1), 5, -1.0), ValueError, "tolerance.*at least 0"),
    "tolerance of a name": (lambda: cx.Steps(optax.sgd(0.1), 5, "small"), ValueError, "tolerance"),
    "tolerance and a sampler": (
        lambda: cx.hypergradient(
            run.problem(CASE.kind, CASE.inner, CASE.outer),
            CASE.phi,
            CASE.theta0,
            inner_solver=cx.Steps(optax.sgd(0.1), 5, 1e-3),
            rule=cx.Unrolled(),
            inner_data=lambda key: CASE.inner_data,
            key=jax.random.key(0),
        ),
        ValueError,
        "tolerance.*sampler",
    ),
    "three arguments": (lambda: cx.Steps(lambda a, b, c: optax.sgd(a), 3), TypeError, "function of phi"),
    "no argument": (lambda: cx.Steps(lambda: optax.sgd(0.1), 3), TypeError, "function of phi"),
    "a start that is no function": (
        lambda: cx.Steps(optax.sgd(0.1), 3, start=jnp.zeros(3)),
        TypeError,
        "`start`.*function",
    ),
    "a start of another shape": (lambda: begun(lambda phi: phi["start"][:2]), ValueError, "`start`.*shapes"),
    "no transformation": (lambda: unrolled(lambda phi, step: 0.1, 2), TypeError, "GradientTransformation"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_says_what_to_do(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        call()
