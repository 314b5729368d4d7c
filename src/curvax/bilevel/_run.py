"""A run on the host: chunk after chunk, with callbacks, progress, checkpoints and interrupts between them."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from curvax._results import RESULTS
from curvax.bilevel._callbacks import Every, Info, wants_stop
from curvax.bilevel._checkpoint import Store
from curvax.bilevel._driver import CAPACITY, AbstractAlgorithm, Carry, own, run_chunk
from curvax.bilevel._history import History, Recorder, to_dict
from curvax.bilevel._progress import Progress

# A chunk lasts about this long: long enough that what the host does between two chunks (0.5 ms, a
# progress line, a callback) is below 1 %, short enough for a person who watches or interrupts.
CHUNK_SECONDS = 0.3


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; a second Ctrl-C acts at once.

    While a chunk runs the old carry is donated and the new one is not there yet: an interrupt between
    the two would leave nothing to save.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    pending: list[int] = []

    def handler(signum: int, frame: Any) -> None:
        if pending:
            previous(signum, frame)
        pending.append(signum)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        previous(signal.SIGINT, None)


class Run:
    """A run on the host: the carry, the rows so far, and how many attempts make a chunk."""

    def __init__(self, constants: PyTree, carry: Carry, history: History | None = None) -> None:
        """Start from a carry that this object may donate."""
        self.constants = constants
        self.carry = carry
        self.recorder = Recorder(history)
        self.num_rows = int(carry.num_rows)
        self.finished = bool(carry.finished)
        self.is_sound = True
        self._chunk_attempts = 1
        self._is_warm = False

    @property
    def step(self) -> int:
        """Number of updates made; 0 before the start was measured."""
        return max(0, self.num_rows - 1)

    def advance(self, limit: int) -> bool:
        """Run one chunk, of at most `limit` attempts; whether it brought a new row."""
        attempts = max(1, min(self._chunk_attempts, limit, CAPACITY))
        start = time.perf_counter()
        with deferred_interrupt():
            self.is_sound = False  # until the new carry and its rows are here
            self.carry, buffers, num_rows = run_chunk(
                (jnp.asarray(attempts, jnp.int32), self.constants), self.carry
            )
            host = jax.device_get((buffers, num_rows, self.carry.finished, self.carry.num_rows))
            buffers, num_rows, finished, total = host
            self.recorder.append(buffers, int(num_rows))
            self.finished, self.num_rows = bool(finished), int(total)
            self.is_sound = True
        self._adapt((time.perf_counter() - start) / attempts)
        return bool(num_rows)

    def _adapt(self, seconds: float) -> None:
        """Choose the next chunk from the time of an attempt; growth is bounded against a lucky clock."""
        wanted = int(CHUNK_SECONDS / max(seconds, 1e-9))
        # The first chunk holds the compilation, so its time says nothing about a step.
        largest = 8 * self._chunk_attempts if self._is_warm else 1
        self._chunk_attempts = max(1, min(wanted, largest, CAPACITY))
        self._is_warm = True

    def stop(self) -> None:
        """Mark the run as finished."""
        # Stopped is not failed: a retry that happened to be under way is forgotten.
        stopped = (jnp.asarray(True), jnp.zeros((), jnp.int32), RESULTS.successful)
        self.carry = eqx.tree_at(lambda c: (c.finished, c.num_retries, c.result), self.carry, stopped)
        self.finished = True

    def point(self) -> tuple[PyTree, PyTree]:
        """Copies of the hyperparameters and of the inner solution."""
        algorithm: AbstractAlgorithm = self.constants[0]
        return own(algorithm.point(self.carry.state))

    def save(self, store: Store, *, wait: bool = False) -> bool:
        """Write a checkpoint; whether that worked as far as is known."""
        arrays = to_dict(self.recorder.history())
        return store.save(int(self.carry.num_attempts), self.carry, arrays, wait=wait)


def load(store: Store, like: Carry) -> tuple[Carry, History | None]:
    """Carry and history from a checkpoint if there is one, else `like` and none."""
    names = tuple(History.__dataclass_fields__)
    found = store.load(like, names)
    if found is None:
        return like, None
    carry, arrays = found
    return revive(carry), History(**arrays)


def revive(carry: Carry) -> Carry:
    """Let a run that gave up try again with full steps; one that was stopped stays stopped."""
    if not bool(carry.finished) or bool(carry.result == RESULTS.successful):
        return carry
    fresh = (jnp.asarray(False), jnp.zeros((), jnp.int32), jnp.ones_like(carry.scale))
    return eqx.tree_at(lambda c: (c.finished, c.num_retries, c.scale), carry, fresh)


def execute(
    run: Run,
    *,
    target_rows: int,
    callbacks: Sequence[Callable] = (),
    store: Store | None = None,
    progress: Progress | None = None,
) -> None:
    """Advance `run` until it has `target_rows` rows, gives up, or is stopped."""
    try:
        while not run.finished and run.num_rows < target_rows:
            is_new = run.advance(_limit(run, target_rows, callbacks))
            if progress is not None:
                progress.update(run.step, run.recorder.last())
            if is_new and callbacks:
                _call(run, target_rows, callbacks)
            if store is not None and store.is_due():
                run.save(store)
    except BaseException as error:
        if not run.is_sound:
            raise
        text = f"minimise: interrupted at step {run.step} of {target_rows - 1}"
        if store is None:
            text += ". To be able to go on from such a point, pass `checkpoint=cx.Checkpoint(directory)`."
        elif run.save(store, wait=True):
            text += f" and saved in {store.directory}. The same call goes on from there."
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(text) from error
        error.add_note(text)
        raise
    if store is not None:
        run.save(store, wait=True)


def _limit(run: Run, target_rows: int, callbacks: Sequence[Callable]) -> int:
    """Attempts until the next place where the chunk has to end."""
    limit, step = target_rows - run.num_rows, run.num_rows - 1
    for callback in callbacks:
        if isinstance(callback, Every):
            limit = min(limit, (step // callback.num_steps + 1) * callback.num_steps - step)
    return limit


def _call(run: Run, target_rows: int, callbacks: Sequence[Callable]) -> None:
    """Call every callback whose turn it is; stop the run if one of them asks for it."""
    due = [c for c in callbacks if not isinstance(c, Every) or run.step % c.num_steps == 0]
    if not due:
        return
    phi, theta = run.point()
    info = Info(run.step, target_rows - 1, phi, theta, run.recorder.history())
    answers = [wants_stop(callback, callback(info)) for callback in due]
    if any(answers):
        run.stop()
