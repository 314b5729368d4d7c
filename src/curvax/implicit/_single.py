"""The hypergradient without an estimate of its error: the inner solve, one adjoint solve, and nothing else.

Nothing is judged, so nothing of the size of θ or φ is kept beside the solution, the adjoint and the vectors of
the linear solver.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._pytree import (
    tree_add,
    tree_all_finite,
    tree_axpy,
    tree_dtype,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax._results import RESULTS
from curvax.implicit._influence import without_influence
from curvax.implicit._preconditioner import preconditioner_at
from curvax.implicit._progress import Accuracy
from curvax.implicit._rule import Outcome, State, Stats, Task
from curvax.implicit._stage import AbstractStage, Request, why_failed
from curvax.linear._upkeep import after_call


def _nan_where(bad: Array, tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: jnp.where(bad, jnp.nan, leaf), tree)


def run_single(task: Task, stage: AbstractStage, accuracy: Accuracy, state: State) -> Outcome:
    """Hypergradient by one adjoint solve; the inner solver is believed."""
    dtype = tree_dtype((task.theta0, task.phi))
    inf, nan = jnp.asarray(jnp.inf, dtype), jnp.asarray(jnp.nan, dtype)
    theta, inner_steps, inner_result = task.solve(tree_where(state.warm, state.theta, task.theta0))
    at = task.condition.linearise(theta, task.phi, task.inner_batch)
    value, (outer_theta, outer_phi) = jax.value_and_grad(task.outer, argnums=(0, 1))(
        theta, task.phi, task.outer_batch
    )
    inner_norm = tree_norm(at.residual)
    start = tree_where(state.warm, state.adjoint, tree_zeros_like(task.theta0))

    rhs, products, cold = outer_theta, 1, state.warm is False
    if not cold:
        rhs, products = tree_axpy(-accuracy.damping, start, tree_sub(rhs, at.transposed(start)[0])), 2
    preconditioner, kept = preconditioner_at(stage, state.preconditioner, task.rebuild(theta), task.args)
    request = Request(
        rhs=rhs,
        wanted=jnp.asarray(True),
        transposed=jnp.asarray(True),
        correction=jnp.asarray(False),
        probing=jnp.asarray(False),
        amplified=False,
        rtol=accuracy.adjoint_rtol,
        atol=0.0,
        damping=accuracy.damping,
        reference=None if cold else start,
        curvature_min=None if cold else jnp.where(state.warm, state.curvature_min.astype(dtype), inf),
        recycled=None,
        moved=jnp.asarray(False),
        preconditioner=preconditioner,
    )
    x, info = stage.solve(at, request)
    adjoint = tree_add(start, x)

    residual_norm = info.residual_norm
    if not stage.knows_its_error:
        product = at.apply(x) if task.condition.symmetric else at.transposed(x)[0]
        residual_norm = tree_norm(tree_sub(tree_axpy(accuracy.damping, start, rhs), product))

    broken = info.singular | info.indefinite | info.nonfinite
    # Of a solve that broke down nothing is left to be believed. And since this φ is known only after the solve, the
    # compiler cannot compute parts of Bᵀ before it, and hold them through it (a barrier is dropped too early).
    hyper = _nan_where(broken, task.phi)

    cross = task.condition.cross(theta, hyper, task.inner_batch, adjoint)
    grad = _nan_where(broken, tree_sub(outer_phi, cross))
    finite = jnp.isfinite(value) & tree_all_finite(grad)
    # Each line overrides those before it: the order in which failures are told apart.
    result = RESULTS.where(info.exhausted, RESULTS.adjoint_not_converged, inner_result)
    result = RESULTS.where(broken, why_failed(info), result)
    result = RESULTS.where(finite | broken, result, RESULTS.nonfinite)
    no_influence, result = without_influence(task, grad, result)
    usable = jnp.asarray((result == RESULTS.successful) | (result == RESULTS.no_influence))
    if kept is not None:
        kept = after_call(stage.preconditioned_by, kept, info.num_matvecs, info.decades, usable)
    stats = Stats(
        inner_residual=inner_norm,
        adjoint_residual=residual_norm,
        error_estimate=nan,
        relative_error=nan,
        num_matvecs=products + info.num_matvecs.astype(jnp.int32),
        num_sweeps=jnp.asarray(0, jnp.int32),
        num_inner_steps=inner_steps.astype(jnp.int32),
        curvature_min=jnp.where(info.num_matvecs > 0, info.curvature_min, nan),
        curvature_max=jnp.where(info.num_matvecs > 0, info.curvature_max, nan),
    )
    new_state = State(
        theta=tree_where(usable, theta, task.theta0),
        adjoint=tree_where(usable, adjoint, tree_zeros_like(adjoint)),
        curvature_min=jnp.where(info.ritz_min > 0, info.ritz_min, inf).astype(state.curvature_min.dtype),
        warm=usable,
        trend=state.trend,
        recycled=state.recycled,
        preconditioner=kept,
        key=state.key,
    )
    return Outcome(value.astype(dtype), grad, theta, result, stats, new_state, no_influence)
