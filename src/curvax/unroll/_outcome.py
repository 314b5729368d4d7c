"""From a differentiated path to what a rule returns: how it went, and what it says."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from curvax._pytree import tree_all_finite, tree_dtype, tree_norm, tree_zeros_like
from curvax._results import RESULTS
from curvax.implicit._influence import silent, unreached, without_effect
from curvax.implicit._rule import Outcome, State, Stats, Task
from curvax.unroll._path_stats import PathStats
from curvax.unroll._reverse import Followed
from curvax.unroll._step import Step, Walk

# A path whose rounding errors grow to this relative size is one of many.
CHAOTIC = 1e-2


def check_rollout(rule: str, has_rollout: bool) -> None:
    """Refuse a solver that has no steps."""
    if not has_rollout:
        raise ValueError(
            f"`rule={rule}()` differentiates through the steps of `inner_solver=cx.Steps(...)`, but another "
            "solver was given. Use `cx.Steps` with an Optax optimiser, or `rule=cx.Implicit()`."
        )


@contextlib.contextmanager
def in_reverse() -> Iterator[None]:
    """Say what a loop in the optimiser means for reverse mode, where JAX meets one.

    Raises:
        IrreversibleError: There is one.
        ValueError: Any other, as it came.
    """
    try:
        yield
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise IrreversibleError(
            "`optimizer` of `Steps` loops until a condition holds, as the line search of `optax.lbfgs` does, and such "
            'a loop has no derivative in reverse. Use `rule=cx.Unrolled("forward")` without a memory budget, or an '
            "optimiser without such a loop, as `optax.lbfgs(rate, linesearch=None)`."
        ) from error


class IrreversibleError(ValueError):
    """Of a program that JAX cannot differentiate in reverse."""


def reported(
    task: Task,
    state: State,
    theta: PyTree[Array],
    value: Array,
    grad: PyTree[Array],
    result: RESULTS,
    unseen: Sequence[bool],
    *,
    residual: PyTree[Array],
    num_steps: Array,
    error: Array | None = None,
    path: PathStats | None = None,
) -> Outcome:
    """The outcome of a rule that solves no linear system.

    Args:
        task: The task.
        state: The state that was handed over.
        theta: Where the derivative was taken.
        value: The outer loss there.
        grad: Its derivative.
        result: How it went, as far as the rule knows; what is not finite or has no influence overrides a success.
        unseen: Leaves of φ that cannot have an influence through θ.
        residual: The inner condition at θ.
        num_steps: Steps of the inner solver.
        error: Estimated error of `grad`; None where there is no estimate.
        path: For rules that follow one.
    """
    dtype = tree_dtype((task.theta0, task.phi))
    nan, none = jnp.asarray(jnp.nan, dtype), jnp.zeros((), jnp.int32)
    finite = jnp.isfinite(value) & tree_all_finite((theta, grad))
    result = RESULTS.where(finite, result, RESULTS.nonfinite)
    no_influence, result = silent(unseen, grad, result)
    norm = tree_norm(grad).astype(dtype)
    error = nan if error is None else error.astype(dtype)
    stats = Stats(
        inner_residual=tree_norm(residual).astype(dtype),
        adjoint_residual=nan,
        error_estimate=error,
        relative_error=jnp.where(error == 0, 0, error / norm),
        num_matvecs=none,
        num_sweeps=none,
        num_inner_steps=num_steps.astype(jnp.int32),
        curvature_min=nan,
        curvature_max=nan,
        path=path,
    )
    # These rules start where the user says: nothing is warm.
    cold = eqx.tree_at(lambda s: s.adjoint, state, tree_zeros_like(state.adjoint))
    return Outcome(value.astype(dtype), grad, theta, result, stats, cold, no_influence)


def outcome(
    task: Task, state: State, step: Step, found: Followed, path: PathStats, bias: Float[Array, ""] | None
) -> Outcome:
    """The outcome of a rule that follows the path; `bias` is the estimated error of its hypergradient."""
    theta = found.walk.theta
    return reported(
        task,
        state,
        theta,
        found.value,
        found.grad,
        RESULTS.where(path.rounding > CHAOTIC, RESULTS.chaotic_path, RESULTS.successful),
        unseen_leaves(task, step, found.walk, path.truncate),
        residual=jax.grad(step.loss)(theta, task.phi, task.inner_batch),
        num_steps=found.walk.taken,
        error=bias,
        path=path,
    )


def extrapolated(
    last: Float[Array, ""], change: Float[Array, ""], number: Int[Array, ""] | Float[Array, ""] | None
) -> Float[Array, ""]:
    """last·(ρ + ρ² + …) with ρ = `change`: so many terms, or without end where `number` is None."""
    ratio = jnp.where(change == 1, jnp.nan, change)
    if number is None:
        total = jnp.where(change < 1, ratio / (1 - ratio), jnp.inf)
    else:
        number = number.astype(change.dtype)
        total = jnp.where(change == 1, number, ratio * (1 - ratio**number) / (1 - ratio))
    return jnp.where(last == 0, 0, last * total)


def beyond(
    older: Float[Array, ""],
    later: Float[Array, ""],
    *,
    near: float,
    far: float,
    begin: float,
    end: Int[Array, ""],
) -> Float[Array, ""]:
    """∫ c(x) dx from `begin` to `end`, x the distance from the end of the path and c what a step there contributes.

    c goes on as the power of x that is `later` at `near` and `older` at `far`. Parts of a path that decay at different
    rates add up to a function with a heavier tail than a geometric series through its last values. Where c grew it is
    taken to stay as it is.
    """
    dtype = older.dtype
    power = jnp.maximum(jnp.log(later / older) / jnp.log(jnp.asarray(far / near, dtype)), 0)
    low = jnp.log(jnp.asarray(begin / far, dtype))
    high = jnp.maximum(jnp.log(end.astype(dtype) / far), low)
    harmonic = jnp.abs(1 - power) < 1e-3
    rest = jnp.where(harmonic, 1, 1 - power)
    total = jnp.where(harmonic, high - low, (jnp.exp(rest * high) - jnp.exp(rest * low)) / rest)
    return jnp.where(older == 0, 0, older * far * total)


def unseen_leaves(task: Task, step: Step, walk: Walk, truncate: int | None) -> list[bool]:
    """For each leaf of φ, whether neither the inner gradient nor the optimiser depends on it, nor the start.

    The optimiser's first state is among its arguments here: that it may hold φ shows in the update of the next. Of a
    truncated path the start is no part.
    """
    rollout: Any = task.rollout
    batch, phi = task.inner_batch, task.phi

    def cross(vector: PyTree[Array]) -> PyTree[Array]:
        return jax.jvp(lambda t: jax.grad(step.loss, 1)(t, phi, batch), (walk.theta,), (vector,))[1]

    def moved(phi: PyTree[Array]) -> PyTree[Array]:
        value = jnp.zeros((), step.value_dtype)
        after = step.update(phi, walk.theta, value, walk.state, walk.theta, batch, walk.taken)
        return eqx.filter(after, eqx.is_inexact_array)

    by_loss, by_optimiser = unreached(cross, walk.theta), without_effect(moved, phi)
    by_start = [True] * len(by_loss) if truncate is not None else without_effect(rollout.begin, phi)
    return [all(parts) for parts in zip(by_loss, by_optimiser, by_start, strict=True)]
