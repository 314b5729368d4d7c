"""Checkpoints in half precision: a block of a path that reverse mode computes again from a rounded start."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._pytree import tree_unit


def from_rounded_start(run: Callable[[Any, Any], Any], dtype: Any) -> Callable[[Any, Any], Any]:
    """`run` of (walk, slot), of which reverse mode keeps nothing but the walk, rounded.

    The path itself is not rounded: only what is computed again to be differentiated starts from there. The rounding
    has no derivative, so that there is reverse mode of the first order and no other.
    """

    def call(walk: Any, slot: Any) -> Any:
        traced = eqx.filter_closure_convert(run, walk, slot)
        closed_over, static = eqx.partition(traced, eqx.is_array)

        @jax.custom_vjp
        def kept(closed_over: Any, walk: Any, slot: Any) -> Any:
            return eqx.combine(closed_over, static)(walk, slot)

        def forward(closed_over: Any, walk: Any, slot: Any) -> tuple[Any, Any]:
            after = eqx.combine(closed_over, static)(walk, slot)
            return after, (closed_over, rounded(walk, dtype), slot)

        def backward(stored: Any, cotangents: Any) -> tuple[Any, Any, Any]:
            closed_over, packed, slot = stored
            given = (closed_over, restored(packed, walk, dtype), slot)
            dynamic, rest = eqx.partition(given, eqx.is_inexact_array)

            def moved(dynamic: Any) -> Any:
                closed_over, walk, slot = eqx.combine(dynamic, rest)
                after = eqx.combine(closed_over, static)(walk, slot)
                return [leaf for leaf in jax.tree.leaves(after) if eqx.is_inexact_array(leaf)]

            _, pull = jax.vjp(moved, dynamic)
            wanted = [c for c in jax.tree.leaves(cotangents) if c.dtype != jax.dtypes.float0]
            return pull(wanted)[0]

        kept.defvjp(forward, backward)
        return kept(closed_over, walk, slot)

    return call


def rounded(tree: PyTree[Array], dtype: Any) -> PyTree:
    """Wide floating-point leaves in half precision: (its bits, the power of two that it was multiplied by).

    Bits, since XLA has no bfloat16 of its own on CPU and widens whole stacks of it.
    """

    def pack(leaf: Array) -> Any:
        if not _is_wide(leaf):
            return leaf
        unit = tree_unit(leaf) if jnp.dtype(dtype) == jnp.float16 else jnp.ones((), jnp.float32)
        half = (leaf * unit.astype(leaf.dtype)).astype(dtype)
        return jax.lax.bitcast_convert_type(half, jnp.uint16), unit

    return jax.tree.map(pack, tree)


def restored(packed: PyTree, like: PyTree[Array], dtype: Any) -> PyTree[Array]:
    """The leaves of `rounded` to `dtype` in the dtypes of `like`."""

    def unpack(leaf: Array, found: Any) -> Array:
        if not _is_wide(leaf):
            return found
        half = jax.lax.bitcast_convert_type(found[0], dtype)
        return half.astype(leaf.dtype) / found[1].astype(leaf.dtype)

    return jax.tree.map(unpack, like, packed)


def _is_wide(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 2
