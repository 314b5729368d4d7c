"""The exact quadratic model of the objective, along a few directions."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_dtype
from curvax.optim._blocks import Context, Matrices

EXACT = jax.lax.Precision.HIGHEST
# Sums over up to so many entries are taken together: XLA on CPU compiles several kernels for each, and none for larger.
SMALL = 2**14


class Quadratic(NamedTuple):
    """Along δ = Σ cᵢ uᵢ: the mean loss at c = 0, and uᵢᵀ G uⱼ with G the Gauss–Newton matrix of the batch."""

    loss: Scalar
    curvature: Float[Array, "k k"]


def quadratic(context: Context, directions: Sequence[Matrices]) -> Quadratic:
    """In a forward pass and a tangent pass for each direction; no backward pass.

    Args:
        context: Of the step.
        directions: As matrices of the blocks.
    """
    leaves = context.leaves
    tangents = [
        [t.astype(leaf.dtype) for t, leaf in zip(context.unpack(u), leaves, strict=True)] for u in directions
    ]
    dtype = tree_dtype(leaves)

    def forward(leaves: list[Array]) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        outputs, rest = context.outputs(leaves)
        return outputs, (outputs, rest)

    stacked = [jnp.stack(parts) for parts in zip(*tangents, strict=True)]

    def push(tangent: list[Array]) -> tuple[PyTree, PyTree, PyTree]:
        _, moved, (outputs, rest) = jax.jvp(forward, (leaves,), (tangent,), has_aux=True)
        return moved, outputs, rest

    moved, outputs, rest = jax.vmap(push, out_axes=(0, None, None))(stacked)
    gradient = jax.grad(lambda outputs: context.mean_loss(outputs, rest))
    curved = jax.vmap(lambda t: jax.jvp(gradient, (outputs,), (t,))[1])(moved)
    flat = lambda tree: jnp.concatenate(
        [leaf.astype(dtype).reshape(len(directions), -1) for leaf in jax.tree.leaves(tree)], axis=1
    )
    matrix = jnp.matmul(flat(moved), flat(curved).T, precision=EXACT)
    return Quadratic(context.mean_loss(outputs, rest).astype(dtype), 0.5 * (matrix + matrix.T))


def inner(first: Sequence[Matrices], second: Sequence[Matrices]) -> Float[Array, "k l"]:
    """uᵢᵀ vⱼ."""
    dtype = tree_dtype(first)
    small = [name for name, matrix in first[0].items() if matrix.size <= SMALL]

    def rows(vectors: Sequence[Matrices]) -> Float[Array, "k n"]:
        flat = lambda vector: jnp.concatenate([vector[name].astype(dtype).ravel() for name in small])
        return jnp.stack([flat(vector) for vector in vectors])

    def one(u: Matrices, v: Matrices) -> Scalar:
        large = (name for name in u if name not in small)
        terms = [jnp.sum(u[name].astype(dtype) * v[name].astype(dtype)) for name in large]
        return sum(terms, start=jnp.zeros((), dtype))

    total = jnp.stack([jnp.stack([one(u, v) for v in second]) for u in first])
    return total + jnp.matmul(rows(first), rows(second).T, precision=EXACT) if small else total


def minimiser(matrix: Float[Array, "2 2"], slope: Float[Array, " 2"]) -> Float[Array, " 2"]:
    """The c with the least ½ cᵀMc + bᵀc; along the first direction alone where the second is zero or no other.

    Args:
        matrix: M, positive definite along the first direction.
        slope: b.
    """
    first = jnp.stack([-slope[0] / matrix[0, 0], jnp.zeros((), slope.dtype)])
    determinant = matrix[0, 0] * matrix[1, 1] - matrix[0, 1] * matrix[1, 0]
    # Directions that are parallel but for rounding have no minimiser of their own.
    apart = determinant > 100 * jnp.finfo(slope.dtype).eps * matrix[0, 0] * matrix[1, 1]
    safe = jnp.where(apart, determinant, 1)
    both = jnp.stack(
        [
            matrix[0, 1] * slope[1] - matrix[1, 1] * slope[0],
            matrix[1, 0] * slope[0] - matrix[0, 0] * slope[1],
        ]
    )
    return jnp.where(apart, both / safe, first)
