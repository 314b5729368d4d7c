"""The loop of the minimum residual method, over pytrees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import (
    tree_add,
    tree_axpy,
    tree_dot,
    tree_dtype,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax.linear._system import MatVec


class MINRESInfo(NamedTuple):
    """What a run of MINRES learnt; scalars."""

    num_matvecs: Int[Array, ""]
    num_restarts: Int[Array, ""]
    residual_norm: Scalar  # of the true residual b − Ax
    converged: Bool[Array, ""]
    singular: Bool[Array, ""]  # the residual lies in the null space: no solution
    breakdown: Bool[Array, ""]  # the preconditioner is not positive definite
    nonfinite: Bool[Array, ""]
    max_steps: Int[Array, ""]


class _Lanczos(NamedTuple):
    """One pass, in the notation of Paige & Saunders as SciPy writes it."""

    x: PyTree[Array]
    r: PyTree[Array]  # recursive residual
    r_previous: PyTree[Array]  # unnormalised Lanczos vectors
    r_current: PyTree[Array]
    y: PyTree[Array]  # preconditioned r_current
    w: PyTree[Array]
    w_previous: PyTree[Array]
    beta_previous: Scalar
    beta: Scalar
    dbar: Scalar
    epsilon: Scalar
    phibar: Scalar
    cosine: Scalar
    sine: Scalar
    norm: Scalar  # lower bound of ‖A‖
    steps: Int[Array, ""]
    done: Bool[Array, ""]  # converged, at rounding level, or the Krylov space is used up
    singular: Bool[Array, ""]
    breakdown: Bool[Array, ""]
    nonfinite: Bool[Array, ""]


def _pass(
    matvec: MatVec,
    precondition: MatVec,
    rhs: PyTree[Array],
    target: Scalar,
    budget: Int[Array, ""],
    rounding: Scalar,
) -> _Lanczos:
    """MINRES from zero until the recursive residual is at most `target`."""
    dtype = tree_dtype(rhs)
    zero, one, no = jnp.zeros((), dtype), jnp.ones((), dtype), jnp.asarray(False)
    y = precondition(rhs)
    gamma = tree_dot(rhs, y)
    zeros = tree_zeros_like(rhs)
    beta, rhs_norm = jnp.sqrt(jnp.maximum(gamma, 0)), tree_norm(rhs)
    begin = _Lanczos(
        zeros, rhs, zeros, rhs, y, zeros, zeros, one, beta, zero, zero, beta, -one, zero, zero,
        jnp.asarray(0), ~(rhs_norm > target), no, ~(gamma > 0) & jnp.isfinite(gamma), ~jnp.isfinite(gamma),
    )  # fmt: skip

    def unfinished(c: _Lanczos) -> Bool[Array, ""]:
        return ~(c.done | c.singular | c.breakdown | c.nonfinite) & (c.steps < budget)

    def body(c: _Lanczos) -> _Lanczos:
        v = tree_scale(1 / c.beta, c.y)
        # r_previous is zero in the first step, so that its factor does not matter there.
        product = tree_axpy(-c.beta / c.beta_previous, c.r_previous, matvec(v))
        alpha = tree_dot(v, product)
        r_next = tree_axpy(-alpha / c.beta, c.r_current, product)
        y = precondition(r_next)
        gamma = tree_dot(r_next, y)
        beta = jnp.sqrt(jnp.maximum(gamma, 0))
        norm = jnp.maximum(c.norm, jnp.sqrt(alpha**2 + beta**2 + jnp.where(c.steps > 0, c.beta, 0) ** 2))

        delta = c.cosine * c.dbar + c.sine * alpha
        gbar = c.sine * c.dbar - c.cosine * alpha
        pivot = jnp.sqrt(gbar**2 + beta**2)
        # ‖A r‖/‖r‖ of the residual before this step; at rounding level r is a null vector.
        root = jnp.sqrt(gbar**2 + (c.cosine * beta) ** 2)
        singular = root <= rounding * norm
        safe = jnp.where(pivot > 0, pivot, 1)
        cosine, sine = gbar / safe, beta / safe
        w = tree_scale(1 / safe, tree_axpy(-delta, c.w, tree_axpy(-c.epsilon, c.w_previous, v)))
        phi, phibar = cosine * c.phibar, sine * c.phibar
        step = jnp.where(singular, 0, phi)
        x = tree_axpy(step, w, c.x)
        # r_k = s² r_{k−1} − φ̄ c r_{k+1}/β: the Euclidean residual, whatever the preconditioner's norm.
        safe_beta = jnp.where(beta > 0, beta, 1)
        r = tree_axpy(-phibar * cosine / safe_beta, r_next, tree_scale(sine**2, c.r))
        residual_norm = tree_norm(r)
        nonfinite = ~jnp.isfinite(residual_norm + alpha + gamma)
        # Where b has a part in the null space x grows without end along it, and only rounding stops the
        # residual: the backward error then says that nothing more can be won, and an x that is as
        # large as for a condition number near 1/eps says why.
        attainable = rounding * norm * tree_norm(x)
        exhausted = residual_norm <= attainable
        singular = singular | (exhausted & (attainable >= 0.03 * rhs_norm))
        return _Lanczos(
            x, r, c.r_current, r_next, y, w, c.w, c.beta, beta, -c.cosine * beta,
            c.sine * beta, phibar, cosine, sine, norm, c.steps + 1,
            ~singular & ((residual_norm <= target) | exhausted | (beta <= rounding * norm)),
            singular & ~nonfinite,
            # rᵀM⁻¹r < 0 beyond rounding: the preconditioner is not positive definite.
            (gamma < 0) & (-gamma > rounding * tree_norm(r_next) * tree_norm(y)),
            nonfinite,
        )  # fmt: skip

    return jax.lax.while_loop(unfinished, body, begin)


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    residual_norm: Scalar
    num_matvecs: Int[Array, ""]
    num_restarts: Int[Array, ""]
    stalled: Bool[Array, ""]
    singular: Bool[Array, ""]
    breakdown: Bool[Array, ""]
    nonfinite: Bool[Array, ""]


def minres(
    matvec: MatVec,
    rhs: PyTree[Array],
    x: PyTree[Array],
    r: PyTree[Array],
    *,
    target: Scalar,
    max_steps: Int[Array, ""] | int,
    preconditioner: MatVec | None = None,
) -> tuple[PyTree[Array], PyTree[Array], MINRESInfo]:
    """Improve x, whose residual is r = b − Ax, until the true residual norm is at most `target`.

    The recursive residual drifts from b − Ax, so that each pass ends with the true one and the method
    starts again from there, as long as a pass at least halves it. Returns x, its residual and a `MINRESInfo`.
    """
    dtype = tree_dtype(r)
    precondition: MatVec = preconditioner if preconditioner is not None else lambda v: v
    rounding = jnp.asarray(2 * jnp.finfo(dtype).eps, dtype)
    no = jnp.asarray(False)
    norm = tree_norm(r)
    begin = _Carry(x, r, norm, jnp.asarray(0), jnp.asarray(-1), no, no, no, ~jnp.isfinite(norm))

    def unfinished(c: _Carry) -> Bool[Array, ""]:
        failed = c.stalled | c.singular | c.breakdown | c.nonfinite
        return ~(c.residual_norm <= target) & ~failed & (c.num_matvecs < max_steps)

    def body(c: _Carry) -> _Carry:
        end = _pass(matvec, precondition, c.r, 0.9 * target, max_steps - c.num_matvecs, rounding)
        x = tree_add(c.x, end.x)
        # Not r − Ad: that would forget the rounding of x + d and report residuals below what x has.
        r = tree_sub(rhs, matvec(x))
        residual_norm = tree_norm(r)
        better = residual_norm < c.residual_norm
        return _Carry(
            tree_where(better, x, c.x),
            tree_where(better, r, c.r),
            jnp.where(better, residual_norm, c.residual_norm),
            c.num_matvecs + end.steps + 1,
            c.num_restarts + 1,
            ~(residual_norm <= 0.5 * c.residual_norm),
            end.singular,
            end.breakdown,
            end.nonfinite,
        )

    end = jax.lax.while_loop(unfinished, body, begin)
    info = MINRESInfo(
        end.num_matvecs,
        jnp.maximum(end.num_restarts, 0),
        end.residual_norm,
        end.residual_norm <= target,
        end.singular,
        end.breakdown,
        end.nonfinite,
        jnp.asarray(max_steps),
    )
    return end.x, end.r, info
