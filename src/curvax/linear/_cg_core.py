"""Conjugate gradients that know how wrong they are.

The loop keeps the extreme Ritz values of the operator beside the iterates, at O(1) scalar work a
step, and stops on an estimate of the *forward* error of the solution instead of on the residual.
Everything that solves with a symmetric curvature in this library runs this loop.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._pytree import (
    tree_add,
    tree_axpy,
    tree_dtype,
    tree_gram,
    tree_neg,
    tree_norm,
    tree_size,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax.linear._recycle import Fresh, Recycled, deflated, keep, merged, no_fresh

MatVec = Callable[[PyTree[Array]], PyTree[Array]]


# How a run stands. Everything above RUNNING stops the loop.
RUNNING, CONVERGED, PRECISION_LIMITED, SINGULAR, INDEFINITE, NONFINITE = range(6)


class CGInfo(NamedTuple):
    """What one run of conjugate gradients learnt: scalars, and the residual b − Ax as the recursion has it.

    `curvature_min` and `curvature_max` are estimates of the extreme eigenvalues of the operator, or of the
    preconditioned operator where there is a preconditioner. Of the operator itself, `norm` is the largest ‖Ap‖/‖p‖ that
    was seen, `lowest` the estimate of its smallest eigenvalue, `rayleigh` the smallest Rayleigh quotient. `status` is
    one of the codes above; RUNNING means that the budget was spent. `recycled` has the directions that were kept,
    `decades` by how many powers of ten √(rᵀM⁻¹r) has fallen, 0 where nothing is recycled.
    """

    num_matvecs: Int[Array, ""]
    residual: PyTree[Array]
    residual_norm: Float[Array, ""]
    solution_norm: Float[Array, ""]
    curvature_min: Float[Array, ""]
    curvature_max: Float[Array, ""]
    norm: Float[Array, ""]
    lowest: Float[Array, ""]
    rayleigh: Float[Array, ""]
    status: Int[Array, ""]
    recycled: Recycled | None
    decades: Float[Array, ""]

    @property
    def converged(self) -> Bool[Array, ""]:
        """Solved, as far as the precision allows."""
        return (self.status == CONVERGED) | (self.status == PRECISION_LIMITED)


def no_info(rhs: PyTree[Array], recycled: Recycled) -> CGInfo:
    """Of the structure of what a run with these directions learns, and nothing learnt."""
    zero, none = jnp.zeros((), tree_dtype(rhs)), jnp.zeros((), jnp.int32)
    return CGInfo(none, tree_zeros_like(rhs), zero, zero, zero, zero, zero, zero, zero, none, recycled, zero)


class _Ritz(NamedTuple):
    """Incremental estimates of the extreme eigenvalues of the Lanczos matrix T = LLᵀ.

    L is the bidiagonal Cholesky factor that CG's coefficients spell out: diagonal ν = 1/√α, subdiagonal
    ℓ = √(β/α₋). `low` estimates ‖L⁻¹‖² = 1/λmin: the top eigenvalue of a 2×2 matrix a step (after Meurant & Tichý,
    "Approximating the extreme Ritz values and upper bounds for the A-norm of the error in CG", 2018, derived anew
    for the lower end). `high` is the largest row of T seen, diagonal plus one off-diagonal entry: within
    a factor of 2 of λmax.
    """

    low: Scalar  # ‖uᵀL⁻¹‖² for the current best unit vector u
    overlap: Scalar  # uᵀ L⁻¹ L⁻ᵀ e_k
    last_row: Scalar  # ‖e_kᵀ L⁻¹‖²
    high: Scalar
    inverse_alpha: Scalar  # 1/α of the last step


class _Loop(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    z: PyTree[Array] | None  # M⁻¹ r, where there is a preconditioner
    p: PyTree[Array]
    fresh: Fresh | None
    gamma: Scalar  # rᵀ M⁻¹ r
    direction: Scalar  # pᵀ M p
    beta: Scalar
    deviation: Scalar  # estimate of ‖(b − Ax) − r‖, the drift of the recursive residual
    ritz: _Ritz
    norm: Scalar
    rayleigh: Scalar  # smallest pᵀAp/pᵀp and xᵀAx/xᵀx
    metric: Scalar  # smallest zᵀMz/zᵀz
    x_norm: Scalar
    num_matvecs: Int[Array, ""]
    replace: Bool[Array, ""]
    status: Int[Array, ""]


def _top_eigenpair(a: Array, b: Array, d: Array) -> tuple[Array, Array, Array]:
    """Largest eigenvalue of [[a, b], [b, d]] and its unit eigenvector (s, c)."""
    half = 0.5 * (a - d)
    radius = jnp.sqrt(half * half + b * b)
    top = 0.5 * (a + d) + radius
    # Two formulas for the same vector: take the one without cancellation.
    s = jnp.where(a >= d, half + radius, b)
    c = jnp.where(a >= d, b, radius - half)
    length = jnp.sqrt(s * s + c * c)
    safe = jnp.where(length > 0, length, 1)
    return top, jnp.where(length > 0, s / safe, 1.0), c / safe


def _update_ritz(ritz: _Ritz, alpha: Scalar, beta: Scalar) -> _Ritz:
    ratio_squared = beta * ritz.inverse_alpha * alpha  # (ℓ/ν)²
    tau = -jnp.sqrt(ratio_squared) * ritz.overlap
    omega = ratio_squared * ritz.last_row + alpha
    low, s, c = _top_eigenpair(ritz.low, tau, omega)
    row = 1 / alpha + (beta + jnp.sqrt(beta)) * ritz.inverse_alpha
    return _Ritz(low, s * tau + c * omega, omega, jnp.maximum(ritz.high, row), 1 / alpha)


def default_max_steps(size: int) -> int:
    """Step budget: forty times the size, at least 1000 and at most 100 000."""
    return min(max(40 * size, 1000), 100_000)


def conjugate_gradient(
    matvec: MatVec,
    rhs: PyTree[Array],
    *,
    rtol: Scalar | float,
    atol: Scalar | float = 0.0,
    max_steps: Int[Array, ""] | int,
    preconditioner: MatVec | None = None,
    recycled: Recycled | None = None,
    keeps: Bool[Array, ""] | bool = True,
    reference: PyTree[Array] | None = None,
    curvature_min: Scalar | None = None,
    amplified: Bool[Array, ""] | bool = False,
) -> tuple[PyTree[Array], CGInfo]:
    """Solve A x = b for symmetric positive definite A, to a relative *forward* error.

    The stopping test is (‖r‖ / ‖p‖) · ‖r‖ ≤ rtol · λ̂min · ‖x‖, with p the next search direction and λ̂min the smallest
    Ritz value so far. With μ ≤ λmin the error e obeys ‖e‖²_A ≤ ‖r‖⁴ / (μ ‖p‖²) (Meurant & Tichý, "Approximating the
    extreme Ritz values and upper bounds for the A-norm of the error in CG", 2018) and ‖e‖² ≤ ‖e‖²_A / λmin, so that
    this asks for a relative error `rtol` of x. A test on the relative residual does not: in the prototypes the
    residual at 5 % forward error ran from 5e-2 down to 7e-7.

    Under a preconditioner M⁻¹ the bound is ‖e‖² ≤ (‖r‖ / ‖p‖)² rᵀM⁻¹r / (μ λmin), the norms those of M⁻¹ and M, and μ
    the smallest eigenvalue of M⁻¹A. The test is (‖r‖ / ‖p‖) √(ν rᵀM⁻¹r) ≤ rtol · s · ‖x‖ with s ≤ λmin and s ≤ μν,
    which is enough whatever ν is: s is the smallest of the Rayleigh quotients of A that were seen, of what
    earlier runs have found, and of ν times the smallest Ritz value. ν is the smallest zᵀMz/zᵀz of the
    preconditioned residuals, an estimate of λmin(M), and 1/scale for recycled directions. With M = I this is the
    test above, so that the error is that of x in the 2-norm in every case.

    The recursive residual drifts from b − Ax. The drift is estimated as the loop runs (van der Vorst
    & Ye, "Residual replacement strategies for Krylov subspace iterative methods", 2000), counts in the
    stopping test, and when it matters one step is spent on computing the true residual.

    Args:
        matvec: v ↦ A v.
        rhs: b, a pytree of real floating-point arrays; float32 or float64.
        rtol: Relative forward error wanted of x (or of `reference + x`).
        atol: Absolute forward error that will do as well.
        max_steps: Budget of products with A.
        preconditioner: r ↦ M⁻¹ r, symmetric positive definite.
        recycled: Directions of earlier runs: they precondition this one, which adds its own while there is room.
        keeps: Whether it does.
        reference: A start q: x is then the correction to it and the error is relative to ‖q + x‖.
            `rhs` must already be b − A q.
        curvature_min: Smallest eigenvalue of A known from earlier solves with a nearby operator: a
            right-hand side may not excite the small directions.
        amplified: The error of x will be multiplied by A⁻¹ once more; tighten by λ̂min over the
            Rayleigh quotient of x.

    Returns:
        x and a `CGInfo`. When a direction with pᵀAp ≤ 0 is met the loop stops with the last iterate.

    Cost: one product with A a step, five vector updates, four inner products (five preconditioned).
    """
    dtype = tree_dtype(rhs)
    eps = jnp.asarray(jnp.finfo(dtype).eps, dtype)
    floor_of_singular = jnp.asarray(max(tree_size(rhs), 4) ** 0.5, dtype) * eps
    rtol, atol = jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype)
    inf, zero, one = jnp.asarray(jnp.inf, dtype), jnp.zeros((), dtype), jnp.ones((), dtype)
    carried_min = inf if curvature_min is None else curvature_min.astype(dtype)
    rhs_norm = tree_norm(rhs)
    plain = preconditioner is None and recycled is None

    def preconditioned(vector: PyTree[Array]) -> tuple[PyTree[Array], Scalar, Scalar]:
        """z = M⁻¹ r, rᵀz, and the zᵀMz/zᵀz of what the given preconditioner has seen.

        Under recycled directions rᵀz is added up from terms that are not negative, not left of a cancellation.
        """
        if recycled is None:
            z = vector if preconditioner is None else preconditioner(vector)
            before, after, inside = vector, z, zero
        else:
            z, before, after, inside = deflated(recycled, preconditioner, vector)
        ends: Any = sum(tree_gram(before, after))
        energy, square = ends[0, 1], ends[1, 1]
        return z, energy + inside, jnp.where(square > 0, energy / square, inf)

    z, gamma = rhs, rhs_norm * rhs_norm
    if not plain:
        z, gamma, _ = preconditioned(rhs)
    # A preconditioner that is not positive definite shows as γ ≤ 0 with r ≠ 0.
    status = jnp.where(rhs_norm == 0, CONVERGED, jnp.where(gamma > 0, RUNNING, INDEFINITE))
    start = _Loop(
        x=tree_zeros_like(rhs),
        r=rhs,
        z=None if plain else z,
        p=z,
        fresh=None if recycled is None else no_fresh(rhs, recycled),
        gamma=gamma,
        direction=gamma,
        beta=zero,
        deviation=zero,
        ritz=_Ritz(zero, zero, zero, zero, zero),
        norm=zero if recycled is None else recycled.highest,
        rayleigh=inf if recycled is None else recycled.lowest,
        metric=inf if preconditioner is not None else one if recycled is None else 1 / recycled.scale,
        x_norm=zero,
        num_matvecs=jnp.zeros((), jnp.int32),
        replace=jnp.asarray(False),
        status=jnp.where(jnp.isfinite(rhs_norm + gamma), status, NONFINITE).astype(jnp.int32),
    )

    def unfinished(c: _Loop) -> Bool[Array, ""]:
        return (c.status == RUNNING) & (c.num_matvecs < max_steps)

    def body(c: _Loop) -> _Loop:
        # One product serves both kinds of step, so that the compiler sees the operator once.
        product = matvec(tree_where(c.replace, c.x, c.p))
        directions: Any = sum(tree_gram(c.p, product))
        p_dot_p, curvature, product_squared = squares = directions[0, 0], directions[0, 1], directions[1, 1]
        norm = jnp.where(c.replace, c.norm, jnp.maximum(c.norm, jnp.sqrt(product_squared / p_dot_p)))
        advance = ~c.replace & (curvature > 0)
        alpha = jnp.where(advance, c.gamma / curvature, zero)
        ritz = _update_ritz(c.ritz, alpha, c.beta)
        ritz = jax.tree.map(lambda new, old: jnp.where(advance, new, old), ritz, c.ritz)

        x = tree_axpy(alpha, c.p, c.x)
        # An ordinary step: r − αAp; a replacement: b − Ax.
        r = tree_axpy(jnp.where(c.replace, -1, -alpha), product, tree_where(c.replace, rhs, c.r))
        total = x if reference is None else tree_add(reference, x)
        vectors: Any = sum(tree_gram(x, r, rhs, total))
        z, gamma, metric = r, vectors[1, 1], c.metric
        if not plain:
            z, gamma, seen = preconditioned(r)
            metric = metric if preconditioner is None else jnp.minimum(metric, seen)
        x_norm, residual_norm, total_norm = (jnp.sqrt(vectors[i, i]) for i in (0, 1, 3))
        x_energy = vectors[0, 2]  # xᵀb = xᵀAx, because r ⟂ x
        own_rayleigh = x_energy / jnp.where(x_norm > 0, x_norm * x_norm, 1)
        witness = jnp.minimum(curvature / p_dot_p, jnp.where(x_norm > 0, own_rayleigh, inf))
        rayleigh = c.rayleigh
        if not plain:
            rayleigh = jnp.where(advance, jnp.minimum(c.rayleigh, witness), c.rayleigh)
        rounding = eps * (norm * x_norm + rhs_norm)
        deviation = jnp.where(c.replace, rounding, c.deviation + eps * (norm * x_norm + residual_norm))
        smallest = jnp.minimum(carried_min, jnp.minimum(rayleigh, metric / ritz.low))

        beta = jnp.where(advance, gamma / c.gamma, c.beta)
        # After a replacement p keeps its conjugate part: p + (z_new − z_old).
        renewed = tree_add(c.p, tree_sub(z, c.r if c.z is None else c.z))
        p = tree_where(c.replace, renewed, tree_axpy(beta, c.p, z))
        direction = jnp.where(c.replace, c.direction, gamma + beta * beta * c.direction)
        shrink = jnp.sqrt(gamma / direction)
        # A direction with a small eigenvalue may not have shown itself in one or two steps.
        wanted = rtol * jnp.where(c.num_matvecs < 3, 0.1, 1.0).astype(dtype)
        tighten = jnp.where(amplified, jnp.minimum(1, smallest / own_rayleigh), 1)
        measured = residual_norm if plain else jnp.sqrt(metric * gamma)
        met = shrink * measured + deviation <= smallest * tighten * jnp.maximum(wanted * total_norm, atol)

        # Each line overrides those before it.
        status = jnp.where(met | (gamma == 0), CONVERGED, RUNNING)
        # r at rounding level of Ax: nothing more can be won in this precision.
        status = jnp.where(residual_norm <= rounding, PRECISION_LIMITED, status)
        status = jnp.where(gamma < 0, INDEFINITE, status)
        # In a long run lost orthogonality pushes the Ritz value below the spectrum: a vector must bear it out.
        unseen = 1 / ritz.low <= floor_of_singular * ritz.high
        borne_out = advance & (witness <= 6 * floor_of_singular * norm)
        status = jnp.where(unseen & borne_out, SINGULAR, status)
        at_rounding = jnp.abs(curvature) <= floor_of_singular * norm * p_dot_p
        status = jnp.where(c.replace | advance, status, jnp.where(at_rounding, SINGULAR, INDEFINITE))
        status = jnp.where(jnp.isfinite(curvature + product_squared + gamma), status, NONFINITE)
        drifted = (deviation > jnp.sqrt(eps) * residual_norm) & (deviation > 10 * rounding)
        return _Loop(
            x=x,
            r=r,
            z=None if plain else z,
            p=p,
            fresh=None if c.fresh is None else keep(c.fresh, advance & keeps, c.p, product, squares),
            gamma=gamma,
            direction=direction,
            beta=beta,
            deviation=deviation,
            ritz=ritz,
            norm=norm,
            rayleigh=rayleigh,
            metric=metric,
            x_norm=x_norm,
            num_matvecs=c.num_matvecs + 1,
            replace=~c.replace & drifted,
            status=status.astype(jnp.int32),
        )

    end = jax.lax.while_loop(unfinished, body, start)
    lowest, highest = jnp.minimum(end.rayleigh, end.metric / end.ritz.low), end.norm
    kept = None
    if recycled is not None and end.fresh is not None:
        # The Ritz values are those of A itself only where nothing was deflated.
        own = (recycled.count == 0) & (preconditioner is None)
        highest = jnp.where(own, jnp.maximum(highest, end.ritz.high), highest)
        kept = merged(recycled, end.fresh, lowest if preconditioner is None else end.rayleigh, highest)
    info = CGInfo(
        num_matvecs=end.num_matvecs,
        residual=end.r,
        residual_norm=jnp.sqrt(end.gamma) if plain else tree_norm(end.r),
        solution_norm=end.x_norm,
        curvature_min=1 / end.ritz.low,
        curvature_max=end.ritz.high,
        norm=highest,
        lowest=lowest,
        rayleigh=end.rayleigh,
        status=end.status,
        recycled=kept,
        decades=zero if recycled is None else 0.5 * jnp.log10(gamma / end.gamma),
    )
    return end.x, info


def negated(matvec: MatVec) -> MatVec:
    """v ↦ −A v: turns a negative definite operator into a positive definite one."""
    return lambda v: tree_neg(matvec(v))
