"""Several vectors stacked along a leading axis of every leaf: their inner products and their sums."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_dtype

EXACT = jax.lax.Precision.HIGHEST


def flat(slots: Array) -> Float[Array, "m n"]:
    """One row for each vector."""
    return slots.reshape(slots.shape[0], -1)


def along(slots: PyTree[Array], vector: PyTree[Array]) -> Float[Array, " m"]:
    """The inner products of a vector with every slot, in `tree_dtype`."""
    dtype = tree_dtype(vector)
    products = jax.tree.map(lambda a, v: jnp.matmul(flat(a), v.ravel(), precision=EXACT), slots, vector)
    terms = [term.astype(dtype) for term in jax.tree.leaves(products)]
    return sum(terms[1:], start=terms[0])


def mixed(weights: Float[Array, "*k m"], slots: PyTree[Array]) -> PyTree[Array]:
    """Sums of the slots, one for every row of weights; a slot that is not in use has weight 0."""

    def leaf(slot: Array) -> Array:
        total = jnp.matmul(weights.astype(slot.dtype), flat(slot), precision=EXACT)
        return total.reshape(*weights.shape[:-1], *slot.shape[1:])

    return jax.tree.map(leaf, slots)
