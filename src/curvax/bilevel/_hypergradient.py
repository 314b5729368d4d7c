"""The hypergradient of a bilevel problem, with its error."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._pytree import strong, tree_norm
from curvax._results import RESULTS, describe
from curvax.bilevel._data import is_sampler
from curvax.bilevel._door import (
    check_data,
    check_finite,
    check_inner_solver,
    check_rule,
    make_task,
    tolerances_as_arrays,
)
from curvax.bilevel._problem import Bilevel
from curvax.bilevel._state import check_state, initial_state, with_room
from curvax.implicit._rule import AbstractRule, Outcome, State, Stats
from curvax.unroll import GradientFlow, Steps


class Hypergradient(eqx.Module):
    """What `hypergradient` returns.

    Attributes:
        value: Outer loss f(θ, φ) at the inner solution.
        grad: df/dφ; a pytree like phi with None where phi is not a floating-point array.
        theta: The inner solution that `value` and `grad` belong to.
        result: `cx.RESULTS.successful`, or what went wrong.
        stats: Residuals, error estimate, counts and curvature bounds.
        state: Warm starts (θ, adjoint, where they are heading, smallest Ritz value, random key) for the next call.
    """

    value: Float[Array, ""]
    grad: PyTree
    theta: PyTree
    result: RESULTS
    stats: Stats
    state: State


def _cast_back(tree: PyTree[Array], like: PyTree) -> PyTree:
    """Inexact leaves in the dtypes that the user gave."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, eqx.filter(like, eqx.is_inexact_array))


@eqx.filter_custom_jvp
def _undifferentiated(x: PyTree) -> PyTree:
    return x


@_undifferentiated.def_jvp
def _undifferentiated_jvp(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "`hypergradient` cannot be differentiated: its loops stop on tests that have no derivative. Differentiate "
        "`cx.solution_map` instead (any order); hypergradients of hypergradients come out of it."
    )


@eqx.filter_jit
def _compiled(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    inner_solver: Any,
    rule: AbstractRule,
    data: tuple,
    state: State,
) -> tuple[Hypergradient, PyTree[Array]]:
    dynamic, static = eqx.partition((phi, theta0, data), eqx.is_inexact_array)
    phi, theta0, (inner_data, outer_data) = eqx.combine(_undifferentiated(dynamic), static)
    key, next_key = (None, None) if state.key is None else tuple(jax.random.split(state.key))
    task = make_task(problem, phi, theta0, inner_solver, inner_data, outer_data, key)
    outcome: Outcome = rule.hypergradient(task, state)
    theta_static = eqx.filter(theta0, eqx.is_inexact_array, inverse=True)
    grad = _cast_back(outcome.grad, phi)
    hypergradient = Hypergradient(
        value=outcome.value,
        grad=grad,
        theta=eqx.combine(_cast_back(outcome.theta, theta0), theta_static),
        result=outcome.result,
        stats=_with_rounding(outcome.stats, outcome.grad, grad),
        state=eqx.tree_at(lambda s: s.key, outcome.state, next_key, is_leaf=lambda x: x is None),
    )
    return hypergradient, outcome.no_influence


def _with_rounding(stats: Stats, grad: PyTree[Array], returned: PyTree[Array]) -> Stats:
    """The error estimate with what the return in half precision adds to it; that is known exactly."""
    if all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(returned), strict=True)):
        return stats
    rounding = tree_norm(jax.tree.map(lambda a, b: b.astype(a.dtype) - a, grad, returned))
    norm = tree_norm(grad)
    return eqx.tree_at(
        lambda s: (s.error_estimate, s.relative_error),
        stats,
        (stats.error_estimate + rounding, stats.relative_error + rounding / jnp.where(norm > 0, norm, 1)),
    )


def hypergradient(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    rule: AbstractRule,
    inner_data: Any = None,
    outer_data: Any = None,
    state: State | None = None,
    key: Array | None = None,
    throw: bool = True,
) -> Hypergradient:
    """df(θ*(φ), φ)/dφ with the outer value, an estimate of its error, and warm starts for the next call.

    Args:
        problem: The bilevel problem. Build it once: a fresh lambda compiles again.
        phi: Hyperparameters, any pytree with at least one floating-point array.
        theta0: Start of the inner solver, any pytree (an Equinox module, say); unused from a warm `state`.
        inner_solver: An Optimistix solver of the kind that the inner problem needs, `cx.Steps` or `cx.GradientFlow`.
            Its tolerances decide how far the inner problem is solved before the rule's sweeps take over.
        rule: `cx.Implicit(...)` or `cx.Unrolled()`.
        inner_data: Third argument of the inner function: a pytree of arrays, or a sampler key -> batch.
        outer_data: The same for the outer function.
        state: `hg.state` of an earlier call with the same shapes; cold where None, and after a call that failed.
        key: Random key for samplers; where a state is given, its own key is used.
        throw: Raise when the result is not successful. With False the failure is in `result`, and `grad` is
            NaN where no hypergradient could be computed at all.

    Returns:
        A `Hypergradient` (value, grad, theta, result, stats, state).

    Raises:
        ValueError: phi or theta0 hold no floating-point array, a sampler has no key, the rule cannot serve this solver.
        TypeError: The inner solver is of the wrong kind.
        RuntimeError: With `throw=True`, the result is not successful; inside `jit` the error of `eqx.error_if`.

    Not differentiable itself: for derivatives of the solution, second-order ones too, use `cx.solution_map`.

    Cost: the inner solve, one adjoint solve and, with an estimate, one loose correction of each. Memory
        O(dim θ + dim φ) beside the linearisation of the inner gradient.

    Example:
        ```python
        import jax.numpy as jnp, optimistix as optx, curvax as cx

        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - 1.0) ** 2) + lam * jnp.sum(w**2),
            outer=lambda w, lam, _: jnp.sum((w - 0.5) ** 2),
        )
        hg = cx.hypergradient(
            problem, jnp.array(0.5), jnp.zeros(3), inner_solver=optx.BFGS(1e-6, 1e-6), rule=cx.Implicit()
        )
        hg.grad, hg.stats.relative_error
        ```

    Source: `Implicit` and `Unrolled` name theirs.
    """
    if not isinstance(problem, Bilevel):
        raise TypeError(f"`problem` must be a `cx.Bilevel`, got {type(problem).__name__}.")
    check_rule(rule)
    check_inner_solver(problem, inner_solver)
    if state is None:
        if throw:  # without it nothing raises: the result says `nonfinite`
            check_finite(phi=phi, theta0=theta0, inner_data=inner_data, outer_data=outer_data)
        state = initial_state(
            problem, phi, theta0, inner_solver=inner_solver, rule=rule, inner_data=inner_data, key=key
        )
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((phi, theta0, inner_data))):
            # In a program of the user's this call is a cold one for good; called directly, the next is a warm one.
            state = State(**{**vars(state), "warm": False})
    check_state(state, phi, theta0)
    state = with_room(state, problem, phi, theta0, rule, inner_data)
    check_data(inner_data, outer_data, state.key)
    rule.check(
        stochastic_steps=isinstance(inner_solver, Steps) and is_sampler(inner_data),
        has_rollout=isinstance(inner_solver, Steps | GradientFlow),
    )
    phi, theta0, inner_data, outer_data = strong((phi, theta0, inner_data, outer_data))
    rule, inner_solver = tolerances_as_arrays(rule), tolerances_as_arrays(inner_solver)
    out, no_influence = _compiled(problem, phi, theta0, inner_solver, rule, (inner_data, outer_data), state)
    if not throw:
        return out
    failed = out.result != RESULTS.successful
    if isinstance(failed, jax.core.Tracer):
        return _raise_if(failed, out)
    if bool(failed):
        if bool(out.result == RESULTS.nonfinite):  # name the culprit, if it was given
            check_finite(phi=phi, theta0=theta0, inner_data=inner_data, outer_data=outer_data)
        raise RuntimeError(explain(out, no_influence))
    return out


def _raise_if(failed: Array, out: Hypergradient) -> Hypergradient:
    """`out.result.error_if(out, failed)` without a copy of `out`: the check goes through one boolean.

    A select by that boolean fuses with whatever made the array; `error_if` on the arrays hands them to a branch.
    """
    sound = out.result.error_if(~failed, failed)
    return jax.tree.map(lambda x: jnp.where(sound, x, jnp.nan) if eqx.is_inexact_array(x) else x, out)


def explain(out: Hypergradient, no_influence: PyTree[Array] | None = None) -> str:
    """The result's message with the figures that led to it; concrete values only."""
    stats = out.stats
    message = [f"The hypergradient failed. {describe(out.result)}"]
    if no_influence is not None:
        paths = [
            jax.tree_util.keystr(p) or "phi"
            for p, flag in jax.tree.leaves_with_path(no_influence)
            if bool(flag)
        ]
        if paths:
            message.append(f"Leaves of phi without influence: {', '.join(paths)}.")
    if stats.path is not None:
        message.append(stats.path.describe())
    message.append(
        f"(error estimate {float(stats.error_estimate):.2e}, relative {float(stats.relative_error):.2e}; "
        f"inner residual {float(stats.inner_residual):.2e}, adjoint residual {float(stats.adjoint_residual):.2e}; "
        f"curvature from {float(stats.curvature_min):.2e} to {float(stats.curvature_max):.2e}; "
        f"{int(stats.num_inner_steps)} inner steps, {int(stats.num_matvecs)} products, {int(stats.num_sweeps)} sweeps)"
    )
    return " ".join(message)
