"""The state of a hypergradient at its start, and whether a given one fits."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._pytree import tree_dtype, tree_zeros_like
from curvax.bilevel._data import is_sampler
from curvax.bilevel._door import check_rule, split
from curvax.bilevel._problem import Bilevel
from curvax.implicit._rule import AbstractRule, State
from curvax.implicit._trend import no_trend
from curvax.linear._recycle import nothing_recycled
from curvax.linear._upkeep import KeptPreconditioner


def initial_state(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    rule: AbstractRule,
    inner_data: Any = None,
    key: Array | None = None,
) -> State:
    """A cold state of the structure that `hypergradient` returns, for the carry of a loop.

    Args:
        problem: The bilevel problem.
        phi: Hyperparameters.
        theta0: Start of the inner solver.
        inner_solver: The inner solver.
        rule: The derivative rule.
        inner_data: Data of the inner level, as for `hypergradient`; read only (for shapes) where the rule keeps a
            preconditioner.
        key: Random key, needed where data is drawn.

    Returns:
        A cold `State`.

    Raises:
        TypeError: `rule` is no rule.
        ValueError: phi or theta0 hold no floating-point array, or the rule cannot keep what it is to keep.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - 1.0) ** 2) + lam * jnp.sum(w**2), outer=lambda w, lam, _: jnp.sum(w**2)
        )
        method = {"inner_solver": optx.BFGS(1e-6, 1e-6), "rule": cx.Implicit()}
        state = cx.bilevel.initial_state(problem, jnp.array(0.5), jnp.zeros(3), **method)
        ```
    """
    del inner_solver
    check_rule(rule)
    phi_dynamic, _ = split(phi, "phi")
    theta, _ = split(theta0, "theta0")
    capacity = rule.num_recycled(theta, problem.condition.symmetric)
    return State(
        theta=theta,
        adjoint=tree_zeros_like(theta),
        curvature_min=jnp.asarray(jnp.inf, tree_dtype((theta, phi_dynamic))),
        warm=jnp.asarray(False),
        trend=no_trend(phi_dynamic, theta) if rule.follows_trend else None,
        recycled=nothing_recycled(theta, capacity) if capacity else None,
        preconditioner=_place_of_preconditioner(problem, phi, theta0, rule, inner_data, key),
        key=key,
    )


def check_state(state: Any, phi: PyTree, theta0: PyTree) -> None:
    """A state must be one of ours and fit phi and theta0."""
    if not isinstance(state, State):
        raise TypeError(
            f"`state` must be the `state` of an earlier hypergradient, got {type(state).__name__}."
        )
    pairs = [("theta0", theta0, state.theta)]
    if state.trend is not None:
        pairs.append(("phi", phi, state.trend.phi))
    for name, given, kept in pairs:
        given = eqx.filter(given, eqx.is_inexact_array)
        wanted, found = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (given, kept))
        if wanted != found or jax.tree.structure(given) != jax.tree.structure(kept):
            raise ValueError(
                f"`state` belongs to another problem: its {name.removesuffix('0')} has the shapes {found}, "
                f"`{name}` has {wanted} (or another structure). Start with `state=None`."
            )


def with_room(
    state: State, problem: Bilevel, phi: PyTree, theta0: PyTree, rule: AbstractRule, inner_data: Any
) -> State:
    """The state with places for what the rule keeps: empty ones, where an earlier rule had others."""
    theta, _ = split(theta0, "theta0")
    capacity = rule.num_recycled(theta, problem.condition.symmetric)
    found = 0 if state.recycled is None else jax.tree.leaves(state.recycled.directions)[0].shape[0]
    changes: dict[str, Any] = {}
    if found != capacity:
        changes["recycled"] = nothing_recycled(theta, capacity) if capacity else None
    if rule.keeps_preconditioner != (state.preconditioner is not None):
        changes["preconditioner"] = _place_of_preconditioner(
            problem, phi, theta0, rule, inner_data, state.key
        )
    return State(**{**vars(state), **changes}) if changes else state


def _place_of_preconditioner(
    problem: Bilevel, phi: PyTree, theta0: PyTree, rule: AbstractRule, inner_data: Any, key: Array | None
) -> KeptPreconditioner | None:
    """Where the rule keeps a preconditioner; it sees what it will see of θ and the data in a call."""
    if not rule.keeps_preconditioner:
        return None
    theta, rest = split(theta0, "theta0")
    batch = jax.eval_shape(inner_data, key) if is_sampler(inner_data) and key is not None else inner_data
    return rule.kept_preconditioner(eqx.combine(theta, rest), (phi, batch), problem.condition.symmetric)
