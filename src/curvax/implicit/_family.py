"""Whether the solutions of a singular inner problem can be followed, and the derivative of the one that moves least.

Where A = ∂F/∂θ is singular, A dθ = −B dφ has no solution or many; dθ = −A⁺ B dφ is the smallest. There are solutions
for every dφ, and the family can be followed, if and only if zᵀB = 0 for all z with zᵀA = 0. That is tested with one
generic z: of a generic v the part outside of the range of A, z = v − A A⁺ v.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PyTree

from curvax._pytree import tree_generic_like, tree_norm, tree_sub


def can_be_followed(
    apply: Callable[[PyTree[Array]], PyTree[Array]],
    pseudo_inverse: Callable[[PyTree[Array]], PyTree[Array]],
    cross: Callable[[PyTree[Array]], PyTree[Array]],
    like: PyTree[Array],
    accuracy: Array | float = 0.0,
) -> Bool[Array, ""]:
    """Whether B maps into the range of A, by the products v ↦ A v, v ↦ A⁺v (to a relative `accuracy`) and v ↦ Bᵀv.

    θ being inexact, so are A and its null space: a share of eps^(1/4) of B outside of the range passes.
    """
    v = tree_generic_like(like)
    z = tree_sub(v, apply(pseudo_inverse(v)))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), z, v)
    # One trace and one compilation for the two products.
    outside, whole = jax.lax.map(lambda u: tree_norm(cross(u)), both)
    share = jnp.maximum(jnp.finfo(outside.dtype).eps ** 0.25, 10 * accuracy)
    return outside <= share * whole


def accuracy_of(solver: lx.AbstractLinearSolver) -> Array | float:
    """The relative tolerance of an iterative solver, 0 for the others."""
    found = getattr(solver, "rtol", 0.0)
    return found if eqx.is_array_like(found) else 0.0
