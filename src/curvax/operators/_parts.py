"""Inverses, powers and determinants of the parts that structured operators are made of."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax._lapack import eigh
from curvax.operators._dispatch import register
from curvax.operators._structured import AbstractStructuredOperator, check_power, is_symmetric
from curvax.operators._written_out import written_out

EXACT = jax.lax.Precision.HIGHEST


def untagged(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """What is inside of `lx.TaggedLinearOperator`s: they hide a structure."""
    while isinstance(operator, lx.TaggedLinearOperator):
        operator = operator.operator
    return operator


def tags_of(operator: lx.AbstractLinearOperator) -> frozenset[object]:
    """What is known of a square part and holds for its inverse and its powers too."""
    known = [
        (is_symmetric, lx.symmetric_tag),  # of a definite one too, whatever Lineax says of it
        (lx.is_positive_semidefinite, lx.positive_semidefinite_tag),
        (lx.is_negative_semidefinite, lx.negative_semidefinite_tag),
        (lx.is_diagonal, lx.diagonal_tag),
        (lx.is_lower_triangular, lx.lower_triangular_tag),
        (lx.is_upper_triangular, lx.upper_triangular_tag),
    ]
    return frozenset(tag for check, tag in known if check(operator))


_DIRECT = lx.AutoLinearSolver(well_posed=True)


class Inverse(lx.AbstractLinearOperator):
    """The inverse of a matrix, factorised once (Cholesky, LU, triangular or tridiagonal, by its tags)."""

    matrix: lx.MatrixLinearOperator | lx.TridiagonalLinearOperator
    factors: Any
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """A⁻¹ v; differentiable in A."""
        return lx.linear_solve(self.matrix, vector, _DIRECT, state=self.factors, throw=False).value

    def as_matrix(self) -> Float[Array, "n n"]:
        """A⁻¹ written out."""
        return jax.vmap(self.mv, 1, 1)(jnp.eye(self.in_size(), dtype=self.in_structure().dtype))

    def transpose(self) -> "Inverse":
        """The inverse of the transposed matrix, from the same factors."""
        factors, _ = _DIRECT.transpose(self.factors, {})
        return Inverse(self.matrix.transpose(), factors, lx.transpose_tags(self.tags))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return self.matrix.out_structure()

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return self.matrix.in_structure()


def inverse_of(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """A⁻¹: by the structure of the part, or by a factorisation."""
    inner = untagged(operator)
    if isinstance(inner, AbstractStructuredOperator):
        return lx.TaggedLinearOperator(inner.inverse(), tags_of(operator))
    if isinstance(inner, lx.IdentityLinearOperator):
        return inner
    if lx.is_diagonal(operator):
        return lx.DiagonalLinearOperator(1 / lx.diagonal(operator))
    tags = tags_of(operator)
    matrix = inner
    if not isinstance(inner, lx.TridiagonalLinearOperator):
        matrix = lx.MatrixLinearOperator(written_out(operator), tags)
    return Inverse(matrix, _DIRECT.init(matrix, {}), tags)


def eigen_of(operator: lx.AbstractLinearOperator) -> tuple[Float[Array, "n n"], Float[Array, " n"]]:
    """Orthonormal eigenvectors and eigenvalues of a symmetric part; rounding below zero is cut off if definite."""
    values, vectors = eigh(written_out(operator))
    if lx.is_positive_semidefinite(operator):
        values = jnp.maximum(values, 0)
    if lx.is_negative_semidefinite(operator):
        values = jnp.minimum(values, 0)
    return vectors, values


def power_of(operator: lx.AbstractLinearOperator, exponent: float) -> lx.AbstractLinearOperator:
    """A to a real power, for a positive semidefinite part."""
    inner = untagged(operator)
    if isinstance(inner, lx.IdentityLinearOperator):
        return inner
    if isinstance(inner, lx.DiagonalLinearOperator):
        return lx.DiagonalLinearOperator(lx.diagonal(inner) ** exponent)
    if exponent == -1:
        return inverse_of(operator)
    check_power(operator, exponent)
    if (
        isinstance(inner, AbstractStructuredOperator)
        and type(inner).power is not AbstractStructuredOperator.power
    ):
        return inner.power(exponent)
    vectors, values = eigen_of(operator)
    matrix = jnp.matmul(vectors * values**exponent, vectors.T, precision=EXACT)
    return lx.MatrixLinearOperator(0.5 * (matrix + matrix.T), lx.positive_semidefinite_tag)


def trace_of(operator: lx.AbstractLinearOperator) -> Scalar:
    """The trace of a part."""
    inner = untagged(operator)
    if isinstance(inner, AbstractStructuredOperator):
        return inner.trace()
    if isinstance(inner, lx.IdentityLinearOperator):
        return jnp.asarray(inner.in_size(), inner.in_structure().dtype)
    return jnp.sum(lx.diagonal(operator))


def logdet_of(operator: lx.AbstractLinearOperator) -> Scalar:
    """log |det| of a part."""
    inner = untagged(operator)
    if isinstance(inner, AbstractStructuredOperator):
        return inner.logdet()
    if isinstance(inner, lx.IdentityLinearOperator):
        return jnp.zeros((), inner.in_structure().dtype)
    if lx.is_diagonal(operator):
        return jnp.sum(jnp.log(jnp.abs(lx.diagonal(operator))))
    return jnp.linalg.slogdet(written_out(operator))[1]


def check_symmetric(operator: lx.AbstractLinearOperator, what: str) -> None:
    """Raise unless a part is tagged symmetric."""
    if not is_symmetric(operator):
        raise ValueError(
            f"{what} needs symmetric parts: tag them `lx.symmetric_tag` or `lx.positive_semidefinite_tag` if they are. "
            "For others solve with `cx.linear.Auto` or `lx.GMRES`, which need products only."
        )


register(Inverse)


@lx.materialise.register(Inverse)
def _(operator):
    return lx.MatrixLinearOperator(operator.as_matrix(), operator.tags)
