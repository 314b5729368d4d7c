"""Hyperparameters that the inner condition does not see, found while tracing."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import Array, Bool, PyTree

from curvax._pytree import tree_zeros_like
from curvax._results import RESULTS
from curvax.implicit._rule import Task


def unreached(linear: Callable[[PyTree], PyTree], vector: PyTree) -> list[bool]:
    """For each leaf that a linear function returns, whether it is zero for all vectors by the structure of the program.

    An output that is computed without the vector is zero. JAX drops the derivatives that it knows to vanish, behind
    `stop_gradient`, rounding or a factor that does not depend on what is differentiated too.
    """
    traced = jax.make_jaxpr(linear)(vector)
    reached = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        if any(isinstance(atom, Var) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return [not (isinstance(atom, Var) and atom in reached) for atom in traced.jaxpr.outvars]


def without_effect(fn: Callable[[PyTree], PyTree], at: PyTree) -> list[bool]:
    """For each leaf of its argument, whether a function's derivative is zero along it, by the structure of the program.

    As `unreached`, by forward mode: the function may hold loops that have no reverse mode.
    """
    traced = jax.make_jaxpr(jax.linearize(fn, at)[1])(at)
    reaching: dict[Var, set[int]] = {v: {i} for i, v in enumerate(traced.jaxpr.invars)}
    for equation in traced.jaxpr.eqns:
        sources = [reaching.get(atom, set()) for atom in equation.invars if isinstance(atom, Var)]
        for variable in equation.outvars:
            reaching[variable] = set().union(*sources)
    found = [reaching.get(atom, set()) for atom in traced.jaxpr.outvars if isinstance(atom, Var)]
    arrived = set().union(*found)
    return [i not in arrived for i in range(len(traced.jaxpr.invars))]


def without_influence(
    task: Task, grad: PyTree[Array], result: RESULTS
) -> tuple[PyTree[Bool[Array, ""]], RESULTS]:
    """Which leaves neither loss depends on, and the result, which says so if there is one in a success.

    A leaf that only the outer loss sees is no failure, and neither is a derivative that happens to be zero.
    """
    cross = lambda q: task.condition.cross(task.theta0, task.phi, task.inner_batch, q)
    return silent(unreached(cross, tree_zeros_like(task.theta0)), grad, result)


def silent(
    unseen: Sequence[bool], grad: PyTree[Array], result: RESULTS
) -> tuple[PyTree[Bool[Array, ""]], RESULTS]:
    """The same where it is known which leaves cannot have an influence through θ."""
    leaves, structure = jax.tree.flatten(grad)
    nothing = jnp.asarray(False)
    flags = [
        ~jnp.any(leaf != 0) if without and leaf.size > 0 else nothing
        for leaf, without in zip(leaves, unseen, strict=True)
    ]
    if any(flag is not nothing for flag in flags):
        found = jnp.any(jnp.stack(flags)) & (result == RESULTS.successful)
        result = RESULTS.where(found, RESULTS.no_influence, result)
    return jax.tree.unflatten(structure, flags), result
