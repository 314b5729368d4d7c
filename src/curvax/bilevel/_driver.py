"""The compiled outer loop: chunks of steps in one program, and what happens to a step that fails.

One program serves every chunk: `while_loop(i < k & running)` with the number of steps k a dynamic
argument. The state after a chunk therefore does not depend on how the run was cut into chunks,
which is what makes a resumed run equal to an uninterrupted one, bit for bit.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._results import RESULTS
from curvax.bilevel._history import History, Measurements, empty, write

# Rows that the buffers of one chunk hold.
CAPACITY = 4096
# After a failed attempt the step is halved, down to 1/1024: a run that needs still smaller ones creeps along a
# wall, and whoever waits for it is better told. After some good steps in a row it is doubled again. From the second
# repetition on the algorithm forgets its momentum: that may push into the wall while the gradient points away.
SHRINK = 0.5
MIN_SCALE = 2.0**-10
NUM_GOOD_TO_GROW = 5
NUM_RETRIES_TO_RESTART = 2


class AbstractAlgorithm(eqx.Module):
    """A bilevel algorithm as pure functions; its state always describes a good point.

    The law that makes retries work: a state holds a measured point and all that the next update
    needs. `step` takes `scale` times that update and measures the point to which it leads. When that
    point is bad, the driver throws the new state away and calls `step` again on the old state with a
    smaller scale, and with `restart` when that did not help. The first call of `step` takes no
    update: it measures the start.
    """

    @abc.abstractmethod
    def init(self, phi: PyTree[Array], data: PyTree, key: PyTree) -> PyTree:
        """State at the start, before anything was measured."""

    @abc.abstractmethod
    def step(
        self, state: PyTree, scale: Scalar, restart: Scalar, data: PyTree
    ) -> tuple[PyTree, Measurements, RESULTS]:
        """Take the update times `scale`, without momentum if `restart`; `successful` if the point is good."""

    @abc.abstractmethod
    def point(self, state: PyTree) -> tuple[PyTree, PyTree]:
        """Hyperparameters and inner solution at the point of `state`."""


class Carry(eqx.Module):
    """All that a run carries from step to step: a pytree of arrays."""

    state: PyTree
    stopping: PyTree
    num_rows: Int[Array, ""]
    num_attempts: Int[Array, ""]
    num_retries: Int[Array, ""]
    num_good: Int[Array, ""]
    scale: Float[Array, ""]
    result: RESULTS
    finished: Bool[Array, ""]


@eqx.filter_jit
def _init(constants: PyTree, phi: PyTree, key: PyTree) -> Carry:
    algorithm, rules, data = constants
    zero = jnp.zeros((), jnp.int32)
    return Carry(
        state=algorithm.init(phi, data, key),
        stopping=tuple(rule.init() for rule in rules),
        num_rows=zero,
        num_attempts=zero,
        num_retries=zero,
        num_good=zero,
        scale=jnp.ones((), float),
        result=RESULTS.successful,
        finished=jnp.asarray(False),
    )


def own(tree: PyTree) -> PyTree:
    """A copy of every array, strongly typed: safe to donate, and of one and the same type in every call."""

    def copy(leaf: Any) -> Any:
        if not eqx.is_array(leaf):
            return leaf
        # `dtype` given: a weakly typed array would compile the program a second time.
        return jnp.array(leaf, dtype=leaf.dtype, copy=True)

    return jax.tree.map(copy, tree)


def initial(constants: PyTree, phi: PyTree, key: PyTree) -> Carry:
    """The carry of a run that has not begun."""
    # `jit` may hand its inputs through as outputs: without the copy, donating the carry would delete
    # the user's own arrays.
    return own(_init(constants, phi, key))


def _advance(constants: PyTree, carry: Carry, buffers: History, row: Scalar) -> tuple[Carry, History, Scalar]:
    """One attempt; kept if it is good, else only counted."""
    algorithm, rules, data = constants
    restart = carry.num_retries >= NUM_RETRIES_TO_RESTART
    state, entry, result = algorithm.step(carry.state, carry.scale, restart, data)
    good = result == RESULTS.successful
    buffers = write(buffers, row, entry, carry.scale, carry.num_retries)  # a failed row is overwritten
    stopping, stops = [], [jnp.asarray(False)]
    for rule, before in zip(rules, carry.stopping, strict=True):
        after, stop = rule.update(before, entry)
        stopping.append(after)
        stops.append(stop)
    keep = lambda new, old: jnp.where(good, new, old) if eqx.is_array(new) else new  # noqa: E731
    # At the start there is no step that could be made smaller.
    hopeless = (carry.scale * SHRINK < MIN_SCALE) | (carry.num_rows == 0)
    grown = carry.num_good + 1 >= NUM_GOOD_TO_GROW
    new = Carry(
        state=jax.tree.map(keep, state, carry.state),
        stopping=jax.tree.map(keep, tuple(stopping), carry.stopping),
        num_rows=carry.num_rows + good.astype(jnp.int32),
        num_attempts=carry.num_attempts + 1,
        num_retries=jnp.where(good, 0, carry.num_retries + 1),
        num_good=jnp.where(good & ~grown, carry.num_good + 1, 0),
        scale=jnp.where(
            good, jnp.where(grown, jnp.minimum(carry.scale / SHRINK, 1.0), carry.scale), carry.scale * SHRINK
        ),
        result=result,
        finished=jnp.where(good, jnp.any(jnp.stack(stops)), hopeless),
    )
    return new, buffers, row + good.astype(jnp.int32)


@eqx.filter_jit(donate="all-except-first")
def run_chunk(constants: PyTree, carry: Carry) -> tuple[Carry, History, Scalar]:
    """At most `num_attempts` attempts; returns the new carry, the rows written and their number."""
    num_attempts, constants = constants
    arrays, static = eqx.partition(carry, eqx.is_array)

    def running(loop: tuple) -> Bool[Array, ""]:
        attempt, carry, _, _ = loop
        return (attempt < num_attempts) & ~carry.finished

    def body(loop: tuple) -> tuple:
        attempt, arrays, buffers, row = loop
        carry, buffers, row = _advance(constants, eqx.combine(arrays, static), buffers, row)
        return attempt + 1, eqx.filter(carry, eqx.is_array), buffers, row

    zero = jnp.zeros((), jnp.int32)
    _, arrays, buffers, row = jax.lax.while_loop(running, body, (zero, arrays, empty(CAPACITY), zero))
    return eqx.combine(arrays, static), buffers, row
