"""The compiled loop and the loop around it, with a small algorithm in the place of a hypergradient."""

import signal
import threading
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree

import curvax as cx
from curvax.bilevel import _run as runs
from curvax.bilevel._driver import AbstractAlgorithm, initial
from curvax.bilevel._history import Measurements
from curvax.bilevel._run import Run, execute

TRACES = []


class _State(eqx.Module):
    x: Array
    update: Array
    noise: Array


class Descent(AbstractAlgorithm):
    """Gradient descent on `fn`, with noise from a key in the state; a point is bad where `fn` is not finite."""

    fn: callable
    rate: Array

    def init(self, phi, data, key):
        return _State(phi, jnp.zeros_like(phi), key)

    def step(self, state, scale, restart, data):
        TRACES.append(self.fn)
        x = state.x + scale.astype(state.x.dtype) * state.update
        value, grad = jax.value_and_grad(self.fn)(x, data)
        noise = 1e-3 * jax.random.normal(state.noise, x.shape, x.dtype)
        new = _State(x, -self.rate.astype(x.dtype) * (grad + noise), jax.random.split(state.noise)[0])
        zero = jnp.zeros((), jnp.int32)
        norm = jnp.linalg.norm(grad)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        result = cx.RESULTS.where(good, cx.RESULTS.successful, cx.RESULTS.nonfinite)
        return new, Measurements(value, norm, norm, norm, zero, zero), result

    def point(self, state) -> tuple[PyTree, PyTree]:
        return state.x, state.noise


def quadratic(x, data):
    """Minimum 0 at `data`."""
    return 0.5 * jnp.sum((x - data) ** 2)


def barrier(x, data):
    """NaN for x <= 0, minimum at `data > 0`."""
    return jnp.sum(data * -jnp.log(x) + x)


def _make(fn=quadratic, rate=0.1, x0=(3.0, 4.0), target=1.0, stopping=(), dtype=float):
    algorithm = Descent(fn, jnp.asarray(rate))
    constants = (algorithm, stopping, jnp.asarray(target, dtype))
    return constants, initial(constants, jnp.asarray(x0, dtype), jax.random.key(0))


def _by_hand(num_rows, rate=0.1):
    """The same descent as a plain Python loop."""
    x, noise, values = jnp.array([3.0, 4.0]), jax.random.key(0), []
    step = jax.jit(jax.value_and_grad(quadratic))
    for _ in range(num_rows):
        value, grad = step(x, jnp.array(1.0))
        values.append(float(value))
        last = x
        x = x - rate * (grad + 1e-3 * jax.random.normal(noise, x.shape))
        noise = jax.random.split(noise)[0]
    return np.array(values), np.array(last)


@pytest.mark.parametrize("chunks", [[1] * 30, [30], [1, 7, 22], [4096]])
def test_result_does_not_depend_on_chunks(chunks):
    values, x = _by_hand(30)
    constants, carry = _make()
    run = Run(constants, carry)
    for size in chunks:
        run._chunk_attempts = size
        run.advance(min(size, 30))
    assert run.num_rows == 30
    np.testing.assert_allclose(run.recorder.history().value, values, rtol=1e-12)
    np.testing.assert_allclose(run.point()[0], x, rtol=1e-12)
    reference = Run(*_make())
    reference._chunk_attempts = 30
    reference.advance(30)
    assert eqx.tree_equal(reference.carry, run.carry)
    assert eqx.tree_equal(reference.recorder.history(), run.recorder.history())


def test_one_trace_for_all_chunks_and_runs():
    constants, carry = _make(fn=lambda x, data: quadratic(x, data) + 1)
    fn = constants[0].fn
    for _ in range(2):
        run = Run(constants, initial(constants, jnp.array([3.0, 4.0]), jax.random.key(0)))
        execute(run, target_rows=100)
        assert run.num_rows == 100
    assert TRACES.count(fn) == 1


def test_user_arrays_survive_donation():
    x0 = jnp.array([3.0, 4.0])
    constants, _ = _make()
    key = jax.random.key(0)
    run = Run(constants, initial(constants, x0, key))
    execute(run, target_rows=5)
    assert np.array_equal(x0, [3.0, 4.0])
    assert not key.is_deleted()


def test_chunks_last_as_long_as_wished():
    run = Run(*_make())
    run._adapt(5.0)  # the first chunk: compilation
    assert run._chunk_attempts == 1
    sizes = []
    for _ in range(5):
        run._adapt(0.005)
        sizes.append(run._chunk_attempts)
    assert sizes == [8, 60, 60, 60, 60]
    run._adapt(10.0)
    assert run._chunk_attempts == 1


def test_step_that_leaves_the_domain_is_halved_until_it_fits():
    # From x = 1.5 with rate 40 the step is -40 (1 - 1/x) = -13.3; a sixteenth of it is the first to stay above 0.
    constants, carry = _make(fn=barrier, rate=40.0, x0=(1.5,))
    run = Run(constants, carry)
    execute(run, target_rows=2)
    history = run.recorder.history()
    assert list(history.num_retries) == [0, 4]
    assert list(history.step_scale) == [1.0, 1 / 16]
    assert np.all(np.isfinite(history.value))
    np.testing.assert_allclose(run.point()[0], 1.5 - 40 / 16 * (1 - 1 / 1.5), atol=0.01)
    assert run.carry.result == cx.RESULTS.successful


def test_step_grows_back_after_good_steps():
    constants, carry = _make(fn=barrier, rate=2.0, x0=(0.5,), target=0.01)
    run = Run(constants, carry)
    execute(run, target_rows=40)
    history = run.recorder.history()
    shrunk = np.flatnonzero(history.num_retries)
    assert len(shrunk) > 0 and history.step_scale[0] == 1
    assert np.any(np.diff(history.step_scale) > 0)
    assert np.max(history.step_scale) == 1


def test_benign_control_is_never_halved():
    constants, carry = _make(fn=barrier, rate=0.1, x0=(1.5,))
    run = Run(constants, carry)
    execute(run, target_rows=30)
    assert np.all(run.recorder.history().step_scale == 1)
    assert np.all(run.recorder.history().num_retries == 0)


def test_gives_up_and_keeps_the_last_good_point():
    def wall(x, data):
        return jnp.where(jnp.all(x == data), 0.0, jnp.nan) + jnp.sum(x)

    constants, carry = _make(fn=wall, rate=1.0, x0=(1.0,), target=1.0)
    run = Run(constants, carry)
    execute(run, target_rows=10)
    assert run.finished and run.num_rows == 1
    assert run.carry.result == cx.RESULTS.nonfinite
    assert int(run.carry.num_attempts) == 1 + 11  # at 1, 1/2, ..., 1/1024
    assert np.array_equal(run.point()[0], [1.0])
    assert len(run.recorder.history()) == 1


def test_creeping_along_a_wall_is_a_failure():
    """The minimum lies beyond a wall: every step shrinks, and the run says so before they are nothing."""

    def walled(x, data):
        return jnp.sum((x - data) ** 2) + jnp.where(x[0] > 1.0, jnp.nan, 0.0)

    constants, carry = _make(fn=walled, rate=0.1, x0=(0.0,), target=3.0)
    run = Run(constants, carry)
    execute(run, target_rows=1000)
    assert run.finished and run.carry.result == cx.RESULTS.nonfinite
    assert run.num_rows < 100
    assert 0.99 < run.point()[0][0] <= 1.0


def test_bad_start_is_not_repeated():
    constants, carry = _make(fn=barrier, x0=(-1.0,))
    run = Run(constants, carry)
    execute(run, target_rows=10)
    assert run.finished and run.num_rows == 0
    assert int(run.carry.num_attempts) == 1
    assert np.array_equal(run.point()[0], [-1.0])


def test_early_stopping_is_exact_and_independent_of_chunks():
    def sawtooth(x, data):  # value k at step k until 7, constant after it
        return jnp.maximum(10.0 - x[0], data)

    rule = cx.EarlyStopping(patience=4)
    rows = []
    for size in (1, 3, 100):
        constants, carry = _make(fn=sawtooth, rate=1.0, x0=(0.0,), target=3.0, stopping=(rule,))
        run = Run(constants, carry)
        while not run.finished:
            run._chunk_attempts = size
            run.advance(size)
        rows.append(run.num_rows)
        assert run.carry.result == cx.RESULTS.successful
    assert rows == [rows[0]] * 3
    value = run.recorder.history().value
    best = np.flatnonzero(value < np.minimum.accumulate(np.append(np.inf, value[:-1])))[-1]
    assert rows[0] - 1 == best + 4


def test_min_delta_counts_small_progress_as_none():
    for delta, stops in ((0.0, False), (1e3, True)):
        rule = cx.EarlyStopping(patience=3, min_delta=delta)
        constants, carry = _make(stopping=(rule,))
        run = Run(constants, carry)
        execute(run, target_rows=10)
        assert run.finished == stops
        assert run.num_rows == (4 if stops else 10)


def test_callbacks_see_copies_and_stop():
    seen = []

    def callback(info):
        seen.append(info)
        return info.step >= 5 or None

    constants, carry = _make()
    run = Run(constants, carry)
    execute(run, target_rows=1000, callbacks=[callback])
    assert run.finished and run.num_rows < 1000
    assert seen[0].step == 0 and seen[0].num_steps == 999
    for info in seen:
        assert len(info.history) == info.step + 1
        assert np.isfinite(np.asarray(info.phi)).all()  # not deleted by donation
    np.testing.assert_array_equal(seen[0].phi, [3.0, 4.0])


def test_every_is_called_at_its_steps_only():
    steps = []
    constants, carry = _make()
    run = Run(constants, carry)
    execute(run, target_rows=36, callbacks=[cx.Every(10, lambda info: steps.append(info.step))])
    assert steps == [0, 10, 20, 30]
    assert run.num_rows == 36


def test_callback_of_another_answer_is_refused():
    run = Run(*_make())
    with pytest.raises(TypeError, match="return True to stop"):
        execute(run, target_rows=5, callbacks=[lambda info: 3])


def test_interrupt_waits_for_the_chunk(monkeypatch):
    monkeypatch.setattr(runs, "CHUNK_SECONDS", 0.05)
    constants, carry = _make()
    run = Run(constants, carry)
    execute(run, target_rows=3)  # compiled
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt, match="interrupted at step .*cx.Checkpoint"):
        execute(run, target_rows=10**9)
    timer.join()
    assert run.is_sound and run.num_rows == len(run.recorder.history())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    rows = run.num_rows
    execute(run, target_rows=rows + 3)  # and it goes on
    assert run.num_rows == rows + 3


def test_second_interrupt_acts_at_once():
    with pytest.raises(KeyboardInterrupt), runs.deferred_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")


def test_works_outside_the_main_thread():
    failures = []

    def work():
        try:
            execute(Run(*_make()), target_rows=5)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_float32():
    constants, carry = _make(dtype=jnp.float32)
    run = Run(constants, carry)
    execute(run, target_rows=50)
    assert run.point()[0].dtype == jnp.float32
    np.testing.assert_allclose(run.point()[0], 1.0, atol=0.02)


def test_progress_time_is_not_spent_between_fast_steps():
    constants, carry = _make()
    run = Run(constants, carry)
    execute(run, target_rows=3)
    start = time.perf_counter()
    execute(run, target_rows=20_000)
    assert time.perf_counter() - start < 5
