"""How a path is differentiated: the mode, the schedule, and what each of them is predicted to cost."""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core

from curvax._pytree import tree_size
from curvax.unroll._forward import CHUNK
from curvax.unroll._memory import Outer, Sizes, measure
from curvax.unroll._schedule import MemoryBudget, candidates, named
from curvax.unroll._step import Step, Walk

# Time of a step in inner gradients, beside the runs of the path: differentiated in reverse from its start, or from its
# tape; of the product of mixed mode; of one tangent of forward mode. For a loss of contractions alone and for one
# without any: a tangent multiplies matrices anew, and shares the functions of single numbers with the step.
REVERSED, TAPED, PRODUCT, TANGENT = (2.1, 2.1), (2.8, 2.0), (1.7, 2.7), (1.4, 0.28)
# Operations of a contraction in the time that an elementwise one takes for a number.
CONTRACTED_AT_ONCE = 8


class Method(NamedTuple):
    """One way to differentiate a path.

    Attributes:
        mode: "mixed", "reverse" or "forward".
        lengths: Lengths of the nested loops; None for the whole tape, empty in forward mode.
        gradients: Predicted time of a step, in inner gradients.
        chunk: Tangents that forward mode carries side by side.
        rounded_to: The dtype in which states are stored, None for their own.
    """

    mode: str
    lengths: tuple[int, ...] | None
    gradients: float
    chunk: int = CHUNK
    rounded_to: Any = None

    def num_bytes(self, sizes: Sizes, num_steps: int) -> int:
        """Predicted memory beside arguments and results."""
        if self.mode == "forward":
            return sizes.carried(self.chunk)
        rounded = self.rounded_to is not None
        return sizes.stored(self.lengths, num_steps, mixed=self.mode == "mixed", rounded=rounded)


def adjoint_methods(
    mode: str, num_steps: int, contracted: float, *, stops: bool, rounded_to: Any = None
) -> list[Method]:
    """Reverse or mixed mode with every schedule, from the fastest on; `contracted` as for `contracted_part`.

    No tape of a path that may stop early: what a step reads, the data too, would be on it at each step. From a rounded
    state the gradient of the step is computed again.
    """
    own = _between(REVERSED if mode == "reverse" else PRODUCT, contracted)
    own += mode == "mixed" and rounded_to is not None
    found = [
        Method(mode, lengths, len(lengths) + own, rounded_to=rounded_to) for lengths in candidates(num_steps)
    ]
    if mode == "reverse" and not stops and rounded_to is None:
        found.append(Method(mode, None, 1 + _between(TAPED, contracted)))
    return sorted(found, key=lambda m: m.gradients)


def forward_method(num_phi: int, contracted: float, chunk: int = CHUNK) -> Method:
    """Forward mode; `contracted` as for `contracted_part`."""
    chunk = min(chunk, num_phi)
    return Method("forward", (), -(-num_phi // chunk) + _between(TANGENT, contracted) * num_phi, chunk)


def _between(prices: tuple[float, float], contracted: float) -> float:
    """The price at this part of contractions."""
    return contracted * prices[0] + (1 - contracted) * prices[1]


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
    rounded_to: Any = None,
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
        rounded_to: The dtype in which states are stored, None for their own.

    Raises:
        ValueError: Mixed mode, or steps in float16, of a loss with a `jax.custom_vjp`; reverse mode of such steps; or
            nothing fits the memory budget.
    """
    custom, stops = has_custom_vjp(step, walk), walk.stopped is not None
    if mode == "mixed" and custom:
        raise ValueError(
            '`mode="mixed"` of `Unrolled` takes second derivatives of the inner loss to be symmetric, which a '
            '`jax.custom_vjp` in it need not respect. Use `mode="reverse"`, or `jax.custom_jvp` in the loss.'
        )
    if walk.scaling is not None and (mode == "reverse" or custom):
        raise ValueError(
            "`half=HalfPrecision(jnp.float16)` of `Steps` guards the products of mixed and forward mode against "
            "overflow, and only those"
            + (
                ", which a `jax.custom_vjp` in the inner loss need not respect. Use `jnp.bfloat16`."
                if custom
                else '. Use `mode="mixed"`, or `jnp.bfloat16`.'
            )
        )
    num_phi, contracted = directions or tree_size(step.phi), contracted_part(step, walk)
    considered = automatic(custom, contracted) if mode == "auto" else {mode}
    adjoints = [name for name in ("mixed", "reverse") if name in considered] or ["mixed"]
    if len(adjoints) == 2 and (outer is None or walk.scaling is not None):
        adjoints = ["mixed"]
    forward = with_forward and "forward" in considered

    def by_adjoints() -> list[Method]:
        every = [
            adjoint_methods(name, num_steps, contracted, stops=stops, rounded_to=rounded_to)
            for name in adjoints
        ]
        return sum(every, start=[])

    if isinstance(checkpoint, MemoryBudget):
        options = []
        if mode != "forward":
            options = by_adjoints()
        if forward:
            options += [forward_method(num_phi, contracted, CHUNK >> i) for i in range(CHUNK.bit_length())]
        sizes: dict[str, Sizes] = {
            m: measure(step.in_mixed_mode() if m == "mixed" else step, walk, outer) for m in adjoints
        }
        sizes["forward"] = sizes[adjoints[0]]
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
    method = forward_method(num_phi, contracted)
    if mode != "forward":
        tape = (mode, checkpoint) == ("reverse", "none") and not stops and rounded_to is None
        lengths = None if tape else named(checkpoint, num_steps)
        # The tape of a loss without contractions is hardly more than the states and gradients.
        allowed = {lengths, None} if len(adjoints) == 2 and checkpoint == "none" else {lengths}
        other = min((m for m in by_adjoints() if m.lengths in allowed), key=lambda m: m.gradients)
        if not forward or other.gradients <= method.gradients:
            method = other
        elif not asked:
            reason = f"the fastest for {num_phi} hyperparameters"
    if method.rounded_to is not None:
        reason += f", states in {jnp.dtype(rounded_to).name}"
    return method, f"{method.mode} mode, {reason}: about {method.gradients:.1f} inner gradients a step"


def _within(
    budget: MemoryBudget, options: list[Method], sizes: dict[str, Sizes], num_steps: int
) -> tuple[Method, str]:
    """The first one that fits."""
    for method in options:
        found = method.num_bytes(sizes[method.mode], num_steps)
        if found <= budget.num_bytes:
            return method, (
                f"{method.mode} mode, the fastest within {budget.num_bytes} bytes (it takes about {found}): about "
                f"{method.gradients:.1f} inner gradients a step"
            )
    least = min(options, key=lambda m: m.num_bytes(sizes[m.mode], num_steps))
    raise ValueError(
        f"`checkpoint=MemoryBudget({budget.num_bytes})` of `Unrolled` is too small: the schedule that stores least "
        f"takes about {least.num_bytes(sizes[least.mode], num_steps)} bytes, of which differentiating one step, or the "
        f"outer loss, takes {sizes[least.mode].working}."
    )


def automatic(custom: bool, contracted: float) -> set[str]:
    """Modes among which `auto` takes the fastest.

    Reverse mode only where nothing is contracted, or mixed mode is excluded: of other losses its graph of a step is
    several times as large, and beside matrix products its time depends on the memory that it moves.
    """
    if custom:
        return {"reverse"}
    return {"mixed", "forward"} if contracted else {"mixed", "forward", "reverse"}


def has_custom_vjp(step: Step, walk: Walk) -> bool:
    """Whether the inner loss has derivatives of the user's own, which need be those of no function."""
    closed, _, _ = eqx.filter_make_jaxpr(step.loss)(walk.theta, step.phi, step.example)

    def found(jaxpr: Any) -> bool:
        own = any("custom_vjp" in equation.primitive.name for equation in jaxpr.eqns)
        return own or any(found(inner) for inner in core.subjaxprs(jaxpr))

    return found(closed.jaxpr)


def contracted_part(step: Step, walk: Walk) -> float:
    """Which part of the time of the inner loss goes into contractions, from its program."""
    closed, _, _ = eqx.filter_make_jaxpr(step.loss)(walk.theta, step.phi, step.example)
    contracted, single = _operations(closed.jaxpr)
    time = contracted / CONTRACTED_AT_ONCE
    return time / max(time + single, 1)


def _operations(jaxpr: Any) -> tuple[float, float]:
    """Multiplications of contractions, and numbers that all other operations return."""
    contracted = single = 0.0
    for equation in jaxpr.eqns:
        size = sum(math.prod(getattr(v.aval, "shape", ())) for v in equation.outvars)
        inner = [
            value
            for value in jax.tree.leaves(list(equation.params.values()))
            if isinstance(value, core.Jaxpr | core.ClosedJaxpr)
        ]
        match equation.primitive.name:
            case "dot_general":
                (over, _), _ = equation.params["dimension_numbers"]
                contracted += size * math.prod(equation.invars[0].aval.shape[i] for i in over)
            case "conv_general_dilated":
                kernel, spec = equation.invars[1].aval, equation.params["dimension_numbers"].rhs_spec
                contracted += size * kernel.size / kernel.shape[spec[0]]
            case _ if inner:
                # Of a loop of unknown length one turn is counted, of branches all.
                for program in inner:
                    parts = _operations(getattr(program, "jaxpr", program))
                    length = equation.params.get("length", 1)
                    contracted, single = contracted + length * parts[0], single + length * parts[1]
            case _:
                single += size
    return contracted, single
