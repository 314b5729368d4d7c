"""Runs of conjugate gradients that become one block run where they are batched over right-hand sides alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from curvax._pytree import tree_dtype, tree_size, tree_unit
from curvax.linear._block_cg import block_conjugate_gradient
from curvax.linear._cg_core import conjugate_gradient

MatVec = Callable[[PyTree[Array]], PyTree[Array]]
# Right-hand sides in one block: every step works with m × m matrices.
MOST_TOGETHER = 32
# Unknowns for each right-hand side from which a block is worth its overhead.
FEWEST_UNKNOWNS = 4


class RunInfo(NamedTuple):
    """The part of `CGInfo` that both kinds of run have."""

    num_matvecs: Int[Array, ""]
    residual_norm: Float[Array, ""]
    curvature_min: Float[Array, ""]
    curvature_max: Float[Array, ""]
    status: Int[Array, ""]


def _in_blocks(run: Callable[[Any], Any], batch: Any, count: int, blocks: int, each: int) -> Any:
    """`run` of batches of `each` at a time; what is missing to the last one is filled with zeros."""
    missing = blocks * each - count

    def cut(leaf: Array) -> Array:
        filled = jnp.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        return filled.reshape(blocks, each, *leaf.shape[1:])

    if blocks == 1:
        return run(batch)
    out = jax.vmap(run)(jax.tree.map(cut, batch))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], out)


def solve_sharing_products(
    matvec: MatVec,
    rhs: PyTree[Array],
    *,
    rtol: Scalar | float,
    max_steps: int,
    preconditioner: MatVec | None,
    reference: PyTree[Array] | None,
) -> tuple[PyTree[Array], RunInfo]:
    """`conjugate_gradient`; under `vmap` over `rhs` (and `reference`) alone, up to 32 of them share a Krylov space.

    `num_matvecs` counts the products of one right-hand side.
    """
    size = tree_size(rhs)
    # Tracers that the functions close over become arguments: `vmap` has to see which of them are batched.
    functions = [
        None if fn is None else eqx.filter_closure_convert(fn, rhs) for fn in (matvec, preconditioner)
    ]
    shared, static = eqx.partition((functions, rtol), eqx.is_array)

    def alone(
        shared: Any, rhs: PyTree[Array], reference: PyTree[Array] | None
    ) -> tuple[PyTree[Array], RunInfo]:
        (apply, precondition), rtol = eqx.combine(shared, static)
        x, info = conjugate_gradient(
            apply, rhs, rtol=rtol, max_steps=max_steps, preconditioner=precondition, reference=reference
        )
        return x, RunInfo(
            info.num_matvecs, info.residual_norm, info.curvature_min, info.curvature_max, info.status
        )

    def together(
        shared: Any, rhs: PyTree[Array], reference: PyTree[Array] | None
    ) -> tuple[PyTree[Array], RunInfo]:
        (apply, precondition), rtol = eqx.combine(shared, static)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rhs)
        dtype = tree_dtype(rhs)
        _, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda s: jnp.zeros(s.shape, dtype), one))

        def row(tree: PyTree[Array]) -> Array:
            return jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(dtype), tree))[0]

        def tree(vector: Array) -> PyTree[Array]:
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), unravel(vector), one)

        def on_rows(fn: MatVec) -> Callable[[Array], Array]:
            return jax.vmap(lambda vector: row(fn(tree(vector))))

        units = jax.vmap(tree_unit)(rhs if reference is None else (rhs, reference))
        x, info = block_conjugate_gradient(
            on_rows(apply),
            units[:, None] * jax.vmap(row)(rhs),
            rtol=rtol,
            max_steps=max_steps,
            preconditioner=None if precondition is None else on_rows(precondition),
            reference=None if reference is None else units[:, None] * jax.vmap(row)(reference),
        )
        every = jax.tree.map(lambda a: jnp.broadcast_to(a, units.shape), info)
        out = RunInfo(
            every.num_steps,
            every.residual_norm / units,
            every.curvature_min,
            every.curvature_max,
            every.status,
        )
        return jax.vmap(tree)(x / units[:, None]), out

    @jax.custom_batching.custom_vmap
    def solve(shared: Any, rhs: PyTree[Array], reference: PyTree[Array] | None) -> Any:
        return alone(shared, rhs, reference)

    @solve.def_vmap
    def _(axis_size: int, in_batched: Any, shared: Any, rhs: Any, reference: Any) -> Any:
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        blocks = -(-axis_size // MOST_TOGETHER)
        each = -(-axis_size // blocks)
        if any(jax.tree.leaves(in_batched[0])) or each == 1 or size < FEWEST_UNKNOWNS * each:
            out = jax.vmap(alone, in_axes=axes)(shared, rhs, reference)
        else:
            # Every right-hand side has a start, if one has; those of zero fill the last block.
            spread = jax.tree.map(
                lambda leaf, batched: leaf if batched else jnp.broadcast_to(leaf, (axis_size, *leaf.shape)),
                (rhs, reference),
                tuple(in_batched[1:]),
            )
            out = _in_blocks(lambda pair: together(shared, *pair), spread, axis_size, blocks, each)
        return out, jax.tree.map(lambda _: True, out)

    return solve(shared, rhs, reference)
