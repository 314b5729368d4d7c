"""Conjugate gradients for several right-hand sides of one system: their Krylov spaces are searched together.

Every step takes one product with each of the vectors, as separate runs do, but all of them serve every right-hand
side, so that fewer steps are needed. As in `_cg_core`, the smallest Ritz value is kept as the loop runs, and the
stopping test is on the forward error of each solution.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from curvax.linear._cg_scalars import (
    CONVERGED,
    INDEFINITE,
    NONFINITE,
    PRECISION_LIMITED,
    RUNNING,
    SINGULAR,
    judging_scale,
)

Vectors = Float[Array, "m n"]
Small = Float[Array, "m m"]
Apply = Callable[[Vectors], Vectors]


class BlockInfo(NamedTuple):
    """What a run learnt; the second and third for each right-hand side. Curvatures as in `CGInfo`."""

    num_steps: Int[Array, ""]
    residual_norm: Float[Array, " m"]
    status: Int[Array, " m"]
    curvature_min: Scalar
    curvature_max: Scalar


class _Basis(NamedTuple):
    """W = S Q with rows of Q that are orthonormal in the inner product of M⁻¹, or zero where W has no more of them."""

    q: Vectors
    z: Vectors  # M⁻¹ Q
    s: Small


class _Ritz(NamedTuple):
    """The smallest eigenvalue of the block Lanczos matrix T = LLᵀ, as `_cg_scalars.Ritz` keeps it for one vector.

    L is block bidiagonal with G on the diagonal (GGᵀ = PAPᵀ) and SᵀG₋ below it.
    """

    low: Scalar  # ‖uᵀL⁻¹‖² for the best unit vector u so far: 1/λmin
    overlap: Float[Array, " m"]  # uᵀL⁻¹ times the transposed last block row of L⁻¹
    last: Small  # last block row of L⁻¹ times its transpose
    factor: Small  # G
    high: Scalar


class _Loop(NamedTuple):
    x: Vectors
    q: Vectors
    p: Vectors
    z: Vectors
    coefficients: Small  # the residual is C Q
    s: Small
    lengths: Small  # P M Pᵀ
    ritz: _Ritz
    norm: Scalar
    rayleigh: Scalar
    metric: Scalar
    num_steps: Int[Array, ""]
    check: Bool[Array, ""]  # this turn takes the residual b − Ax instead of a step
    status: Int[Array, ""]
    met: Bool[Array, " m"]
    limited: Bool[Array, " m"]


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _basis(w: Vectors, preconditioner: Apply | None) -> _Basis:
    """Factors of W by the eigendecomposition of its Gram matrix, rows scaled first; dependent rows are dropped.

    What is dropped is found again when the residual is computed anew.
    """
    dtype, size = w.dtype, w.shape[0]
    z = w if preconditioner is None else preconditioner(w)
    gram = _times(w, z.T)
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0))
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    values, vectors = jnp.linalg.eigh(0.5 * (gram + gram.T) * inverse[:, None] * inverse)
    # Of the square root of a Gram matrix half the digits are lost; what is kept is orthonormal after one correction.
    alive = values > jnp.finfo(dtype).eps ** 0.66 * values[-1]
    root = jnp.sqrt(jnp.where(alive, values, 1))
    into = jnp.where(alive, 1 / root, 0)[:, None] * vectors.T * inverse
    back = scale[:, None] * vectors * jnp.where(alive, root, 0)
    q, z = _times(into, w), _times(into, z)
    error = 0.5 * (_times(q, z.T) - jnp.diag(alive.astype(dtype)))
    unit = jnp.eye(size, dtype=dtype)
    return _Basis(q - _times(error, q), z - _times(error, z), _times(back, unit + error))


def _next_ritz(ritz: _Ritz, energy: Small, s: Small, first: Bool[Array, ""]) -> _Ritz:
    """One more block row; see `_Ritz`."""
    size, dtype = energy.shape[0], energy.dtype
    factor = jnp.linalg.cholesky(energy)
    below = _times(s.T, ritz.factor) * jnp.where(first, 0, 1)
    solve = lambda b: jax.scipy.linalg.solve_triangular(factor, b, lower=True)  # noqa: E731
    moved = solve(below)
    corner = solve(jnp.eye(size, dtype=dtype))
    last = _times(_times(moved, ritz.last), moved.T) + _times(corner, corner.T)
    overlap = _times(moved, ritz.overlap)
    matrix = jnp.block([[ritz.low[None, None], overlap[None]], [overlap[:, None], 0.5 * (last + last.T)]])
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.isfinite(matrix), matrix, 0))
    best = vectors[:, -1]
    rows = jnp.sum(jnp.abs(_times(below, below.T) + energy), axis=1)
    return _Ritz(
        values[-1],
        best[0] * overlap + _times(last, best[1:]),
        last,
        factor,
        jnp.maximum(ritz.high, rows.max()),
    )


def block_conjugate_gradient(
    apply: Apply,
    rhs: Vectors,
    *,
    rtol: Scalar | float,
    max_steps: int,
    preconditioner: Apply | None = None,
    reference: Vectors | None = None,
) -> tuple[Vectors, BlockInfo]:
    """Solve A xⱼ = bⱼ for the rows bⱼ of `rhs`, each to a relative *forward* error.

    The recursion is that of A. A. Dubrulle, "Retooling the method of block conjugate gradients", 2001: residuals are
    kept as C Q with orthonormal Q, so that right-hand sides that depend on each other, or are solved before the
    others, do no harm. The test of right-hand side j is √ν (cⱼᵀ (PMPᵀ)⁻¹ cⱼ)^½ ≤ rtol · s · ‖xⱼ‖, cⱼ the row of C, s
    and ν as in `conjugate_gradient`. For one vector it is the test that is made there.

    Args:
        apply: A times every row.
        rhs: One right-hand side a row; those that are not finite are set to zero and fail alone.
        rtol: Relative forward error wanted of each solution (of `reference + x`).
        max_steps: Budget of steps, each with one product a row.
        preconditioner: M⁻¹ times every row, symmetric positive definite.
        reference: Starts; `rhs` must already be b − A · reference.

    Cost: m products with A, and 4 matrix products of m × n with m × m, a step.
    """
    dtype, (count, size) = rhs.dtype, rhs.shape
    eps = jnp.finfo(dtype).eps
    floor = max(size, 4) ** 0.5 * eps
    finite = jnp.all(jnp.isfinite(rhs), axis=1)
    rhs = jnp.where(finite[:, None], rhs, 0)
    rhs_norms = jnp.linalg.norm(rhs, axis=1)
    zero, inf = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    unit = jnp.eye(count, dtype=dtype)

    def metric_of(z: Vectors) -> Scalar:
        """1/‖Z‖² ≤ zᵀMz/zᵀz for all z in the span, since Z M Zᵀ = I."""
        if preconditioner is None:
            return jnp.ones((), dtype)
        return 1 / jnp.max(jnp.linalg.eigvalsh(_times(z, z.T)))

    first = _basis(rhs, preconditioner)
    start = _Loop(
        x=jnp.zeros_like(rhs),
        q=first.q,
        p=first.z,
        z=first.z,
        coefficients=first.s,
        s=jnp.zeros_like(unit),
        lengths=unit,
        ritz=_Ritz(zero, jnp.zeros((count,), dtype), jnp.zeros_like(unit), unit, zero),
        norm=zero,
        rayleigh=inf,
        metric=metric_of(first.z),
        num_steps=jnp.zeros((), jnp.int32),
        check=jnp.asarray(False),
        status=jnp.where(jnp.all(rhs == 0), CONVERGED, RUNNING).astype(jnp.int32),
        met=jnp.all(rhs == 0, axis=1),
        limited=jnp.zeros((count,), bool),
    )

    def body(c: _Loop) -> _Loop:
        # One product serves both kinds of turn, so that the compiler sees the operator once.
        product = apply(jnp.where(c.check, c.x, c.p))
        energy = _times(c.p, product.T)
        squares = jnp.sum(c.p * c.p, axis=1)
        alive = squares > 0
        # Rows of zeros: an eigenvalue inside the spectrum, which disturbs nothing.
        inside = jnp.max(jnp.diagonal(energy))
        energy = 0.5 * (energy + energy.T) + jnp.diag(jnp.where(alive, 0, inside))
        quotients = jnp.where(alive, jnp.diagonal(energy) / jnp.where(alive, squares, 1), inf)
        stretches = jnp.linalg.norm(product, axis=1) / jnp.sqrt(jnp.where(alive, squares, 1))
        norm = jnp.where(c.check, c.norm, jnp.maximum(c.norm, jnp.max(jnp.where(alive, stretches, 0))))
        ritz = _next_ritz(c.ritz, energy, c.s, c.num_steps == 0)
        definite = jnp.all(jnp.isfinite(ritz.factor))
        advance = ~c.check & definite
        safe = jnp.where(definite, ritz.factor, unit)
        alpha = jax.scipy.linalg.cho_solve((safe, True), unit)
        x = jnp.where(advance, c.x + _times(_times(c.coefficients, alpha), c.p), c.x)
        w = jnp.where(c.check, rhs - product, c.q - _times(alpha, product))
        after = _basis(w, preconditioner)
        coefficients = jnp.where(c.check, after.s, _times(c.coefficients, after.s))
        ritz = jax.tree.map(lambda new, old: jnp.where(advance, new, old), ritz, c.ritz)

        total = x if reference is None else reference + x
        x_norms, total_norms = jnp.linalg.norm(x, axis=1), jnp.linalg.norm(total, axis=1)
        own = jnp.where(x_norms > 0, jnp.sum(x * rhs, axis=1) / jnp.where(x_norms > 0, x_norms, 1) ** 2, inf)
        rayleigh = jnp.minimum(c.rayleigh, jnp.min(own))
        rayleigh = jnp.where(c.check, rayleigh, jnp.minimum(rayleigh, jnp.min(quotients)))
        metric = jnp.minimum(c.metric, metric_of(after.z))
        smallest = jnp.minimum(rayleigh, metric / ritz.low)
        # What a check judges are the recursion's own quantities, and how far they are from b − Ax.
        lengths = jnp.where(c.check, c.lengths, unit + _times(_times(after.s.T, c.lengths), after.s))
        judged = jnp.where(c.check, c.coefficients, coefficients)
        drift = jnp.where(c.check, jnp.linalg.norm(w - _times(c.coefficients, c.q), axis=1), 0)
        residuals = jnp.linalg.norm(judged, axis=1)
        # Of the smallest residual in the Krylov space, which no error of conjugate gradients exceeds in the norm of A.
        inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(lengths), True), judged.T)
        least = jnp.sqrt(jnp.maximum(jnp.sum(judged.T * inverse, axis=0), 0))
        wanted = jnp.where(c.num_steps < 2, 0.1, 1.0) * rtol
        scale = smallest if preconditioner is None else judging_scale(smallest, rayleigh)
        met = jnp.sqrt(metric) * least + drift <= scale * wanted * total_norms
        met = met | (residuals + drift == 0)
        limited = residuals * jnp.sqrt(metric) + drift <= 10 * eps * (norm * x_norms + rhs_norms)
        done = jnp.all(met | limited)
        # Done by the recursion: to be checked. Done after a check: done. Else on from the residual as it is.
        status = jnp.where(done & c.check, CONVERGED, RUNNING)
        unseen = 1 / ritz.low <= floor * ritz.high
        status = jnp.where(unseen & (rayleigh <= 6 * floor * norm), SINGULAR, status)
        lowest = jnp.min(quotients)
        broken = jnp.where(jnp.abs(lowest) <= floor * norm, SINGULAR, INDEFINITE)
        status = jnp.where(c.check | definite, status, broken)
        sound = jnp.isfinite(jnp.sum(product)) & jnp.isfinite(jnp.sum(after.z))
        status = jnp.where(sound, status, NONFINITE).astype(jnp.int32)
        # After a check the directions start anew, since what was dropped has changed the residual.
        p = after.z + jnp.where(c.check, 0, _times(after.s.T, c.p))
        return _Loop(
            x=x,
            q=after.q,
            p=p,
            z=after.z,
            coefficients=coefficients,
            s=jnp.where(c.check, 0, after.s),
            lengths=jnp.where(c.check, unit, lengths),
            ritz=ritz,
            norm=norm,
            rayleigh=rayleigh,
            metric=metric,
            num_steps=c.num_steps + 1,
            check=done & ~c.check,
            status=status,
            met=met,
            limited=limited,
        )

    end = jax.lax.while_loop(lambda c: (c.status == RUNNING) & (c.num_steps < max_steps), body, start)
    each = jnp.where(end.met, CONVERGED, jnp.where(end.limited, PRECISION_LIMITED, RUNNING))
    solved = (end.status == CONVERGED) | (end.status == RUNNING)
    status = jnp.where(solved, jnp.where(end.status == RUNNING, RUNNING, each), end.status)
    status = jnp.where(rhs_norms == 0, CONVERGED, status)
    return end.x, BlockInfo(
        num_steps=end.num_steps,
        residual_norm=jnp.linalg.norm(_times(end.coefficients, end.q), axis=1),
        status=jnp.where(finite, status, NONFINITE).astype(jnp.int32),
        curvature_min=1 / end.ritz.low,
        curvature_max=end.ritz.high,
    )
