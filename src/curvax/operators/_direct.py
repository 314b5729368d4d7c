"""Whether the structure of an operator gives its inverse at a price worth paying."""

import lineax as lx

from curvax.operators._block_diagonal import BlockDiagonal
from curvax.operators._combination import ConvexCombination
from curvax.operators._damped import Damped, inverse_part, is_square
from curvax.operators._kronecker import Kronecker
from curvax.operators._kronecker_sum import KroneckerSum
from curvax.operators._parts import untagged
from curvax.operators._sketched import Sketched
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric
from curvax.operators._toeplitz import Toeplitz

# Largest part that is factorised as a matrix, and largest one of which its products are worth writing out for that.
_DENSE, _PRODUCTS = 2048, 128
# Largest Toeplitz matrix: the recursion takes n steps of n operations each, one after the other.
_TOEPLITZ = 16_384
_BANDED = (lx.IdentityLinearOperator, lx.DiagonalLinearOperator, lx.TridiagonalLinearOperator)


def structured_inverse(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator | None:
    """A⁻¹ through the structure of A, None where there is none or where it would hide a large factorisation.

    Args:
        operator: Square. Its structure may be that of this library, or a diagonal, tridiagonal or triangular one.
    """
    part = untagged(operator)
    triangular = isinstance(part, lx.MatrixLinearOperator) and (
        lx.is_lower_triangular(operator) or lx.is_upper_triangular(operator)
    )
    if triangular or (isinstance(part, (AbstractStructuredOperator, *_BANDED)) and _pays(part)):
        return inverse_part(operator)
    return None


def _pays(operator: lx.AbstractLinearOperator) -> bool:
    part = untagged(operator)
    if isinstance(part, Kronecker):
        return all(is_square(factor) and _pays(factor) for factor in (part.left, part.right))
    if isinstance(part, KroneckerSum):
        return part.has_inverse and all(_pays(term) for term in part.terms)
    if isinstance(part, Damped):
        return _pays_damped(part.operator)
    if isinstance(part, BlockDiagonal):
        return all(is_square(block) and _pays(block) for block in part.parts)
    if isinstance(part, Toeplitz):
        return part.in_size() <= _TOEPLITZ
    if isinstance(part, ConvexCombination):
        return part.has_inverse and _pays(part.operators[0])
    if isinstance(part, Sketched):
        return False
    if isinstance(part, (AbstractStructuredOperator, *_BANDED)):
        return True
    return operator.in_size() <= (_DENSE if isinstance(part, lx.MatrixLinearOperator) else _PRODUCTS)


def _pays_damped(operator: lx.AbstractLinearOperator) -> bool:
    """Of A + damping · I: products of A alone are not enough, and a Kronecker product needs an eigenbasis."""
    part = untagged(operator)
    if isinstance(part, Kronecker):
        return _pays(part) and is_symmetric(part.left) and is_symmetric(part.right)
    if isinstance(part, KroneckerSum):
        return len(part.terms) == 1 and _pays_damped(part.terms[0])
    if isinstance(part, BlockDiagonal):
        return all(is_square(block) and _pays_damped(block) for block in part.parts)
    if isinstance(part, ConvexCombination):
        return part.has_inverse and _pays_damped(part.operators[0])
    if isinstance(part, Sketched):
        return True
    known = (AbstractStructuredOperator, lx.MatrixLinearOperator, *_BANDED)
    return isinstance(part, known) and _pays(part)
