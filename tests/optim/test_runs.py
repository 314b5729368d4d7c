"""Whole runs: one compilation, the operations of a fused step, schedules, resume bit for bit, and what goes wrong."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax.optim import Damping, Factors, Schedule
from curvax.optim._turns import Turns
from helpers.quick import quick
from helpers.training import (
    EMPIRICAL,
    FIXED,
    SOFTMAX,
    SQUARED,
    normal,
    objective,
    stepper,
    tanh_net,
    tanh_problem,
)

OPTIMISERS = ("kfac", "ekfac", "kf_trust_region", "kbfgs")


def make(name, x, **options):
    """An optimiser by name; K-BFGS has no statistics to choose and no schedule."""
    options = {} if name == "kbfgs" else options
    return getattr(cx.optim, name)(tanh_net, SQUARED, example=x[0], **options)


@ft.cache
def runner(name):
    """An optimiser, its compiled step for `tanh_problem`, and what grows by one at each trace of that."""
    traces = []

    def compiled(fn):
        def counted(*args):
            traces.append(1)
            return fn(*args)

        return quick(counted)

    optimiser = make(name, jnp.zeros((1, 3)), factors=EMPIRICAL, schedule=Schedule(statistics=2, inverses=3))
    return optimiser, stepper(optimiser, tanh_net, SQUARED, compiled=compiled), traces


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_compilation_and_resume_bit_for_bit(name, key, tmp_path):
    """Ten steps; and five, saved, restored and five more."""
    params, x, y = tanh_problem(key)
    optimiser, step, traces = runner(name)
    state, saved = optimiser.init(params), None
    for number in range(10):
        params, state, _, _ = step(params, state, x, y, jax.random.fold_in(key, number))
        if number == 4:
            leaves, structure = jax.tree.flatten((params, state))
            np.savez(tmp_path / "state.npz", *[np.asarray(leaf) for leaf in leaves])
            with np.load(tmp_path / "state.npz") as file:
                saved = jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    value = quick(lambda params: objective(tanh_net, SQUARED, params, x, y))
    assert value(params) < value(saved[0])
    again = saved
    for number in range(5, 10):
        again = step(*again, x, y, jax.random.fold_in(key, number))[:2]
    jax.tree.map(np.testing.assert_array_equal, again, (params, state))
    assert len(traces) == 1


def test_in_a_chain(key):
    """What comes after sees its step."""
    params, x, y = tanh_problem(key)
    optimiser, step, _ = runner("kfac")
    chained = optax.chain(optimiser, optax.scale(0.5))
    whole = step(params, optimiser.init(params), x, y)[2]
    half = stepper(chained, tanh_net, SQUARED)(params, chained.init(params), x, y)[2]
    jax.tree.map(lambda whole, half: np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-9), whole, half)


def test_update_in_one_jit_costs_what_a_fused_step_does():
    """The forward pass is shared: as many operations as in a step written out by hand for this network."""
    w, b, v, x, y = normal(
        jax.random.key(0), (64, 32), (64,), (16, 64), (256, 32), (256, 16), dtype=jnp.float32
    )
    params = {"w": w, "b": b, "v": v}
    model_fn = lambda p, x: p["v"] @ jnp.tanh(p["w"] @ x + p["b"])
    frozen = Schedule(inverses=1000, staggered=False)
    optimiser = cx.optim.kfac(
        model_fn, SQUARED, 0.1, example=x[0], damping=FIXED, factors=EMPIRICAL, schedule=frozen
    )

    def separate(params, state, x, y):
        grads = jax.grad(lambda p: objective(model_fn, SQUARED, p, x, y))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y)
        return optax.apply_updates(params, updates), state

    def fused(params, factors, inverses, x, y):
        hidden = jnp.tanh(x @ params["w"].T + params["b"])
        g2 = hidden @ params["v"].T - y
        g1 = (g2 @ params["v"]) * (1 - hidden**2)
        bias = jnp.concatenate([x, jnp.ones((256, 1), x.dtype)], axis=1)
        moments = [(a.T @ a / 256, g.T @ g / 256) for a, g in ((bias, g1), (hidden, g2))]
        factors = jax.tree.map(lambda old, new: old + 0.05 * (new - old), factors, moments)
        grads = [g1.T @ bias / 256, g2.T @ hidden / 256]
        steps = [0.1 * g @ d @ a for d, (a, g) in zip(grads, inverses, strict=True)]
        moved = {"w": w - steps[0][:, :-1], "b": b - steps[0][:, -1], "v": v - steps[1]}
        return moved, factors

    pairs = [
        (jnp.eye(33, dtype=x.dtype), jnp.eye(64, dtype=x.dtype)),
        (jnp.eye(64, dtype=x.dtype), jnp.eye(16, dtype=x.dtype)),
    ]
    options = {"xla_backend_optimization_level": 0}
    flops = lambda fn, *args: jax.jit(fn).lower(*args).compile(options).cost_analysis()["flops"]
    ours = flops(separate, params, optimiser.init(params), x, y)
    theirs = flops(fused, params, pairs, pairs, x, y)
    apart = flops(
        lambda p, s, g: optimiser.update(g, s, p, inputs=x, targets=y), params, optimiser.init(params), params
    )
    gradient = flops(lambda p: jax.grad(lambda p: objective(model_fn, SQUARED, p, x, y))(p), params)
    # A product of two matrices for each inverse, which `fused` has none of, and what is done with every entry.
    inverses = 2 * (2 * 64**3 + 33**3 + 16**3) + 50 * (2 * 64**2 + 33**2 + 16**2)
    assert ours <= 1.05 * theirs + inverses
    assert ours < apart + gradient - 0.9 * 2 * 256 * (32 * 64 + 64 * 16)  # a forward pass less


# Schedules.


def test_turns_share_the_work_evenly():
    costs = [257**3, 256**3, 257**3, 256**3, 65**3, 257**3, 256**3, 10**3]
    turns = Turns.of(costs, Schedule(inverses=5), Damping(every=5))
    assert sorted(item for share in turns.shares for item in share) == list(range(8))
    assert turns.steps == (0, 1, 2, 3) and turns.period == 5  # the last step is that of the damping
    loads = [sum(costs[i] for i in share) for share in turns.shares]
    assert max(loads) <= 2.1 * 256**3
    spread = Turns.of(costs, Schedule(inverses=20), Damping(every=None))
    assert spread.shares == tuple((i,) for i in sorted(range(8), key=lambda i: -costs[i]))
    assert len(set(spread.steps)) == 8 and max(spread.steps) < 20
    at_once = Turns.of(costs, Schedule(inverses=3, staggered=False), Damping())
    assert at_once.shares == (tuple(range(8)),) and at_once.steps == (0,)
    assert Turns.of([], Schedule(), Damping()).shares == ()


@pytest.mark.parametrize(
    ("name", "drift"),
    [("kfac", None), ("ekfac", None), ("kfac", 1e-6), ("ekfac", 1e-6), ("kfac", 1e6)],
)
def test_factors_are_refreshed_when_it_is_their_turn(name, drift, key):
    """With a period each factor once in it; by drift the one most out of date at every step, or none at all."""
    params, x, y = tanh_problem(key)
    schedule = Schedule(inverses=4, drift=drift)
    optimiser = make(name, x, learning_rate=0.5, damping=FIXED, factors=EMPIRICAL, schedule=schedule)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    changes = []
    for number in range(8):
        kept = state.curvature.inverses if name == "kfac" else state.curvature.bases
        params, state, _, _ = step(params, state, jnp.roll(x, number, axis=1), y)
        new = state.curvature.inverses if name == "kfac" else state.curvature.bases
        changed = [bool(np.any(a != b)) for a, b in zip(*map(jax.tree.leaves, (kept, new)), strict=True)]
        changes.append(np.array(changed))
        if number < 3:
            assert all(changed)
    later = np.sum(changes[4:], axis=0)
    if drift is None:
        assert np.all(later == 1)
    elif drift > 1:
        assert not np.any(later)
    else:
        assert all(0 < np.sum(change) < len(change) for change in changes[4:])


# What goes wrong.


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_batch_that_is_not_finite_changes_nothing(name, key):
    """It is reported, statistics stay out, parameters stay, and the next steps go on as if nothing had been."""
    params, x, y = tanh_problem(key)
    optimiser, step, _ = runner(name)
    state = optimiser.init(params)
    for _ in range(2):
        params, state, _, _ = step(params, state, x, y)
    before = int(state.info.skipped)
    after, bad, _, _ = step(params, state, x.at[3, 1].set(jnp.nan), y)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, bad.curvature.factors, state.curvature.factors)
    assert bad.damping == state.damping
    assert int(bad.info.skipped) == before + 1 and int(bad.info.nonfinite) == 1
    report = cx.optim.report(bad)
    assert {row.rejected for row in report.rows} == {1}
    assert not report.healthy and "not finite in 1 of 3 steps" in str(report)
    for _ in range(4):  # of which some are looked at and may be refused
        params, bad, _, _ = step(params, bad, x, y)
    value = quick(lambda params: objective(tanh_net, SQUARED, params, x, y))
    assert value(params) < value(after) and int(bad.info.nonfinite) == 1


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_first_batch_that_is_not_finite_does_not_count(name, key):
    """The running means start with the first batch that is finite: no half of it with zeros."""
    params, x, y = tanh_problem(key)
    optimiser, step, _ = runner(name)
    params, state, _, _ = step(params, optimiser.init(params), x.at[0].set(jnp.nan), y)
    state = state._replace(count=jnp.zeros_like(state.count))  # of which the statistics are due
    _, late, _, _ = step(params, state, x, y)
    _, prompt, _, _ = step(params, optimiser.init(params), x, y)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    for field in set(prompt.curvature._fields) - {"seen", "rejected", "fallbacks"}:
        jax.tree.map(close, getattr(late.curvature, field), getattr(prompt.curvature, field))


def test_a_loss_that_is_not_finite_is_no_health(key):
    """Targets out of range: their gradient is zero, and only the loss tells."""
    w, x = normal(key, (2, 3), (6, 3))
    spoilt = lambda output, target: SQUARED(output, jnp.zeros(2)) + jnp.where(target > 0, jnp.nan, 0.0)
    optimiser = cx.optim.kfac(lambda w, x: w @ x, spoilt, example=x[0], factors=EMPIRICAL)
    step = stepper(optimiser, lambda w, x: w @ x, spoilt)
    _, state, updates, grads = step(w, optimiser.init(w), x, jnp.ones(6))
    assert np.all(np.isfinite(grads)) and not np.any(updates)
    report = cx.optim.report(state)
    assert report.nonfinite == 1 and not report.healthy
    assert cx.optim.report(step(w, optimiser.init(w), x, jnp.zeros(6))[1]).healthy


def test_a_run_of_refused_steps_is_no_health():
    """A few are how the damping finds its place; most of a run is a learning rate that does not work."""
    state = make("kfac", jnp.zeros((1, 3))).init(tanh_problem(jax.random.key(0))[0])
    for steps, skipped, healthy in ((5, 5, True), (60, 29, True), (60, 50, False)):
        info = state.info._replace(skipped=jnp.asarray(skipped))
        report = cx.optim.report(state._replace(count=jnp.asarray(steps), info=info))
        assert report.healthy == healthy and bool(report.problems) != healthy
        assert f"{skipped} of {steps} steps" in str(report)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_parameter_that_is_not_used_is_no_illness(name, key):
    """It stays where it is, and the report says so."""
    w, x, y = normal(key, (2, 3), (6, 3), (6, 2))
    params = {"w": w, "idle": jnp.ones(4)}
    model_fn = lambda params, x: params["w"] @ x
    options = {} if name == "kbfgs" else {"factors": EMPIRICAL}
    optimiser = getattr(cx.optim, name)(model_fn, SQUARED, example=x[0], **options)
    after, state, _, _ = stepper(optimiser, model_fn, SQUARED)(params, optimiser.init(params), x, y)
    np.testing.assert_array_equal(after["idle"], params["idle"])
    report = cx.optim.report(state)
    assert {row.block: row.factors for row in report.rows}["['idle']"] == "not used"
    assert report.healthy, report


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_state_keeps_its_kinds(name, dtype, key):
    """Shapes, dtypes and weak types of a state and of parameters: no second compilation, and `scan` takes them."""
    params, x, y = tanh_problem(key, dtype=dtype)
    optimiser = make(name, x, **({} if name == "kbfgs" else {"factors": EMPIRICAL}))
    grads = jax.tree.map(jnp.ones_like, params)
    step = lambda grads, state, params: optimiser.update(grads, state, params, inputs=x, targets=y)
    for state in (optimiser.init(params), jax.eval_shape(optimiser.init, params)):
        updates, after = jax.eval_shape(step, grads, state, params)
        kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
        assert kinds(after) == kinds(state) and kinds(updates) == kinds(params)


def test_a_step_has_a_derivative_in_reverse(key):
    """Its numbers are computed in a loop, which has none: theirs is that of the formulas."""
    params, x, y = tanh_problem(key)
    optimiser = make("kfac", x, factors=EMPIRICAL)
    state = optimiser.init(params)

    def length(scale):
        scaled = jax.tree.map(lambda leaf: scale * leaf, params)
        grads = jax.grad(lambda p: objective(tanh_net, SQUARED, p, x, y))(scaled)
        updates, _ = optimiser.update(grads, state, scaled, inputs=x, targets=y)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(updates))

    value_and_slope = quick(jax.value_and_grad(length))
    (above, _), (below, _) = value_and_slope(1 + 1e-5), value_and_slope(1 - 1e-5)
    np.testing.assert_allclose(value_and_slope(1.0)[1], (above - below) / 2e-5, rtol=1e-5)


def test_a_given_rate_is_bounded(key):
    """By default: a rate of 1 far from the minimum, where the curvature of saturated outputs is next to nothing."""
    params, x, y = tanh_problem(key)
    labels, steep = jnp.arange(len(x)) % 2, jax.tree.map(lambda leaf: 5 * leaf, params)
    damping = Damping(1e-3, every=None)
    optimiser = cx.optim.kfac(tanh_net, SOFTMAX, 1.0, example=x[0], damping=damping, factors=EMPIRICAL)
    _, state, updates, grads = stepper(optimiser, tanh_net, SOFTMAX)(steep, optimiser.init(steep), x, labels)
    u, g = ravel_pytree(updates)[0], ravel_pytree(grads)[0]
    assert float(-u @ g * state.info.learning_rate) == pytest.approx(1e-2, rel=1e-6)
    assert state.info.learning_rate < 0.2  # of 1


def test_a_factor_without_an_inverse_falls_back(key):
    """A multiple of the identity takes its place, the step stays finite, and the report names the block."""
    params, x, y = tanh_problem(key)
    factors = Factors("empirical", decay=0.999)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, 1.0, example=x[0], damping=FIXED, factors=factors)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    rows, columns = state.curvature.factors["['w']"]
    broken = -100 * jnp.eye(4)[None] + 200 * jnp.ones((1, 4, 4))  # indefinite, of positive trace
    spoilt = state.curvature.factors | {"['w']": (broken, columns)}
    state = state._replace(
        curvature=state.curvature._replace(factors=spoilt, seen=jnp.asarray(1000, jnp.int32))
    )
    params, state, updates, grads = step(params, state, x, y)
    assert np.all(np.isfinite(ravel_pytree(updates)[0]))
    failed = {row.block: row.fallbacks for row in cx.optim.report(state).rows}
    assert failed == {"['w']": 1, "['v']": 0}
    inverse = np.asarray(state.curvature.inverses["['w']"][0][0])
    np.testing.assert_allclose(inverse, inverse[0, 0] * np.eye(4))
    assert inverse[0, 0] > 0
    assert (
        sum(float(jnp.vdot(u, g)) for u, g in zip(*map(jax.tree.leaves, (updates, grads)), strict=True)) < 0
    )


def test_zero_gradient_zero_step(key):
    """At a minimum there is nothing to divide by."""
    params, x, _ = tanh_problem(key)
    y = jax.vmap(lambda x: tanh_net(params, x))(x)
    for name in OPTIMISERS:
        optimiser, step, _ = runner(name)
        _, _, updates, _ = step(params, optimiser.init(params), x, y)
        assert np.max(np.abs(ravel_pytree(updates)[0])) < 1e-12


def test_a_loss_that_is_not_convex_is_refused(key):
    params, x, y = tanh_problem(key)
    saddle = lambda output, target: jnp.sum(jnp.array([1.0, -1.0]) * (output - target) ** 2)
    optimiser = cx.optim.kfac(tanh_net, saddle, 0.1, example=x[0], damping=FIXED)
    with pytest.raises(Exception, match="not convex"):
        jax.block_until_ready(stepper(optimiser, tanh_net, saddle)(params, optimiser.init(params), x, y)[0])


def test_a_batch_of_one(key):
    params, x, y = tanh_problem(key)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, example=x[0])
    moved, state, _, _ = stepper(optimiser, tanh_net, SQUARED)(params, optimiser.init(params), x[:1], y[:1])
    assert np.all(np.isfinite(ravel_pytree(moved)[0])) and cx.optim.report(state).healthy
