"""Runs that are cut off: by a kill, by Ctrl-C, by a callback, by an error; and go on bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from helpers import killed_run, tuning

NUM_STEPS = 40


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run; it has retries in it, so that their state counts too."""
    solution = killed_run.run(None, NUM_STEPS)
    assert solution.history.num_retries.sum() > 0
    return solution


def _start(directory, result):
    tests = pathlib.Path(__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "helpers.killed_run", str(directory), str(NUM_STEPS), str(result)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tests,
        env=os.environ | {"PYTHONPATH": str(tests)},
    )


def _steps(process):
    """Each line that the run prints, as a number of steps."""
    for line in process.stdout:
        if line.startswith("WARNING:absl:Metadata file does not exist"):
            continue  # Orbax, of a checkpoint in whose writing the run before was killed
        assert line.strip().isdigit(), line + process.stdout.read()
        yield int(line)


def _is_writing(directory):
    return any("tmp" in path.name for path in directory.iterdir())


def _kill_when(process, directory, condition):
    """Kill -9 as soon as `condition(step, is_writing)` holds; the step at which that was, None if it ended before."""
    state = {"step": None}
    killed = None

    def read():
        for step in _steps(process):
            state["step"] = step

    with process:
        reader = threading.Thread(target=read)
        reader.start()
        while process.poll() is None:
            if state["step"] is not None and condition(state["step"], _is_writing(directory)):
                process.kill()
                killed = state["step"]
                break
            time.sleep(0.0005)
        reader.join()
    return killed, state["step"]


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_no_bit(tmp_path, whole):
    directory, result = tmp_path / "run", tmp_path / "result.npz"
    directory.mkdir()
    moments = [
        lambda step, writing: step >= 0,  # right after the first chunk
        lambda step, writing: step >= 8 and writing,  # in the middle of a write
        lambda step, writing: step >= 20 and not writing,
    ]
    for moment in moments:
        killed, _ = _kill_when(_start(directory, result), directory, moment)
        assert killed is not None and killed < NUM_STEPS
        assert not result.exists()
    _, last = _kill_when(_start(directory, result), directory, lambda step, writing: False)
    assert last == NUM_STEPS
    with np.load(result) as found:
        leaves = [found[name] for name in found.files]
    expected = killed_run.arrays(whole)
    assert len(leaves) == len(expected)
    for a, b in zip(leaves, expected, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_longer_run_goes_on_from_a_shorter_one(tmp_path, whole):
    first = killed_run.run(tmp_path, 11)
    assert first.num_steps == 11
    second = killed_run.run(tmp_path, NUM_STEPS)
    assert tuning.same_bits(second, whole)
    third = killed_run.run(tmp_path, NUM_STEPS)  # nothing left to do
    assert tuning.same_bits(third, whole)


def test_checkpoints_and_callbacks_do_not_change_the_run(tmp_path, whole):
    watched = killed_run.run(
        tmp_path, NUM_STEPS, callbacks=[lambda info: None, cx.Every(7, lambda info: None)]
    )
    assert tuning.same_bits(watched, whole)


def test_interrupt_saves_and_says_how_to_go_on(tmp_path, whole):
    def interrupt(info):
        if info.step == 10:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(
        KeyboardInterrupt, match=f"step 10 of 40 and saved in {tmp_path}. The same call goes on"
    ):
        killed_run.run(tmp_path, NUM_STEPS, callbacks=[cx.Every(10, interrupt)])
    assert tuning.same_bits(killed_run.run(tmp_path, NUM_STEPS), whole)


def test_error_in_a_callback_saves(tmp_path, whole):
    def fail(info):
        raise OSError("no printer")

    with pytest.raises(OSError, match="no printer") as caught:
        killed_run.run(tmp_path, NUM_STEPS, callbacks=[cx.Every(9, fail)])
    assert "saved in" in caught.value.__notes__[0]
    assert tuning.same_bits(killed_run.run(tmp_path, NUM_STEPS), whole)


def test_stopped_run_stays_stopped(tmp_path):
    stop = cx.Every(5, lambda info: info.step >= 5)
    first = killed_run.run(tmp_path, NUM_STEPS, callbacks=[stop])
    again = killed_run.run(tmp_path, NUM_STEPS)
    assert first.num_steps == again.num_steps == 5
    assert tuning.same_bits(first, again)


def test_early_stopping_resumes_exactly(tmp_path):
    stopping = [cx.EarlyStopping(patience=8, min_delta=1e-5)]
    whole = tuning.minimise(300, callbacks=stopping)
    assert whole.num_steps < 300
    for num_steps in (whole.num_steps - 5, whole.num_steps - 1, 300):
        part = tuning.minimise(num_steps, callbacks=stopping, checkpoint=cx.Checkpoint(tmp_path))
    assert tuning.same_bits(part, whole)


def test_state_and_checkpoint_together(tmp_path):
    whole = tuning.minimise(15)
    start = tuning.minimise(5)
    with pytest.raises(KeyboardInterrupt):
        tuning.minimise(
            10,
            state=start.state,
            checkpoint=cx.Checkpoint(tmp_path),
            callbacks=[cx.Every(9, lambda info: signal.raise_signal(signal.SIGINT))],
        )
    second = tuning.minimise(10, state=start.state, checkpoint=cx.Checkpoint(tmp_path))
    assert second.num_steps == 15
    np.testing.assert_array_equal(second.phi, whole.phi)
    np.testing.assert_array_equal(second.history.value, whole.history.value[6:])


def test_checkpoint_of_another_problem_is_refused(tmp_path):
    tuning.minimise(2, checkpoint=cx.Checkpoint(tmp_path))
    with pytest.raises(
        ValueError, match=r"another problem: `inner_data` was .*\[12, 6\].*now it is .*\[10, 6\]"
    ):
        data = jax.tree.map(lambda x: x[:10], tuning.data()[0])
        tuning.minimise(2, inner_data=data, checkpoint=cx.Checkpoint(tmp_path))
    with pytest.raises(ValueError, match="another problem: `key` was no arrays"):
        tuning.minimise(2, key=jax.random.key(0), checkpoint=cx.Checkpoint(tmp_path))
    with pytest.raises(ValueError, match="another inner solver, rule, optimizer"):
        tuning.minimise(2, optimizer=optax.sgd(0.1), checkpoint=cx.Checkpoint(tmp_path))
    with pytest.warns(UserWarning, match="other values of phi0"):
        tuning.minimise(2, phi0=jnp.asarray(1.0), checkpoint=cx.Checkpoint(tmp_path))
    tuning.minimise(2, checkpoint=cx.Checkpoint(tmp_path))  # benign control


def test_damaged_checkpoint_falls_back(tmp_path):
    whole = tuning.minimise(12)
    tuning.minimise(4, checkpoint=cx.Checkpoint(tmp_path))
    tuning.minimise(8, checkpoint=cx.Checkpoint(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "9"]
    (tmp_path / "9" / "meta" / "metadata").write_text('{"format": "curvax')
    with pytest.warns(UserWarning, match="9 cannot be read"):
        resumed = tuning.minimise(12, checkpoint=cx.Checkpoint(tmp_path))
    assert tuning.same_bits(resumed, whole)


def test_failed_run_keeps_its_history_and_can_be_repaired(tmp_path):
    def outer(theta, phi, batch):
        return tuning.outer(theta, phi, batch[0]) + jnp.where(phi > batch[1], jnp.nan, 0.0)

    problem = cx.Bilevel(inner=tuning.inner, outer=outer)
    train, valid = tuning.data()

    def run(wall):
        return tuning.minimise(
            60, problem=problem, outer_data=(valid, jnp.asarray(wall)), checkpoint=cx.Checkpoint(tmp_path)
        )

    with pytest.raises(RuntimeError, match=f"gave up after step .*kept in {tmp_path}"):
        run(1.0)
    with pytest.warns(UserWarning, match="other values of outer_data"):
        solution = run(10.0)
    assert solution.result == cx.RESULTS.successful and solution.num_steps == 60
    assert np.all(np.isfinite(solution.history.value)) and len(solution.history) == 61
    assert solution.phi > 1.5
