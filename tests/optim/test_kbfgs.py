"""K-BFGS: its updates against NumPy, and what they learn."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from curvax.optim import Damping
from curvax.optim._quasi_newton import bfgs, damped
from helpers.quick import quick
from helpers.training import FIXED, SQUARED, normal, objective, stepper, tanh_net, tanh_problem


def test_an_update_satisfies_the_secant_equation(key):
    root, s, noise = normal(key, (2, 4, 4), (2, 4), (2, 4))
    inverse = root @ root.swapaxes(1, 2) + jnp.eye(4)
    y = s + 0.1 * noise
    updated, good = quick(bfgs)(inverse, s, y)
    assert np.all(good)
    np.testing.assert_allclose(jnp.einsum("sij,sj->si", updated, y), s, rtol=1e-9)
    assert np.all(np.linalg.eigvalsh(updated) > 0)
    for h, new, a, b in zip(inverse, updated, s, y, strict=True):
        left = np.eye(4) - np.outer(a, b) / (a @ b)
        np.testing.assert_allclose(new, left @ h @ left.T + np.outer(a, a) / (a @ b), rtol=1e-9, atol=1e-12)
    assert not np.any(quick(bfgs)(inverse, s, -s)[1])


def test_an_update_by_tiny_changes_does_not_overflow(key):
    root, s = normal(key, (2, 3, 3), (2, 3), dtype=jnp.float32)
    inverse = root @ root.swapaxes(1, 2) + jnp.eye(3, dtype=jnp.float32)
    one, tiny = (quick(bfgs)(inverse, scale * s, 2 * scale * s) for scale in (1.0, 2.0**-50))
    assert np.all(tiny[1])
    np.testing.assert_allclose(tiny[0], one[0], rtol=1e-5)


def test_a_change_lost_in_rounding_changes_nothing(key):
    """With inputs of mean zero and no bias the mean of what the layer returns stays zero but for rounding."""
    w, half = normal(key, (2, 3), (8, 3), dtype=jnp.float32)
    x, y = jnp.concatenate([half, -half]), jnp.ones((16, 2), jnp.float32)
    model_fn = lambda w, x: w @ x
    optimiser = cx.optim.kbfgs(model_fn, SQUARED, 0.1, example=x[0], damping=FIXED)
    step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(w)
    for _ in range(3):
        w, state, _, _ = step(w, state, x, y)
    np.testing.assert_array_equal(state.curvature.inverses[""][0][0], np.eye(2))
    assert cx.optim.report(state).healthy


def test_double_damping_keeps_the_curvature_positive(key):
    root, s, y = normal(key, (3, 4, 4), (3, 4), (3, 4))
    inverse = root @ root.swapaxes(1, 2) + 0.1 * jnp.eye(4)
    y = y - 2 * s
    shorter, larger = quick(damped)(inverse, s, y, jnp.asarray(0.3))
    modelled = jnp.einsum("si,sij,sj->s", y, inverse, y)
    along = jnp.sum(shorter * y, axis=1)
    assert np.all(along >= 0.2 * modelled * (1 - 1e-12))
    np.testing.assert_allclose(larger, y + 0.3 * shorter)
    same, _ = quick(damped)(inverse, y, y, jnp.asarray(0.3))  # enough curvature: s stays
    kept = np.sum(y * y, axis=1) >= 0.2 * modelled
    np.testing.assert_allclose(same[kept], y[kept])


def test_the_first_steps_are_those_of_the_formulas(key):
    """Two steps of a linear layer with a fixed rate, by NumPy."""
    w, x, y = normal(key, (2, 3), (8, 3), (8, 2))
    optimiser = cx.optim.kbfgs(
        lambda w, x: w @ x,
        SQUARED,
        0.1,
        example=x[0],
        damping=Damping(0.04, every=None, kl_clip=None),
        decay=0.9,
    )
    step, state = stepper(optimiser, lambda w, x: w @ x, SQUARED), optimiser.init(w)
    first, state, _, _ = step(w, state, x, y)
    _, second, updates, _ = step(first, state, x, y)
    w, x, y = map(np.asarray, (w, x, y))
    moment, mean = x.T @ x / 8, x.mean(0)
    columns = np.linalg.inv(moment + 0.2 * np.eye(3))
    gradient = lambda w: (x @ w.T - y).T @ x / 8
    moved = w - 0.1 * gradient(w) @ columns
    np.testing.assert_allclose(first, moved, rtol=1e-9)
    # The change of the mean output is that of the mean gradient: the Hessian in the outputs is the identity.
    s = (moved - w) @ mean
    h = np.eye(2)
    left = np.eye(2) - np.outer(s, 1.2 * s) / (1.2 * s @ s)
    rows = left @ h @ left.T + np.outer(s, s) / (1.2 * s @ s)
    np.testing.assert_allclose(state.curvature.inverses[""][0][0], rows, rtol=1e-8, atol=1e-12)
    along = columns @ mean
    b = (moment + 0.2 * np.eye(3)) @ along
    left = np.eye(3) - np.outer(along, b) / (along @ b)
    columns = left @ columns @ left.T + np.outer(along, along) / (along @ b)
    np.testing.assert_allclose(updates, -0.1 * rows @ gradient(moved) @ columns, rtol=1e-7, atol=1e-12)


def test_an_inverse_out_of_date_is_computed_anew(key):
    """λ falls by a lot: an update along one direction would leave the inverse of the inputs as damped as it was."""
    params, x, y = tanh_problem(key)
    optimiser = cx.optim.kbfgs(tanh_net, SQUARED, 0.1, example=x[0], damping=Damping(0.5, every=None))
    step, state = stepper(optimiser, tanh_net, SQUARED), optimiser.init(params)
    for damping in (0.5, 0.45, 1e-6):
        params, state, _, _ = step(params, state._replace(damping=jnp.asarray(damping)), x, y)
        factor, inverse = (
            pairs["['w']"][1][0] for pairs in (state.curvature.factors, state.curvature.inverses)
        )
        error = np.linalg.norm(inverse @ (factor + np.sqrt(damping) * np.eye(4)) - np.eye(4))
        if damping == 0.45:
            assert 1e-4 < error < 0.5  # not out of date by enough
        else:
            assert error < 1e-9


def test_trains_without_a_key(key):
    """With all that is adaptive; tied and diagonal parameters included."""
    params, x, y = tanh_problem(key)
    params = params | {"scale": jnp.ones(2), "square": 0.3 * normal(key, (3, 3))[0]}

    def model_fn(params, x):
        x = params["square"].T @ (params["square"] @ x) + x
        return params["scale"] * tanh_net(params, x)

    optimiser = cx.optim.kbfgs(model_fn, SQUARED, example=x[0])
    step, state = stepper(optimiser, model_fn, SQUARED), optimiser.init(params)
    before = float(objective(model_fn, SQUARED, params, x, y))
    for _ in range(15):
        params, state, _, _ = step(params, state, x, y)
    assert float(objective(model_fn, SQUARED, params, x, y)) < 0.5 * before
    assert cx.optim.report(state).healthy, cx.optim.report(state)
    assert np.all(np.isfinite(ravel_pytree(params)[0]))


@pytest.mark.parametrize("stack", [1, 3])
def test_a_member_without_curvature_stays(stack):
    """NaN, or no step at all, changes nothing."""
    inverse = jnp.broadcast_to(jnp.eye(2), (stack, 2, 2))
    for s, y in (
        (jnp.zeros((stack, 2)), jnp.zeros((stack, 2))),
        (jnp.full((stack, 2), jnp.nan), jnp.ones((stack, 2))),
    ):
        assert not np.any(quick(bfgs)(inverse, s, y)[1])
