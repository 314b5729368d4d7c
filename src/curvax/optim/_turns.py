"""Which factors are factorised in which step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from curvax._control import one_kernel
from curvax.optim._options import Damping, Schedule

_T = TypeVar("_T")

# In so many steps at the start everything is factorised: the running means still change by much.
WARM_UP = 3


@dataclass(frozen=True)
class Turns:
    """Shares of the work, and the step of a period in which each is done. Static.

    Attributes:
        shares: What is done together: indices of the items.
        steps: For each share its step of the period.
        period: Number of steps.
        limit: How far a share may be out of date where need decides and not the step; None where the step does.
    """

    shares: tuple[tuple[int, ...], ...]
    steps: tuple[int, ...]
    period: int
    limit: float | None

    @classmethod
    def of(cls, costs: Sequence[float], schedule: Schedule, damping: Damping) -> "Turns":
        """Shares of about equal cost.

        Args:
            costs: Of the items.
            schedule: When.
            damping: Its adaptation takes a turn of its own where it comes once in a period.
        """
        period = schedule.inverses
        if not costs:
            return cls((), (), period, None)
        if not schedule.staggered:
            return cls((tuple(range(len(costs))),), (0,), period, None)
        own = damping.every is not None and damping.every % period == 0 and period > 1
        slots = min(period - own, len(costs))
        shares: list[list[int]] = [[] for _ in range(slots)]
        loads = [0.0] * slots
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            lightest = loads.index(min(loads))
            shares[lightest].append(item)
            loads[lightest] += costs[item]
        # Spread over the period, its last step left to the damping.
        steps = tuple(number * (period - own) // slots for number in range(slots))
        return cls(tuple(map(tuple, shares)), steps, period, schedule.drift)

    def run(
        self,
        count: Int[Array, ""],
        drift: Callable[[tuple[int, ...]], Array],
        work: Callable[[tuple[int, ...], _T], _T],
        kept: Sequence[_T],
    ) -> list[_T]:
        """What is kept of each share, worked on if it is its turn.

        Every share has a `cond` of its own, so that its work is compiled once: one `switch` would need a branch besides
        in which all is done.

        Args:
            count: Of the steps before.
            drift: How far a share is out of date; called only where need decides.
            work: On one share.
            kept: For each share.
        """
        if self.limit is None and self.period == 1:
            return [work(share, before) for share, before in zip(self.shares, kept, strict=True)]
        results = []
        for share, due, before in zip(self.shares, self._due(count, drift), kept, strict=True):
            results.append(
                jax.lax.cond(
                    due, lambda before, share=share: work(share, before), lambda before: before, before
                )
            )
        return results

    def _due(self, count: Int[Array, ""], drift: Callable[[tuple[int, ...]], Array]) -> list[Bool[Array, ""]]:
        if self.limit is None:
            return one_kernel(self._by_step)(count)
        drifts = jnp.stack([drift(share) for share in self.shares])
        worst = jnp.argmax(drifts)
        # What is not finite is out of date.
        needed = ~(drifts[worst] <= self.limit)
        return [(count < WARM_UP) | (needed & (worst == number)) for number in range(len(self.shares))]

    def _by_step(self, count: Int[Array, ""]) -> list[Bool[Array, ""]]:
        phase = count % self.period
        return [(count < WARM_UP) | (phase == step) for step in self.steps]
