"""What the stages of `Auto` hand on to each other: the best iterate so far, and how it came about."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._control import Packed, in_one_kernel, pack
from curvax._pytree import tree_dtype, tree_norm, tree_where


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
    cholesky_fallback = 10
    cg_jacobi = 11  # with the diagonal as a preconditioner


class Reason(enum.IntEnum):
    """Why the method before the one that answered did not: `Reason(int(solution.stats["reason"]))`."""

    first_choice = 0
    indefinite = 1  # tagged definite, and a direction of the other sign was found
    singular = 2  # singular to working precision
    stalled = 3  # no further progress, or rounding level above the tolerance
    budget = 4  # out of steps
    not_symmetric = 5  # tagged symmetric, and a probe has shown that it is not
    slow = 6  # by its progress so far, a factorisation would be done before it


class Marks(NamedTuple):
    """The scalars of an attempt."""

    residual_norm: Scalar  # of the true residual
    num_matvecs: Int[Array, ""]
    method: Int[Array, ""]
    reason: Int[Array, ""]
    failure: Int[Array, ""]  # a Reason: why the last stage failed
    singular: Bool[Array, ""]
    taken: Bool[Array, ""]  # whether the last stage brought a smaller residual
    condition: Scalar
    lowest: Scalar  # smallest Ritz value of conjugate gradients
    upcoming: Int[Array, ""]  # products of the next phase of a stage
    again: Bool[Array, ""]  # whether there is one


class Attempt(NamedTuple):
    """The best x so far, its true residual, and how it came about."""

    x: PyTree[Array]
    r: PyTree[Array]
    packed: Packed[Marks]

    @property
    def marks(self) -> Marks:
        """The scalars, each one apart."""
        return self.packed.tree


def begin(x: PyTree[Array], r: PyTree[Array], num_matvecs: int = 0) -> Attempt:
    """The start, before any stage."""
    dtype = tree_dtype(r)
    none, no, spent = jnp.zeros((), jnp.int32), jnp.asarray(False), jnp.asarray(num_matvecs, jnp.int32)
    zero, unknown = jnp.zeros((), dtype), jnp.asarray(jnp.inf, dtype)
    return Attempt(x, r, pack(Marks(tree_norm(r), spent, none, none, none, no, no, zero, unknown, none, no)))


def stats_of(p: Attempt) -> dict[str, Array]:
    """The public statistics."""
    marks = p.marks
    return {
        "method": marks.method,
        "reason": marks.reason,
        "num_steps": marks.num_matvecs,
        "residual_norm": marks.residual_norm,
        "condition": marks.condition,
    }


def sign_of(operator: lx.AbstractLinearOperator) -> int:
    """+1 or −1 where the operator is tagged positive or negative semidefinite, else 0."""
    if lx.is_positive_semidefinite(operator):
        return 1
    return -1 if lx.is_negative_semidefinite(operator) else 0


def after_stage(
    p: Attempt,
    x: PyTree[Array],
    r: PyTree[Array],
    steps: Int[Array, ""] | int,
    method: Method,
    told: Callable[..., Marks],
    *scalars: Array,
) -> Attempt:
    """Take (x, r) if its residual is smaller; it is this method's answer in any case.

    `told(marks, norm, *scalars)` sets what else the stage has found out, given the norm of its own residual.
    """

    def judged(marks: Marks, norm: Scalar, steps: Int[Array, ""], *scalars: Array) -> Marks:
        taken = norm < marks.residual_norm
        kept = marks._replace(
            residual_norm=jnp.where(taken, norm, marks.residual_norm),
            num_matvecs=marks.num_matvecs + steps,
            method=jnp.full_like(marks.method, int(method)),
            reason=marks.failure,
            taken=taken,
        )
        return told(kept, norm, *scalars)

    packed = in_one_kernel(judged)(p.packed, tree_norm(r), jnp.asarray(steps, jnp.int32), *scalars)
    taken = packed.pick(lambda marks: marks.taken)
    return Attempt(tree_where(taken, x, p.x), tree_where(taken, r, p.r), packed)


def failed(marks: Marks, *failures: tuple[Bool[Array, ""] | bool, Reason]) -> Marks:
    """With the first of these failures that holds, or `stalled`."""
    failure = jnp.full_like(marks.failure, int(Reason.stalled))
    for holds, reason in reversed(failures):
        failure = jnp.where(holds, int(reason), failure)
    return marks._replace(failure=failure)
