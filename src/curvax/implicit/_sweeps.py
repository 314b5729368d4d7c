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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import (
    tree_add,
    tree_axpy,
    tree_dtype,
    tree_generic_like,
    tree_gram,
    tree_neg,
    tree_norm,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax._results import RESULTS
from curvax.implicit._condition import Linearised
from curvax.implicit._influence import without_influence
from curvax.implicit._rule import Outcome, State, Stats, Task
from curvax.implicit._stage import AbstractStage, Request, why_failed
from curvax.implicit._trend import extrapolate, follow
from curvax.linear._recycle import Recycled, forget_if, maintain

CORRECTION_RTOL = 0.2  # forward error of a correction: 0.3 was fooled in prototypes
WARM_SWEEPS = 4  # sweeps that a warm start may spend before the inner solver is called
MAX_NONLINEARITY = 10.0  # cap of the factor by which a Newton step outside its quadratic regime is mistrusted
POLISH_TARGET = 0.7  # polishing ends when the error of θ is expected below this share of rtol

# What a turn does. POLISH → POLISH | FIRST, FIRST → SWEEP_THETA, which judges and goes to SWEEP_ADJOINT and back.
# A failure before there was a hypergradient goes through REPORT, where the outer loss is taken for the report.
POLISH, FIRST, SWEEP_THETA, SWEEP_ADJOINT, REPORT, DONE = range(6)
# Where θ comes from.
WARM, INNER_NOW, INNER_DONE = range(3)


class Accuracy(NamedTuple):
    """The accuracy requested: error ≤ atol + rtol·‖grad‖."""

    eps: float  # unit roundoff of the least precise leaf of θ and φ
    rtol: Scalar
    atol: Scalar
    adjoint_rtol: Scalar  # forward error of the first adjoint
    damping: Scalar
    max_sweeps: int


class _Kept(NamedTuple):
    """The hypergradient that would be returned, and where it was taken."""

    value: Scalar
    grad: PyTree[Array]
    theta: PyTree[Array]
    norm: Scalar  # ‖grad‖
    inner_residual: Scalar
    adjoint_residual: Scalar
    estimate: Scalar


class _Counts(NamedTuple):
    matvecs: Int[Array, ""]
    sweeps: Int[Array, ""]
    inner_steps: Int[Array, ""]
    decades: Scalar  # of residual, over all solves


class _Curvature(NamedTuple):
    """What the solves so far have seen of A."""

    ritz_min: Scalar
    lowest: Scalar
    highest: Scalar
    condition: Scalar


class _Carry(NamedTuple):
    theta: PyTree[Array]
    adjoint: PyTree[Array]
    kept: _Kept
    phase: Int[Array, ""]
    moved: Bool[Array, ""]  # θ is another one than the one that is visited
    tried: Bool[Array, ""]  # the recycled directions were tried on the curvature of this visit
    source: Int[Array, ""]
    sweeps: Int[Array, ""]  # since the inner solve or the warm start; −1 before the first judgement
    polished: Int[Array, ""]
    change: Scalar  # ‖h⁺ − h‖ of the sweep before
    residual: Scalar  # ‖F‖ of the turn before
    step: Scalar  # ‖d‖ of the last correction of θ
    linear_residual: Scalar  # ‖F + A d‖ that its solve left
    rtol: Scalar  # forward error of the next correction
    counts: _Counts
    curvature: _Curvature
    recycled: Recycled | None
    pending: RESULTS  # failure that ends the run at the next judgement
    result: RESULTS


class _Visit(NamedTuple):
    """Everything about one θ."""

    at: Linearised
    value: Scalar
    outer_theta: PyTree[Array]
    outer_phi: PyTree[Array]


class _Evaluation(NamedTuple):
    """Everything about one pair (θ, q)."""

    current: _Kept
    adjoint_residual: PyTree[Array]
    theta_norm: Scalar
    adjoint_norm: Scalar
    change: Scalar
    cross: Scalar  # ‖Bᵀq‖
    finite: Bool[Array, ""]
    products: Int[Array, ""]  # that it took


class _Judgement(NamedTuple):
    judged: Bool[Array, ""]
    swept: Bool[Array, ""]
    accepted: Bool[Array, ""]
    probing: Bool[Array, ""]  # accepted, and to be searched for negative curvature that no solve has excited
    takes_current: Bool[Array, ""]
    failed: Bool[Array, ""]
    why: RESULTS
    estimate: Scalar
    request: Scalar
    sweeps: Int[Array, ""]


def _visit(task: Task, theta: PyTree[Array], needed: Bool[Array, ""]) -> _Visit:
    """Linearise at θ; the outer loss and its gradients only if `needed`, zeros otherwise."""
    at = task.condition.linearise(theta, task.phi, task.inner_batch)
    value_and_grad = jax.value_and_grad(task.outer, argnums=(0, 1))
    dtype = tree_dtype((theta, task.phi))

    def compute(_: Any) -> tuple[Scalar, tuple[PyTree[Array], PyTree[Array]]]:
        value, gradients = value_and_grad(theta, task.phi, task.outer_batch)
        return value.astype(dtype), gradients

    # Written out: to ask `eval_shape` for it would trace the outer loss twice.
    nothing = jnp.zeros((), dtype), tree_zeros_like((theta, task.phi))
    value, (outer_theta, outer_phi) = run_if(needed, compute, nothing)
    return _Visit(at, value, outer_theta, outer_phi)


def _evaluate(
    visit: _Visit, theta: PyTree[Array], vector: PyTree[Array], kept: _Kept, idle: Bool[Array, ""]
) -> _Evaluation:
    """Take the hypergradient at the θ of the visit with the adjoint `vector`; not where that is `idle`."""
    dtype, at = kept.norm.dtype, visit.at
    # Of a zero adjoint the products are known.
    nothing = tree_zeros_like((vector, visit.outer_phi))
    needed = ~idle & (tree_norm(vector) > 0)
    product, cross = run_if(needed, lambda _: at.transposed(vector), nothing)
    grad, adjoint_residual = tree_sub(visit.outer_phi, cross), tree_sub(visit.outer_theta, product)
    residuals: Any = sum(tree_gram(at.residual, adjoint_residual, theta, vector, dtype=dtype))
    hyper: Any = sum(tree_gram(tree_sub(grad, kept.grad), cross, grad, dtype=dtype))
    inner_norm, residual_norm, theta_norm, adjoint_norm = (jnp.sqrt(residuals[i, i]) for i in range(4))
    change, cross_norm, grad_norm = (jnp.sqrt(hyper[i, i]) for i in range(3))
    value = visit.value
    current = _Kept(
        value=value,
        grad=grad,
        theta=theta,
        norm=grad_norm,
        inner_residual=inner_norm,
        adjoint_residual=residual_norm,
        estimate=jnp.full_like(value, jnp.inf),
    )
    return _Evaluation(
        current=current,
        adjoint_residual=adjoint_residual,
        theta_norm=theta_norm,
        adjoint_norm=adjoint_norm,
        change=change,
        cross=cross_norm,
        finite=jnp.isfinite(value + inner_norm + residual_norm + grad_norm),
        products=needed.astype(jnp.int32),
    )


def _estimate(stage: AbstractStage, c: _Carry, found: _Evaluation, eps: float) -> tuple[Scalar, Scalar]:
    """The error of the hypergradient before the last sweep, and how much of it is rounding."""
    dtype, change = found.change.dtype, found.change
    curvature, inner = c.curvature, found.current.inner_residual
    worst, own = eps * curvature.condition * found.cross, eps * (c.kept.norm + found.cross)
    floor = worst + own
    if stage.knows_its_error:
        # At rounding level the change is one sample of the noise, and may miss it when h and h⁺ share it. The worst
        # case ε·κ·‖Bᵀq‖ is met only when all noise falls on the smallest eigenvalue: a fifth of it is
        # within 0.5 to 100 times the truth on thousands of quadratics, the whole of it is not.
        noise = jnp.minimum(worst, jnp.maximum(1.5 * change, 0.2 * worst)) + own
        # The next Newton step is at most ν‖d‖, as far as ‖F(θ⁺)‖ is not what the linear solve left. Near a degenerate
        # minimum its direction can be the one to which the hypergradient is most sensitive: √ν, measured on networks.
        linear = c.linear_residual + 10 * eps * jnp.maximum(curvature.highest, 0) * found.theta_norm
        leftover = jnp.maximum(inner - linear, 0)
        nu = leftover / jnp.maximum(curvature.lowest * c.step, jnp.finfo(dtype).tiny)
        mistrust = jnp.minimum(2 * jnp.maximum(nu, jnp.sqrt(nu)), MAX_NONLINEARITY)
        estimate = change * (1 + mistrust) + noise
        # Far from the solution a Newton step may leave h as it is: a long step that the next one will not be much
        # shorter than proves nothing, whatever the change.
        far = ~(nu <= 1) & ~(c.step <= 0.1 * found.theta_norm)
        return jnp.where(far, jnp.maximum(estimate, c.kept.norm), estimate), floor
    # Solves of unknown accuracy: successive changes contract by ρ, so the error is change/(1 − ρ); believed only
    # when the residuals fell too (a solver that returns zero makes no change).
    before = c.change
    ratio = change / jnp.where(before > 0, before, 1)
    # κ is hardly known here: thirty times the floor is taken for noise.
    tiny = 30 * floor
    at_noise = change <= tiny
    noise = 1e3 * eps * curvature.highest
    fell = (inner <= jnp.maximum(0.5 * c.kept.inner_residual, noise * found.theta_norm)) & (
        found.current.adjoint_residual
        <= jnp.maximum(0.5 * c.kept.adjoint_residual, noise * found.adjoint_norm)
    )
    trusted = jnp.isfinite(before) & fell & (at_noise | (ratio < 0.9))
    # At noise level the ratio of two changes is chance: take the larger one, as far as it is noise too.
    limit = jnp.where(
        at_noise, jnp.maximum(change, jnp.minimum(before, tiny)), change / (1 - jnp.minimum(ratio, 0.9))
    )
    return jnp.where(trusted, limit + 0.5 * worst + own, jnp.inf), floor


def _judge(c: _Carry, found: _Evaluation, stage: AbstractStage, accuracy: Accuracy) -> _Judgement:
    """Is the kept hypergradient good enough, is there still hope, and if not, why?"""
    judged = c.phase == SWEEP_THETA
    swept = judged & (c.sweeps >= 0)
    sweeps = c.sweeps + judged.astype(jnp.int32)
    warm = c.source == WARM
    estimate, rounding = _estimate(stage, c, found, accuracy.eps)
    request = accuracy.atol + accuracy.rtol * c.kept.norm
    met = swept & (estimate <= request)
    least = 1 if stage.knows_its_error else 2
    limit = jnp.where(warm, max(WARM_SWEEPS, accuracy.max_sweeps), max(accuracy.max_sweeps, least))
    out_of_sweeps = swept & ~met & (sweeps >= limit)
    nonfinite = ~found.finite
    # A Newton step from a point that is too far away makes ‖F‖ grow, beyond what the linear solve left of it: one
    # that stops on its forward error may. (Where F was zero nothing is known of A yet.)
    highest = jnp.maximum(c.curvature.highest, 0)
    before = 2 * jnp.maximum(c.residual, c.linear_residual) + 100 * accuracy.eps * highest * found.theta_norm
    diverged = (c.phase <= FIRST) & (c.polished > 0) & ~(found.current.inner_residual <= before)
    stopped = judged & (c.pending != RESULTS.successful)
    over = RESULTS.where(rounding > request, RESULTS.precision_limited, RESULTS.inner_not_converged)
    why = RESULTS.where(nonfinite, RESULTS.nonfinite, RESULTS.where(stopped, c.pending, over))
    accepted = met & ~stopped & ~nonfinite
    # What was solved so far may have been blind to a direction of negative curvature. Along a path of warm starts the
    # cold call has looked.
    probing = jnp.zeros_like(accepted) if stage.sees_everything else accepted & ~warm
    return _Judgement(
        judged=judged,
        swept=swept,
        accepted=accepted,
        probing=probing,
        takes_current=judged & ~met & ~out_of_sweeps & ~nonfinite,
        failed=nonfinite | out_of_sweeps | diverged | stopped,
        why=why,
        estimate=estimate,
        request=request,
        sweeps=sweeps,
    )


def _integer(value: int) -> Int[Array, ""]:
    return jnp.asarray(value, jnp.int32)


def run_sweeps(task: Task, stage: AbstractStage, accuracy: Accuracy, state: State) -> Outcome:
    """Hypergradient by implicit differentiation, judged by sweeps; see the head of this file."""
    dtype = tree_dtype((task.theta0, task.phi))
    inf, nan = jnp.asarray(jnp.inf, dtype), jnp.asarray(jnp.nan, dtype)
    zero = jnp.zeros((), dtype)
    zero_theta = tree_zeros_like(task.theta0)
    led = state.theta, state.adjoint
    if state.trend is not None:
        led = extrapolate(state.trend, task.phi, *led)
    start_theta = tree_where(state.warm, led[0], task.theta0)
    loose = jnp.asarray(CORRECTION_RTOL, dtype)
    # Where the inner solver stopped, Newton's own error leaves little of a first correction to be solved for; near a
    # warm start it wins several digits, as many as the goal of polishing asks for.
    first_rtol = jnp.clip(30 * jnp.sqrt(accuracy.rtol), 3e-4, CORRECTION_RTOL).astype(dtype)
    warm_rtol = jnp.clip(0.3 * jnp.sqrt(accuracy.rtol), 3e-4, CORRECTION_RTOL).astype(dtype)
    after_inner = POLISH if accuracy.max_sweeps > 1 else FIRST
    probe = tree_generic_like(task.theta0)
    before = state.recycled if stage.recycles else None
    nowhere = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), task.phi)
    nothing = _Kept(nan, nowhere, start_theta, nan, nan, nan, inf)
    known_min = jnp.where(state.warm, state.curvature_min.astype(dtype), inf)
    init = _Carry(
        theta=start_theta,
        adjoint=tree_where(state.warm, led[1], zero_theta),
        kept=nothing,
        phase=jnp.where(state.warm, POLISH, after_inner).astype(jnp.int32),
        moved=jnp.asarray(True),
        tried=jnp.asarray(False),
        source=jnp.where(state.warm, WARM, INNER_NOW).astype(jnp.int32),
        sweeps=_integer(-1),
        polished=_integer(0),
        change=inf,
        residual=inf,
        step=inf,
        linear_residual=zero,
        rtol=jnp.where(state.warm, warm_rtol, first_rtol),
        counts=_Counts(_integer(0), _integer(0), _integer(0), zero),
        curvature=_Curvature(inf, inf, -inf, zero),
        recycled=None if before is None else forget_if(~state.warm, before),
        pending=RESULTS.successful,
        result=RESULTS.successful,
    )

    def inner(carry: tuple[PyTree[Array], Array]) -> tuple[PyTree[Array], Array]:
        # What the solver says of itself is not asked: the estimate will tell.
        theta, new_steps, _ = task.solve(carry[0])
        return theta, carry[1] + new_steps.astype(jnp.int32)

    def solve(
        c: _Carry, visit: _Visit, found: _Evaluation, verdict: _Judgement, wanted: Bool[Array, ""]
    ) -> Any:
        """The one linear solve of a turn: x, what it learnt, and how accurate it was to be."""
        solve_theta = (c.phase == POLISH) | (c.phase == SWEEP_THETA)
        correction = c.phase != FIRST
        factor = 0.5 * verdict.request / jnp.where(verdict.estimate > 0, verdict.estimate, 1)
        again = jnp.where(verdict.swept, jnp.clip(factor, 1e-3, CORRECTION_RTOL), loose).astype(dtype)
        rtol = jnp.where(verdict.judged, again, c.rtol)
        damping = jnp.where(correction, zero, accuracy.damping)
        adjoint_rhs = tree_axpy(-damping, c.adjoint, found.adjoint_residual)
        rhs = tree_where(
            verdict.probing, probe, tree_where(solve_theta, tree_neg(visit.at.residual), adjoint_rhs)
        )
        request = Request(
            rhs=rhs,
            wanted=wanted,
            transposed=~solve_theta,
            correction=correction,
            probing=verdict.probing,
            # In a judged sweep the error of d goes through A⁻¹ once more on its way into the hypergradient.
            amplified=(c.phase == SWEEP_THETA) & ~verdict.probing,
            rtol=jnp.where(correction, rtol, accuracy.adjoint_rtol),
            # More than the goal of polishing would be wasted on it.
            atol=jnp.where(c.phase == POLISH, POLISH_TARGET * accuracy.rtol * found.theta_norm, 0),
            damping=damping,
            reference=tree_where(correction, zero_theta, c.adjoint),
            # What the call before has seen is a hint for a nearby curvature, and no more than that.
            curvature_min=jnp.minimum(c.curvature.ritz_min, jnp.where(c.source == WARM, known_min, inf)),
            recycled=c.recycled,
            moved=~c.tried,
        )
        theta = found.current.theta
        x, info = stage.solve(visit.at, request, (task.rebuild(theta), task.args))
        # θ and φ may differ in precision; what is known about them is kept in the higher one.
        recycled = info.recycled
        info = info._replace(recycled=None)
        info = jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, info)
        return x, info._replace(recycled=recycled), rtol

    def turn(c: _Carry, visit: _Visit) -> _Carry:
        theta = c.theta
        found = _evaluate(visit, theta, c.adjoint, c.kept, c.phase == POLISH)
        verdict = _judge(c, found, stage, accuracy)
        # Under `vmap` a task that is done goes on turning with the others.
        probing = verdict.probing
        wanted = (~verdict.accepted | probing) & ~verdict.failed & (c.phase < REPORT)
        x, info, rtol = solve(c, visit, found, verdict, wanted)

        exhausted = wanted & ~probing & info.exhausted
        fails = wanted & (info.singular | info.indefinite | info.nonfinite | exhausted)
        # A spent budget on a correction leaves the hypergradient before it, but no estimate of its error.
        broken = fails & ~(exhausted & (c.phase == FIRST))
        wrong = verdict.failed | broken
        retry = wrong & (c.source == WARM)
        moved = wanted & ~broken & ~probing
        solve_theta = (c.phase == POLISH) | (c.phase == SWEEP_THETA)

        # Newton's error after a step d: linear part η‖d‖, quadratic part ‖d‖·(‖d‖/‖d₋‖)².
        step, size = info.solution_norm, found.theta_norm
        ratio = jnp.where(jnp.isfinite(c.step), (step / c.step) ** 2, step / jnp.maximum(size, step))
        expected, goal = step * jnp.maximum(rtol, ratio), POLISH_TARGET * accuracy.rtol * size
        polish_limit = jnp.where(c.source == WARM, WARM_SWEEPS, accuracy.max_sweeps - 1)
        polish_more = (expected > goal) & (c.polished + 1 < polish_limit)

        following = jnp.select(
            [c.phase == POLISH, c.phase == SWEEP_THETA],
            [jnp.where(polish_more, POLISH, FIRST), _integer(SWEEP_ADJOINT)],
            _integer(SWEEP_THETA),
        )
        unreported = wrong & (c.phase == POLISH)
        following = jnp.where(verdict.accepted | wrong, jnp.where(unreported, REPORT, DONE), following)
        following = jnp.where(c.phase == REPORT, DONE, following)
        following = jnp.where(retry, after_inner, following)
        result = RESULTS.where(
            wrong & ~retry,
            RESULTS.where(verdict.failed, verdict.why, why_failed(info)),
            RESULTS.successful,
        )
        result = RESULTS.where(c.phase == REPORT, c.result, result)
        pending = RESULTS.where(exhausted & (c.phase == FIRST), RESULTS.adjoint_not_converged, c.pending)
        estimate = jnp.where(verdict.swept, verdict.estimate, c.kept.estimate)
        # Until there is a hypergradient, the point itself is kept: it is what a failure is about.
        here = found.current._replace(grad=nowhere, estimate=inf)
        older = tree_where(c.sweeps < 0, here, c.kept._replace(estimate=estimate))
        kept = tree_where(verdict.takes_current, found.current, older)
        # Back to the inner solver the adjoint is kept as a start, if it is one.
        usable = jnp.isfinite(found.current.adjoint_residual)
        old_adjoint = tree_where(retry & ~usable, zero_theta, c.adjoint)
        seen = wanted & (info.num_matvecs > 0)
        lowest = jnp.where(seen, jnp.minimum(c.curvature.lowest, info.curvature_min), c.curvature.lowest)
        highest = jnp.where(seen, jnp.maximum(c.curvature.highest, info.curvature_max), c.curvature.highest)
        return _Carry(
            theta=tree_where(retry, task.theta0, tree_where(moved & solve_theta, tree_add(theta, x), theta)),
            adjoint=tree_where(moved & ~solve_theta & ~retry, tree_add(c.adjoint, x), old_adjoint),
            kept=tree_where(retry, nothing, kept),
            phase=following.astype(jnp.int32),
            moved=retry | unreported | (moved & solve_theta),
            tried=c.tried | info.tried,
            source=jnp.where(retry, INNER_NOW, c.source).astype(jnp.int32),
            sweeps=jnp.where(retry, -1, verdict.sweeps),
            polished=jnp.where(retry, 0, c.polished + (moved & (c.phase == POLISH)).astype(jnp.int32)),
            change=jnp.where(retry, inf, jnp.where(verdict.swept, found.change, c.change)),
            residual=found.current.inner_residual,
            step=jnp.where(retry, inf, jnp.where(moved & solve_theta, step, c.step)),
            linear_residual=jnp.where(moved & solve_theta, info.residual_norm, c.linear_residual),
            rtol=jnp.where(
                retry,
                first_rtol,
                jnp.where(
                    (c.phase == POLISH) & polish_more, jnp.clip(goal / expected, 1e-4, CORRECTION_RTOL), rtol
                ),
            ).astype(dtype),
            counts=_Counts(
                c.counts.matvecs + found.products + info.num_matvecs.astype(jnp.int32),
                c.counts.sweeps + verdict.swept.astype(jnp.int32),
                c.counts.inner_steps,
                c.counts.decades + info.decades,
            ),
            curvature=_Curvature(
                jnp.where(
                    retry,
                    inf,
                    jnp.minimum(c.curvature.ritz_min, jnp.where(info.ritz_min > 0, info.ritz_min, inf)),
                ),
                lowest,
                highest,
                jnp.where(seen, highest / jnp.abs(lowest), c.curvature.condition),
            ),
            recycled=None if info.recycled is None else forget_if(retry, info.recycled),
            pending=RESULTS.where(retry, RESULTS.successful, pending),
            result=result,
        )

    def stay(c: _Carry) -> _Carry:
        theta, inner_steps = run_if(c.source == INNER_NOW, inner, (c.theta, c.counts.inner_steps))
        visit = _visit(task, theta, (c.phase != POLISH) & (c.phase != DONE))
        source = jnp.where(c.source == INNER_NOW, INNER_DONE, c.source).astype(jnp.int32)
        here = c._replace(
            theta=theta,
            source=source,
            counts=c.counts._replace(inner_steps=inner_steps),
            moved=jnp.zeros_like(c.moved),
            tried=jnp.zeros_like(c.tried),
        )
        return jax.lax.while_loop(lambda c: ~c.moved & (c.phase != DONE), lambda c: turn(c, visit), here)

    end = jax.lax.while_loop(lambda c: c.phase != DONE, stay, init)
    return _outcome(task, state, end)


def _outcome(task: Task, state: State, end: _Carry) -> Outcome:
    """What the loop ended with, as the user sees it."""
    kept, curvature = end.kept, end.curvature
    nan = jnp.asarray(jnp.nan, kept.estimate.dtype)
    usable = end.result == RESULTS.successful
    no_influence, result = without_influence(task, kept.grad, end.result)
    stats = Stats(
        inner_residual=kept.inner_residual,
        adjoint_residual=kept.adjoint_residual,
        error_estimate=kept.estimate,
        relative_error=jnp.where(kept.estimate == 0, 0, kept.estimate / kept.norm),
        num_matvecs=end.counts.matvecs,
        num_sweeps=end.counts.sweeps,
        num_inner_steps=end.counts.inner_steps,
        curvature_min=jnp.where(jnp.isfinite(curvature.lowest), curvature.lowest, nan),
        curvature_max=jnp.where(jnp.isfinite(curvature.highest), curvature.highest, nan),
    )
    recycled = state.recycled
    if end.recycled is not None:
        recycled = maintain(end.recycled, end.counts.matvecs, end.counts.decades, state.warm, usable)
    trend = state.trend
    if trend is not None:
        before, after = (state.theta, state.adjoint), (end.theta, end.adjoint)
        trend = follow(trend, task.phi, before, after, state.warm & usable)
    new_state = State(
        theta=tree_where(usable, end.theta, tree_where(state.warm, state.theta, task.theta0)),
        adjoint=tree_where(usable, end.adjoint, tree_zeros_like(end.adjoint)),
        curvature_min=curvature.ritz_min,
        warm=usable,
        trend=trend,
        recycled=recycled,
        key=state.key,
    )
    return Outcome(kept.value, kept.grad, kept.theta, result, stats, new_state, no_influence)
