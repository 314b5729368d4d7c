"""Stabilised biconjugate gradients over pytrees, for use inside `Auto`.

Lineax has a public BiCGStab. It takes any negative inner product for a breakdown and tests entries instead of norms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import tree_add, tree_axpy, tree_dot, tree_norm, tree_scale, tree_sub, tree_where
from curvax.linear._system import MatVec


class BiCGStabInfo(NamedTuple):
    """What a run learnt; scalars."""

    num_matvecs: Int[Array, ""]
    residual_norm: Scalar  # of the true residual b − Ax
    stalled: Bool[Array, ""]  # broke down, and starting again from there did not help


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    shadow: PyTree[Array]
    p: PyTree[Array]
    rho: Scalar
    best: PyTree[Array]
    best_norm: Scalar
    since: Scalar  # ‖r‖ when the recurrence was last started
    num_matvecs: Int[Array, ""]
    restarts: Bool[Array, ""]
    stalled: Bool[Array, ""]


def bicgstab(
    matvec: MatVec,
    rhs: PyTree[Array],
    x: PyTree[Array],
    r: PyTree[Array],
    *,
    target: Scalar,
    max_steps: Int[Array, ""] | int,
    preconditioner: MatVec | None = None,
) -> tuple[PyTree[Array], PyTree[Array], BiCGStabInfo]:
    """Improve x, whose residual is r = b − Ax, until the true residual norm is at most `target`.

    Preconditioned from the right. Where an inner product vanishes or the recursive residual says that it is done, the
    method starts again from the true residual, as long as that has halved. Returns the best x, its true
    residual and a `BiCGStabInfo`.

    Source: H. A. van der Vorst, "Bi-CGSTAB", SIAM J. Sci. Stat. Comput. 13, 1992. Cost: two products a step, one more
    a start; 8 vectors.
    """
    precondition: MatVec = preconditioner if preconditioner is not None else lambda v: v
    norm = tree_norm(r)
    eps = jnp.finfo(norm.dtype).eps
    no = jnp.asarray(False)
    begin = _Carry(x, r, r, r, norm * norm, x, norm, norm, jnp.asarray(0), no, ~jnp.isfinite(norm))

    def unfinished(c: _Carry) -> Bool[Array, ""]:
        return ~c.stalled & (c.num_matvecs < max_steps) & (c.restarts | ~(tree_norm(c.r) <= target))

    def body(c: _Carry) -> _Carry:
        # A start: the true residual takes the place of the recursive one. One product serves both kinds of turn.
        point = precondition(c.p)
        product = matvec(tree_where(c.restarts, c.x, point))
        true = tree_sub(rhs, product)
        size = tree_norm(true)
        better = c.restarts & (size < c.best_norm)
        stalled = c.restarts & ~(size <= 0.5 * c.since) & ~(size <= target)

        along = tree_dot(c.shadow, product)
        alpha = c.rho / jnp.where(along == 0, 1, along)
        half = tree_axpy(-alpha, product, c.r)
        smoothed = precondition(half)
        image = matvec(smoothed)
        square = tree_dot(image, image)
        omega = tree_dot(image, half) / jnp.where(square == 0, 1, square)
        x = tree_add(c.x, tree_add(tree_scale(alpha, point), tree_scale(omega, smoothed)))
        r = tree_axpy(-omega, image, half)
        rho = tree_dot(c.shadow, r)
        residual_norm = tree_norm(r)
        beta = rho / jnp.where(c.rho == 0, 1, c.rho) * alpha / jnp.where(omega == 0, 1, omega)
        p = tree_axpy(beta, tree_axpy(-omega, product, c.p), r)
        scale = eps * tree_norm(c.shadow)
        broken = (jnp.abs(along) <= scale * tree_norm(product)) | (jnp.abs(rho) <= scale * residual_norm)
        finite = jnp.isfinite(residual_norm + rho + beta)
        # Before a breakdown there may be a step that went nowhere: go on from the point before it.
        usable = finite & ~(jnp.abs(along) <= scale * tree_norm(product))
        again = ~c.restarts & (broken | ~finite | (omega == 0) | (residual_norm <= target))
        ordinary = ~c.restarts & usable
        return _Carry(
            x=tree_where(ordinary, x, c.x),
            r=tree_where(c.restarts, true, tree_where(usable, r, c.r)),
            shadow=tree_where(c.restarts, true, c.shadow),
            p=tree_where(c.restarts, true, tree_where(usable, p, c.p)),
            rho=jnp.where(c.restarts, size * size, jnp.where(usable, rho, c.rho)),
            best=tree_where(better, c.x, c.best),
            best_norm=jnp.where(better, size, c.best_norm),
            since=jnp.where(c.restarts, size, c.since),
            num_matvecs=c.num_matvecs + 2,
            restarts=again,
            stalled=stalled | (c.restarts & ~jnp.isfinite(size)),
        )

    end = jax.lax.while_loop(unfinished, body, begin)
    # Out of steps the last point may still be the best.
    last = tree_sub(rhs, matvec(end.x))
    better = tree_norm(last) < end.best_norm
    best = tree_where(better, end.x, end.best)
    residual = tree_sub(rhs, matvec(best))
    return best, residual, BiCGStabInfo(end.num_matvecs + 2, tree_norm(residual), end.stalled)
