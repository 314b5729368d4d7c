"""Block-diagonal matrices, as the curvature of a network taken layer by layer."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax.operators._base import as_tags
from curvax.operators._damped import (
    check_damping,
    check_real,
    damped_part,
    diagonal_part,
    inverse_part,
    is_square,
    known_tags,
    logdet_part,
    over,
    signature,
    tagged,
    trace_part,
)
from curvax.operators._dense import ravel, structure_dtype
from curvax.operators._parts import power_of, untagged
from curvax.operators._structured import AbstractStructuredOperator, as_operator, check_power

# What holds for a block-diagonal matrix exactly where it holds for every block.
_SHARED = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag, lx.negative_semidefinite_tag])


class BlockDiagonal(AbstractStructuredOperator):
    """diag(A₁, ..., A_k), of blocks in a pytree: one for each layer or parameter of a model, say.

    Its vectors are the same pytree with a vector of each block's own structure in the place of the block: an array of
    shape (n,) for a matrix, one of shape (m, n) for a `Kronecker`, again a pytree for a block over one. Blocks may have
    different dtypes, and need not be square for products.

    Args:
        blocks: A pytree (list, dict, nested) of Lineax operators, or real matrices, which act on vectors.
        tags: Lineax tags that you know to hold for the whole, beside those that all blocks have in common. Symmetric
            and definite ones are used for each block.

    Raises:
        ValueError: There is no block, or one is not real; a vector has another structure; a method needs square or
            positive semidefinite blocks and one, named by its path, is not.

    Cost: a product that of all blocks. `inverse`, `power`, `damped` and `logdet` work block by block: each by its own
        structure, or, where it has none, by one factorisation of its n × n matrix (n³/3 operations if positive
        semidefinite, else 2n³/3; memory 2n²; `power` one eigendecomposition). Blocks known through products are
        written out for them in n products, below a size limit; once damped they are solved in products only.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        layers = {
            "weight": cx.operators.Kronecker(jnp.eye(2), 2 * jnp.eye(3)),
            "bias": lx.DiagonalLinearOperator(jnp.array([1.0, 4.0])),
        }
        curvature = cx.operators.BlockDiagonal(layers)
        step = curvature.inverse().mv({"weight": jnp.ones((2, 3)), "bias": jnp.ones(2)})
        ```
    """

    blocks: PyTree[lx.AbstractLinearOperator]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self, blocks: PyTree[lx.AbstractLinearOperator | Array], tags: object | Iterable[object] = ()
    ) -> None:
        self.blocks = jax.tree_util.tree_map_with_path(_as_block, blocks, is_leaf=_is_block)
        parts = self.parts
        if not parts:
            raise ValueError(
                "`blocks` of `BlockDiagonal` holds no block: give at least one operator or matrix."
            )
        # A triangular block that is not square shifts the diagonal for those after it.
        square = all(is_square(part) for part in parts)
        common = frozenset.intersection(*(known_tags(part) for part in parts)) if square else frozenset()
        self.tags = as_tags(tags) | common

    @property
    def parts(self) -> list[lx.AbstractLinearOperator]:
        """The blocks, in the order of the leaves."""
        return jax.tree.leaves(self.blocks, is_leaf=_is_block)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """Each block times its part of the vector."""
        wanted, found = self.in_structure(), jax.eval_shape(lambda: vector)
        if signature(wanted) != signature(found):
            raise ValueError(
                f"`vector` must have the structure {wanted} of the blocks of `BlockDiagonal`, found {found}."
            )
        return jax.tree.map(lambda part, v: part.mv(v), self.blocks, vector, is_leaf=_is_block)

    def transpose(self) -> "BlockDiagonal":
        """diag(A₁ᵀ, ..., A_kᵀ)."""
        blocks = jax.tree.map(lambda part: part.transpose(), self.blocks, is_leaf=_is_block)
        return BlockDiagonal(blocks, lx.transpose_tags(self.tags))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The pytree of the blocks' inputs."""
        return jax.tree.map(lambda part: part.in_structure(), self.blocks, is_leaf=_is_block)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """The pytree of the blocks' outputs."""
        return jax.tree.map(lambda part: part.out_structure(), self.blocks, is_leaf=_is_block)

    def inverse(self) -> "BlockDiagonal":
        """diag(A₁⁻¹, ..., A_k⁻¹); infinite or NaN in the part of a singular block, and right in the others."""
        return BlockDiagonal(self._square("inverse", inverse_part), known_tags(self))

    def power(self, exponent: float) -> "BlockDiagonal":
        """diag(A₁ᵖ, ..., A_kᵖ), for positive semidefinite blocks."""
        powers = self._square("power", lambda part: _power_part(part, exponent))
        return BlockDiagonal(powers, lx.positive_semidefinite_tag)

    def damped(self, damping: Scalar | float) -> "BlockDiagonal":
        """diag(A₁ + damping · I, ..., A_k + damping · I)."""
        check_damping(damping)
        kept = known_tags(self) - {lx.negative_semidefinite_tag}
        return BlockDiagonal(self._square("damped", lambda part: damped_part(part, damping)), kept)

    def trace(self) -> Scalar:
        """Σ tr Aᵢ."""
        return self._sum("trace", trace_part)

    def logdet(self) -> Scalar:
        """Σ log |det Aᵢ|."""
        return self._sum("logdet", logdet_part)

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonals of the blocks, one after the other."""
        return ravel(self._square("diagonal", diagonal_part), structure_dtype(self.in_structure()))

    def _square(self, method: str, fn: Callable[[lx.AbstractLinearOperator], Any]) -> PyTree:
        """`fn` of each block, with what the tags of the whole say about it; errors name the block."""
        shared = known_tags(self) & _SHARED

        def apply(path: Any, part: lx.AbstractLinearOperator) -> Any:
            if not is_square(part):
                raise ValueError(
                    f"{method}() of `BlockDiagonal` needs square blocks; block {_name(path)} takes "
                    f"{part.in_structure()} to {part.out_structure()}."
                )
            try:
                return fn(tagged(part, shared))
            except ValueError as error:
                raise ValueError(f"{method}() of block {_name(path)} of `BlockDiagonal`: {error}") from error

        return jax.tree_util.tree_map_with_path(apply, self.blocks, is_leaf=_is_block)

    def _sum(self, method: str, fn: Callable[[lx.AbstractLinearOperator], Scalar]) -> Scalar:
        return jnp.sum(ravel(self._square(method, fn), structure_dtype(self.in_structure())))


@lx.linearise.register(BlockDiagonal)
def _(operator):
    linear = jax.tree.map(lx.linearise, operator.blocks, is_leaf=_is_block)
    return BlockDiagonal(linear, operator.tags)


def _is_block(x: Any) -> bool:
    return isinstance(x, lx.AbstractLinearOperator)


def _name(path: Any) -> str:
    """`blocks['dense'][0]`, as one would write it."""
    return f"`blocks{jax.tree_util.keystr(path)}`"


def _as_block(path: Any, block: lx.AbstractLinearOperator | Array) -> lx.AbstractLinearOperator:
    name = _name(path).strip("`")
    if not _is_block(block):
        return as_operator(block, name)
    check_real(block, f"`{name}` of `BlockDiagonal`")
    return block


def _power_part(operator: lx.AbstractLinearOperator, exponent: float) -> lx.AbstractLinearOperator:
    """A positive semidefinite part over vectors of any structure, to a real power."""
    check_power(operator, exponent)
    part = untagged(operator)
    if isinstance(part, AbstractStructuredOperator):
        power = part.power(exponent)
    elif isinstance(part, lx.IdentityLinearOperator):
        power = part
    elif isinstance(part, lx.DiagonalLinearOperator):
        power = lx.DiagonalLinearOperator(jax.tree.map(lambda d: d**exponent, part.diagonal))
    else:
        power = over(operator.in_structure(), power_of(operator, exponent))
    return tagged(power, frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag]))
