"""Steps against dense linear algebra, in float64."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
import curvax.operators as ops
from curvax.optim import Damping, Factors, Momentum, Schedule
from helpers.quick import quick
from helpers.training import (
    EMPIRICAL,
    EXACT,
    FIXED,
    SOFTMAX,
    SQUARED,
    dense_curvature,
    normal,
    objective,
    stepper,
    tanh_net,
    tanh_problem,
)


def deep_linear(params, x):
    for w, b in params:
        x = w @ x + b
    return x


def block_positions(params):
    """Flat positions of each (weight, bias) pair."""
    numbers, unravel = ravel_pytree(params)
    tree = unravel(jnp.arange(numbers.size, dtype=numbers.dtype))
    return [np.concatenate([np.ravel(w), np.ravel(b)]).astype(int) for w, b in tree]


def dense_step(params, x, grads, damping):
    """−(blocks of the Gauss–Newton matrix + damping I)⁻¹ g."""
    whole, flat = dense_curvature(deep_linear, params, x), np.asarray(ravel_pytree(grads)[0])
    step = np.zeros_like(flat)
    for where in block_positions(params):
        block = whole[np.ix_(where, where)] + damping * np.eye(len(where))
        step[where] = -np.linalg.solve(block, flat[where])
    return step


@pytest.fixture
def linear(key):
    w1, b1, w2, b2, w3, b3, x, y = normal(key, (4, 3), (4,), (5, 4), (5,), (2, 5), (2,), (7, 3), (7, 2))
    return [(w1, b1), (w2, b2), (w3, b3)], x, y


@pytest.mark.parametrize("make", [cx.optim.kfac, cx.optim.ekfac])
def test_step_on_a_deep_linear_network_is_the_dense_one(linear, make):
    params, x, y = linear
    damping = Damping(0.02, every=None, exact=True, penalty=0.01, kl_clip=None)
    optimiser = make(deep_linear, SQUARED, 1.0, example=x[0], damping=damping, factors=EXACT)
    _, _, updates, grads = stepper(optimiser, deep_linear, SQUARED, 0.01)(
        params, optimiser.init(params), x, y
    )
    found, truth = ravel_pytree(updates)[0], dense_step(params, x, grads, 0.03)
    np.testing.assert_allclose(found, truth, rtol=0, atol=1e-10 * np.abs(truth).max())


def test_factored_damping_is_that_of_the_operator(linear):
    params, x, y = linear
    optimiser = cx.optim.kfac(deep_linear, SQUARED, 0.5, example=x[0], damping=FIXED, factors=EXACT)
    _, _, updates, grads = stepper(optimiser, deep_linear, SQUARED)(params, optimiser.init(params), x, y)

    @quick
    def truth(params, grads):
        curvature = ops.kfac(deep_linear, SQUARED, params, x, y).damped_factors(0.05)
        return curvature.inverse().mv(grads)

    expected = -0.5 * ravel_pytree(truth(params, grads))[0]
    np.testing.assert_allclose(ravel_pytree(updates)[0], expected, rtol=1e-9)


def test_ekfac_values_are_those_of_the_operator(key):
    """With a running mean that forgets everything, and eigenvectors that stay."""
    params, x, y = tanh_problem(key)
    options = {"factors": Factors("exact", decay=0.0), "schedule": Schedule(inverses=50, staggered=False)}
    optimiser = cx.optim.ekfac(tanh_net, SQUARED, 1.0, example=x[0], damping=FIXED, **options)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    for _ in range(4):  # everything is factorised in the first three
        _, state, updates, grads = step(params, state, x, y)

    @quick
    def truth(params, grads):
        return ops.ekfac(tanh_net, SQUARED, params, x, y).damped(0.05).inverse().mv(grads)

    np.testing.assert_allclose(ravel_pytree(updates)[0], -ravel_pytree(truth(params, grads))[0], rtol=1e-8)


def test_momentum_before_and_after(key):
    """With a gradient and a curvature that stay: a corrected mean is the gradient, a velocity a geometric sum."""
    params, x, y = tanh_problem(key)
    make = ft.partial(cx.optim.kfac, tanh_net, SQUARED, 0.1, example=x[0], damping=FIXED, factors=EMPIRICAL)
    steps = {}
    for name, momentum in (("before", Momentum(0.8, "before")), ("after", 0.8)):
        optimiser = make(momentum=momentum)
        step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
        found = []
        for _ in range(3):
            _, state, updates, _ = step(params, state, x, y)
            found.append(ravel_pytree(updates)[0])
        steps[name] = found
    np.testing.assert_allclose(steps["before"][0], steps["after"][0], rtol=1e-10)
    np.testing.assert_allclose(steps["before"][2], steps["before"][0], rtol=1e-10)
    np.testing.assert_allclose(steps["after"][2], steps["after"][0] * (1 + 0.8 + 0.64), rtol=1e-10)


def test_a_schedule_of_the_learning_rate(key):
    """With a gradient and a curvature that stay."""
    params, x, y = tanh_problem(key)
    rate = lambda count: 0.1 / (1.0 + count.astype(jnp.float32))
    optimiser = cx.optim.kfac(tanh_net, SQUARED, rate, example=x[0], damping=FIXED, factors=EMPIRICAL)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    _, state, first, _ = step(params, state, x, y)
    assert float(state.info.learning_rate) == pytest.approx(0.1)
    _, state, second, _ = step(params, state, x, y)
    assert float(state.info.learning_rate) == pytest.approx(0.05)
    np.testing.assert_allclose(ravel_pytree(second)[0], 0.5 * ravel_pytree(first)[0], rtol=1e-6)


@pytest.mark.parametrize("rate", [None, 1.0])
def test_kl_clip_bounds_the_step(key, rate):
    params, x, y = tanh_problem(key)
    most = 1e-3
    damping = Damping(0.05, every=None, exact=True, kl_clip=most)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, rate, example=x[0], damping=damping, factors=EXACT)
    _, state, updates, grads = stepper(optimiser, tanh_net, SQUARED)(params, optimiser.init(params), x, y)
    u = np.asarray(ravel_pytree(updates)[0])
    if rate is None:
        length = u @ dense_curvature(tanh_net, params, x) @ u
    else:  # in K-FAC's metric, damping included: δᵀ(F + λ)δ = −α δᵀg
        length = -u @ np.asarray(ravel_pytree(grads)[0]) * float(state.info.learning_rate)
    assert length == pytest.approx(most, rel=1e-8)


def test_the_dense_model_gives_rate_momentum_and_damping(key):
    """Rate and momentum minimise it over the plane of two steps; λ follows Levenberg and Marquardt's rule."""
    params, x, y = tanh_problem(key)
    damping = Damping(0.05, every=2, factor=0.9, penalty=0.02)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, example=x[0], damping=damping, factors=EMPIRICAL)
    step, state = stepper(optimiser, tanh_net, SQUARED, 0.02), optimiser.init(params)
    value = quick(ft.partial(objective, tanh_net, SQUARED, x=x, y=y, penalty=0.02))
    v = None
    for number in range(4):
        before = state
        moved, state, updates, grads = step(params, state, x, y)
        whole = dense_curvature(tanh_net, params, x)
        whole = whole + (float(before.damping) + 0.02) * np.eye(len(whole))
        u, g = (np.asarray(ravel_pytree(tree)[0]) for tree in (updates, grads))
        # The slope of the model vanishes along the step, and along the one before.
        slope = whole @ u + g
        assert abs(slope @ u) < 1e-8 * abs(g @ u)
        if v is not None:
            assert abs(slope @ v) < 1e-8 * np.linalg.norm(g) * np.linalg.norm(v)
            assert abs(float(state.info.momentum)) > 1e-6
        v = u
        ratio = (value(moved) - value(params)) / (g @ u + 0.5 * u @ whole @ u)
        assert value(moved) < value(params)
        params_before, params = params, moved
        if number == 2:  # is not looked at
            assert (state.damping, state.info.ratio) == (before.damping, before.info.ratio)
            continue
        assert np.any(u) and float(state.info.ratio) == pytest.approx(float(ratio), rel=1e-6)
        # The curvature of the objective along the step, ÷ the model's.
        share = (value(moved) - value(params_before) - g @ u) / (0.5 * u @ whole @ u)
        change = np.clip(share, 0.81**5, 0.81) if ratio > 0.75 else 1 / 0.81 if ratio < 0.25 else 1
        assert float(state.damping) == pytest.approx(float(before.damping) * change)


@pytest.mark.parametrize("share", ["auto", 0.5])
def test_the_model_has_all_of_the_damping_and_the_preconditioner_a_share(key, share):
    """The first step, with the factors, the Gauss–Newton matrix and the rate written out in NumPy."""
    params, x, y = tanh_problem(key)
    damping = Damping(0.2, every=None, exact=True, penalty=0.01, share=share)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, example=x[0], damping=damping, factors=EXACT)
    _, state, updates, grads = stepper(optimiser, tanh_net, SQUARED, 0.01)(
        params, optimiser.init(params), x, y
    )
    w, b, v, inputs = (np.asarray(a) for a in (params["w"], params["b"], params["v"], x))
    hidden = np.tanh(inputs @ w.T + b)
    with_one = lambda a: np.concatenate([a, np.ones((len(a), 1))], axis=1)
    back = v[None] * (1 - hidden**2)[:, None]  # ∂ output / ∂ what goes into tanh, by example
    factors = (
        ("w", "b", np.einsum("noi,noj->ij", back, back) / 12, with_one(inputs)),
        ("v", "c", np.eye(2), with_one(hidden)),
    )
    shift = {"auto": 0.1, 0.5: 0.5}[share] * 0.2 + 0.01
    direction = {}
    for weight, bias, of_rows, read in factors:
        gradient = np.concatenate([grads[weight], grads[bias][:, None]], axis=1)
        block = np.kron(of_rows, read.T @ read / 12)
        solved = np.linalg.solve(block + shift * np.eye(len(block)), gradient.ravel()).reshape(gradient.shape)
        direction |= {weight: -solved[:, :-1], bias: -solved[:, -1]}
    d, g, u = (np.asarray(ravel_pytree(tree)[0]) for tree in (direction, grads, updates))
    whole = dense_curvature(tanh_net, params, x) + 0.21 * np.eye(len(d))
    rate = -(g @ d) / (d @ whole @ d)
    np.testing.assert_allclose(u, rate * d, rtol=1e-8, atol=1e-10 * np.abs(u).max())
    assert float(state.info.learning_rate) == pytest.approx(rate)


@pytest.mark.parametrize(("initial", "leaps"), [(10.0, 5), (1e-3, 1)])
def test_damping_leaps_where_it_is_all_of_the_curvature(key, initial, leaps):
    """Outputs that are nearly certain: far from λ = 10 the objective is as good as linear; λ = 1e-3 is of its size."""
    x, y = jax.random.normal(key, (20, 3)), jnp.arange(20) % 2
    x = x.at[:, 0].set(jnp.where(y == 1, 1.0, -1.0))
    w = jnp.zeros((2, 3)).at[1, 0].set(2.0 if leaps == 5 else 0.2)
    model_fn = lambda w, x: w @ x
    damping = Damping(initial, every=2, factor=0.9)
    optimiser = cx.optim.kfac(model_fn, SOFTMAX, example=x[0], damping=damping, factors=EMPIRICAL)
    _, state, _, _ = stepper(optimiser, model_fn, SOFTMAX)(w, optimiser.init(w), x, y)
    assert float(state.info.ratio) > 0.75
    assert float(state.damping) == pytest.approx(initial * 0.81**leaps)


def test_steps_up_are_refused_until_damping_is_enough(key):
    """A learning rate far too large, and outputs so saturated that their curvature vanishes."""
    params, x, y = tanh_problem(key)
    damping = Damping(0.05, every=1, factor=0.9, limits=(1e-8, 0.1), kl_clip=None)
    optimiser = cx.optim.kfac(tanh_net, SQUARED, 300.0, example=x[0], damping=damping, factors=EMPIRICAL)
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    for expected in (0.05 / 0.9**5, 0.1):
        moved, state, updates, _ = step(params, state, x, y)
        assert not np.any(ravel_pytree(updates)[0])
        assert float(state.damping) == pytest.approx(expected)
    assert int(state.info.skipped) == 2
    steep, labels = jax.tree.map(lambda leaf: 5 * leaf, params), jnp.arange(len(x)) % 2
    optimiser = cx.optim.kfac(tanh_net, SOFTMAX, example=x[0], damping=Damping(1e-6, every=8))
    step, state = stepper(optimiser, tanh_net, SOFTMAX), optimiser.init(steep)
    values = []
    for number in range(8):
        steep, state, _, _ = step(steep, state, x, labels, jax.random.fold_in(key, number))
        values.append(float(objective(tanh_net, SOFTMAX, steep, x, labels)))
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))


def test_trust_region_keeps_its_promise(key):
    """Length in F, ratio, radius and refusal, with F from the operator and the objective computed apart."""
    params, x, y = tanh_problem(key)
    optimiser = cx.optim.kf_trust_region(
        tanh_net, SQUARED, example=x[0], factors=EXACT, damping=1e-2, schedule=Schedule(inverses=2)
    )
    step = stepper(optimiser, tanh_net, SQUARED)

    @quick
    def truth(updates, grads):
        curvature = ops.kfac(tanh_net, SQUARED, params, x, y).damped_factors(1e-2)
        return curvature.mv(updates), curvature.inverse().mv(grads)

    value = quick(ft.partial(objective, tanh_net, SQUARED, x=x, y=y))
    for radius in (0.05, 1e4):
        state = optimiser.init(params)._replace(damping=jnp.asarray(radius))
        moved, state, updates, grads = step(params, state, x, y)
        product, newton_step = truth(updates, grads)
        u, g = ravel_pytree(updates)[0], ravel_pytree(grads)[0]
        squared = float(u @ ravel_pytree(product)[0])
        newton = ravel_pytree(newton_step)[0]
        whole = float(jnp.sqrt(g @ newton))
        share = min(1, radius / whole)
        proposed = eqx.apply_updates(params, jax.tree.map(ft.partial(jnp.multiply, -share), newton_step))
        ratio = float((value(proposed) - value(params)) / ((0.5 * share**2 - share) * whole**2))
        assert float(state.info.ratio) == pytest.approx(ratio, rel=1e-6)
        if ratio > 0:
            assert np.sqrt(squared) == pytest.approx(min(radius, whole), rel=1e-8)
        else:
            assert not np.any(u) and int(state.info.skipped) == 1
        expected = 2 * radius if ratio > 0.75 and whole > radius else radius if ratio >= 0.25 else radius / 2
        assert float(state.damping) == pytest.approx(expected)


def test_trust_region_refuses_a_step_up():
    """Newton's step for arctan overshoots: it is not taken, and the radius halved until one goes down."""
    w, x, y = jnp.array([[3.0]]), jnp.ones((4, 1)), jnp.zeros((4, 1))
    model_fn = lambda w, x: jnp.arctan(w @ x)
    optimiser = cx.optim.kf_trust_region(model_fn, SQUARED, 1e3, example=x[0], damping=1e-6, factors=EXACT)
    step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(w)
    refused = 0
    for _ in range(15):
        moved, state, updates, _ = step(w, state, x, y)
        before, after = (objective(model_fn, SQUARED, p, x, y) for p in (w, moved))
        assert after <= before
        refused += not np.any(updates)
        w = moved
    assert refused == int(state.info.skipped) > 0
    assert abs(float(w[0, 0])) < 1


def test_float32_agrees_with_float64(key):
    params, x, y = tanh_problem(key)
    results = []
    for dtype in (jnp.float64, jnp.float32):
        cast = ft.partial(jax.tree.map, lambda leaf: leaf.astype(dtype))  # noqa: B023
        optimiser = cx.optim.kfac(tanh_net, SQUARED, example=cast(x[0]), factors=EMPIRICAL)
        step, p, state = stepper(optimiser, tanh_net, SQUARED), cast(params), optimiser.init(cast(params))
        for _ in range(2):
            p, state, updates, _ = step(p, state, cast(x), cast(y))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves((p, updates)))
        results.append(np.asarray(ravel_pytree(p)[0], float))
    np.testing.assert_allclose(results[1], results[0], rtol=2e-3, atol=2e-3)


def test_half_precision(key):
    """Factors, or parameters, in bfloat16: the direction is right to a few per cent."""
    exact, x, y = tanh_problem(key, jnp.float32)
    cast = lambda dtype: jax.tree.map(lambda leaf: leaf.astype(dtype), (exact, x, y))
    # Parameters and data that bfloat16 holds, in float32.
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cast(jnp.bfloat16))
    steps = []
    for arguments, dtype in (
        (rounded, None),
        (rounded, jnp.bfloat16),
        (cast(jnp.bfloat16), None),
    ):
        p, a, b = arguments
        factors = Factors("empirical", dtype=dtype)
        optimiser = cx.optim.kfac(tanh_net, SQUARED, 1.0, example=a[0], damping=FIXED, factors=factors)
        _, state, updates, _ = stepper(optimiser, tanh_net, SQUARED)(p, optimiser.init(p), a, b)
        if dtype is not None:
            assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(state.curvature.factors))
        steps.append(np.asarray(ravel_pytree(updates)[0], float))
    for found in steps[1:]:
        assert np.linalg.norm(found - steps[0]) < 0.1 * np.linalg.norm(steps[0])


def test_equal_models_equal_steps(key):
    """Remat, and an Equinox module instead of a dict, change nothing."""
    params, x, y = tanh_problem(key)

    class Net(eqx.Module):
        params: dict
        activation: object

        def __call__(self, x):
            p = self.params
            return p["v"] @ self.activation(p["w"] @ x + p["b"]) + p["c"]

    def run(model_fn, params):
        optimiser = cx.optim.kfac(model_fn, SQUARED, example=x[0], factors=EMPIRICAL)
        step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(params)
        for _ in range(2):
            params, state, _, _ = step(params, state, x, y)
        return ravel_pytree(eqx.filter(params, eqx.is_inexact_array))[0]

    plain = run(tanh_net, params)
    np.testing.assert_allclose(run(jax.checkpoint(tanh_net), params), plain, rtol=1e-10)
    np.testing.assert_allclose(run(lambda net, x: net(x), Net(params, jnp.tanh)), plain, rtol=1e-10)
