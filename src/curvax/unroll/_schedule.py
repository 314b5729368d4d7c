"""What of a path is stored: how many loops are nested, and how long each is."""

import math
from typing import Any

import equinox as eqx
import numpy as np

MOST_LEVELS = 5


def plain_integer(value: Any) -> Any:
    """An integer of NumPy, as products of shapes are, as one of Python; anything else as it is."""
    return int(value) if isinstance(value, np.integer) else value


class MemoryBudget(eqx.Module):
    """Memory that an unrolled derivative may take, in bytes; the fastest schedule that fits is taken.

    Args:
        num_bytes: Bytes for all that the derivative holds beside its arguments and results: the stored states and
            what one step, or the outer loss, needs to be differentiated. Under `vmap` the budget is for one example.

    Raises:
        ValueError: `num_bytes` is not a positive integer. When it is used: no schedule fits; the message says what the
            smallest one takes.

    Example:
        ```python
        rule = cx.Unrolled(checkpoint=cx.MemoryBudget(64 * 2**20))
        ```
    """

    num_bytes: int = eqx.field(static=True, converter=plain_integer)

    def __check_init__(self) -> None:
        if isinstance(self.num_bytes, bool) or not isinstance(self.num_bytes, int) or self.num_bytes < 1:
            raise ValueError(
                f"`num_bytes` of `MemoryBudget` must be a positive integer, got {self.num_bytes!r}. A megabyte is "
                "2**20."
            )


def balanced(num_steps: int, levels: int) -> tuple[int, ...]:
    """Lengths of so many nested loops over `num_steps` steps, with nearly the smallest sum.

    A product that is exactly `num_steps` is preferred, since then no step needs to be skipped; if there is none that
    stores at most a quarter more, the product is the next larger one.
    """
    ideal = levels * num_steps ** (1 / levels)
    exact = _exact(num_steps, levels)
    if exact is not None and sum(exact) <= 1.25 * ideal + 1:
        return exact
    lengths, rest = [], num_steps
    for level in range(levels, 0, -1):
        length = math.ceil(round(rest ** (1 / level), 9))
        lengths.append(length)
        rest = math.ceil(rest / length)
    return tuple(lengths)


def _exact(num_steps: int, levels: int) -> tuple[int, ...] | None:
    """The factorisation with the smallest sum, longest factor first; None if a factor would be 1."""
    if levels == 1:
        return (num_steps,) if num_steps > 1 else None
    best: tuple[int, ...] | None = None
    for length in range(2, math.isqrt(num_steps) + 1):
        if num_steps % length == 0:
            rest = _exact(num_steps // length, levels - 1)
            if rest is not None and (best is None or sum(rest) + length < sum(best)):
                best = (*rest, length)
    return None if best is None else tuple(sorted(best, reverse=True))


def candidates(num_steps: int) -> list[tuple[int, ...]]:
    """Schedules from the fastest on, each with fewer stored states than the one before."""
    found: list[tuple[int, ...]] = []
    for levels in range(1, MOST_LEVELS + 1):
        lengths = balanced(num_steps, levels)
        if not found or sum(lengths) < sum(found[-1]):
            found.append(lengths)
    return found


def named(name: str, num_steps: int) -> tuple[int, ...]:
    """The schedule of a name: "none", "sqrt" or "binomial"."""
    schedules = candidates(num_steps)
    if name == "none":
        return schedules[0]
    if name == "sqrt":
        return schedules[min(1, len(schedules) - 1)]
    fewest = sum(schedules[-1])
    return next(s for s in schedules if sum(s) <= 1.25 * fewest)


def check_checkpoint(value: Any) -> None:
    """Refuse what is no schedule."""
    if not isinstance(value, MemoryBudget) and value not in ("none", "sqrt", "binomial"):
        raise ValueError(
            '`checkpoint` of `Unrolled` must be "none", "sqrt", "binomial" or `cx.MemoryBudget(num_bytes)`, got '
            f"{value!r}."
        )
