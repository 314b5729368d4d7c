"""The place of our operators in Lineax's dispatch, in one home."""

from typing import Any

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array

from curvax.operators._dense import check_dense_size

# Which tags answer which question with yes.
_IMPLIED_BY = {
    lx.is_symmetric: {
        lx.symmetric_tag,
        lx.diagonal_tag,
        lx.positive_semidefinite_tag,
        lx.negative_semidefinite_tag,
    },
    lx.is_diagonal: {lx.diagonal_tag},
    lx.is_tridiagonal: {lx.tridiagonal_tag, lx.diagonal_tag},
    lx.is_lower_triangular: {lx.lower_triangular_tag, lx.diagonal_tag},
    lx.is_upper_triangular: {lx.upper_triangular_tag, lx.diagonal_tag},
    lx.has_unit_diagonal: {lx.unit_diagonal_tag},
    lx.is_positive_semidefinite: {lx.positive_semidefinite_tag},
    lx.is_negative_semidefinite: {lx.negative_semidefinite_tag},
}
# Of one row and one column these hold whatever the tags.
_TRUE_OF_ONE = (lx.is_diagonal, lx.is_tridiagonal, lx.is_lower_triangular, lx.is_upper_triangular)


def register(cls: type, *, own_diagonal: bool = False, one_by_one: bool = False) -> None:
    """Teach Lineax a class of real operators that has `mv`, `as_matrix`, `tags` and the structures.

    Any single answer can be registered anew after this.

    Args:
        cls: The class; its subclasses inherit what is registered here.
        own_diagonal: Whether it has a method `diagonal`.
        one_by_one: Whether an operator of one row and one column counts as diagonal though it has no tag.
    """
    lx.linearise.register(cls, lambda operator: operator)
    lx.conj.register(cls, lambda operator: operator)
    lx.materialise.register(cls, _materialise)
    lx.diagonal.register(cls, (lambda operator: operator.diagonal()) if own_diagonal else _diagonal)
    lx.tridiagonal.register(cls, _tridiagonal)
    for question, tags in _IMPLIED_BY.items():
        question.register(cls, _answer(frozenset(tags), one_by_one and question in _TRUE_OF_ONE))


def as_function(operator: Any) -> lx.FunctionLinearOperator:
    """The products of an operator as one of Lineax's own classes."""
    return lx.FunctionLinearOperator(operator.mv, operator.in_structure(), operator.tags)


def _materialise(operator: Any) -> lx.AbstractLinearOperator:
    check_dense_size(operator)
    return lx.materialise(as_function(operator))


def _diagonal(operator: Any) -> Array:
    return jnp.diagonal(operator.as_matrix())


def _tridiagonal(operator: Any) -> tuple[Array, Array, Array]:
    matrix = operator.as_matrix()
    return jnp.diagonal(matrix), jnp.diagonal(matrix, offset=-1), jnp.diagonal(matrix, offset=1)


def _answer(implied_by: frozenset[object], one_by_one: bool) -> Any:
    def answer(operator: Any) -> bool:
        small = one_by_one and operator.in_size() == 1 and operator.out_size() == 1
        return bool(operator.tags & implied_by) or small

    return answer
