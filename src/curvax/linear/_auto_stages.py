"""The stages of `Auto`: each takes the best iterate so far and tries to do better."""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import (
    tree_add,
    tree_dtype,
    tree_generic_like,
    tree_neg,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
)
from curvax.linear._bicgstab_core import bicgstab
from curvax.linear._cg_core import conjugate_gradient, negated
from curvax.linear._cg_scalars import INDEFINITE, SINGULAR
from curvax.linear._gmres_core import gmres
from curvax.linear._minres_core import minres
from curvax.linear._system import MatVec
from curvax.operators._dense import ravel, structure_of, unravel
from curvax.operators._factorisation import Factorisation, factorise, written_out


class Method(enum.IntEnum):
    """What produced the answer of `Auto`: `Method(int(solution.stats["method"]))`."""

    none = 0  # the start was good enough
    cholesky = 1
    lu = 2
    cg = 3
    minres = 4
    gmres = 5
    gmres_long = 6  # with four times the restart length
    lu_fallback = 7
    structured = 8  # the inverse that the structure of the operator gives
    bicgstab = 9


class Reason(enum.IntEnum):
    """Why the method before the one that answered did not: `Reason(int(solution.stats["reason"]))`."""

    first_choice = 0
    indefinite = 1  # tagged definite, and a direction of the other sign was found
    singular = 2  # singular to working precision
    stalled = 3  # no further progress, or rounding level above the tolerance
    budget = 4  # out of steps
    not_symmetric = 5  # tagged symmetric, and a probe has shown that it is not


class Attempt(NamedTuple):
    """The best x so far, its true residual, and how it came about."""

    x: PyTree[Array]
    r: PyTree[Array]
    residual_norm: Scalar
    num_matvecs: Int[Array, ""]
    method: Int[Array, ""]
    reason: Int[Array, ""]
    failure: Int[Array, ""]  # a Reason: why the last stage failed
    singular: Bool[Array, ""]
    condition: Scalar


def sign_of(operator: lx.AbstractLinearOperator) -> int:
    """+1 or −1 where the operator is tagged positive or negative semidefinite, else 0."""
    if lx.is_positive_semidefinite(operator):
        return 1
    return -1 if lx.is_negative_semidefinite(operator) else 0


def begin(x: PyTree[Array], r: PyTree[Array]) -> Attempt:
    """The start, before any stage."""
    zero = jnp.asarray(0)
    dtype = tree_dtype(r)
    return Attempt(x, r, tree_norm(r), zero, zero, zero, zero, jnp.asarray(False), jnp.zeros((), dtype))


def stats_of(p: Attempt) -> dict[str, Array]:
    """The public statistics."""
    return {
        "method": p.method,
        "reason": p.reason,
        "num_steps": p.num_matvecs,
        "residual_norm": p.residual_norm,
        "condition": p.condition,
    }


def by_factors(f: Factorisation, vector: PyTree[Array]) -> Attempt:
    """A solve with a factorisation at hand."""
    structure = structure_of(vector)
    b = ravel(vector, f.matrix.dtype)
    x = f.solve(b)
    r = unravel(b - f.multiply(x), structure)
    direct = jnp.where(f.definite, int(Method.cholesky), int(Method.lu))
    fell_back = jnp.logical_and(f.tries_cholesky, ~f.definite)
    start = begin(unravel(x, structure), r)
    return start._replace(
        method=direct.astype(start.method.dtype),
        reason=jnp.where(fell_back, int(Reason.indefinite), 0).astype(start.reason.dtype),
        failure=jnp.asarray(int(Reason.stalled)),
        singular=_is_singular(f) & (tree_norm(vector) > 0),
        condition=1 / f.rcond,
    )


def structured_stage(
    operator: lx.AbstractLinearOperator,
    inverse: lx.AbstractLinearOperator,
    condition: Scalar,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
) -> Attempt:
    """The inverse of the structure, refined while that halves the residual."""

    def refine(carry: tuple[Attempt, Bool[Array, ""]]) -> tuple[Attempt, Bool[Array, ""]]:
        before, _ = carry
        x = tree_add(before.x, inverse.mv(before.r))
        after = _improved(before, x, tree_sub(vector, operator.mv(x)), jnp.asarray(1), Method.structured)
        halved = after.residual_norm <= 0.5 * before.residual_norm
        return after._replace(reason=p.failure), halved & ~(after.residual_norm <= target)

    after, _ = jax.lax.while_loop(lambda carry: carry[1], refine, (p, jnp.asarray(True)))
    # Written so that a condition number that is not a number counts as singular.
    singular = ~(condition * 10 * jnp.finfo(condition.dtype).eps < 1) & (p.residual_norm > 0)
    failure = _failure(p, singular, jnp.asarray(False))
    return after._replace(failure=failure, singular=singular, condition=condition)


def condition_of(operator: lx.AbstractLinearOperator, inverse: lx.AbstractLinearOperator) -> Scalar:
    """A lower bound of the condition number in the 2-norm, mostly within a factor of two; 8 products.

    Two steps of the power method for AᵀA, and for its inverse. Infinite or NaN where the inverse is.
    """

    def norm(apply: lx.AbstractLinearOperator) -> Scalar:
        transposed = apply.transpose()
        vector = tree_generic_like(apply.in_structure(), another=True)
        for _ in range(2):
            image = apply.mv(tree_scale(1 / tree_norm(vector), vector))
            size, vector = tree_norm(image), transposed.mv(image)
        return size

    return norm(operator) * norm(inverse)


def _is_singular(f: Factorisation) -> Bool[Array, ""]:
    return ~(f.rcond > f.matrix.shape[0] * jnp.finfo(f.matrix.dtype).eps)


def _improved(
    p: Attempt, x: PyTree[Array], r: PyTree[Array], steps: Int[Array, ""], method: Method
) -> Attempt:
    """Take (x, r) if its residual is smaller; it is this method's answer in any case."""
    norm = tree_norm(r)
    better = norm < p.residual_norm
    return p._replace(
        x=tree_where(better, x, p.x),
        r=tree_where(better, r, p.r),
        residual_norm=jnp.where(better, norm, p.residual_norm),
        num_matvecs=p.num_matvecs + steps,
        method=jnp.asarray(int(method)).astype(p.method.dtype),
        reason=p.failure,
    )


def cg_stage(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
    budget: int,
    precondition: MatVec | None,
) -> Attempt:
    """Conjugate gradients, to a relative forward error."""
    negative = sign_of(operator) < 0
    norm = tree_norm(vector)
    correction, info = conjugate_gradient(
        negated(operator.mv) if negative else operator.mv,
        tree_neg(p.r) if negative else p.r,
        rtol=jnp.minimum(target / jnp.where(norm > 0, norm, 1), 0.5),
        max_steps=budget,
        preconditioner=precondition,
        reference=p.x,
    )
    x = tree_add(p.x, correction)
    after = _improved(p, x, tree_sub(vector, operator.mv(x)), info.num_matvecs + 1, Method.cg)
    singular = info.status == SINGULAR
    failure = _failure(p, singular, info.num_matvecs >= budget)
    failure = jnp.where(info.status == INDEFINITE, int(Reason.indefinite), failure)
    seen = jnp.isfinite(info.curvature_min) & (info.curvature_min > 0)
    condition = jnp.where(seen, info.curvature_max / jnp.where(seen, info.curvature_min, 1), 0)
    return after._replace(
        failure=failure.astype(p.failure.dtype),
        singular=singular,
        condition=condition.astype(p.condition.dtype),
    )


def minres_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
    budget: int,
    precondition: MatVec | None,
) -> Attempt:
    """MINRES."""
    x, r, info = minres(
        matvec, vector, p.x, p.r, target=target, max_steps=budget, preconditioner=precondition
    )
    failure = _failure(p, info.singular, info.num_matvecs >= budget)
    return _improved(p, x, r, info.num_matvecs, Method.minres)._replace(failure=failure)


def gmres_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
    budget: int,
    precondition: MatVec | None,
    restart: int,
    method: Method,
) -> Attempt:
    """Restarted GMRES."""
    x, r, info = gmres(
        matvec,
        vector,
        p.x,
        p.r,
        target=target,
        max_steps=budget,
        restart=restart,
        preconditioner=precondition,
    )
    failure = _failure(p, jnp.asarray(False), info.num_matvecs >= budget)
    return _improved(p, x, r, info.num_matvecs, method)._replace(failure=failure)


def bicgstab_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
    budget: int,
    precondition: MatVec | None,
) -> Attempt:
    """Stabilised biconjugate gradients: no long recurrence to restart, and no guarantee."""
    x, r, info = bicgstab(
        matvec, vector, p.x, p.r, target=target, max_steps=budget, preconditioner=precondition
    )
    failure = _failure(p, jnp.asarray(False), info.num_matvecs >= budget)
    return _improved(p, x, r, info.num_matvecs, Method.bicgstab)._replace(failure=failure)


def lu_stage(operator: lx.AbstractLinearOperator, vector: PyTree[Array], p: Attempt) -> Attempt:
    """The matrix written out and factorised, whatever its definiteness: the last word on singularity."""
    f = factorise(written_out(operator), 0)
    structure, dtype = structure_of(p.r), f.matrix.dtype
    x = ravel(p.x, dtype) + f.solve(ravel(p.r, dtype))
    r = ravel(vector, dtype) - f.multiply(x)
    after = _improved(p, unravel(x, structure), unravel(r, structure), jnp.asarray(0), Method.lu_fallback)
    singular = _is_singular(f)
    return after._replace(
        failure=_failure(p, singular, jnp.asarray(False)), singular=singular, condition=1 / f.rcond
    )


def _failure(p: Attempt, singular: Bool[Array, ""], out_of_steps: Bool[Array, ""]) -> Int[Array, ""]:
    failure = jnp.where(out_of_steps, int(Reason.budget), int(Reason.stalled))
    return jnp.where(singular, int(Reason.singular), failure).astype(p.failure.dtype)
