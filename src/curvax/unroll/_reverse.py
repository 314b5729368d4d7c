"""The hypergradient by reverse or mixed mode through the steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from curvax._pytree import stop_gradient, tree_dtype
from curvax.unroll._path import advance, follow
from curvax.unroll._rollout import Rollout
from curvax.unroll._step import Step, Walk
from curvax.unroll._watch import Slots, no_slots, watch_phi, watch_theta


class Followed(NamedTuple):
    """A path and its derivative.

    The norms are those of `PathStats`; `shares` is what each differentiated step contributed, `spread` the standard
    error of an estimate from random directions, `bias` that of a truncated path in forward mode; None where there are
    none.
    """

    value: Float[Array, ""]
    grad: PyTree[Array]
    walk: Walk
    gradient_norms: Float[Array, " steps"]
    derivative_norms: Float[Array, " steps+1"]
    num_clipped: Float[Array, ""]
    shares: Float[Array, " steps"] | None
    spread: Float[Array, ""] | None = None
    bias: Float[Array, ""] | None = None


class Tail(NamedTuple):
    """Where the differentiated part of a path begins, and the gradient norms of what was stepped through to find it."""

    walk: Walk
    num_steps: int
    norms: Float[Array, " n"]

    def all_norms(self, norms: Float[Array, " n"]) -> Float[Array, " steps"]:
        """With those of the differentiated part, where they are not among them."""
        if self.walk.stopped is not None and self.norms.size:
            return self.norms
        return jnp.concatenate([self.norms.astype(norms.dtype), norms])


def tail(step: Step, walk: Walk, num_steps: int, truncate: int | None) -> Tail:
    """The last `truncate` steps of the path; what is before them is frozen."""
    if truncate is None or truncate >= num_steps:
        return Tail(walk, num_steps, jnp.zeros(0))
    still, walk = stop_gradient((step, walk))
    if walk.stopped is None:
        walk, norms = follow(lambda _: still, walk, num_steps - truncate, num_steps - truncate, None)
    else:
        # Which steps are the last is known at the end.
        end, norms = follow(lambda _: still, walk, num_steps, num_steps, None)
        walk = advance(still, walk, jnp.maximum(end.taken - truncate, 0))
    return Tail(stop_gradient(walk), truncate, norms)


def by_adjoint(
    rollout: Rollout,
    step: Step,
    walk: Walk,
    outer: Callable[[PyTree[Array], PyTree[Array]], Array],
    *,
    lengths: tuple[int, ...] | None,
    truncate: int | None,
    clip: optax.GradientTransformationExtraArgs | None,
    rounded_to: Any = None,
) -> Followed:
    """The outer loss at the end of the path and its derivative.

    Args:
        rollout: The inner loop.
        step: Its step at φ, in mixed mode or not.
        walk: Where it starts.
        outer: (θ, φ) ↦ f.
        lengths: As for `follow`, of the differentiated part.
        truncate: How many of the last steps to differentiate; None: all.
        clip: What the adjoint goes through before each step.
        rounded_to: As for `follow`.
    """
    total = rollout.steps.num_steps
    num_steps = total if truncate is None else min(truncate, total)
    dtype = tree_dtype(rollout.theta0)

    def loss(phi: PyTree[Array], slots: Slots, last: Slots) -> tuple[Array, Any]:
        at_phi, begin = rollout.moved(step, walk, phi)
        start = tail(at_phi, begin, total, truncate)

        def watched(slot: Slots) -> Callable[[Walk], tuple[Walk, Array]]:
            def run(walk: Walk) -> tuple[Walk, Array]:
                here = at_phi if slot.share is None else at_phi.at(watch_phi(phi, slot.share))
                return here(walk._replace(theta=watch_theta(walk.theta, slot, clip)))

            return run

        end, norms = follow(
            watched,
            start.walk,
            num_steps,
            total,
            lengths,
            slots,
            keep_gradient=step.mixed,
            rounded_to=rounded_to,
        )
        theta = watch_theta(end.theta, last)
        return outer(theta, phi), (end, start.walk.taken, start.all_norms(norms))

    derivative = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    slots = no_slots((num_steps,), dtype, clipped=clip is not None, share=truncate is not None)
    last = no_slots((), dtype, clipped=False, share=False)
    (value, (end, first, norms)), (grad, seen, seen_last) = derivative(step.phi, slots, last)

    index = jnp.arange(total + 1, dtype=jnp.int32)
    adjoint = jnp.full(total + 1, jnp.nan, dtype)
    adjoint = jax.lax.dynamic_update_slice(adjoint, seen.adjoint, (first,))
    adjoint = jnp.where(index < end.taken, adjoint, jnp.nan)
    adjoint = jnp.where(index == end.taken, seen_last.adjoint, adjoint)
    num_clipped = jnp.zeros((), dtype) if seen.clipped is None else jnp.sum(seen.clipped)
    return Followed(value, grad, end, norms, adjoint, num_clipped, seen.share)
