"""The decisions of a turn of the sweeps: is the hypergradient good enough, what to solve, and what comes next."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Scalar

from curvax._results import RESULTS
from curvax.implicit._progress import (
    DONE,
    FIRST,
    INNER_NOW,
    POLISH,
    REPORT,
    SWEEP_ADJOINT,
    SWEEP_THETA,
    WARM,
    WARM_SWEEPS,
    Counts,
    Curvature,
    Found,
    Kept,
    Measured,
    Moves,
    Progress,
    integer,
    norms_of,
)
from curvax.implicit._stage import StageInfo, why_failed

CORRECTION_RTOL = 0.2  # forward error of a correction: 0.3 was fooled in prototypes
MAX_NONLINEARITY = 10.0  # cap of the factor by which a Newton step outside its quadratic regime is mistrusted
POLISH_TARGET = 0.7  # polishing ends when the error of θ is expected below this share of rtol


class Policy(NamedTuple):
    """What is fixed when the program is built."""

    eps: float
    max_sweeps: int
    knows_its_error: bool  # the stage
    sees_everything: bool
    after_inner: int  # phase


class Limits(NamedTuple):
    """Numbers of one call."""

    rtol: Scalar
    atol: Scalar
    adjoint_rtol: Scalar
    first_rtol: Scalar  # of the first correction after the inner solver
    known_min: Scalar  # smallest curvature that the call before has seen


class Decision(NamedTuple):
    """What a turn has decided before its solve."""

    found: Found
    judged: Bool[Array, ""]
    swept: Bool[Array, ""]
    accepted: Bool[Array, ""]
    probing: Bool[Array, ""]  # accepted, and to be searched for negative curvature that no solve has excited
    takes_current: Bool[Array, ""]
    failed: Bool[Array, ""]
    why: RESULTS
    estimate: Scalar
    sweeps: Int[Array, ""]
    wanted: Bool[Array, ""]  # the solve
    solve_theta: Bool[Array, ""]
    correction: Bool[Array, ""]
    amplified: Bool[Array, ""]
    rtol: Scalar
    solve_rtol: Scalar
    solve_atol: Scalar
    curvature_min: Scalar


def _estimate(policy: Policy, c: Progress, found: Found) -> tuple[Scalar, Scalar]:
    """The error of the hypergradient before the last sweep, and how much of it is rounding."""
    dtype, change = found.change.dtype, found.change
    curvature, inner, eps = c.curvature, found.inner_residual, policy.eps
    worst, own = eps * curvature.condition * found.cross, eps * (c.kept.norm + found.cross)
    floor = worst + own
    if policy.knows_its_error:
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
        found.adjoint_residual <= jnp.maximum(0.5 * c.kept.adjoint_residual, noise * found.adjoint_norm)
    )
    trusted = jnp.isfinite(before) & fell & (at_noise | (ratio < 0.9))
    # At noise level the ratio of two changes is chance: take the larger one, as far as it is noise too.
    limit = jnp.where(
        at_noise, jnp.maximum(change, jnp.minimum(before, tiny)), change / (1 - jnp.minimum(ratio, 0.9))
    )
    return jnp.where(trusted, limit + 0.5 * worst + own, jnp.inf), floor


def decide(policy: Policy, c: Progress, measured: Measured, limits: Limits) -> Decision:
    """Is the kept hypergradient good enough, is there still hope, and if not, why? And what is to be solved?"""
    found = norms_of(measured)
    dtype = found.norm.dtype
    judged = c.phase == SWEEP_THETA
    swept = judged & (c.sweeps >= 0)
    sweeps = c.sweeps + judged.astype(jnp.int32)
    warm = c.source == WARM
    estimate, rounding = _estimate(policy, c, found)
    request = limits.atol * c.unit + limits.rtol * c.kept.norm
    met = swept & (estimate <= request)
    least = 1 if policy.knows_its_error else 2
    limit = jnp.where(warm, max(WARM_SWEEPS, policy.max_sweeps), max(policy.max_sweeps, least))
    out_of_sweeps = swept & ~met & (sweeps >= limit)
    nonfinite = ~found.finite
    # A Newton step from a point that is too far away makes ‖F‖ grow, beyond what the linear solve left of it: one
    # that stops on its forward error may. (Where F was zero nothing is known of A yet.)
    highest = jnp.maximum(c.curvature.highest, 0)
    before = 2 * jnp.maximum(c.residual, c.linear_residual) + 100 * policy.eps * highest * found.theta_norm
    diverged = (c.phase <= FIRST) & (c.polished > 0) & ~(found.inner_residual <= before)
    stopped = judged & (c.pending != RESULTS.successful)
    # A request below rounding level is to blame only where rounding is what the estimate is made of.
    limited = (rounding > request) & (estimate <= 30 * rounding)
    over = RESULTS.where(limited, RESULTS.precision_limited, RESULTS.inner_not_converged)
    why = RESULTS.where(nonfinite, RESULTS.nonfinite, RESULTS.where(stopped, c.pending, over))
    accepted = met & ~stopped & ~nonfinite
    failed = nonfinite | out_of_sweeps | diverged | stopped
    # What was solved so far may have been blind to a direction of negative curvature. Along a path of warm starts the
    # cold call has looked.
    probing = jnp.zeros_like(accepted) if policy.sees_everything else accepted & ~warm

    factor = 0.5 * request / jnp.where(estimate > 0, estimate, 1)
    again = jnp.where(swept, jnp.clip(factor, 1e-3, CORRECTION_RTOL), CORRECTION_RTOL).astype(dtype)
    rtol = jnp.where(judged, again, c.rtol)
    correction = c.phase != FIRST
    polishing = c.phase == POLISH
    return Decision(
        found=found,
        judged=judged,
        swept=swept,
        accepted=accepted,
        probing=probing,
        takes_current=judged & ~met & ~out_of_sweeps & ~nonfinite,
        failed=failed,
        why=why,
        estimate=estimate,
        sweeps=sweeps,
        # Under `vmap` a task that is done goes on turning with the others.
        wanted=(~accepted | probing) & ~failed & (c.phase < REPORT),
        solve_theta=polishing | judged,
        correction=correction,
        # In a judged sweep the error of d goes through A⁻¹ once more on its way into the hypergradient.
        amplified=judged & ~probing,
        rtol=rtol,
        solve_rtol=jnp.where(correction, rtol, limits.adjoint_rtol),
        # More than the goal of polishing would be wasted on it.
        solve_atol=jnp.where(polishing, POLISH_TARGET * limits.rtol * found.theta_norm, 0),
        # What the call before has seen is a hint for a nearby curvature, and no more than that.
        curvature_min=jnp.minimum(c.curvature.ritz_min, jnp.where(warm, limits.known_min, jnp.inf)),
    )


def _next_phase(
    policy: Policy, c: Progress, d: Decision, info: StageInfo, limits: Limits
) -> tuple[Int[Array, ""], Scalar]:
    """The phase after this one if nothing goes wrong, and the forward error of the next correction."""
    # Newton's error after a step d: linear part η‖d‖, quadratic part ‖d‖·(‖d‖/‖d₋‖)².
    step, size = info.solution_norm, d.found.theta_norm
    ratio = jnp.where(jnp.isfinite(c.step), (step / c.step) ** 2, step / jnp.maximum(size, step))
    expected, goal = step * jnp.maximum(d.rtol, ratio), POLISH_TARGET * limits.rtol * size
    polish_limit = jnp.where(c.source == WARM, WARM_SWEEPS, policy.max_sweeps - 1)
    more = (expected > goal) & (c.polished + 1 < polish_limit)
    polishing = c.phase == POLISH
    following = jnp.select(
        [polishing, c.phase == SWEEP_THETA],
        [jnp.where(more, POLISH, FIRST), integer(SWEEP_ADJOINT)],
        integer(SWEEP_THETA),
    )
    tighter = jnp.clip(goal / expected, 1e-4, CORRECTION_RTOL)
    return following, jnp.where(polishing & more, tighter, d.rtol)


def proceed(policy: Policy, c: Progress, d: Decision, info: StageInfo, limits: Limits) -> Progress:
    """What the solve has changed."""
    found, polishing, first = d.found, c.phase == POLISH, c.phase == FIRST
    exhausted = d.wanted & ~d.probing & info.exhausted
    fails = d.wanted & (info.singular | info.indefinite | info.nonfinite | exhausted)
    # A spent budget on a correction leaves the hypergradient before it, but no estimate of its error.
    broken = fails & ~(exhausted & first)
    wrong = d.failed | broken
    retry = wrong & (c.source == WARM)
    moved = d.wanted & ~broken & ~d.probing

    following, rtol = _next_phase(policy, c, d, info, limits)
    unreported = wrong & polishing
    following = jnp.where(d.accepted | wrong, jnp.where(unreported, REPORT, DONE), following)
    following = jnp.where(c.phase == REPORT, DONE, following)
    following = jnp.where(retry, policy.after_inner, following)
    result = RESULTS.where(
        wrong & ~retry, RESULTS.where(d.failed, d.why, why_failed(info)), RESULTS.successful
    )
    result = RESULTS.where(c.phase == REPORT, c.result, result)
    pending = RESULTS.where(exhausted & first, RESULTS.adjoint_not_converged, c.pending)

    inf = jnp.asarray(jnp.inf, found.norm.dtype)
    current = Kept(found.value, found.norm, found.inner_residual, found.adjoint_residual, inf)
    keep_point = c.sweeps < 0
    older = c.kept._replace(estimate=jnp.where(d.swept, d.estimate, c.kept.estimate))
    nan = jnp.full_like(inf, jnp.nan)
    nothing = Kept(nan, nan, nan, nan, inf)
    kept = Kept(
        *(
            jnp.where(retry, none, jnp.where(d.takes_current | keep_point, new, old))
            for none, new, old in zip(nothing, current, older, strict=True)
        )
    )
    solved_theta = moved & d.solve_theta
    seen = d.wanted & (info.num_matvecs > 0)
    lowest = jnp.where(seen, jnp.minimum(c.curvature.lowest, info.curvature_min), c.curvature.lowest)
    highest = jnp.where(seen, jnp.maximum(c.curvature.highest, info.curvature_max), c.curvature.highest)
    ritz_min = jnp.minimum(c.curvature.ritz_min, jnp.where(info.ritz_min > 0, info.ritz_min, inf))
    return Progress(
        unit=c.unit,
        kept=kept,
        phase=following.astype(jnp.int32),
        moved=retry | unreported | solved_theta,
        tried=c.tried | info.tried,
        source=jnp.where(retry, INNER_NOW, c.source).astype(jnp.int32),
        sweeps=jnp.where(retry, -1, d.sweeps),
        polished=jnp.where(retry, 0, c.polished + (moved & polishing).astype(jnp.int32)),
        change=jnp.where(retry, inf, jnp.where(d.swept, found.change, c.change)),
        residual=found.inner_residual,
        step=jnp.where(retry, inf, jnp.where(solved_theta, info.solution_norm, c.step)),
        linear_residual=jnp.where(solved_theta, info.residual_norm, c.linear_residual),
        rtol=jnp.where(retry, limits.first_rtol, rtol),
        counts=Counts(
            c.counts.matvecs + found.products + info.num_matvecs.astype(jnp.int32),
            c.counts.sweeps + d.swept.astype(jnp.int32),
            c.counts.inner_steps,
            c.counts.decades + info.decades,
        ),
        curvature=Curvature(
            ritz_min=jnp.where(retry, inf, ritz_min),
            lowest=lowest,
            highest=highest,
            condition=jnp.where(seen, highest / jnp.abs(lowest), c.curvature.condition),
        ),
        pending=RESULTS.where(retry, RESULTS.successful, pending),
        result=result,
        moves=Moves(
            theta=solved_theta & ~retry,
            adjoint=moved & ~d.solve_theta & ~retry,
            retry=retry,
            # Back to the inner solver the adjoint is kept as a start, if it is one.
            forget_adjoint=retry & ~jnp.isfinite(found.adjoint_residual),
            keep=d.takes_current,
            keep_point=keep_point & ~d.takes_current,
        ),
    )
