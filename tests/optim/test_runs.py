"""Whole runs: one compilation, the operations of a fused step, schedules, resume bit for bit, and what goes wrong."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax.optim import Damping, Factors, Momentum, Schedule
from curvax.optim._turns import Turns
from helpers.training import EMPIRICAL, FIXED, SQUARED, normal, objective, stepper, tanh_net, tanh_problem

OPTIMISERS = ("kfac", "ekfac", "kf_trust_region", "kbfgs")


def make(name, x, **options):
    """An optimiser by name; K-BFGS has no statistics to choose and no schedule."""
    options = {} if name == "kbfgs" else options
    return getattr(cx.optim, name)(tanh_net, SQUARED, example=x[0], **options)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_one_compilation_and_resume_bit_for_bit(name, key, tmp_path):
    """Ten steps; and five, saved, restored and five more."""
    params, x, y = tanh_problem(key)
    optimiser = make(name, x, schedule=Schedule(statistics=2, inverses=3))
    traces = []

    def compiled(fn):
        def counted(*args):
            traces.append(1)
            return fn(*args)

        return jax.jit(counted)

    step = stepper(optimiser, tanh_net, SQUARED, compiled=compiled)
    state, saved = optimiser.init(params), None
    for number in range(10):
        params, state, _, _ = step(params, state, x, y, jax.random.fold_in(key, number))
        if number == 4:
            leaves, structure = jax.tree.flatten((params, state))
            np.savez(tmp_path / "state.npz", *[np.asarray(leaf) for leaf in leaves])
            with np.load(tmp_path / "state.npz") as file:
                saved = jax.tree.unflatten(structure, [jnp.asarray(file[name]) for name in file.files])
    assert len(traces) == 1
    assert float(objective(tanh_net, SQUARED, params, x, y)) < float(
        objective(tanh_net, SQUARED, saved[0], x, y)
    )
    again = saved
    for number in range(5, 10):
        again = step(*again, x, y, jax.random.fold_in(key, number))[:2]
    jax.tree.map(np.testing.assert_array_equal, again, (params, state))
    assert len(traces) == 1


def test_in_a_chain(key):
    """What comes after sees its step."""
    params, x, y = tanh_problem(key)
    steps = []
    for wrap in (lambda one: one, lambda one: optax.chain(one, optax.scale(0.5))):
        optimiser = wrap(make("kfac", x, learning_rate=0.1, damping=FIXED, factors=EMPIRICAL))
        steps.append(stepper(optimiser, tanh_net, SQUARED)(params, optimiser.init(params), x, y)[2])
    jax.tree.map(lambda whole, half: np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-12), *steps)


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
    inverses = 2 * (2 * 64**3 + 33**3 + 16**3)
    assert ours <= 1.05 * theirs + inverses
    assert ours < apart + gradient - 0.9 * 2 * 256 * (32 * 64 + 64 * 16)  # a forward pass less


# Schedules.


def test_turns_share_the_work_evenly():
    costs = [257**3, 256**3, 257**3, 256**3, 65**3, 257**3, 256**3, 10**3]
    turns = Turns.of(costs, Schedule(inverses=5), Damping(every=5))
    assert sorted(item for share in turns.shares for item in share) == list(range(8))
    assert sorted(turns.table) == [0, 2, 3, 4, 5] and turns.table[-1] == 0  # that of the damping
    loads = [sum(costs[i] for i in share) for share in turns.shares]
    assert max(loads) <= 2.1 * 256**3
    assert sorted(Turns.of(costs, Schedule(inverses=20), Damping(every=None)).table) == [0] * 12 + list(
        range(2, 10)
    )
    assert Turns.of(costs, Schedule(inverses=3, staggered=False), Damping()).table == (1, 0, 0)
    assert Turns.of([], Schedule(), Damping()).shares == ()


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
@pytest.mark.parametrize("drift", [None, 1e-6, 1e6])
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
    optimiser = make(name, x, factors=EMPIRICAL)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    params, state, _, _ = step(params, state, x, y)
    after, bad, updates, _ = step(params, state, x.at[3, 1].set(jnp.nan), y)
    jax.tree.map(np.testing.assert_array_equal, after, params)
    jax.tree.map(np.testing.assert_array_equal, bad.curvature.factors, state.curvature.factors)
    assert int(bad.info.skipped) == 1 and bad.damping == state.damping
    report = cx.optim.report(bad)
    assert not report.healthy and {row.rejected for row in report.rows} == {1}
    better, good, updates, _ = step(params, bad, x, y)
    assert np.any(ravel_pytree(updates)[0]) and np.all(np.isfinite(ravel_pytree(better)[0]))
    assert int(good.info.skipped) == 1
    assert float(objective(tanh_net, SQUARED, better, x, y)) < float(
        objective(tanh_net, SQUARED, params, x, y)
    )


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
        optimiser = make(name, x)
        _, _, updates, _ = stepper(optimiser, tanh_net, SQUARED)(params, optimiser.init(params), x, y)
        assert np.max(np.abs(ravel_pytree(updates)[0])) < 1e-12


W, X, Y = np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 2))
linear = lambda w, x: jax.tree.leaves(w)[0] @ x
kfac = ft.partial(cx.optim.kfac, linear, SQUARED, example=X[0])
update = lambda optimiser, **extra: optimiser.update(
    W, optimiser.init(jnp.asarray(W)), jnp.asarray(W), **extra
)
BAD = {
    "params": (lambda: kfac().update(W, kfac().init(jnp.asarray(W)), inputs=X, targets=Y), "`params`"),
    "inputs": (lambda: update(kfac(), targets=Y, key=jax.random.key(0)), "`inputs`"),
    "key": (lambda: update(kfac(), inputs=X, targets=Y), "`key`"),
    "sizes": (lambda: update(kfac(), inputs=X, targets=Y[:3], key=jax.random.key(0)), "leading axis"),
    "no parameters": (lambda: kfac().init({}), "no floating-point"),
    "integers": (lambda: kfac().init(jnp.ones((2, 3), jnp.int32)), "no floating-point"),
    "rate": (lambda: kfac(-1.0), "`learning_rate`"),
    "rate type": (lambda: kfac("fast"), "`learning_rate`"),
    "momentum": (lambda: kfac(0.1, momentum=1.0), "`decay`"),
    "momentum type": (lambda: kfac(0.1, momentum="nesterov"), "`momentum`"),
    "place": (lambda: Momentum(0.9, "between"), "`place`"),
    "damping type": (lambda: kfac(damping=0.1), "`damping`"),
    "damping": (lambda: Damping(0.0), "`initial`"),
    "limits": (lambda: Damping(limits=(1.0, 0.1)), "`limits`"),
    "every": (lambda: Damping(every=0), "`every`"),
    "factor": (lambda: Damping(factor=1.5), "`factor`"),
    "penalty": (lambda: Damping(penalty=-1.0), "`penalty`"),
    "clip": (lambda: Damping(kl_clip=0.0), "`kl_clip`"),
    "kind": (lambda: Factors("full"), "`kind`"),
    "sharing": (lambda: Factors(sharing="some"), "`sharing`"),
    "decay": (lambda: Factors(decay=1.0), "`decay`"),
    "fraction": (lambda: Factors(fraction=0.0), "`fraction`"),
    "dtype": (lambda: Factors(dtype=jnp.int32), "`dtype`"),
    "period": (lambda: Schedule(inverses=0), "`inverses`"),
    "drift": (lambda: Schedule(drift=0.1, staggered=False), "`drift`"),
    "class": (lambda: cx.optim.kfac(linear, cx.operators.SquaredError, example=X[0]), "instance"),
    "model": (lambda: cx.optim.kfac(W, SQUARED, example=X[0]), "`model_fn`"),
    "exact": (
        lambda: cx.optim.kbfgs(linear, SQUARED, example=X[0], damping=Damping(exact=True)),
        "`damping.exact`",
    ),
    "radius": (lambda: cx.optim.kf_trust_region(linear, SQUARED, 0.0, example=X[0]), "`radius`"),
    "damping of the region": (
        lambda: cx.optim.kf_trust_region(linear, SQUARED, example=X[0], damping=Damping()),
        "`damping`",
    ),
    "gradients": (
        lambda: kfac().update(
            W[:1], kfac().init(jnp.asarray(W)), jnp.asarray(W), inputs=X, targets=Y, key=jax.random.key(0)
        ),
        "`updates`",
    ),
    "state": (
        lambda: kfac().update(
            W, kfac().init([jnp.asarray(W)]), jnp.asarray(W), inputs=X, targets=Y, key=jax.random.key(0)
        ),
        "another model",
    ),
    "report": (lambda: cx.optim.report(()), "`state`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


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
