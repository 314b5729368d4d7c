"""The implicit function theorem as a JVP rule that nests.

Optimistix's own rule (`optimistix.internal.implicit_jvp`) is right but closed: it passes no preconditioner and no
damping, and it differentiates a failed solve without a word when the outer loss is linear. This one is written
to be open at those places; as there, the rule calls itself for its primal, which is what makes it nest.
"""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from curvax._pytree import (
    promote_half,
    stop_gradient,
    tree_axpy,
    tree_cast_like,
    tree_dtype,
    tree_neg,
    tree_norm,
    tree_scale,
)
from curvax.implicit._family import accuracy_of, can_be_followed
from curvax.implicit._preconditioner import resolve_preconditioner

_TOO_EARLY = (
    "The inner solver stopped before the inner problem was solved: one Newton step would move the solution by more "
    "than the relative accuracy `rtol` of `Implicit`, so a derivative taken there would be wrong. Tighten the inner "
    "solver, or switch this check off with `Implicit(rtol=None)`."
)
_INNER_FAILED = (
    "The inner solver failed, so the derivative of its solution is not defined. Ask the primal solve with "
    "`throw=True` for the reason, and give the inner solver more steps or another start."
)
_NOT_FOLLOWED = (
    "The inner problem is singular at its solution, which cannot be followed: the derivative of its equations in the "
    "hyperparameters has a part outside of the range of the curvature, as at a fold or a degenerate minimum. There is "
    "no derivative. Regularise the inner problem (an L2 term)."
)


def while_loop() -> Callable:
    """The loop that Optimistix's solvers are handed: a plain one, since nothing differentiates through it."""
    return ft.partial(eqxi.while_loop, kind="lax")


def implicit_solution(
    primal: Callable[[Any], tuple[PyTree, PyTree]],
    rewrite: Callable[[PyTree, PyTree, Any], PyTree],
    inputs: Any,
    rule: Any,
    tags: frozenset[object],
) -> tuple[PyTree, PyTree]:
    """`primal(inputs)` = (root, residual), differentiated through `rewrite(root, residual, inputs) = 0`.

    Args:
        primal: inputs ↦ (root, residual); the residual carries no derivative. A global function.
        rewrite: (root, residual, inputs) ↦ what vanishes at the root. A global function.
        inputs: Any pytree.
        rule: The `Implicit` rule, with `linear_solver`, `preconditioner`, `damping`, `rtol`, `atol`.
        tags: Lineax tags of ∂rewrite/∂root.

    The tangent is −(∂rewrite/∂root + damping·I)⁻¹ ∂rewrite/∂inputs · tangent(inputs).
    """
    root, residual = _solve(primal, rewrite, inputs, stop_gradient(rule), tags)
    return root, jax.tree.map(eqxi.nondifferentiable_backward, residual)


@eqx.filter_custom_jvp
def _solve(primal: Callable, rewrite: Callable, inputs: Any, rule: Any, tags: frozenset[object]) -> Any:
    del rewrite, rule, tags
    return jax.tree.map(jnp.asarray, primal(inputs))


def _rewrite_in_root(root: PyTree, args: Any) -> PyTree:
    rewrite, residual, inputs = args
    return rewrite(root, residual, inputs)


def _is_none(x: Any) -> bool:
    return x is None


def _is_result(x: Any) -> bool:
    # Optimistix's enumeration holds Lineax's members too; items say which enumeration they belong to.
    return isinstance(x, optx.RESULTS)


def _solver_failed(residual: PyTree) -> Array | None:
    """Whether a solver reported failure in what it returned beside the root; None where it reports nothing."""
    results = [x for x in jax.tree.leaves(residual, is_leaf=_is_result) if _is_result(x)]
    flags = [r != optx.RESULTS.successful for r in results]
    return jnp.any(jnp.stack([jnp.asarray(f) for f in flags])) if flags else None


@_solve.def_jvp
def _solve_jvp(primals: Any, tangents: Any) -> Any:
    primal, rewrite, inputs, rule, tags = primals
    t_primal, t_rewrite, t_inputs, _, _ = tangents
    del t_primal, t_rewrite
    no_tangent = jax.tree.map(_is_none, t_inputs, is_leaf=_is_none)
    fixed, moving = eqx.partition(inputs, no_tangent, is_leaf=_is_none)

    root, residual = implicit_solution(primal, rewrite, inputs, rule, tags)
    # Half precision is promoted for the solve: a bfloat16 residual cannot converge.
    point = promote_half(root)
    # Solvers written for one dtype return it: the promoted function does too.
    _, rhs = jax.jvp(
        lambda m: promote_half(rewrite(root, residual, eqx.combine(m, fixed))), (moving,), (t_inputs,)
    )

    def in_root(at: PyTree, args: Any) -> PyTree:
        return promote_half(_rewrite_in_root(tree_cast_like(at, root), args))

    jacobian = lx.JacobianLinearOperator(in_root, point, (rewrite, residual, inputs), tags=tags)
    operator = _damped(jacobian, rule.damping, tags)
    solver = rule.solver_for(tags, tree_dtype(point))
    options = {}
    preconditioner = resolve_preconditioner(rule.preconditioner, root, rule.args_of(inputs), (type(solver),))
    if preconditioner is not None:
        options["preconditioner"] = preconditioner
    # A decomposition is made once.
    state = solver.init(stop_gradient(operator), options)
    solve = ft.partial(lx.linear_solve, solver=solver, options=options, state=state)
    if not solver.assume_full_rank():
        rhs = _followed(rhs, jacobian, no_tangent, stop_gradient(operator), solve, solver)
    undamped = solve if operator is jacobian else ft.partial(lx.linear_solve, solver=solver, options=options)
    rhs = _checked(rhs, residual, rule, point, jacobian, undamped)
    t_root = tree_neg(solve(operator, rhs).value)
    t_root = tree_cast_like(t_root, root)
    t_residual = jax.custom_derivatives.zero_from_primal(residual, symbolic_zeros=True)
    return (root, residual), (t_root, t_residual)


def _damped(
    operator: lx.AbstractLinearOperator, damping: Any, tags: frozenset[object]
) -> lx.AbstractLinearOperator:
    if isinstance(damping, int | float) and damping == 0:
        return operator
    structure = operator.in_structure()
    return lx.FunctionLinearOperator(lambda v: tree_axpy(damping, v, operator.mv(v)), structure, tags)


def _followed(
    rhs: PyTree, jacobian: Any, no_tangent: PyTree, operator: Any, solve: Callable, solver: Any
) -> PyTree:
    """`rhs`, guarded as by `_checked`: where there is no derivative, a solver for singular systems finds one."""
    point, (rewrite, residual, inputs) = stop_gradient((jacobian.x, jacobian.args))
    fixed, moving = eqx.partition(inputs, no_tangent, is_leaf=_is_none)

    def at(moved: PyTree) -> PyTree:
        return jacobian.fn(point, (rewrite, residual, eqx.combine(moved, fixed)))

    _, pull = jax.vjp(at, moving)
    followed = can_be_followed(
        operator.mv,
        lambda v: solve(operator, v, throw=False).value,
        lambda z: pull(z)[0],
        point,
        accuracy_of(solver),
    )
    one = jnp.ones((), tree_dtype(rhs))
    return tree_scale(eqx.error_if(one, ~stop_gradient(followed), _NOT_FOLLOWED), rhs)


def _checked(
    rhs: PyTree, residual: PyTree, rule: Any, point: PyTree, jacobian: Any, solve: Callable
) -> PyTree:
    """`rhs`, with the checks threaded through it: they then guard the derivative whatever the loss does with the value.

    A check guards only the values that depend on it: threaded through the primal alone it is dead code when the
    loss is linear in the solution. It enters as a factor one, not as `error_if(rhs, ...)`: that is transposed to
    the identity and lost in reverse mode, while the transpose of a product keeps its factor.
    """
    one = jnp.ones((), tree_dtype(rhs))
    failed = _solver_failed(residual)
    if failed is not None:
        one = eqx.error_if(one, failed, _INNER_FAILED)
    if rule.rtol is None:
        return tree_scale(one, rhs)
    frozen, args = stop_gradient((point, jacobian.args))
    vanishing = stop_gradient(jacobian.fn(frozen, args))
    still = lx.JacobianLinearOperator(jacobian.fn, frozen, args, tags=jacobian.tags)
    step = solve(still, vanishing, throw=False).value
    size, moved = tree_norm(frozen), tree_norm(step)
    # At θ* = 0 the relative part is empty: rounding is then measured by the start.
    start = tree_norm(promote_half(stop_gradient(eqx.filter(jacobian.args[2][2], eqx.is_inexact_array))))
    noise = (jnp.sqrt(jnp.finfo(tree_dtype(frozen)).eps) * start).astype(size.dtype)
    allowed = rule.rtol * size + rule.atol + noise
    return tree_scale(eqx.error_if(one, ~(moved <= allowed), _TOO_EARLY), rhs)
