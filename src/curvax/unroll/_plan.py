"""How a path is differentiated: the mode, the schedule, and what each of them is predicted to cost."""

from typing import Any, NamedTuple

import equinox as eqx
from jax.extend import core

from curvax._pytree import tree_size
from curvax.unroll._forward import CHUNK
from curvax.unroll._memory import Outer, Sizes, measure
from curvax.unroll._schedule import MemoryBudget, candidates, named
from curvax.unroll._step import Step, Walk

# Time of a step in inner gradients, beside the runs of the path: of the product of mixed mode, of a step differentiated
# in reverse from its start, of one whose tape was kept, and of one tangent of forward mode.
PRODUCT, REVERSED, TAPED, TANGENT = 1.7, 2.1, 2.8, 1.1


class Method(NamedTuple):
    """One way to differentiate a path.

    Attributes:
        mode: "mixed", "reverse" or "forward".
        lengths: Lengths of the nested loops; None for the whole tape, empty in forward mode.
        gradients: Predicted time of a step, in inner gradients.
        chunk: Tangents that forward mode carries side by side.
    """

    mode: str
    lengths: tuple[int, ...] | None
    gradients: float
    chunk: int = CHUNK

    def num_bytes(self, sizes: Sizes, num_steps: int) -> int:
        """Predicted memory beside arguments and results."""
        if self.mode == "forward":
            return sizes.carried(self.chunk)
        return sizes.stored(self.lengths, num_steps, mixed=self.mode == "mixed")


def adjoint_methods(mode: str, num_steps: int, *, stops: bool) -> list[Method]:
    """Reverse or mixed mode with every schedule, from the fastest on.

    No tape of a path that may stop early: what a step reads, the data too, would be on it at each step.
    """
    own = PRODUCT if mode == "mixed" else REVERSED
    found = [Method(mode, lengths, len(lengths) + own) for lengths in candidates(num_steps)]
    if mode == "reverse" and not stops:
        found.append(Method(mode, None, 1 + TAPED))
    return sorted(found, key=lambda m: m.gradients)


def forward_method(num_phi: int, chunk: int = CHUNK) -> Method:
    """Forward mode."""
    chunk = min(chunk, num_phi)
    return Method("forward", (), -(-num_phi // chunk) + TANGENT * num_phi, chunk)


def choose(
    mode: str,
    checkpoint: str | MemoryBudget,
    step: Step,
    walk: Walk,
    num_steps: int,
    outer: Outer | None,
    *,
    with_forward: bool,
    directions: int | None = None,
) -> tuple[Method, str]:
    """The method that a rule asks for or, where it leaves the choice, the fastest; and why.

    Args:
        mode: As for `Unrolled`.
        checkpoint: As for `Unrolled`.
        step: The step.
        walk: Where it starts.
        num_steps: Steps to be differentiated.
        outer: (θ, φ) ↦ f, if it is differentiated as well.
        with_forward: Whether forward mode may be chosen.
        directions: How many tangents forward mode takes, if not one for each number in φ.

    Raises:
        ValueError: Mixed mode of a loss with a `jax.custom_vjp`; or nothing fits the memory budget.
    """
    custom, stops = has_custom_vjp(step, walk), walk.stopped is not None
    if mode == "mixed" and custom:
        raise ValueError(
            '`mode="mixed"` of `Unrolled` takes second derivatives of the inner loss to be symmetric, which a '
            '`jax.custom_vjp` in it need not respect. Use `mode="reverse"`, or `jax.custom_jvp` in the loss.'
        )
    adjoint = mode if mode in ("mixed", "reverse") else "reverse" if custom else "mixed"
    forward = with_forward and mode in ("auto", "forward")
    num_phi = directions or tree_size(step.phi)
    if isinstance(checkpoint, MemoryBudget):
        options = [] if mode == "forward" else adjoint_methods(adjoint, num_steps, stops=stops)
        if forward:
            options += [forward_method(num_phi, CHUNK >> i) for i in range(CHUNK.bit_length())]
        sizes = measure(step.in_mixed_mode() if adjoint == "mixed" else step, walk, outer)
        return _within(checkpoint, sorted(options, key=lambda m: m.gradients), sizes, num_steps)

    asked = mode != "auto"
    reason = (
        f"{directions} random directions"
        if directions
        else "as asked for"
        if asked
        else "the inner loss has a `jax.custom_vjp`"
        if custom
        else "the fastest"
    )
    method = forward_method(num_phi)
    if mode != "forward":
        tape = (mode, checkpoint) == ("reverse", "none") and not stops
        lengths = None if tape else named(checkpoint, num_steps)
        other = next(m for m in adjoint_methods(adjoint, num_steps, stops=stops) if m.lengths == lengths)
        if not forward or other.gradients <= method.gradients:
            method = other
        elif not asked:
            reason = f"the fastest for {num_phi} hyperparameters"
    return method, f"{method.mode} mode, {reason}: about {method.gradients:.1f} inner gradients a step"


def _within(budget: MemoryBudget, options: list[Method], sizes: Sizes, num_steps: int) -> tuple[Method, str]:
    """The first one that fits."""
    for method in options:
        found = method.num_bytes(sizes, num_steps)
        if found <= budget.num_bytes:
            return method, (
                f"{method.mode} mode, the fastest within {budget.num_bytes} bytes (it takes about {found}): about "
                f"{method.gradients:.1f} inner gradients a step"
            )
    least = min(method.num_bytes(sizes, num_steps) for method in options)
    raise ValueError(
        f"`checkpoint=MemoryBudget({budget.num_bytes})` of `Unrolled` is too small: the schedule that stores least "
        f"takes about {least} bytes, of which differentiating one step, or the outer loss, takes {sizes.working}."
    )


def has_custom_vjp(step: Step, walk: Walk) -> bool:
    """Whether the inner loss has derivatives of the user's own, which need be those of no function."""
    closed, _, _ = eqx.filter_make_jaxpr(step.loss)(walk.theta, step.phi, step.example)

    def found(jaxpr: Any) -> bool:
        own = any("custom_vjp" in equation.primitive.name for equation in jaxpr.eqns)
        return own or any(found(inner) for inner in core.subjaxprs(jaxpr))

    return found(closed.jaxpr)
