"""The hypergradient with its error estimate: one loop over solves with the curvature.

Every turn of the loop linearises at the current (θ, q), judges the hypergradient there, and spends at most one
solve: on the adjoint (Aᵀ q = ∇_θ f) or on a correction of θ (A d = −F). The order is

    [θ → θ → …] → adjoint → θ → adjoint → judge [→ θ → adjoint → judge …]

where the first corrections of θ *polish* what the inner solver or a warm start left (only where more than one
sweep is allowed; the adjoint waits, since one that is solved at a poor θ is thrown away), and *judge* compares the
hypergradients before and after the last pair of corrections (a *sweep*). Because all solves are turns of one loop,
the compiler sees the inner solver, the linearisation and the conjugate gradients once each, however many sweeps
there are.

Why the difference is the error: with θ⁺ = θ − A⁻¹F the error of θ is squared, and with
q⁺ = q + A⁻ᵀ(∇_θ f − Aᵀ q) at θ⁺ so is that of q; h⁺ is then far more accurate than h, and ‖h⁺ − h‖ is
the error of h up to the error of the corrections, which are solved to 10 % of themselves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import (
    tree_add,
    tree_all_finite,
    tree_axpy,
    tree_dtype,
    tree_neg,
    tree_norm,
    tree_random_like,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax._results import RESULTS
from curvax.implicit._rule import Outcome, State, Stats, Task
from curvax.implicit._stage import AbstractStage, Request, run_once

CORRECTION_RTOL = 0.1  # forward error of a correction: 0.3 was fooled in prototypes, 0.1 was not
WARM_SWEEPS = 4  # sweeps that a warm start may spend before the inner solver is called
POLISH_TARGET = 0.3  # polishing ends when the error of θ is expected below this share of rtol


class Accuracy(NamedTuple):
    """The accuracy requested: error ≤ atol + rtol·‖grad‖; `estimated` is static."""

    estimated: bool
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
    inner_residual: Scalar
    adjoint_residual: Scalar
    estimate: Scalar


class _Counts(NamedTuple):
    matvecs: Int[Array, ""]
    sweeps: Int[Array, ""]
    inner_steps: Int[Array, ""]


class _Carry(NamedTuple):
    theta: PyTree[Array]
    adjoint: PyTree[Array]
    solve_theta: Bool[Array, ""]  # what this turn solves for: θ, or the adjoint
    run_inner: Bool[Array, ""]
    warm: Bool[Array, ""]  # still living on the warm start
    after_adjoint: Bool[Array, ""]  # (θ, q) is a pair that can be judged
    first_adjoint: Bool[Array, ""]  # the next adjoint solve is not a correction for the estimate
    probing: Bool[Array, ""]
    has_kept: Bool[Array, ""]
    kept: _Kept
    change: Scalar  # ‖h⁺ − h‖ of the sweep before
    residual: Scalar  # ‖F‖ of the turn before
    step: Scalar  # ‖d‖ of the last correction of θ
    polished: Int[Array, ""]  # corrections of θ before the first adjoint
    rtol: Scalar  # forward error of the next corrections
    attempt_sweeps: Int[Array, ""]
    counts: _Counts
    curvature_min: Scalar
    lowest: Scalar
    highest: Scalar
    condition: Scalar
    no_influence: PyTree[Array]
    done: Bool[Array, ""]
    pending: RESULTS  # failure that ends the run at the next judgement
    result: RESULTS


def _estimate(stage: AbstractStage, change: Scalar, before: Scalar, size: Scalar, rounding: Scalar) -> Scalar:
    """The error of the hypergradient before the last sweep, from the sweep's change."""
    if stage.knows_its_error:
        return change + rounding
    # Solves of unknown accuracy: successive changes contract by ρ, so the error is change/(1 − ρ).
    ratio = change / jnp.where(before > 0, before, 1)
    tiny = jnp.sqrt(jnp.finfo(size.dtype).eps) * size
    at_noise = (change <= tiny) & (before <= tiny)
    trusted = at_noise | (ratio < 0.9)
    return jnp.where(
        trusted, jnp.maximum(change, jnp.where(at_noise, before, 0)) / (1 - jnp.minimum(ratio, 0.99)), jnp.inf
    )


def run_sweeps(task: Task, stage: AbstractStage, accuracy: Accuracy, state: State) -> Outcome:
    """Hypergradient by implicit differentiation, judged by sweeps; see the head of this file."""
    dtype = tree_dtype((task.theta0, task.phi))
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    inf, zero, nan = (jnp.asarray(v, dtype) for v in (jnp.inf, 0.0, jnp.nan))
    yes, no = jnp.asarray(True), jnp.asarray(False)
    zero_theta = tree_zeros_like(task.theta0)
    start_theta = tree_where(state.warm, state.theta, task.theta0)
    # Without an estimate nothing would say that a warm start has been swept far enough: solve again.
    sweeps_first = state.warm & accuracy.estimated
    probe = tree_random_like(jax.random.key(0), task.theta0)
    least_sweeps = 1 if stage.knows_its_error else 2
    loose = jnp.asarray(CORRECTION_RTOL, dtype)
    # A first correction has to win more than a digit when much accuracy is wanted.
    first_rtol = jnp.clip(jnp.sqrt(accuracy.rtol), 1e-3, CORRECTION_RTOL).astype(dtype)
    polishes = jnp.asarray(accuracy.estimated and accuracy.max_sweeps > 1)

    empty = _Kept(
        nan, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), task.phi), start_theta, nan, nan, inf
    )
    init = _Carry(
        theta=start_theta,
        adjoint=tree_where(state.warm, state.adjoint, zero_theta),
        solve_theta=sweeps_first | polishes,
        run_inner=~sweeps_first,
        warm=sweeps_first,
        after_adjoint=no,
        first_adjoint=yes,
        probing=no,
        has_kept=no,
        kept=empty,
        change=inf,
        residual=inf,
        step=inf,
        polished=jnp.zeros((), jnp.int32),
        rtol=first_rtol,
        attempt_sweeps=jnp.zeros((), jnp.int32),
        counts=_Counts(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
        curvature_min=jnp.where(state.warm, state.curvature_min.astype(dtype), inf),
        lowest=inf,
        highest=-inf,
        condition=zero,
        no_influence=jax.tree.map(lambda _: no, task.phi),
        done=no,
        pending=RESULTS.successful,
        result=RESULTS.successful,
    )

    def inner(carry: tuple[PyTree[Array], Array, RESULTS]) -> tuple[PyTree[Array], Array, RESULTS]:
        theta, steps, _ = carry
        theta, new_steps, result = task.solve(theta)
        return theta, steps + new_steps.astype(jnp.int32), result

    def turn(c: _Carry) -> _Carry:
        theta, inner_steps, inner_result = run_once(
            c.run_inner, inner, (c.theta, c.counts.inner_steps, RESULTS.successful)
        )
        at = task.condition.linearise(theta, task.phi, task.inner_batch)
        product, cross = at.transposed(tree_where(c.probing, probe, c.adjoint))
        value, (outer_theta, outer_phi) = jax.value_and_grad(task.outer, argnums=(0, 1))(
            theta, task.phi, task.outer_batch
        )
        grad = tree_sub(outer_phi, cross)
        adjoint_residual = tree_sub(outer_theta, product)
        inner_residual = tree_norm(at.residual)
        current = _Kept(value.astype(dtype), grad, theta, inner_residual, tree_norm(adjoint_residual), inf)
        counts = _Counts(c.counts.matvecs + 1, c.counts.sweeps, inner_steps)

        # --- judge the pair (θ, q), if it is one ---
        judged = c.after_adjoint & ~c.probing
        kept_norm = tree_norm(c.kept.grad)
        change = tree_norm(tree_sub(grad, c.kept.grad))
        rounding = eps * c.condition * tree_norm(cross)
        estimate = _estimate(stage, change, c.change, kept_norm, rounding)
        request = accuracy.atol + accuracy.rtol * kept_norm
        swept = judged & c.has_kept
        attempt_sweeps = c.attempt_sweeps + swept.astype(jnp.int32)
        counts = counts._replace(sweeps=counts.sweeps + swept.astype(jnp.int32))
        met = swept & (estimate <= request)
        limit = jnp.where(
            c.warm, max(WARM_SWEEPS, accuracy.max_sweeps), max(accuracy.max_sweeps, least_sweeps)
        )
        out_of_sweeps = swept & ~met & (attempt_sweeps >= limit)
        nonfinite = ~c.probing & ~(
            jnp.isfinite(value) & jnp.isfinite(inner_residual) & tree_all_finite((grad, adjoint_residual))
        )
        # A Newton step from a warm start that is too far away makes ‖F‖ grow.
        diverged = c.warm & ~c.after_adjoint & ~c.probing & ~(inner_residual <= 2 * c.residual)
        stopped = judged & (c.pending != RESULTS.successful)
        accept = (met if accuracy.estimated else judged & ~nonfinite) & ~stopped
        takes_current = judged & ~met & ~out_of_sweeps & ~nonfinite
        kept = tree_where(
            takes_current, current, c.kept._replace(estimate=jnp.where(swept, estimate, c.kept.estimate))
        )
        has_kept = c.has_kept | takes_current

        failed = nonfinite | out_of_sweeps | diverged | stopped
        verdict = RESULTS.where(
            nonfinite,
            RESULTS.nonfinite,
            RESULTS.where(
                stopped,
                c.pending,
                RESULTS.where(rounding > request, RESULTS.precision_limited, RESULTS.inner_not_converged),
            ),
        )

        # --- is there a leaf of φ that nothing depends on? ---
        zero_leaf = jax.tree.map(lambda leaf: jnp.all(leaf == 0) & (leaf.size > 0), kept.grad)
        suspicious = jnp.any(jnp.stack([*jax.tree.leaves(zero_leaf), no]))
        no_influence = jax.tree.map(
            lambda was, zero, b: jnp.where(c.probing, zero & jnp.all(b == 0), was),
            c.no_influence,
            zero_leaf,
            cross,
        )
        start_probe = accept & suspicious & ~c.probing
        done = (accept & ~suspicious) | c.probing

        # --- one solve ---
        back_to_inner = failed & c.warm
        solving = ~done & ~start_probe & ~failed
        # From a warm start θ comes first; after an adjoint, θ; after θ, the adjoint.
        solve_theta = jnp.where(judged, yes, c.solve_theta)
        factor = request / jnp.where(estimate > 0, estimate, 1)
        rtol = jnp.where(
            swept,
            jnp.clip(0.5 * factor, 1e-3, CORRECTION_RTOL).astype(dtype),
            jnp.where(judged, loose, c.rtol),
        )
        correction = solve_theta | ~c.first_adjoint
        damping = jnp.where(correction, zero, accuracy.damping)
        adjoint_rhs = tree_axpy(-damping, c.adjoint, adjoint_residual)
        x, info = stage.solve(
            at,
            Request(
                rhs=tree_where(solve_theta, tree_neg(at.residual), adjoint_rhs),
                wanted=solving,
                transposed=~solve_theta,
                # In a judged sweep the error of d goes through A⁻¹ once more on its way into the hypergradient.
                amplified=solve_theta & ~c.first_adjoint,
                rtol=jnp.where(correction, rtol, accuracy.adjoint_rtol),
                damping=damping,
                reference=tree_where(correction, zero_theta, c.adjoint),
                curvature_min=c.curvature_min,
            ),
            (task.rebuild(theta), task.args),
        )
        counts = counts._replace(matvecs=counts.matvecs + info.num_matvecs.astype(jnp.int32))
        hard = solving & (info.singular | info.indefinite | info.nonfinite)
        soft = solving & info.exhausted
        # A spent budget on a correction leaves the hypergradient before it, but no estimate of its error.
        hard = hard | (soft & correction)
        hard_verdict = RESULTS.where(
            info.nonfinite,
            RESULTS.nonfinite,
            RESULTS.where(
                info.singular,
                RESULTS.singular_curvature,
                RESULTS.where(info.indefinite, RESULTS.indefinite_curvature, RESULTS.adjoint_not_converged),
            ),
        )
        back_to_inner = back_to_inner | (hard & c.warm)
        ends = (failed | hard) & ~back_to_inner
        influence_lost = c.probing & jnp.any(jnp.stack([*jax.tree.leaves(no_influence), no]))
        result = RESULTS.where(
            ends,
            RESULTS.where(failed, verdict, hard_verdict),
            RESULTS.where(influence_lost, RESULTS.no_influence, RESULTS.successful),
        )
        # With a failure the last pair is better than nothing; NaN where there was none.
        moved = solving & ~hard
        # Newton's error after a step d: linear part η‖d‖, quadratic part ‖d‖·(‖d‖/‖d₋‖)².
        step, size = tree_norm(x), tree_norm(tree_add(theta, x))
        ratio = jnp.where(jnp.isfinite(c.step), (step / c.step) ** 2, step / size)
        expected, goal = step * jnp.maximum(rtol, ratio), POLISH_TARGET * accuracy.rtol * size
        polishing = moved & solve_theta & c.first_adjoint
        polish_limit = jnp.where(c.warm, WARM_SWEEPS, accuracy.max_sweeps - 1)
        polish_more = polishing & (expected > goal) & (c.polished + 1 < polish_limit)
        next_rtol = jnp.where(
            polish_more, jnp.clip(goal / expected, 1e-4, CORRECTION_RTOL).astype(dtype), rtol
        )
        new_theta = tree_where(moved & solve_theta, tree_add(theta, x), theta)
        new_adjoint = tree_where(moved & ~solve_theta, tree_add(c.adjoint, x), c.adjoint)
        return _Carry(
            theta=tree_where(back_to_inner, start_theta, new_theta),
            adjoint=tree_where(
                back_to_inner,
                jax.tree.map(lambda q: jnp.where(jnp.isfinite(q), q, 0), c.adjoint),
                new_adjoint,
            ),
            solve_theta=jnp.where(back_to_inner, polishes, polish_more | ~solve_theta),
            run_inner=back_to_inner,
            warm=c.warm & ~back_to_inner,
            after_adjoint=solving & ~solve_theta & ~back_to_inner,
            first_adjoint=(c.first_adjoint & solve_theta) | back_to_inner,
            probing=start_probe,
            has_kept=has_kept & ~back_to_inner,
            kept=tree_where(back_to_inner, empty, kept),
            change=jnp.where(back_to_inner, inf, jnp.where(swept, change, c.change)),
            residual=inner_residual,
            step=jnp.where(back_to_inner, inf, jnp.where(moved & solve_theta, step, c.step)),
            polished=jnp.where(back_to_inner, 0, c.polished + polishing.astype(jnp.int32)),
            rtol=jnp.where(back_to_inner, first_rtol, next_rtol),
            attempt_sweeps=jnp.where(back_to_inner, 0, attempt_sweeps),
            counts=counts,
            curvature_min=jnp.minimum(c.curvature_min, jnp.where(info.ritz_min > 0, info.ritz_min, inf)),
            lowest=jnp.where(
                solving & (info.num_matvecs > 0), jnp.minimum(c.lowest, info.curvature_min), c.lowest
            ),
            highest=jnp.where(
                solving & (info.num_matvecs > 0), jnp.maximum(c.highest, info.curvature_max), c.highest
            ),
            condition=jnp.maximum(c.condition, info.condition),
            no_influence=no_influence,
            done=done | ends,
            pending=RESULTS.where(
                soft & ~correction,
                RESULTS.adjoint_not_converged,
                RESULTS.where(
                    jnp.asarray(not accuracy.estimated) & (inner_result != RESULTS.successful),
                    inner_result,
                    c.pending,
                ),
            ),
            result=result,
        )

    end = jax.lax.while_loop(lambda c: ~c.done, turn, init)
    kept = end.kept
    unknown = jnp.isinf(kept.estimate)
    estimate = jnp.where(unknown, nan, kept.estimate) if accuracy.estimated is False else kept.estimate
    good = end.result == RESULTS.successful
    usable = jnp.asarray(good | (end.result == RESULTS.no_influence))
    stats = Stats(
        inner_residual=kept.inner_residual,
        adjoint_residual=kept.adjoint_residual,
        error_estimate=estimate,
        relative_error=estimate / tree_norm(kept.grad),
        num_matvecs=end.counts.matvecs,
        num_sweeps=end.counts.sweeps,
        num_inner_steps=end.counts.inner_steps,
        curvature_min=jnp.where(jnp.isfinite(end.lowest), end.lowest, nan),
        curvature_max=jnp.where(jnp.isfinite(end.highest), end.highest, nan),
    )
    new_state = State(
        theta=tree_where(usable, end.theta, start_theta),
        adjoint=tree_where(usable, end.adjoint, zero_theta),
        curvature_min=end.curvature_min,
        warm=usable,
        key=state.key,
    )
    return Outcome(kept.value, kept.grad, kept.theta, end.result, stats, new_state, end.no_influence)
