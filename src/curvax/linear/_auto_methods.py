"""The stages of `Auto`: each takes the best iterate so far and tries to do better."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import (
    tree_add,
    tree_dtype,
    tree_generic_like,
    tree_neg,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_zeros_like,
)
from curvax.linear._auto_dense import DirectSolution, Factors, factors_and_solution, solve, written_out
from curvax.linear._auto_stages import Attempt, Marks, Method, Reason, after_stage, begin, failed, sign_of
from curvax.linear._bicgstab_core import bicgstab
from curvax.linear._cg_core import conjugate_gradient, negated
from curvax.linear._cg_scalars import INDEFINITE, SINGULAR
from curvax.linear._gmres_core import gmres
from curvax.linear._jacobi import jacobi
from curvax.linear._minres_core import minres
from curvax.linear._system import MatVec
from curvax.operators._circulant import AbstractCirculant
from curvax.operators._damped import Damped, damped_part, diagonal_part
from curvax.operators._dense import ravel, structure_of, unravel
from curvax.operators._parts import untagged

# Largest entry of a diagonal over the smallest from which on it is used as a preconditioner.
_GRADED = 10


def by_factors(f: Factors, vector: PyTree[Array], target: Scalar) -> Attempt:
    """A solve with a factorisation at hand."""
    start = begin(tree_zeros_like(vector), vector)
    b, x, r = (ravel(tree, f.factor.dtype) for tree in (vector, start.x, start.r))
    return _direct(f, solve(f, b, x, r, target), vector, start, (Method.cholesky, Method.lu))


def direct_stage(
    operator: lx.AbstractLinearOperator,
    widest: int,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
    needed: Bool[Array, ""],
) -> Attempt:
    """The matrix written out and factorised, if that is `needed`: the last word on singularity.

    Under `vmap` one example after the other, each only where it needs it. Batches of factorisations in nested loops
    are also what XLA's CPU runtime (JAX 0.10) has been seen to wait on for ever.
    """
    methods = (Method.cholesky_fallback, Method.lu_fallback)
    arrays, static = eqx.partition((operator, vector, p, target, needed), eqx.is_array)

    @sequential_vmap
    def stage(arrays: PyTree) -> Attempt:
        operator, vector, p, target, needed = eqx.combine(arrays, static)

        def direct(p: Attempt) -> Attempt:
            written = written_out(operator, widest)
            b, x, r = (ravel(tree, written.rows.dtype) for tree in (vector, p.x, p.r))
            f, correction = factors_and_solution(written, sign_of(operator), r[:, None])
            return _direct(f, solve(f, b, x, r, target, correction[:, 0]), vector, p, methods)

        return run_if(needed, direct, p)

    return stage(arrays)


def _direct(
    f: Factors, found: DirectSolution, vector: PyTree[Array], p: Attempt, methods: tuple[Method, Method]
) -> Attempt:
    structure = structure_of(vector)

    def told(marks: Marks, _: Scalar, definite: Array, singular: Array, condition: Scalar) -> Marks:
        by_cholesky, by_lu = (jnp.full_like(marks.method, int(method)) for method in methods)
        fell_back = jnp.asarray(f.sign != 0) & ~definite
        marks = marks._replace(
            method=jnp.where(definite, by_cholesky, by_lu),
            reason=jnp.where(fell_back, int(Reason.indefinite), marks.reason),
            singular=singular,
            condition=condition.astype(marks.condition.dtype),
        )
        return failed(marks, (singular, Reason.singular))

    singular = found.singular & (tree_norm(vector) > 0)
    x, r = unravel(found.x, structure), unravel(found.r, structure)
    return after_stage(p, x, r, 0, methods[0], told, f.definite, singular, found.condition)


def structured_stage(
    operator: lx.AbstractLinearOperator,
    inverse: lx.AbstractLinearOperator,
    condition: Scalar,
    vector: PyTree[Array],
    p: Attempt,
    target: Scalar,
) -> Attempt:
    """The inverse of the structure, refined while that halves the residual."""
    reason = p.packed.pick(lambda marks: marks.failure)
    started = p.packed.pick(lambda marks: marks.residual_norm)

    def refine(carry: tuple[Attempt, Bool[Array, ""]]) -> tuple[Attempt, Bool[Array, ""]]:
        before, _ = carry
        x = tree_add(before.x, inverse.mv(before.r))
        norm = before.packed.pick(lambda marks: marks.residual_norm)
        after = after_stage(before, x, tree_sub(vector, operator.mv(x)), 1, Method.structured, told, reason)
        new = after.packed.pick(lambda marks: marks.residual_norm)
        return after, (new <= 0.5 * norm) & ~(new <= target)

    def told(marks: Marks, _: Scalar, reason: Array) -> Marks:
        # Written so that a condition number that is not a number counts as singular.
        singular = ~(condition * 10 * jnp.finfo(condition.dtype).eps < 1) & (started > 0)
        marks = marks._replace(
            reason=reason, singular=singular, condition=condition.astype(marks.condition.dtype)
        )
        return failed(marks, (singular, Reason.singular))

    return jax.lax.while_loop(lambda carry: carry[1], refine, (p, jnp.asarray(True)))[0]


def condition_of(operator: lx.AbstractLinearOperator, inverse: lx.AbstractLinearOperator) -> Scalar:
    """The condition number in the 2-norm of diagonal and circulant matrices; else a lower bound, 8 products.

    That is two steps of the power method for AᵀA, and for its inverse, mostly within a factor of two. Infinite or NaN
    where the inverse is.
    """
    return _spectral_norm(operator) * _spectral_norm(inverse)


def _spectral_norm(operator: lx.AbstractLinearOperator) -> Scalar:
    part = untagged(operator)
    if isinstance(part, Damped) and isinstance(
        untagged(part.operator), AbstractCirculant | lx.DiagonalLinearOperator
    ):
        part = untagged(damped_part(part.operator, part.damping))
    if isinstance(part, AbstractCirculant):
        return jnp.max(jnp.abs(part.spectrum()))
    if isinstance(part, lx.DiagonalLinearOperator):
        return jnp.max(jnp.abs(diagonal_part(part)))
    transposed, vector = operator.transpose(), tree_generic_like(operator.in_structure(), another=True)
    for _ in range(2):
        image = operator.mv(tree_scale(1 / tree_norm(vector), vector))
        size, vector = tree_norm(image), transposed.mv(image)
    return size


def jacobi_if_graded(operator: lx.AbstractLinearOperator) -> tuple[MatVec, Bool[Array, ""]]:
    """r ↦ D⁻¹r, with D the diagonal if it varies by more than ten, else one; and which of the two it is.

    The diagonal must be known. One that varies little promises little, and may do harm.
    """
    diagonal, structure = diagonal_part(untagged(jacobi(operator))), operator.in_structure()
    graded = jnp.max(diagonal) > _GRADED * jnp.min(diagonal)
    scale = unravel(jnp.where(graded, diagonal, 1), structure)
    return lambda r: jax.tree.map(jnp.multiply, scale, r), graded


def cg_stage(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    precondition: MatVec | None,
    target: Scalar,
    error: Scalar,
    by_jacobi: Bool[Array, ""],
    p: Attempt,
    budget: Int[Array, ""],
) -> Attempt:
    """Conjugate gradients, to a relative forward error; `by_jacobi` says what the preconditioner is."""
    negative = sign_of(operator) < 0
    failure, residual_norm, lowest = p.packed.pick(lambda m: (m.failure, m.residual_norm, m.lowest))
    # After a run that met its own test and missed the target: to what is missing.
    missing = jnp.where(failure == int(Reason.stalled), 0.3 * target / residual_norm, 1)
    correction, info = conjugate_gradient(
        negated(operator.mv) if negative else operator.mv,
        tree_neg(p.r) if negative else p.r,
        # Relative to the whole of x, of which most is there in a later phase: without a vector more in the loop.
        rtol=error * missing,
        atol=error * missing * tree_norm(p.x),
        max_steps=budget,
        preconditioner=precondition,
        curvature_min=lowest,
    )
    x = tree_add(p.x, correction)

    def told(
        marks: Marks,
        _: Scalar,
        status: Array,
        spent: Array,
        low: Scalar,
        high: Scalar,
        least: Scalar,
        by_jacobi: Array,
    ) -> Marks:
        seen = jnp.isfinite(low) & (low > 0)
        condition = jnp.where(seen, high / jnp.where(seen, low, 1), 0)
        marks = marks._replace(
            singular=status == SINGULAR,
            condition=jnp.maximum(marks.condition, condition).astype(marks.condition.dtype),
            lowest=jnp.where(seen, jnp.minimum(marks.lowest, least), marks.lowest).astype(marks.lowest.dtype),
            method=jnp.where(by_jacobi, int(Method.cg_jacobi), marks.method),
        )
        return failed(
            marks,
            (status == INDEFINITE, Reason.indefinite),
            (status == SINGULAR, Reason.singular),
            (spent, Reason.budget),
        )

    ritz = (info.curvature_min, info.curvature_max, info.lowest)
    learnt = (info.status, info.num_matvecs >= budget, *ritz, by_jacobi)
    r = tree_sub(vector, operator.mv(x))
    return after_stage(p, x, r, info.num_matvecs + 1, Method.cg, told, *learnt)


def minres_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    precondition: MatVec | None,
    target: Scalar,
    p: Attempt,
    budget: Int[Array, ""],
) -> Attempt:
    """MINRES."""
    x, r, info = minres(
        matvec, vector, p.x, p.r, target=target, max_steps=budget, preconditioner=precondition
    )
    spent = info.num_matvecs >= budget
    return after_stage(p, x, r, info.num_matvecs, Method.minres, _krylov_told, info.singular, spent)


def gmres_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    precondition: MatVec | None,
    target: Scalar,
    restart: int,
    method: Method,
    p: Attempt,
    budget: Int[Array, ""],
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
    spent = info.num_matvecs >= budget
    return after_stage(p, x, r, info.num_matvecs, method, _krylov_told, jnp.asarray(False), spent)


def bicgstab_stage(
    matvec: MatVec,
    vector: PyTree[Array],
    precondition: MatVec | None,
    target: Scalar,
    p: Attempt,
    budget: Int[Array, ""],
) -> Attempt:
    """Stabilised biconjugate gradients: no long recurrence to restart, and no guarantee."""
    x, r, info = bicgstab(
        matvec, vector, p.x, p.r, target=target, max_steps=budget, preconditioner=precondition
    )
    spent = info.num_matvecs >= budget
    return after_stage(p, x, r, info.num_matvecs, Method.bicgstab, _krylov_told, jnp.asarray(False), spent)


def _krylov_told(marks: Marks, _: Scalar, singular: Array, spent: Array) -> Marks:
    return failed(marks._replace(singular=singular), (singular, Reason.singular), (spent, Reason.budget))


def forward_error(vector: PyTree[Array], target: Scalar) -> Scalar:
    """The relative error of the solution that stands for a residual norm, below one half."""
    norm = tree_norm(vector)
    return jnp.minimum(target / jnp.where(norm > 0, norm, 1), 0.5).astype(tree_dtype(vector))
