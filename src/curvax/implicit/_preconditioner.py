"""From what the user gave as a preconditioner to the operator that serves at one θ."""

import inspect
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import PyTree

from curvax._pytree import stop_gradient
from curvax.implicit._stage import AbstractStage
from curvax.linear._cg import CG
from curvax.linear._minres import MINRES
from curvax.linear._upkeep import KeptPreconditioner, renewed_if_due
from curvax.operators._structured import is_symmetric


def resolve_preconditioner(
    preconditioner: Any, theta: PyTree, args: Any, solvers: tuple[type, ...]
) -> lx.AbstractLinearOperator | None:
    """An operator as it is, a function called at (theta, args); no derivative flows through either.

    It is refused where one of the `solvers` that it is for could not use it.

    Raises:
        TypeError: The function returned no operator.
    """
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, lx.AbstractLinearOperator):
        _check_arguments(preconditioner)
        preconditioner = preconditioner(theta, args)
        if not isinstance(preconditioner, lx.AbstractLinearOperator):
            raise TypeError(
                "`preconditioner` of `Implicit` must be a Lineax operator, or a function (theta, args) -> operator; "
                f"the function returned {type(preconditioner).__name__}."
            )
    _check(preconditioner, theta, solvers)
    return stop_gradient(preconditioner)


def _check_arguments(fn: Any) -> None:
    """Refuse a function that cannot take (theta, args); what has no signature passes."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            "`preconditioner` of `Implicit` is called as preconditioner(theta, args), in `hypergradient` with args = "
            "(phi, batch); its "
            f"signature is {signature}."
        ) from error


def preconditioner_at(
    stage: AbstractStage, kept: KeptPreconditioner | None, theta: PyTree, args: Any
) -> tuple[lx.AbstractLinearOperator | None, KeptPreconditioner | None]:
    """The operator that serves at `theta`, and what is kept of it for later ones."""
    solvers = stage.preconditioned_solvers
    if kept is None:
        return resolve_preconditioner(stage.preconditioned_by, theta, args, solvers), None
    operator, kept = renewed_if_due(stage.preconditioned_by, kept, theta, args)
    _check(operator, theta, solvers)
    return operator, kept


def _check(operator: lx.AbstractLinearOperator, theta: PyTree, solvers: tuple[type, ...]) -> None:
    theta = eqx.filter(theta, eqx.is_inexact_array)
    wanted, found = (
        [leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (theta, operator.in_structure())
    )
    if wanted != found:
        raise ValueError(
            "`preconditioner` of `Implicit` must act on vectors shaped like theta, with leaves of the shapes "
            f"{wanted}; its operator takes {found}."
        )
    of_theta, taken = jax.tree.structure(theta), jax.tree.structure(operator.in_structure())
    if of_theta != taken:
        raise ValueError(
            f"`preconditioner` of `Implicit` must act on pytrees like theta, {of_theta}; its operator takes {taken}. "
            "Write it for the pytree, or put `jax.flatten_util.ravel_pytree` around it in a "
            "`lx.FunctionLinearOperator`."
        )
    wanted, found = (
        [str(leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (theta, operator.in_structure())
    )
    if wanted != found:
        raise ValueError(
            f"`preconditioner` of `Implicit` must act on vectors of theta's dtypes, {wanted}; its operator takes "
            f"{found}. (Half precision is solved for in float32.)"
        )
    demanding = [solver for solver in solvers if issubclass(solver, CG | MINRES | lx.CG)]
    if not demanding or lx.is_positive_semidefinite(operator):
        return
    # Ours are content with less; Lineax's own refuses it without a word about where it came from.
    symmetric = is_symmetric(operator) and not lx.is_negative_semidefinite(operator)
    if symmetric and lx.CG not in demanding:
        return
    names = " and ".join(
        sorted({f"{solver.__module__.split('.')[0]}'s {solver.__name__}" for solver in demanding})
    )
    raise ValueError(
        f"`preconditioner` of `Implicit` must be symmetric positive definite for {names}, which it is used by; its "
        f"operator, a {type(operator).__name__}, is not tagged so. If it is, say it: "
        "`lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag)`. If it is not (an incomplete LU, say), use "
        "a `linear_solver` for any matrix, such as `lx.GMRES`; for an inner minimum with `rtol=None`, since with an "
        "`rtol` conjugate gradients judge the result."
    )
