"""The hypergradient with its error estimate: a loop over solves with the curvature.

Every visit of a θ linearises there, and every turn of a visit judges the hypergradient at (θ, q) and spends at most
one solve: on the adjoint (Aᵀ q = ∇_θ f) or on a correction of θ (A d = −F), which ends the visit. The order is

    [θ → θ → …] → adjoint → θ → adjoint → judge [→ θ → adjoint → judge …]

where the first corrections of θ *polish* what the inner solver or a warm start left (only where more than one
sweep is allowed; the adjoint waits, since one that is solved at a poor θ is thrown away), and *judge* compares the
hypergradients before and after the last pair of corrections (a *sweep*). Because all solves are turns of one loop,
the compiler sees the inner solver, the linearisation and the conjugate gradients once each, however many sweeps
there are.

Why the difference is the error: with θ⁺ = θ − A⁻¹F the error of θ is squared, and with
q⁺ = q + A⁻ᵀ(∇_θ f − Aᵀ q) at θ⁺ so is that of q; h⁺ is then far more accurate than h, and ‖h⁺ − h‖ is
the error of h up to the error of the corrections, which are solved to 20 % of themselves.
"""

import functools as ft
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree, Scalar

from curvax._control import Packed, in_one_kernel, pack, run_if
from curvax._pytree import (
    tree_add,
    tree_axpy,
    tree_dtype,
    tree_generic_like,
    tree_gram,
    tree_neg,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_unit,
    tree_where,
    tree_zeros_like,
)
from curvax._results import RESULTS
from curvax.implicit._condition import Linearised
from curvax.implicit._influence import without_influence
from curvax.implicit._judgement import CORRECTION_RTOL, Decision, Limits, Policy, decide, proceed
from curvax.implicit._preconditioner import preconditioner_at
from curvax.implicit._progress import (
    DONE,
    FIRST,
    INNER_DONE,
    INNER_NOW,
    POLISH,
    WARM,
    Accuracy,
    Counts,
    Curvature,
    Kept,
    Measured,
    Moves,
    Progress,
    integer,
)
from curvax.implicit._rule import Outcome, State, Stats, Task
from curvax.implicit._stage import AbstractStage, Request
from curvax.implicit._trend import extrapolate, follow
from curvax.linear._recycle import Recycled, forget_if, maintain
from curvax.linear._upkeep import KeptPreconditioner, after_call, due_if

# Entries of a Gram matrix that are read.
_SQUARES = [(i, i) for i in range(4)]


class _Carry(NamedTuple):
    theta: PyTree[Array]
    adjoint: PyTree[Array]
    grad: PyTree[Array]  # the hypergradient that would be returned
    point: PyTree[Array]  # where it was taken
    recycled: Recycled | None
    preconditioner: KeptPreconditioner | None
    progress: Packed[Progress]


class _Visit(NamedTuple):
    """Everything about one θ; the outer loss and its gradients in the unit."""

    at: Linearised
    value: Scalar
    outer_theta: PyTree[Array]
    outer_phi: PyTree[Array]


def _visit(task: Task, theta: PyTree[Array], needed: Bool[Array, ""], unit: Scalar) -> tuple[_Visit, Scalar]:
    """Linearise at θ; the outer loss and its gradients only if `needed`, zeros otherwise.

    The first one that is needed sets the unit in which they are given, so that no norm of theirs vanishes.
    """
    at = task.condition.linearise(theta, task.phi, task.inner_batch)
    value_and_grad = jax.value_and_grad(task.outer, argnums=(0, 1))
    dtype = tree_dtype((theta, task.phi))

    def compute(_: Any) -> tuple[Scalar, tuple[PyTree[Array], PyTree[Array]]]:
        value, gradients = value_and_grad(theta, task.phi, task.outer_batch)
        return value.astype(dtype), gradients

    # Written out: to ask `eval_shape` for it would trace the outer loss twice.
    nothing = jnp.zeros((), dtype), tree_zeros_like((theta, task.phi))
    value, (outer_theta, outer_phi) = run_if(needed, compute, nothing)
    unit = jnp.where((unit == 0) & needed, tree_unit((outer_theta, outer_phi)), unit)
    value, outer_theta, outer_phi = tree_scale(unit, (value, outer_theta, outer_phi))
    return _Visit(at, value, outer_theta, outer_phi), unit


def _evaluate(
    c: _Carry, visit: _Visit, idle: Bool[Array, ""]
) -> tuple[PyTree[Array], PyTree[Array], Measured]:
    """The hypergradient and the residual of the adjoint at θ and q, and what was measured; not where that is `idle`."""
    dtype, at = visit.value.dtype, visit.at
    # Of a zero adjoint the products are known.
    nothing = tree_zeros_like((c.adjoint, visit.outer_phi))
    needed = ~idle & ~(tree_norm(c.adjoint) == 0)
    product, cross = run_if(needed, lambda _: at.transposed(c.adjoint), nothing)
    grad, adjoint_residual = tree_sub(visit.outer_phi, cross), tree_sub(visit.outer_theta, product)
    measured = Measured(
        value=visit.value,
        residuals=tree_gram(at.residual, adjoint_residual, c.theta, c.adjoint, wanted=_SQUARES, dtype=dtype),
        hyper=tree_gram(tree_sub(grad, c.grad), cross, grad, wanted=_SQUARES, dtype=dtype),
        products=needed.astype(jnp.int32),
    )
    return grad, adjoint_residual, measured


def _start(
    task: Task, state: State, limits: Limits, policy: Policy, stage: AbstractStage, warm_rtol: Scalar
) -> _Carry:
    """Before the first turn: at the warm start, or before the inner solver."""
    dtype = limits.rtol.dtype
    inf, nan, zero = (jnp.asarray(value, dtype) for value in (jnp.inf, jnp.nan, 0.0))
    led = state.theta, state.adjoint
    if state.trend is not None and state.warm is not False:
        led = extrapolate(state.trend, task.phi, *led)
    theta, adjoint = tree_where(state.warm, led, (task.theta0, tree_zeros_like(task.theta0)))
    no = jnp.asarray(False)
    progress = Progress(
        unit=zero,
        kept=Kept(nan, nan, nan, nan, inf),
        phase=jnp.where(state.warm, POLISH, policy.after_inner).astype(jnp.int32),
        moved=jnp.asarray(True),
        tried=no,
        source=jnp.where(state.warm, WARM, INNER_NOW).astype(jnp.int32),
        sweeps=integer(-1),
        polished=integer(0),
        change=inf,
        residual=inf,
        step=inf,
        linear_residual=zero,
        rtol=jnp.where(state.warm, warm_rtol, limits.first_rtol),
        counts=Counts(integer(0), integer(0), integer(0), zero),
        curvature=Curvature(inf, inf, -inf, zero),
        pending=RESULTS.successful,
        result=RESULTS.successful,
        moves=Moves(no, no, no, no, no, no),
    )
    before = state.recycled if stage.recycles else None
    return _Carry(
        theta=theta,
        adjoint=adjoint,
        grad=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), task.phi),
        point=theta,
        recycled=None if before is None else forget_if(jnp.logical_not(state.warm), before),
        preconditioner=state.preconditioner,
        progress=pack(progress),
    )


def run_sweeps(task: Task, stage: AbstractStage, accuracy: Accuracy, state: State) -> Outcome:
    """Hypergradient by implicit differentiation, judged by sweeps; see the head of this file."""
    dtype = tree_dtype((task.theta0, task.phi))
    zero_theta = tree_zeros_like(task.theta0)
    policy = Policy(
        eps=accuracy.eps,
        max_sweeps=accuracy.max_sweeps,
        knows_its_error=stage.knows_its_error,
        sees_everything=stage.sees_everything,
        after_inner=POLISH if accuracy.max_sweeps > 1 else FIRST,
    )
    rtol = jnp.asarray(accuracy.rtol, dtype)
    limits = Limits(
        rtol=rtol,
        atol=jnp.asarray(accuracy.atol, dtype),
        adjoint_rtol=jnp.asarray(accuracy.adjoint_rtol, dtype),
        # Where the inner solver stopped, Newton's own error leaves little of a first correction to be solved for; near
        # a warm start it wins several digits, as many as the goal of polishing asks for.
        first_rtol=jnp.clip(30 * jnp.sqrt(rtol), 3e-4, CORRECTION_RTOL),
        known_min=jnp.where(state.warm, state.curvature_min.astype(dtype), jnp.inf),
    )
    warm_rtol = jnp.clip(0.3 * jnp.sqrt(rtol), 3e-4, CORRECTION_RTOL)
    probe = tree_generic_like(task.theta0)
    init = _start(task, state, limits, policy, stage, warm_rtol)
    nowhere, packed_limits = init.grad, pack(limits)
    decides = in_one_kernel(ft.partial(decide, policy))
    proceeds = in_one_kernel(ft.partial(proceed, policy))

    def inner(carry: tuple[PyTree[Array], Array]) -> tuple[PyTree[Array], Array]:
        # What the solver says of itself is not asked: the estimate will tell.
        theta, new_steps, _ = task.solve(carry[0])
        return theta, carry[1] + new_steps.astype(jnp.int32)

    def solve(c: _Carry, visit: _Visit, operator: Any, adjoint_residual: PyTree[Array], d: Decision) -> Any:
        """The one linear solve of a turn: x, what it learnt, and the directions that it left."""
        damping = jnp.where(d.correction, jnp.zeros((), dtype), accuracy.damping)
        adjoint_rhs = tree_axpy(-damping, c.adjoint, adjoint_residual)
        rhs = tree_where(d.solve_theta, tree_neg(visit.at.residual), adjoint_rhs)
        request = Request(
            rhs=tree_where(d.probing, probe, rhs),
            wanted=d.wanted,
            transposed=~d.solve_theta,
            correction=d.correction,
            probing=d.probing,
            amplified=d.amplified,
            rtol=d.solve_rtol,
            atol=d.solve_atol,
            damping=damping,
            reference=tree_where(d.correction, zero_theta, c.adjoint),
            curvature_min=d.curvature_min,
            recycled=c.recycled,
            moved=~c.progress.pick(lambda p: p.tried),
            preconditioner=operator,
        )
        x, info = stage.solve(visit.at, request)
        # θ and φ may differ in precision; what is known about them is kept in the higher one.
        scalars = jax.tree.map(
            lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
            info._replace(recycled=None),
        )
        return x, scalars, info.recycled

    def turn(c: _Carry, visit: _Visit, operator: Any) -> _Carry:
        grad, adjoint_residual, measured = _evaluate(c, visit, c.progress.pick(lambda p: p.phase) == POLISH)
        decision = decides(c.progress, measured, packed_limits)
        x, info, recycled = solve(c, visit, operator, adjoint_residual, decision.tree)
        progress = proceeds(c.progress, decision, info, packed_limits)
        moves = progress.pick(lambda p: p.moves)
        theta = tree_where(moves.theta, tree_add(c.theta, x), c.theta)
        adjoint = tree_where(moves.adjoint, tree_add(c.adjoint, x), c.adjoint)
        kept = tree_where(moves.keep, grad, c.grad)
        point = tree_where(moves.keep | moves.keep_point, c.theta, c.point)
        return _Carry(
            theta=tree_where(moves.retry, task.theta0, theta),
            adjoint=tree_where(moves.forget_adjoint, zero_theta, adjoint),
            grad=tree_where(moves.retry | moves.keep_point, nowhere, kept),
            point=tree_where(moves.retry, init.point, point),
            recycled=None if recycled is None else forget_if(moves.retry, recycled),
            preconditioner=None if c.preconditioner is None else due_if(moves.retry, c.preconditioner),
            progress=progress,
        )

    def stay(c: _Carry) -> _Carry:
        progress = c.progress.tree
        solving = progress.source == INNER_NOW
        theta, inner_steps = run_if(solving, inner, (c.theta, progress.counts.inner_steps))
        needed = (progress.phase != POLISH) & (progress.phase != DONE)
        visit, unit = _visit(task, theta, needed, progress.unit)
        operator, kept = preconditioner_at(stage, c.preconditioner, task.rebuild(theta), task.args)
        adjoint = tree_scale(jnp.where(progress.unit == unit, 1, unit), c.adjoint)
        here = progress._replace(
            unit=unit,
            source=jnp.where(solving, INNER_DONE, progress.source).astype(jnp.int32),
            counts=progress.counts._replace(inner_steps=inner_steps),
            moved=jnp.asarray(False),
            tried=jnp.asarray(False),
        )
        return jax.lax.while_loop(
            staying,
            lambda c: turn(c, visit, operator),
            c._replace(theta=theta, adjoint=adjoint, preconditioner=kept, progress=pack(here)),
        )

    def staying(c: _Carry) -> Bool[Array, ""]:
        moved, phase = c.progress.pick(lambda p: (p.moved, p.phase))
        return ~moved & (phase != DONE)

    end = jax.lax.while_loop(lambda c: c.progress.pick(lambda p: p.phase) != DONE, stay, init)
    return _outcome(task, stage, state, end)


def _in_true_units(
    progress: Progress, grad: PyTree[Array], adjoint: PyTree[Array]
) -> tuple[Kept, PyTree[Array], PyTree[Array]]:
    """What is proportional to the outer loss, divided by the unit again."""
    factor = 1 / jnp.where(progress.unit > 0, progress.unit, 1)
    kept = tree_scale(factor, progress.kept)._replace(inner_residual=progress.kept.inner_residual)
    return kept, tree_scale(factor, grad), tree_scale(factor, adjoint)


def _outcome(task: Task, stage: AbstractStage, state: State, end: _Carry) -> Outcome:
    """What the loop ended with, as the user sees it."""
    progress = end.progress.tree
    curvature, counts = progress.curvature, progress.counts
    kept, grad, adjoint = _in_true_units(progress, end.grad, end.adjoint)
    nan = jnp.asarray(jnp.nan, kept.estimate.dtype)
    usable = progress.result == RESULTS.successful
    no_influence, result = without_influence(task, grad, progress.result)
    stats = Stats(
        inner_residual=kept.inner_residual,
        adjoint_residual=kept.adjoint_residual,
        error_estimate=kept.estimate,
        relative_error=jnp.where(kept.estimate == 0, 0, kept.estimate / kept.norm),
        num_matvecs=counts.matvecs,
        num_sweeps=counts.sweeps,
        num_inner_steps=counts.inner_steps,
        curvature_min=jnp.where(jnp.isfinite(curvature.lowest), curvature.lowest, nan),
        curvature_max=jnp.where(jnp.isfinite(curvature.highest), curvature.highest, nan),
    )
    recycled = state.recycled
    if end.recycled is not None:
        recycled = maintain(end.recycled, counts.matvecs, counts.decades, state.warm, usable)
    preconditioner = end.preconditioner
    if preconditioner is not None:
        preconditioner = after_call(
            stage.preconditioned_by, preconditioner, counts.matvecs, counts.decades, usable
        )
    trend = state.trend
    if trend is not None:
        before, after = (state.theta, state.adjoint), (end.theta, adjoint)
        trend = follow(trend, task.phi, before, after, state.warm & usable)
    new_state = State(
        theta=tree_where(usable, end.theta, tree_where(state.warm, state.theta, task.theta0)),
        adjoint=tree_where(usable, adjoint, tree_zeros_like(adjoint)),
        curvature_min=curvature.ritz_min,
        warm=usable,
        trend=trend,
        recycled=recycled,
        preconditioner=preconditioner,
        key=state.key,
    )
    return Outcome(kept.value, grad, end.point, result, stats, new_state, no_influence)
