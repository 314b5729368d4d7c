"""Hyperparameters that the inner condition does not see, found while tracing."""

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import Array, Bool, PyTree

from curvax._pytree import tree_zeros_like
from curvax._results import RESULTS
from curvax.implicit._rule import Task


def _unseen(task: Task) -> list[bool]:
    """For each leaf of φ, whether Bᵀq is zero for all q by the structure of the program.

    Bᵀ is linear, so an output that is computed without q is zero. JAX drops the derivatives that it knows to vanish,
    behind `stop_gradient`, rounding or a factor that does not depend on θ too.
    """
    vector = tree_zeros_like(task.theta0)
    traced = jax.make_jaxpr(lambda q: task.condition.cross(task.theta0, task.phi, task.inner_batch, q))(
        vector
    )
    reached = set(traced.jaxpr.invars)
    for equation in traced.jaxpr.eqns:
        if any(isinstance(atom, Var) and atom in reached for atom in equation.invars):
            reached.update(equation.outvars)
    return [not (isinstance(atom, Var) and atom in reached) for atom in traced.jaxpr.outvars]


def without_influence(
    task: Task, grad: PyTree[Array], result: RESULTS
) -> tuple[PyTree[Bool[Array, ""]], RESULTS]:
    """Which leaves neither loss depends on, and the result, which says so if there is one in a success.

    A leaf that only the outer loss sees is no failure, and neither is a derivative that happens to be zero.
    """
    leaves, structure = jax.tree.flatten(grad)
    nothing = jnp.asarray(False)
    silent = [
        ~jnp.any(leaf != 0) if unseen and leaf.size > 0 else nothing
        for leaf, unseen in zip(leaves, _unseen(task), strict=True)
    ]
    if any(flag is not nothing for flag in silent):
        found = jnp.any(jnp.stack(silent)) & (result == RESULTS.successful)
        result = RESULTS.where(found, RESULTS.no_influence, result)
    return jax.tree.unflatten(structure, silent), result
