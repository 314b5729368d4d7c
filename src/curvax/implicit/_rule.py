"""What every derivative rule receives, carries and returns."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, Bool, Float, Int, PyTree

from curvax._results import RESULTS
from curvax.implicit._condition import AbstractCondition
from curvax.implicit._trend import Trend
from curvax.linear._recycle import Recycled
from curvax.linear._upkeep import KeptPreconditioner


class Stats(eqx.Module):
    """Diagnostics of one hypergradient. All fields are scalar arrays; NaN where nothing was measured.

    Attributes:
        inner_residual: ‖F(θ, φ)‖ at the inner solution that was used (‖∇_θ g‖ for a minimum).
        adjoint_residual: ‖∇_θ f − Aᵀ q‖ of the adjoint that was used.
        error_estimate: Estimate of the Euclidean norm of the error of `grad`, over all leaves together.
        relative_error: `error_estimate` divided by the norm of `grad`.
        num_matvecs: Products with A, Aᵀ or (Aᵀ, Bᵀ).
        num_sweeps: Sweeps (one correction of θ and one of the adjoint) that were spent.
        num_inner_steps: Steps that the inner solver reported; 0 when a warm start made it unnecessary.
        curvature_min: Smallest eigenvalue (symmetric case) or singular value of A that was seen.
        curvature_max: Largest one that was seen.
        path: How a path was differentiated and how it behaved (`cx.unroll.PathStats`); None for rules without one.
    """

    inner_residual: Float[Array, ""]
    adjoint_residual: Float[Array, ""]
    error_estimate: Float[Array, ""]
    relative_error: Float[Array, ""]
    num_matvecs: Int[Array, ""]
    num_sweeps: Int[Array, ""]
    num_inner_steps: Int[Array, ""]
    curvature_min: Float[Array, ""]
    curvature_max: Float[Array, ""]
    path: Any = None


class State(eqx.Module):
    """Warm starts that one hypergradient hands to the next. A fixed structure: it can be a loop's carry.

    Attributes:
        theta: Inner solution after the last correction; inexact arrays only, half precision promoted.
        adjoint: Adjoint vector, like `theta`.
        curvature_min: Smallest Ritz value seen; infinite where none was.
        warm: Whether the fields above hold anything. A Python False where that is known while tracing: then nothing
            that serves a warm start is compiled.
        trend: The last step of phi and what it changed, to start the next call where that leads; None for rules
            that solve to the end from any start.
        preconditioner: The operator that an `cx.linear.Upkeep` keeps; None without one.
        recycled: Directions that earlier solves left behind, as a preconditioner; None where nothing is recycled.
        key: Random key for the next draws, or None where nothing is drawn.
    """

    theta: PyTree[Array]
    adjoint: PyTree[Array]
    curvature_min: Float[Array, ""]
    warm: Bool[Array, ""] | bool
    trend: Trend | None
    recycled: Recycled | None
    preconditioner: KeptPreconditioner | None
    key: Array | None


class Task(eqx.Module):
    """One hypergradient to be computed: functions of inexact arrays only, data drawn, start chosen.

    Attributes:
        condition: The inner condition F(θ, φ, batch) = 0.
        outer: f(θ, φ, batch), a scalar.
        solve: θ₀ ↦ (θ, number of steps, result), the inner solver at these hyperparameters.
        rollout: φ ↦ θ where the inner solver can be differentiated step by step (a `curvax.unroll._rollout.Rollout`),
            else None.
        phi: Hyperparameters.
        theta0: Start of the inner solver.
        inner_batch: Data of the inner level.
        outer_batch: Data of the outer level.
        rebuild: Inexact arrays of θ ↦ θ as the user knows it.
        args: (phi, batch) as the user knows them, for preconditioners that are functions.
    """

    condition: AbstractCondition
    outer: Callable[..., Array]
    solve: Callable[[PyTree[Array]], tuple[PyTree[Array], Array, RESULTS]]
    rollout: Callable[[PyTree[Array]], PyTree[Array]] | None
    phi: PyTree[Array]
    theta0: PyTree[Array]
    inner_batch: PyTree
    outer_batch: PyTree
    rebuild: Callable[[PyTree[Array]], PyTree]
    args: tuple[PyTree, PyTree]


class Outcome(eqx.Module):
    """What a rule returns: the outer value, the hypergradient, where it was taken and how it went.

    `no_influence` has a boolean for every leaf of phi.
    """

    value: Float[Array, ""]
    grad: PyTree[Array]
    theta: PyTree[Array]
    result: RESULTS
    stats: Stats
    state: State
    no_influence: PyTree[Array]


class AbstractRule(eqx.Module):
    """How the derivative of an inner solve is taken; the third seam of the library."""

    @abc.abstractmethod
    def hypergradient(self, task: Task, state: State) -> Outcome:
        """The derivative of f(θ(φ), φ) with respect to φ. Must not raise at run time: report."""

    @property
    def follows_trend(self) -> bool:
        """Whether `State.trend` is worth its memory: two vectors like phi and two like theta."""
        return False

    def num_recycled(self, theta: PyTree[Array], symmetric: bool) -> int:
        """Directions of earlier solves that `State.recycled` has room for: two vectors like theta each."""
        del theta, symmetric
        return 0

    @property
    def keeps_preconditioner(self) -> bool:
        """Whether `State.preconditioner` is in use."""
        return False

    def kept_preconditioner(self, theta: PyTree, args: PyTree, symmetric: bool) -> KeptPreconditioner | None:
        """What `State.preconditioner` starts as; θ and args as the user knows them, args perhaps shapes alone."""
        del theta, args, symmetric
        return None

    @abc.abstractmethod
    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Refuse, while tracing, a combination that the rule cannot serve.

        Args:
            stochastic_steps: The inner solver draws a new batch at every step.
            has_rollout: The inner solver can be differentiated step by step.
        """
