"""Which factors are factorised in which step."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Int

from curvax.optim._options import Damping, Schedule

# In so many steps at the start everything is factorised: the running means still change by much.
WARM_UP = 3


@dataclass(frozen=True)
class Turns:
    """Shares of the work, and the step of a period in which each is done. Static.

    Attributes:
        shares: What is done together: indices of the items.
        table: For each step of a period 0 for nothing, 1 for everything, 2 + i for share i.
    """

    shares: tuple[tuple[int, ...], ...]
    table: tuple[int, ...]

    @classmethod
    def of(cls, costs: Sequence[float], schedule: Schedule, damping: Damping) -> "Turns":
        """Shares of about equal cost.

        Args:
            costs: Of the items.
            schedule: When.
            damping: Its adaptation takes a turn of its own where it comes once in a period.
        """
        period = schedule.inverses
        if not schedule.staggered:
            return cls((), (1, *(0,) * (period - 1)))
        own = damping.every is not None and damping.every % period == 0 and period > 1
        slots = min(period - own, len(costs))
        shares: list[list[int]] = [[] for _ in range(slots)]
        loads = [0.0] * slots
        for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
            lightest = loads.index(min(loads))
            shares[lightest].append(item)
            loads[lightest] += costs[item]
        table = [0] * period
        for number in range(slots):
            # Spread over the period, its last step left to the damping.
            table[number * (period - own) // slots] = 2 + number
        return cls(tuple(tuple(share) for share in shares), tuple(table))

    def choice(self, count: Int[Array, ""], drifts: Array | None, limit: float | None) -> Int[Array, ""]:
        """What is to be done, as in `table`.

        Args:
            count: Of the steps before.
            drifts: How far each share is out of date, None where that is not asked.
            limit: Of it.
        """
        if drifts is None or limit is None:
            picked = jnp.asarray(self.table, jnp.int32)[count % len(self.table)]
        else:
            worst = jnp.argmax(drifts)
            # What is not finite is out of date.
            picked = jnp.where(~(drifts[worst] <= limit), worst.astype(jnp.int32) + 2, 0)
        return jnp.where(count < WARM_UP, 1, picked).astype(jnp.int32)
