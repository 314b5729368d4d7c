"""Operators written out, for dense factorisations of small ones."""

import lineax as lx
from jaxtyping import Array, Float

from curvax.operators._dense import dense_matrix, structure_dtype


def written_out(operator: lx.AbstractLinearOperator) -> Float[Array, "n n"]:
    """The matrix of an operator: its own where it has one, else its products with a basis, in chunks."""
    if isinstance(operator, lx.FunctionLinearOperator | lx.JacobianLinearOperator):
        return dense_matrix(operator)
    # Lineax writes an identity in the default dtype, whatever it acts on.
    return operator.as_matrix().astype(structure_dtype((operator.in_structure(), operator.out_structure())))
