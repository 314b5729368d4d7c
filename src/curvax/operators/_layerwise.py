"""Curvature of a model taken layer by layer, over the pytree of its parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from curvax.capture import Block, Layers
from curvax.operators._damped import (
    check_damping,
    damped_part,
    diagonal_part,
    inverse_part,
    known_tags,
    logdet_part,
    trace_part,
)
from curvax.operators._dense import ravel, structure_dtype
from curvax.operators._kronecker import Kronecker
from curvax.operators._parts import power_of
from curvax.operators._stacked import Stacked
from curvax.operators._structured import AbstractStructuredOperator

_KEPT = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag])


class Layerwise(AbstractStructuredOperator):
    """A block for every group of sites of a model, nothing between them; made by `kfac` and `ekfac`.

    Its vectors are pytrees of the floating-point parameters. A block acts on its entries packed as matrices (stack,
    rows, columns), a folded bias in the last column. Entries that the model does not use are in no block: there it is a
    multiple of the identity, 0 until it is damped.

    Attributes:
        blocks: By name of the group, an operator over arrays (stack, rows, columns).
        rest: What entries in no block are multiplied by.
        coordinates: By name of the group, where its entries are.
    """

    blocks: dict[str, lx.AbstractLinearOperator]
    rest: Scalar
    coordinates: tuple[tuple[str, Block], ...] = eqx.field(static=True)
    likes: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    @classmethod
    def of(cls, layers: Layers, blocks: Mapping[str, lx.AbstractLinearOperator]) -> "Layerwise":
        """From the blocks of all groups of the layers of a model.

        Args:
            layers: From `cx.capture.find_layers`.
            blocks: By name of the group, an operator over arrays of shape `group.block.shape`.

        Raises:
            ValueError: A group has no block, or one of another shape.
        """
        for group in layers.groups:
            found = blocks[group.name].in_structure().shape if group.name in blocks else None
            if found != group.block.shape:
                raise ValueError(
                    f"`blocks[{group.name!r}]` must act on arrays of shape {group.block.shape}, found {found}."
                )
        likes, treedef = jax.tree.flatten(layers.model.params)
        dtype = structure_dtype(likes)
        coordinates = tuple((group.name, group.block) for group in layers.groups)
        kept = {group.name: blocks[group.name] for group in layers.groups}
        return cls(kept, jnp.zeros((), dtype), coordinates, tuple(likes), treedef)

    @property
    def tags(self) -> frozenset[object]:  # type: ignore[override]
        """What all blocks have in common."""
        return frozenset.intersection(*(known_tags(block) & _KEPT for block in self.blocks.values()))

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """Each block times its entries, each once, as matrices."""
        results = {}
        for name, block in self.coordinates:
            operator = self.blocks[name]
            packed = block.pack(vector).astype(operator.in_structure().dtype)
            results[name] = operator.mv(packed)
        return self._unpacked(results, jax.tree.leaves(vector))

    def transpose(self) -> "Layerwise":
        """Of each block."""
        return self._with(lambda block: block.transpose(), self.rest)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the floating-point parameters."""
        return jax.tree.unflatten(self.treedef, self.likes)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the floating-point parameters."""
        return self.in_structure()

    def inverse(self) -> "Layerwise":
        """Of each block; infinite or NaN where a block is singular or an entry is in none, unless damped."""
        return self._with(inverse_part, 1 / self.rest)

    def power(self, exponent: float) -> "Layerwise":
        """Of each block, positive semidefinite ones."""
        return self._with(lambda block: power_of(block, exponent), self.rest**exponent)

    def damped(self, damping: Scalar | float) -> "Layerwise":
        """Each block + damping · I, in the joint eigenbasis of its factors: exact."""
        check_damping(damping)
        return self._with(
            lambda block: damped_part(block, damping), self.rest + jnp.asarray(damping, self.rest.dtype)
        )

    def damped_factors(self, damping: Scalar | float) -> "Layerwise":
        """With (A + π√damping I) ⊗ (B + √damping/π I) for each A ⊗ B, π² = (tr A / m) / (tr B / n).

        Cheaper to invert than `damped` (Cholesky instead of eigendecompositions), and larger: by π√damping I ⊗ B + A ⊗
        √damping/π I.

        Args:
            damping: A scalar ≥ 0, in the units of the eigenvalues.

        Raises:
            ValueError: A block is no Kronecker product.

        Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
            2015, arXiv 1503.05671, section 6.3.
        """
        check_damping(damping)

        def change(block: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
            if not isinstance(block, Stacked) or not isinstance(block.operator, Kronecker):
                raise ValueError(
                    "damped_factors() needs blocks that are Kronecker products; use damped() for those of `ekfac`."
                )
            return block.each(lambda one: one.damped_factors(damping))

        return self._with(change, self.rest + jnp.asarray(damping, self.rest.dtype))

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        total = sum(trace_part(block).astype(self.rest.dtype) for block in self.blocks.values())
        return total + self.rest * self._num_free if self._num_free else jnp.asarray(total)

    def logdet(self) -> Scalar:
        """log |det|; −∞ where an entry is in no block, unless damped."""
        total = sum(logdet_part(block).astype(self.rest.dtype) for block in self.blocks.values())
        return total + jnp.log(self.rest) * self._num_free if self._num_free else jnp.asarray(total)

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonal, in the order of `ravel_pytree`."""
        parts = {
            name: diagonal_part(self.blocks[name]).reshape(block.shape) for name, block in self.coordinates
        }
        ones = [jnp.ones(like.shape, like.dtype) for like in self.likes]
        return ravel(self._unpacked(parts, ones), structure_dtype(self.likes))

    @property
    def _num_free(self) -> int:
        """How many entries are in no block."""
        return sum(like.size for like in self.likes) - sum(block.size for _, block in self.coordinates)

    def _covered(self) -> list[Bool[np.ndarray, "..."]]:
        """Which entries are in a block."""
        with jax.ensure_compile_time_eval():
            ones = {name: jnp.ones(block.shape) for name, block in self.coordinates}
            return [np.asarray(array) != 0 for array in self._scattered(ones)]

    def _scattered(self, matrices: Mapping[str, Array]) -> list[Array]:
        arrays: list[Any] = [None] * len(self.likes)
        for name, block in self.coordinates:
            parts = block.unpack(matrices[name])
            for parameter, leaf in zip(block.parameters, block.leaves, strict=True):
                if parameter in parts:
                    part = parts.pop(parameter)
                    arrays[leaf] = part if arrays[leaf] is None else arrays[leaf] + part
        zeros = lambda like: jnp.zeros(like.shape, like.dtype)
        return [zeros(like) if a is None else a for a, like in zip(arrays, self.likes, strict=True)]

    def _unpacked(self, matrices: Mapping[str, Array], vector: list[Array]) -> PyTree[Array]:
        arrays = self._scattered(matrices)
        if self._num_free:
            arrays = [
                jnp.where(covered, array, self.rest.astype(array.dtype) * v)
                for covered, array, v in zip(self._covered(), arrays, vector, strict=True)
            ]
        return jax.tree.unflatten(self.treedef, arrays)

    def _with(
        self, change: Callable[[lx.AbstractLinearOperator], lx.AbstractLinearOperator], rest: Scalar
    ) -> "Layerwise":
        blocks = {name: change(block) for name, block in self.blocks.items()}
        return Layerwise(blocks, rest, self.coordinates, self.likes, self.treedef)
