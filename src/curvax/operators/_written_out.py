"""Operators written out, for dense factorisations of small ones."""

import lineax as lx
from jaxtyping import Array, Float

from curvax.operators._dense import dense_matrix


def written_out(operator: lx.AbstractLinearOperator) -> Float[Array, "n n"]:
    """The matrix of an operator: its own where it has one, else its products with a basis, in chunks."""
    if isinstance(operator, lx.FunctionLinearOperator | lx.JacobianLinearOperator):
        return dense_matrix(operator)
    return operator.as_matrix()
