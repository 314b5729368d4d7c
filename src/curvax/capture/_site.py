"""One use of one parameter that a model makes."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax.capture._dense import Roles
from curvax.capture._inputs import AbstractInputs, NoInputs
from curvax.capture._piece import Piece

SiteKind = Literal["dense", "convolution", "embedding", "bias", "scale", "other"]
Factor = Literal["dense", "diagonal"]


class Geometry(Protocol):
    """How the inputs and cotangents of an operation become arrays of examples and shared positions."""

    @property
    def roles(self) -> Roles:
        """Sizes and roles of the axes of the result."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of the result."""

    def inputs(self, x: Array, bias: bool, diagonal: bool) -> AbstractInputs:
        """Of examples along the leading axis; every leaf gets a leading axis, of the stack."""

    def cotangents(self, g: Array) -> Float[Array, "S B T out"]:
        """Of examples along the leading axis."""


@dataclass(frozen=True)
class Level:
    """A `scan` around a site: its length, and whether every step has its own part of the parameter."""

    length: int
    stacked: bool


@dataclass(frozen=True)
class Site:
    """One use of one parameter: where statistics are taken. Received, never made by a user; static and hashable.

    A site of a matrix (`dense`, `convolution`, `embedding`) is one operation of the model that is linear in the
    parameter and in data x: its inputs are x, its cotangents those of what it returns. The one site of a parameter that
    is used in any other way (`bias`, `scale`, `other`) has the input 1 and, as cotangent, the gradient of each example
    with respect to the parameter, whatever the uses are.

    Attributes:
        key: Path of the operation in the program, unique; the parameter's name for the one site of a parameter.
        kind: `"dense"`, `"convolution"`, `"embedding"` (a lookup or a product with one-hot rows), `"bias"`, `"scale"`
            or `"other"`.
        parameter: Name of the parameter, as `jax.tree_util.keystr` writes its path.
        source: File and line of the model, empty if unknown.
        stack: Number of members of the stack: experts, groups of a convolution, layers of a scan.
        shared: Positions within one example at which the same weight is used in one call: T.
        steps: Calls over which a statistic is summed, those of the scans that share the weight (1 without any).
        in_size: Size of an input, the bias included.
        out_size: Size of a cotangent.
        bias: Whether a bias is folded in, as the last input, which is always 1.
        transposed: Whether inputs belong to the rows of the block, and cotangents to its columns.
        input_factor: `"dense"`, or `"diagonal"` where only the diagonal of the second moment is to be had: the axis of
            a vocabulary, or of more than 8192 entries.
        cotangent_factor: Likewise for cotangents.
    """

    key: str
    kind: SiteKind
    parameter: str
    source: str
    stack: int
    shared: int
    steps: int
    in_size: int
    out_size: int
    bias: bool = False
    transposed: bool = False
    input_factor: Factor = "dense"
    cotangent_factor: Factor = "dense"
    levels: tuple[Level, ...] = field(default=(), repr=False)
    geometry: Geometry | None = field(default=None, repr=False)
    piece: Piece | None = field(default=None, repr=False)
    leaf: int = field(default=0, repr=False)

    @property
    def outer_stack(self) -> tuple[int, ...]:
        """Lengths of the scans around the site that stack it."""
        return tuple(level.length for level in self.levels if level.stacked)

    def flow(self, x: Array | None, g: Array) -> tuple[AbstractInputs, Float[Array, "S B T out"]]:
        """Inputs and cotangents of one call, with the stack (without that of scans) along the leading axis.

        Args:
            x: Operand of the operation, examples along the leading axis; None for the one site of a parameter.
            g: Cotangents of its result; the gradients of the examples.
        """
        if self.geometry is not None and x is not None:
            return self.geometry.inputs(
                x, self.bias, self.input_factor == "diagonal"
            ), self.geometry.cotangents(g)
        assert self.piece is not None
        cotangents = jax.vmap(self.piece.take)(g).swapaxes(0, 1)[:, :, None]
        return NoInputs(jnp.ones(cotangents.shape[:2], g.dtype)), cotangents
