"""Stabilised biconjugate gradients over pytrees, for use inside `Auto`.

Lineax has a public BiCGStab. It takes any negative inner product for a breakdown and tests entries instead of norms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._control import one_kernel
from curvax._pytree import tree_axpy, tree_norm, tree_products, tree_sub, tree_where
from curvax.linear._cg_scalars import Terms, added
from curvax.linear._system import MatVec


class BiCGStabInfo(NamedTuple):
    """What a run learnt; scalars."""

    num_matvecs: Int[Array, ""]
    residual_norm: Scalar  # of the true residual b − Ax
    stalled: Bool[Array, ""]  # broke down, and starting again from there did not help


class _Turn(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]  # recursive
    p: PyTree[Array]
    rho: Scalar
    num_matvecs: Int[Array, ""]
    going: Bool[Array, ""]


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]  # true
    norm: Scalar
    num_matvecs: Int[Array, ""]
    stalled: Bool[Array, ""]


def _after_turn(
    now: tuple[Scalar, Int[Array, ""]],
    steps: tuple[Scalar, Scalar],
    squares: tuple[Terms, Terms, Terms, Terms],
    norm: Scalar,
    target: Scalar,
    max_steps: Int[Array, ""] | int,
) -> tuple[Scalar, Scalar, Int[Array, ""], Bool[Array, ""]]:
    """β, ρ, the number of products and whether there is a next turn. `norm` is that of the shadow."""
    (old_rho, num_matvecs), (alpha, omega) = now, steps
    along, product, rho, square = map(added, squares)
    residual = jnp.sqrt(square)
    num_matvecs = num_matvecs + 2
    beta = rho / jnp.where(old_rho == 0, 1, old_rho) * alpha / jnp.where(omega == 0, 1, omega)
    scale = float(jnp.finfo(norm.dtype).eps) * norm
    whole = (jnp.abs(along) > scale * jnp.sqrt(product)) & (jnp.abs(rho) > scale * residual) & (omega != 0)
    # Written so that a residual that is not a number ends the loop.
    going = whole & (residual > target) & jnp.isfinite(residual + beta) & (num_matvecs < max_steps)
    return beta, rho, num_matvecs, going


_AFTER_TURN = one_kernel(_after_turn)


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
    eps = float(jnp.finfo(norm.dtype).eps)

    def from_here(c: _Carry) -> _Carry:
        shadow = c.r

        def turn(t: _Turn) -> _Turn:
            point = precondition(t.p)
            product = matvec(point)
            along, square = tree_products([shadow, product], [(0, 1), (1, 1)])
            across = added(along)
            # No step along p where the inner product is rounding: the second half of the turn is good in any case.
            usable = jnp.abs(across) > eps * c.norm * jnp.sqrt(added(square))
            alpha = jnp.where(usable, t.rho / across, 0)
            half = tree_axpy(-alpha, product, t.r)
            smoothed = precondition(half)
            image = matvec(smoothed)
            fit, stretch = tree_products([half, image], [(0, 1), (1, 1)])
            length = added(stretch)
            omega = jnp.where(length > 0, added(fit) / length, 0)
            x = tree_axpy(omega, smoothed, tree_axpy(alpha, point, t.x))
            r = tree_axpy(-omega, image, half)
            rho, residual = tree_products([shadow, r], [(0, 1), (1, 1)])
            beta, *rest = _AFTER_TURN(
                (t.rho, t.num_matvecs),
                (alpha, omega),
                (along, square, rho, residual),
                c.norm,
                target,
                max_steps,
            )
            return _Turn(x, r, tree_axpy(beta, tree_axpy(-omega, product, t.p), r), *rest)

        begin = _Turn(c.x, c.r, c.r, c.norm * c.norm, c.num_matvecs, jnp.asarray(True))
        end = jax.lax.while_loop(lambda t: t.going, turn, begin)
        true = tree_sub(rhs, matvec(end.x))
        norm = tree_norm(true)
        better = norm < c.norm
        return _Carry(
            x=tree_where(better, end.x, c.x),
            r=tree_where(better, true, c.r),
            norm=jnp.where(better, norm, c.norm),
            num_matvecs=end.num_matvecs + 1,
            stalled=~(norm <= 0.5 * c.norm) & ~(norm <= target),
        )

    def unsolved(c: _Carry) -> Bool[Array, ""]:
        return ~(c.norm <= target) & ~c.stalled & (c.num_matvecs < max_steps)

    begin = _Carry(x, r, norm, jnp.asarray(0), ~jnp.isfinite(norm))
    end = jax.lax.while_loop(unsolved, from_here, begin)
    return end.x, end.r, BiCGStabInfo(end.num_matvecs, end.norm, end.stalled)
