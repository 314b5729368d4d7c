"""Restarted GMRES over pytrees, for `FGMRES` and inside `Auto`.

Lineax has a public GMRES. It tests convergence at restarts only, entry by entry against |b|, so that a
zero entry of b with atol = 0 can never pass (or passes as NaN); here each step has the Euclidean norm
of the residual at hand and may stop.
"""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._control import one_kernel
from curvax._pytree import tree_add, tree_dtype, tree_norm, tree_size, tree_sub, tree_where
from curvax.linear._system import MatVec
from curvax.operators._dense import ravel, structure_of, unravel


class GMRESInfo(NamedTuple):
    """What a run of GMRES learnt; scalars."""

    num_matvecs: Int[Array, ""]
    residual_norm: Scalar  # of the true residual b − Ax
    converged: Bool[Array, ""]
    stalled: Bool[Array, ""]  # a whole cycle took off less than a twentieth of the residual
    nonfinite: Bool[Array, ""]


# GPUs round the factors of a float32 product to ten bits unless they are told not to.
_dot = ft.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Where more than this is left of a vector little has cancelled, and one projection is enough (Rutishauser's choice).
_ENOUGH = 0.1


class _Cycle(NamedTuple):
    basis: Float[Array, "m1 n"]  # zero beyond the first `steps` + 1 rows
    directions: (
        Float[Array, "m n"] | None
    )  # the basis preconditioned, where that may differ from step to step
    triangle: Float[Array, "m m"]  # R of the QR factorisation of the Hessenberg matrix, by columns
    rotations: Float[
        Array, "m1 m1"
    ]  # Qᵀ, written out: one product with it instead of a loop of tiny rotations
    rotated: Float[Array, " m1"]  # Qᵀ β e₁; its last entry is the residual norm
    steps: Int[Array, ""]
    finished: Bool[Array, ""]


def _orthogonalised(
    basis: Float[Array, "m1 n"], w: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " m1"], Scalar, Scalar]:
    """w orthogonal to the rows, its coefficients, its norm then and before; a second time where much has cancelled."""
    before = jnp.linalg.norm(w)

    def project(c: tuple[Array, Array, Scalar, Array]) -> tuple[Array, Array, Scalar, Array]:
        found = _dot(basis, c[0])
        w = c[0] - _dot(found, basis)
        return w, c[1] + found, jnp.linalg.norm(w), c[3] + 1

    def cancelled(c: tuple[Array, Array, Scalar, Array]) -> Array:
        return (c[3] == 0) | ((c[2] <= _ENOUGH * before) & (c[3] == 1))

    start = (w, jnp.zeros(len(basis), w.dtype), before, jnp.asarray(0))
    w, coefficients, after, _ = jax.lax.while_loop(cancelled, project, start)
    return w, coefficients, after, before


class _Rotation(NamedTuple):
    """A step's Givens rotation, and what it says."""

    cosine: Scalar
    sine: Scalar
    pivot: Scalar
    head: Scalar  # the entries of the rotated right-hand side
    tail: Scalar
    height: Scalar
    scale: Scalar  # of the new vector, 0 if there is none
    usable: Bool[Array, ""]
    finished: Bool[Array, ""]


def _rotation(a: Scalar, height: Scalar, length: Scalar, head: Scalar, target: Scalar) -> _Rotation:
    """Turn [a, height] into [pivot, 0]."""
    eps = float(jnp.finfo(a.dtype).eps)
    # The Krylov space is invariant: what is left of w is rounding.
    invariant = height <= 10 * eps * length
    height = jnp.where(invariant, 0, height)
    pivot = jnp.sqrt(a * a + height * height)
    # A zero pivot means a singular operator: leave the direction out.
    usable = pivot > eps * length
    inverse = 1 / jnp.where(usable, pivot, 1)
    cosine, sine = jnp.where(usable, a * inverse, 0), jnp.where(usable, height * inverse, 1)
    tail = -sine * head
    return _Rotation(
        cosine=cosine,
        sine=sine,
        pivot=jnp.where(usable, pivot, 1),
        head=jnp.where(usable, cosine * head, 0),
        tail=tail,
        height=height,
        scale=jnp.where(invariant, 0, 1 / jnp.where(height > 0, height, 1)),
        usable=usable,
        finished=invariant | ~(jnp.abs(tail) > target) | ~usable,
    )


_ROTATION = one_kernel(_rotation)


def _cycle(
    matvec: MatVec,
    precondition: MatVec,
    r: Float[Array, " n"],
    target: Scalar,
    restart: int,
    budget: Int[Array, ""],
    flexible: bool,
) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """One Arnoldi cycle from residual r: the correction, and the steps taken."""
    dtype = r.dtype
    norm = jnp.linalg.norm(r)
    begin = _Cycle(
        basis=jnp.zeros((restart + 1, r.size), dtype).at[0].set(r / jnp.where(norm > 0, norm, 1)),
        directions=jnp.zeros((restart, r.size), dtype) if flexible else None,
        triangle=jnp.eye(restart, dtype=dtype),
        rotations=jnp.eye(restart + 1, dtype=dtype),
        rotated=jnp.zeros((restart + 1,), dtype).at[0].set(norm),
        steps=jnp.asarray(0),
        finished=~(norm > target),
    )

    def body(c: _Cycle) -> _Cycle:
        k = c.steps
        z = precondition(c.basis[k])
        w, coefficients, height, length = _orthogonalised(c.basis, matvec(z))
        # Those so far do not touch the height.
        column = _dot(c.rotations, coefficients)
        g = _ROTATION(column[k], height, length, c.rotated[k], target)
        upper, lower = c.rotations[k], c.rotations[k + 1]
        new = jnp.where(g.usable & (jnp.arange(restart) < k), column[:-1], 0).at[k].set(g.pivot)
        return _Cycle(
            basis=c.basis.at[k + 1].set(w * g.scale),
            directions=None if c.directions is None else c.directions.at[k].set(z),
            triangle=c.triangle.at[:, k].set(new),
            rotations=c.rotations.at[k]
            .set(g.cosine * upper + g.sine * lower)
            .at[k + 1]
            .set(g.cosine * lower - g.sine * upper),
            rotated=c.rotated.at[k].set(g.head).at[k + 1].set(g.tail),
            steps=k + 1,
            finished=g.finished,
        )

    def unfinished(c: _Cycle) -> Bool[Array, ""]:
        return ~c.finished & (c.steps < jnp.minimum(restart, budget))

    end = jax.lax.while_loop(unfinished, body, begin)
    used = jnp.where(jnp.arange(restart) < end.steps, end.rotated[:-1], 0)
    coefficients = jax.scipy.linalg.solve_triangular(end.triangle, used)
    if end.directions is None:
        return precondition(_dot(coefficients, end.basis[:restart])), end.steps
    return _dot(coefficients, end.directions), end.steps


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    residual_norm: Scalar
    num_matvecs: Int[Array, ""]
    stalled: Bool[Array, ""]
    nonfinite: Bool[Array, ""]


def gmres(
    matvec: MatVec,
    rhs: PyTree[Array],
    x: PyTree[Array],
    r: PyTree[Array],
    *,
    target: Scalar,
    max_steps: Int[Array, ""] | int,
    restart: int,
    preconditioner: MatVec | None = None,
    flexible: bool = False,
) -> tuple[PyTree[Array], PyTree[Array], GMRESInfo]:
    """Improve x, whose residual is r = b − Ax, until the true residual norm is at most `target`.

    Preconditioned from the right, so that the residual is that of the system itself; `flexible` for one that is
    not the same linear map in every step. Returns x, its residual and a `GMRESInfo`.

    Source: Y. Saad, M. H. Schultz, "GMRES: a generalized minimal residual algorithm", SIAM J. Sci. Stat.
    Comput. 7, 1986; flexible: Y. Saad, "A flexible inner-outer preconditioned GMRES algorithm", SIAM J. Sci. Comput.
    14, 1993. Cost: one product a step and one a cycle; restart + 1 vectors, twice as many if flexible.
    """
    dtype = tree_dtype(r)
    structure = structure_of(r)
    restart = min(restart, tree_size(r))

    def flat(apply: MatVec | None) -> MatVec:
        return lambda v: v if apply is None else ravel(apply(unravel(v, structure)), dtype)

    norm = tree_norm(r)
    no = jnp.asarray(False)
    begin = _Carry(x, r, norm, jnp.asarray(0), no, ~jnp.isfinite(norm))

    def unfinished(c: _Carry) -> Bool[Array, ""]:
        return ~(c.residual_norm <= target) & ~c.stalled & ~c.nonfinite & (c.num_matvecs < max_steps)

    def body(c: _Carry) -> _Carry:
        correction, steps = _cycle(
            flat(matvec),
            flat(preconditioner),
            ravel(c.r, dtype),
            0.9 * target,
            restart,
            max_steps - c.num_matvecs,
            flexible,
        )
        x = tree_add(c.x, unravel(correction, structure))
        r = tree_sub(rhs, matvec(x))
        residual_norm = tree_norm(r)
        better = residual_norm < c.residual_norm
        return _Carry(
            tree_where(better, x, c.x),
            tree_where(better, r, c.r),
            jnp.where(better, residual_norm, c.residual_norm),
            c.num_matvecs + steps + 1,
            ~(residual_norm <= 0.95 * c.residual_norm),
            ~jnp.isfinite(residual_norm),
        )

    end = jax.lax.while_loop(unfinished, body, begin)
    info = GMRESInfo(
        end.num_matvecs, end.residual_norm, end.residual_norm <= target, end.stalled, end.nonfinite
    )
    return end.x, end.r, info
