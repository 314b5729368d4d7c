"""What every operator with a structure of its own shares."""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax.operators._dense import dense_matrix
from curvax.operators._dispatch import register


class AbstractStructuredOperator(lx.AbstractLinearOperator):
    """A matrix whose structure gives its inverse, powers, trace and determinant without writing it out.

    Subclasses give `mv`, `transpose`, the structures and the methods below. `inverse`, `power` and `damped` do their
    factorisations when they are called: keep what they return, and apply it to many vectors.
    """

    tags: eqx.AbstractVar[frozenset[object]]

    @abc.abstractmethod
    def inverse(self) -> lx.AbstractLinearOperator:
        """A⁻¹ as an operator. Where A is singular its products are infinite or NaN, never plausible."""

    @abc.abstractmethod
    def damped(self, damping: Scalar | float) -> "AbstractStructuredOperator":
        """A + damping · I, again with a structure."""

    def power(self, exponent: float) -> lx.AbstractLinearOperator:
        """A to a real power, where the structure has one and A is positive semidefinite; A⁻¹ and A always."""
        if exponent == -1:
            return self.inverse()
        if exponent == 1:
            return self
        raise ValueError(
            f"A {type(self).__name__} has no power({exponent}) of its own structure, only -1 and 1. Where it is small, "
            "take that of `cx.operators.positive_part(lx.MatrixLinearOperator(operator.as_matrix(), tags))`."
        )

    @abc.abstractmethod
    def trace(self) -> Scalar:
        """The sum of the diagonal."""

    @abc.abstractmethod
    def logdet(self) -> Scalar:
        """log |det A|; −∞ where A is singular."""

    @abc.abstractmethod
    def diagonal(self) -> Float[Array, " n"]:
        """The diagonal, over raveled leaves."""

    def as_matrix(self) -> Array:
        """The matrix over raveled leaves, in n products. Raises `ValueError` above a size limit."""
        return dense_matrix(self)


def is_symmetric(operator: lx.AbstractLinearOperator) -> bool:
    """Tagged symmetric or definite."""
    return bool(
        lx.is_symmetric(operator)
        or lx.is_positive_semidefinite(operator)
        or lx.is_negative_semidefinite(operator)
    )


def as_operator(matrix: Array | lx.AbstractLinearOperator, name: str) -> lx.AbstractLinearOperator:
    """A Lineax operator over flat vectors, from one or from a matrix."""
    if isinstance(matrix, lx.AbstractLinearOperator):
        for structure in (matrix.in_structure(), matrix.out_structure()):
            if not (isinstance(structure, jax.ShapeDtypeStruct) and len(structure.shape) == 1):
                raise ValueError(
                    f"`{name}` must act on vectors (arrays of one axis), its structure is {structure}."
                )
        return matrix
    array = jnp.asarray(matrix)
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must be a real floating-point matrix or a Lineax operator over vectors, found shape "
            f"{array.shape} and dtype {array.dtype}."
        )
    return lx.MatrixLinearOperator(array)


def check_power(operator: lx.AbstractLinearOperator, exponent: float) -> None:
    """Raise unless a real power of this operator is defined."""
    if not lx.is_positive_semidefinite(operator):
        raise ValueError(
            f"power({exponent}) of a {type(operator).__name__} needs positive semidefinite parts: tag them "
            "`lx.positive_semidefinite_tag` if they are."
        )


register(AbstractStructuredOperator, own_diagonal=True)
