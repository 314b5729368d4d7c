"""The path of an inner loop: nested loops over its steps, in which no more is stored than the schedule says."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax.unroll._lossy import from_rounded_start
from curvax.unroll._step import GRADIENT, Step, Walk


def advance(step: Step, walk: Walk, limit: Any) -> Walk:
    """Step until `limit` steps have been taken in all, or the path stops. Not to be differentiated in reverse."""

    def going_on(walk: Walk) -> Array:
        return (walk.taken < limit) & (True if walk.stopped is None else ~walk.stopped)

    return jax.lax.while_loop(going_on, lambda walk: step(walk)[0], walk)


def follow(
    step_of: Callable[[Any], Callable[[Walk], tuple[Walk, Float[Array, ""]]]],
    walk: Walk,
    num_steps: int,
    limit: Any,
    lengths: tuple[int, ...] | None,
    slots: PyTree[Float[Array, " n"]] = None,
    *,
    keep_gradient: bool = False,
    rounded_to: Any = None,
) -> tuple[Walk, Float[Array, " n"]]:
    """`num_steps` steps in a form that JAX differentiates in any way; ‖∇ℓ‖ at each, NaN at those not taken.

    In reverse mode the state is stored at the start of every block of every level: `lengths[i]` blocks of the
    blocks of level i, the last level being steps. Each level below the first computes the steps once more.

    Args:
        step_of: What a step finds in `slots` ↦ the step.
        walk: The start.
        num_steps: Steps to be taken, as long as the path goes on.
        limit: Number that `walk.taken` does not exceed.
        lengths: Blocks of each level, their product at least `num_steps`; None stores whatever reverse mode wants.
        slots: For each step something to be differentiated with respect to; arrays of `num_steps` elements.
        keep_gradient: Store the gradient of each step of the last level: mixed mode needs nothing else of it, while
            reverse mode computes all that leads to it again in any case.
        rounded_to: The dtype in which states are stored; None stores them as they are.
    """
    levels = (num_steps,) if lengths is None else lengths
    padding = math.prod(levels) - num_steps

    def unless_ended(run: Callable, walk: Walk, slot: Any) -> tuple[Walk, Float[Array, "..."]]:
        """A step, or a block of steps, skipped whole where the path has come to its end before.

        What a skipped branch reads is copied when it is differentiated, the data too: no more of them than needed.
        """
        ended = walk.taken >= limit
        ended = ended if walk.stopped is None else ended | walk.stopped
        shape = jax.eval_shape(run, walk, slot)[1]
        stay = lambda w, s: (w, jnp.full(shape.shape, jnp.nan, shape.dtype))
        return jax.lax.cond(ended, stay, lambda w, s: run(w, s), walk, slot)

    slots = jax.tree.map(lambda s: jnp.pad(s, (0, padding)).reshape(levels), slots)
    run: Callable = lambda walk, slot: step_of(slot)(walk)
    if padding or walk.stopped is not None:
        run = ft.partial(unless_ended, run)
    if rounded_to is not None:
        run = from_rounded_start(run, rounded_to)
    elif lengths is not None:
        keep = jax.checkpoint_policies.save_only_these_names(*[GRADIENT] * keep_gradient)
        run = jax.checkpoint(run, policy=keep, prevent_cse=False)
    for level, length in enumerate(reversed(levels)):
        run = ft.partial(_loop, run, length)
        if level < len(levels) - 1:
            block = run if walk.stopped is None else ft.partial(unless_ended, run)
            if rounded_to is not None:
                run = from_rounded_start(block, rounded_to)
            else:
                run = jax.checkpoint(block, prevent_cse=False)
    walk, norms = run(walk, slots)
    return walk, norms.reshape(-1)[:num_steps]


def _loop(body: Callable, length: int, walk: Walk, slots: Any) -> tuple[Walk, Array]:
    return jax.lax.scan(body, walk, slots, length=length)
