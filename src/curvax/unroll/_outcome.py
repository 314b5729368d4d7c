"""From a differentiated path to what a rule returns: how it went, and what it says."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from curvax._pytree import tree_all_finite, tree_dtype, tree_norm, tree_zeros_like
from curvax._results import RESULTS
from curvax.implicit._influence import silent, unreached
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
        unseen_leaves(task, step, found.walk),
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


def unseen_leaves(task: Task, step: Step, walk: Walk) -> list[bool]:
    """For each leaf of φ, whether neither the inner gradient nor the optimiser depends on it.

    The optimiser's first state is among its arguments here: that it may hold φ shows in the update of the next.
    """
    batch, phi = task.inner_batch, task.phi

    def cross(vector: PyTree[Array]) -> PyTree[Array]:
        return jax.jvp(lambda t: jax.grad(step.loss, 1)(t, phi, batch), (walk.theta,), (vector,))[1]

    def moved(phi: PyTree[Array]) -> PyTree[Array]:
        value = jnp.zeros((), step.value_dtype)
        after = step.update(phi, walk.theta, value, walk.state, walk.theta, batch, walk.taken)
        return eqx.filter(after, eqx.is_inexact_array)

    by_loss = unreached(cross, walk.theta)
    by_optimiser = unreached(lambda v: jax.vjp(moved, phi)[1](v)[0], jax.eval_shape(moved, phi))
    return [a and b for a, b in zip(by_loss, by_optimiser, strict=True)]
