"""The state of the optimisers of this room."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int, Scalar

from curvax.optim._blocks import Matrices
from curvax.optim._start import full


class StepInfo(NamedTuple):
    """What the last step was, and what went wrong so far; all of it arrays.

    Attributes:
        learning_rate: α: the preconditioned gradient times −α is in the step.
        momentum: μ: the step before, times μ, is in the step; the decay, where momentum is before the preconditioner.
        damping: λ with which the step was made; the radius, for the trust region.
        loss: Mean loss of the batch before the last step that was judged; NaN before the first.
        ratio: ρ of the last step that was judged: the change of the objective ÷ what the model said; NaN likewise.
        skipped: Steps that were not taken: the gradient or the direction was not finite, or the objective was not lower
            after a step that was judged.
        nonfinite: Of these, steps at which the gradient, the direction or the loss of the batch was not finite.
    """

    learning_rate: Scalar
    momentum: Scalar
    damping: Scalar
    loss: Scalar
    ratio: Scalar
    skipped: Int[Array, ""]
    nonfinite: Int[Array, ""]

    @classmethod
    def empty(cls, dtype: Any) -> "StepInfo":
        """Before the first step."""
        nan = lambda: full((), jnp.nan, dtype)
        return cls(nan(), nan(), nan(), nan(), nan(), *(full((), 0, jnp.int32) for _ in range(2)))


class OptimiserState(NamedTuple):
    """The state of an optimiser of this room: a pytree of arrays and nothing else. `cx.optim.report` prints it.

    Attributes:
        count: Steps so far.
        curvature: What is known of the curvature; `rejected` and `fallbacks` in it count what went wrong, by block.
        velocity: By block, the step before, or the running mean of gradients; empty without momentum.
        damping: λ of the next step; the radius, for the trust region.
        info: Of the last step.
    """

    count: Int[Array, ""]  # type: ignore[assignment]
    curvature: Any
    velocity: Matrices
    damping: Scalar
    info: StepInfo
