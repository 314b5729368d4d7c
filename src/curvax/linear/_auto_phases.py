"""An iterative stage of `Auto` run a part at a time, and given up where a factorisation would be done before it.

How many steps a Krylov method will need is not known at the start, and no rule is right about it always: one that
spends a share of the cost of the alternative before it decides loses no more than that share where it decides rightly.
The shares below were chosen on some sixty spectra, with right-hand sides of two kinds and exchange rates from 8 to
3000: 1.3 times the better choice in the mean, where 1.2 was the best that any rule of this kind came to that may look
at every step instead of at a few.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Scalar

from curvax._control import in_one_kernel
from curvax._pytree import tree_norm
from curvax.linear._auto_stages import Attempt, Marks, Reason

# Shares of the exchange rate: what is spent before the first and before the second look at the progress.
_FIRST, _SECOND = 0.12, 0.4
# The largest prediction of what remains, as a share of the same, with which a method goes on.
_PATIENCE = 1.0
# A prediction is given some room.
_ROOM = 1.3

Stage = Callable[[Attempt, Int[Array, ""]], Attempt]


class Terms(NamedTuple):
    """On which an iterative method works."""

    target: Scalar  # residual norm at which the system is solved
    error: Scalar  # the same as a relative error of the solution, for methods that know the spectrum
    budget: int  # products
    exchange: float  # products that a direct solve is worth, infinite where there is none


def in_phases(stage: Stage, p: Attempt, terms: Terms, *, least: int = 4, polished: bool = False) -> Attempt:
    """Run `stage(attempt, budget)` until it has answered, failed, or is predicted to take too long.

    The prediction: the logarithm of the residual falls as it did so far, in the last phase or on the whole, whichever
    was faster, down to where the stage will stop. A restart in between costs a method little where it converges
    linearly.

    Args:
        stage: Improves an attempt; `Reason.budget` as its failure means that it may go on.
        p: The best so far.
        terms: When it is done, and what it competes with.
        least: Products of the shortest phase.
        polished: Whether a stage that stopped short of the target is run once more, as long as that helps.

    Returns:
        The attempt after the last phase, with `Reason.slow` as its failure where a direct solve should be faster.
    """
    budget, exchange = terms.budget, terms.exchange
    if exchange == math.inf and not polished:
        return stage(p, jnp.asarray(budget))

    def plan(
        first: Marks, before: Marks, after: Marks, x_norm: Scalar, target: Scalar, error: Scalar
    ) -> Marks:
        dtype, spent = target.dtype, after.num_matvecs - first.num_matvecs
        unsolved = ~(after.residual_norm <= target) & (spent < budget)
        out = again = unsolved & (after.failure == int(Reason.budget))
        upcoming = jnp.asarray(budget, dtype)
        if exchange < math.inf:
            # Conjugate gradients go on to an error of the solution.
            known = jnp.isfinite(after.lowest)
            wanted = error * jnp.where(known, after.lowest, 0) * x_norm
            aim = jnp.where(known & (wanted < target), wanted, target)
            logarithm, used = jnp.log(after.residual_norm), spent.astype(dtype)
            steps = (after.num_matvecs - before.num_matvecs).astype(dtype)
            recent = (jnp.log(before.residual_norm) - logarithm) / steps
            overall = (jnp.log(first.residual_norm) - logarithm) / used
            rate = jnp.maximum(recent, overall)
            remaining = jnp.where(rate > 0, (logarithm - jnp.log(aim)) / rate, jnp.inf)
            again = out & (remaining <= _PATIENCE * exchange) & (used < exchange)
            upcoming = jnp.maximum(_SECOND * exchange - used, jnp.minimum(_ROOM * remaining, exchange - used))
        # The reason is that of the stage, not of its last phase.
        failure = jnp.where(out & ~again, int(Reason.slow), after.failure)
        if polished:
            helped = after.residual_norm <= 0.5 * before.residual_norm
            again |= unsolved & helped & (after.failure == int(Reason.stalled))
        left = jnp.maximum(budget - spent, 1).astype(dtype)
        upcoming = jnp.clip(upcoming, least, left).astype(jnp.int32)
        return after._replace(failure=failure, reason=first.failure, upcoming=upcoming, again=again)

    def body(before: Attempt) -> Attempt:
        after = stage(before, before.packed.pick(lambda marks: marks.upcoming))
        seen = (p.packed, before.packed, after.packed, tree_norm(after.x))
        return after._replace(packed=in_one_kernel(plan)(*seen, terms.target, terms.error))

    first = budget if exchange == math.inf else min(budget, max(least, int(_FIRST * exchange)))
    start = lambda marks: marks._replace(  # noqa: E731
        upcoming=jnp.full_like(marks.upcoming, first), again=jnp.ones_like(marks.again)
    )
    begin = p._replace(packed=in_one_kernel(start)(p.packed))
    return jax.lax.while_loop(lambda p: p.packed.pick(lambda marks: marks.again), body, begin)
