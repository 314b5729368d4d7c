"""The coordinates of one block of a curvature matrix."""

from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax.capture._piece import Piece
from curvax.capture._site import Factor


@dataclass(frozen=True)
class Block:
    """The parameters of one block as matrices: a weight, or a part of one, with the bias that is folded in.

    Received, never made by a user; static and hashable. `pack` and `unpack` are linear, one the transpose of the other.

    Attributes:
        parameters: Names of the parameters that have entries here: the weight's, and the bias's if there is one.
        shape: (stack, rows, columns) of the packed matrices, the column of a folded bias, the last, included.
        row_factor: `"dense"`, or `"diagonal"` where statistics know the diagonal only.
        column_factor: Likewise.
        bias: Whether the last column is a bias.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, int, int]
    row_factor: Factor
    column_factor: Factor
    bias: bool
    leaves: tuple[int, ...] = field(repr=False)
    pieces: tuple[Piece, ...] = field(repr=False)
    structures: tuple[jax.ShapeDtypeStruct, ...] = field(repr=False)
    count: int = field(repr=False)

    @property
    def size(self) -> int:
        """Number of entries."""
        stack, rows, columns = self.shape
        return stack * rows * columns

    def pack(self, tree: PyTree[Array]) -> Float[Array, "stack rows columns"]:
        """The entries of this block of a tree like the parameters (a gradient, say; positions; None where not float).

        Args:
            tree: Of the structure of the parameters, or of their floating-point arrays.

        Raises:
            ValueError: It has another number of arrays.
        """
        leaves = floats(tree, self.count)
        stack, rows, columns = self.shape
        weight = self.pieces[0].take(leaves[self.leaves[0]]).reshape(stack, rows, columns - self.bias)
        if not self.bias:
            return weight
        column = self.pieces[1].take(leaves[self.leaves[1]]).reshape(stack, rows, 1)
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(weight.dtype, column.dtype)
        return jnp.concatenate([weight.astype(dtype), column.astype(dtype)], axis=2)

    def unpack(self, matrix: Float[Array, "stack rows columns"]) -> dict[str, Array]:
        """For each of `parameters` an array of its shape and dtype with these entries in their places, zero elsewhere.

        Args:
            matrix: What `pack` returns.
        """
        parts = [matrix[:, :, :-1], matrix[:, :, -1]] if self.bias else [matrix]
        arrays: dict[str, Array] = {}
        for name, piece, part, like in zip(self.parameters, self.pieces, parts, self.structures, strict=True):
            array = piece.put(part.reshape(piece.shape), like)
            arrays[name] = arrays[name] + array if name in arrays else array
        return arrays


def floats(tree: PyTree[Any], count: int) -> list[Array]:
    """The arrays of a tree like the parameters, as many as there are floating-point parameters."""
    leaves = jax.tree.leaves(tree)
    if len(leaves) != count:
        leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    if len(leaves) != count:
        raise ValueError(
            f"`tree` must have the structure of the parameters, which have {count} floating-point arrays; "
            f"found {len(leaves)}."
        )
    return leaves
