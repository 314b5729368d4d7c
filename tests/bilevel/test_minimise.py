"""The outer loop against closed forms, plain loops and the promises about compilation."""

import io
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from helpers import tuning


@pytest.fixture(scope="module")
def solution():
    return tuning.minimise(300)


def test_finds_the_best_penalty(solution):
    log_l2, value = tuning.optimum()
    np.testing.assert_allclose(solution.phi, log_l2, atol=1e-4)
    np.testing.assert_allclose(solution.value, value, rtol=1e-8)
    assert solution.result == cx.RESULTS.successful


def test_all_of_a_solution_belongs_to_one_point(solution):
    theta, value = tuning.solve(float(solution.phi))
    np.testing.assert_allclose(solution.theta, theta, rtol=1e-5)
    np.testing.assert_allclose(solution.value, value, rtol=1e-6)
    assert solution.history.value[-1] == solution.value
    np.testing.assert_allclose(solution.history.value[0], tuning.solve(0.0)[1], rtol=1e-6)
    assert solution.num_steps == 300
    for rows in jax.tree.leaves(solution.history):
        assert rows.shape == (301,)


def test_history_holds_what_a_hypergradient_reports(solution):
    history = solution.history
    assert np.all(
        history.relative_error <= tuning.RULE.rtol + 1e-6 * history.grad_norm[0] / history.grad_norm
    )
    assert history.num_inner_steps[0] > 0
    assert np.all(history.num_matvecs >= 0)
    assert np.all(history.step_scale == 1) and np.all(history.num_retries == 0)
    np.testing.assert_allclose(history.relative_error, history.error_estimate / history.grad_norm, rtol=1e-6)


def test_equals_a_plain_loop():
    train, valid = tuning.data()
    phi, theta0 = jnp.asarray(0.0), jnp.zeros(tuning.FEATURES)
    opt_state, state, values, norms = tuning.OPTIMIZER.init(phi), None, [], []
    for step in range(13):
        hg = cx.hypergradient(
            tuning.PROBLEM,
            phi,
            theta0,
            inner_solver=tuning.SOLVER,
            rule=tuning.RULE,
            inner_data=train,
            outer_data=valid,
            state=state,
        )
        state = hg.state
        values.append(hg.value)
        norms.append(jnp.abs(hg.grad))
        if step < 12:
            with jax.numpy_dtype_promotion("standard"):
                update, opt_state = tuning.OPTIMIZER.update(hg.grad, opt_state, phi)
            phi = optax.apply_updates(phi, update)
    run = tuning.minimise(12)
    np.testing.assert_allclose(run.history.value, values, rtol=1e-12)
    np.testing.assert_allclose(run.history.grad_norm, norms, rtol=1e-9)
    np.testing.assert_allclose(run.phi, phi, rtol=1e-12)


def test_near_an_optimum_the_first_hypergradient_sets_the_accuracy(solution):
    first = solution.history.grad_norm[0]
    np.testing.assert_allclose(solution.state.state.floor, 0.01 * first, rtol=1e-12)
    # The error that may be left where the gradient vanishes, and what a larger one of the user's allows.
    history = solution.history
    assert (
        history.error_estimate[-1]
        <= 0.01 * tuning.RULE.rtol * first + tuning.RULE.rtol * history.grad_norm[-1]
    )
    own = tuning.minimise(1, rule=cx.Implicit(rtol=1e-9, atol=0.5, max_sweeps=1), inner_solver=tuning.LOOSE)
    assert 1e-9 * own.history.grad_norm[0] < own.history.error_estimate[0] <= 0.5


def test_a_schedule_of_accuracies():
    """Each hypergradient is as accurate as its number asks for, and the same optimum is found with fewer products."""
    stiff, target = jnp.geomspace(1, 300, 60), jnp.linspace(0.2, 0.9, 60)
    problem = cx.Bilevel(
        inner=lambda w, lam, _: 0.5 * jnp.sum(stiff * (w - 1) ** 2 + jnp.exp(lam) * w**2) + jnp.sum(w**4),
        outer=lambda w, lam, _: jnp.sum((w - target) ** 2) + 1e-3 * jnp.sum(lam**2),
    )
    method = {
        "inner_solver": optx.BFGS(rtol=1e-2, atol=1e-2),
        "rule": cx.Implicit(rtol=1e-6, max_sweeps=6),
        "optimizer": optax.adam(optax.cosine_decay_schedule(0.5, 60)),
        "num_steps": 60,
    }
    schedule = optax.exponential_decay(0.3, 1, 0.8, end_value=1e-6)
    followed = cx.minimise(problem, jnp.zeros(60), jnp.zeros(60), rtol_schedule=schedule, **method)
    fixed = cx.minimise(problem, jnp.zeros(60), jnp.zeros(60), **method)
    history = followed.history
    floor = 1 + 0.01 * history.grad_norm[0] / history.grad_norm
    assert np.all(history.relative_error <= schedule(np.arange(61)) * floor * (1 + 1e-9))
    assert np.any(history.relative_error > 1e-2)  # that is, less is asked for at first
    assert 1.3 * history.num_matvecs.sum() < fixed.history.num_matvecs.sum()
    np.testing.assert_allclose(followed.value, fixed.value, rtol=1e-3)
    more = cx.minimise(
        problem,
        jnp.zeros(60),
        jnp.zeros(60),
        rtol_schedule=schedule,
        state=followed.state,
        **method | {"num_steps": 2},
    )
    assert np.all(
        more.history.relative_error <= 1e-6 * (1 + 0.01 * history.grad_norm[0] / more.history.grad_norm)
    )


def test_schedules_that_cannot_be_followed():
    with pytest.raises(TypeError, match="`rtol_schedule` must be a function"):
        tuning.minimise(1, rtol_schedule=1e-3)
    with pytest.raises(ValueError, match=r"`rtol_schedule` must give a number in \(0, 1\)"):
        tuning.minimise(1, rtol_schedule=lambda k: 2.0)
    with pytest.raises(ValueError, match="needs a rule that asks for an accuracy"):
        tuning.minimise(1, rtol_schedule=lambda k: 0.1, rule=cx.Implicit(rtol=None))


def test_second_call_compiles_nothing():
    traces = []

    def inner(theta, phi, batch):
        traces.append("inner")
        return tuning.inner(theta, phi, batch)

    def update(grad, state, params=None):
        traces.append("update")
        return tuning.OPTIMIZER.update(grad, state, params)

    problem = cx.Bilevel(inner=inner, outer=tuning.outer)
    common = {"problem": problem, "optimizer": optax.GradientTransformation(tuning.OPTIMIZER.init, update)}
    tuning.minimise(3, **common)
    first = len(traces)
    assert traces.count("update") == 1
    assert 0 < traces.count("inner") <= 4
    tuning.minimise(40, **common, phi0=jnp.asarray(-1.0), theta0=jnp.ones(tuning.FEATURES))
    tuning.minimise(2, **common, rule=cx.Implicit(rtol=1e-3), inner_data=tuning.data(1)[0])
    tuning.minimise(2, **common, state=tuning.minimise(2, **common).state)
    assert len(traces) == first
    # Benign control: the counter does count.
    tuning.minimise(1, **common, inner_data=jax.tree.map(lambda x: x[:10], tuning.data()[0]))
    assert len(traces) > first


def test_inputs_are_left_alone():
    phi0, theta0, key = jnp.asarray(0.0), jnp.zeros(tuning.FEATURES), jax.random.key(1)
    tuning.minimise(2, phi0=phi0, theta0=theta0)
    assert phi0 == 0 and np.all(theta0 == 0)
    tuning.minimise(2, outer_data=tuning.stochastic(), key=key)
    jax.random.split(key)


def test_key_decides_the_batches():
    runs = [tuning.minimise(3, outer_data=tuning.stochastic(), key=jax.random.key(k)) for k in (1, 1, 2)]
    assert tuning.same_bits(runs[0], runs[1])
    assert not np.array_equal(runs[0].history.value, runs[2].history.value)


def test_state_goes_on():
    whole = tuning.minimise(15)
    first = tuning.minimise(6)
    second = tuning.minimise(9, state=first.state)
    assert second.num_steps == 15 and len(second.history) == 9
    np.testing.assert_array_equal(second.phi, whole.phi)
    np.testing.assert_array_equal(np.append(first.history.value, second.history.value), whole.history.value)
    again = tuning.minimise(9, state=first.state)  # the state was copied, not donated
    assert tuning.same_bits(second, again)


def test_float32():
    solution = tuning.minimise(
        200,
        dtype=np.float32,
        rule=cx.Implicit(rtol=1e-2),
        inner_solver=optx.BFGS(rtol=1e-4, atol=1e-4),
        optimizer=optax.adam(0.2),
    )
    assert solution.phi.dtype == solution.theta.dtype == jnp.float32
    np.testing.assert_allclose(solution.phi, tuning.optimum()[0], atol=0.02)


class Penalties(eqx.Module):
    """Hyperparameters with everything in them that is not to be tuned."""

    log_l2: jax.Array
    count: jax.Array
    name: str


def test_phi_may_hold_more_than_numbers():
    def inner(theta, phi, batch):
        assert phi.name == "l2"
        scale = phi.count.astype(jnp.float32)
        return tuning.inner(theta["w"], phi.log_l2.astype(jnp.float32), batch) * scale

    problem = cx.Bilevel(inner=inner, outer=lambda theta, phi, batch: tuning.outer(theta["w"], phi, batch))
    solution = tuning.minimise(
        20,
        problem=problem,
        phi0=Penalties(jnp.asarray(0.0, jnp.bfloat16), jnp.asarray(2), "l2"),
        theta0={"w": jnp.zeros(tuning.FEATURES, jnp.float32), "label": "linear"},
        dtype=np.float32,
        inner_solver=optx.BFGS(rtol=1e-4, atol=1e-4),
        rule=cx.Implicit(rtol=1e-2),
    )
    assert solution.phi.log_l2.dtype == jnp.bfloat16
    assert solution.phi.count == 2 and solution.phi.name == "l2"
    assert solution.theta["label"] == "linear"
    assert solution.history.value[-1] < solution.history.value[0]


def test_unrolled_rule():
    solution = tuning.minimise(40, inner_solver=cx.Steps(optax.sgd(0.3), 60), rule=cx.Unrolled())
    assert solution.state.state.floor is None
    train, valid = map(jax.tree.map, [np.asarray] * 2, tuning.data())
    value = tuning.outer(_sgd(float(solution.phi), train), None, valid)
    np.testing.assert_allclose(solution.value, value, rtol=1e-10)
    values = [tuning.outer(_sgd(float(solution.phi) + d, train), None, valid) for d in (-0.2, 0.2)]
    assert solution.history.value[0] > min(solution.history.value)
    assert solution.value < max(values)


def _sgd(log_l2, batch):
    """60 steps of gradient descent in NumPy."""
    x, y = batch
    theta = np.zeros(tuning.FEATURES)
    for _ in range(60):
        theta = theta - 0.3 * (x.T @ (x @ theta - y) / len(y) + np.exp(log_l2) * theta)
    return theta


def test_optimisers_that_look_at_the_value():
    optimizer = optax.chain(
        optax.adam(0.2), optax.contrib.reduce_on_plateau(patience=2, cooldown=0, factor=0.5)
    )
    solution = tuning.minimise(60, optimizer=optimizer)
    assert float(solution.state.state.opt_state[-1].scale) < 1


def test_callbacks_and_early_stopping():
    infos = []
    solution = tuning.minimise(
        30, callbacks=[cx.Every(10, infos.append), lambda info: info.history.value[-1] < 0]
    )
    assert [info.step for info in infos] == [0, 10, 20, 30]
    assert solution.num_steps == 30
    np.testing.assert_allclose(tuning.solve(float(infos[1].phi))[0], infos[1].theta, rtol=1e-5)
    stopped = tuning.minimise(30, callbacks=cx.Every(10, lambda info: info.step >= 10))
    assert stopped.num_steps == 10 and stopped.result == cx.RESULTS.successful
    np.testing.assert_array_equal(stopped.history.value, solution.history.value[:11])


def test_early_stopping_ends_after_the_optimum():
    solution = tuning.minimise(500, callbacks=[cx.EarlyStopping(patience=5, min_delta=1e-5)])
    assert 5 < solution.num_steps < 500
    assert solution.result == cx.RESULTS.successful
    np.testing.assert_allclose(solution.value, tuning.optimum()[1], rtol=1e-2)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(monkeypatch, capsys):
    tuning.minimise(2)
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""  # no terminal: quiet
    tuning.minimise(2, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "\x1b" not in captured.err
    assert "step 2/2 · loss " in captured.err and "rel. error" in captured.err
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")
    tuning.minimise(50)
    assert "50/50" in terminal.getvalue() and "loss" in terminal.getvalue()
    terminal.truncate(0)
    tuning.minimise(2, progress=False)
    assert "loss" not in terminal.getvalue()
