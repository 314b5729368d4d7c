"""The inverse of a multiple of the identity plus low rank, in the basis in which it is diagonal."""

from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import stop_gradient
from curvax.operators._dense import ravel, structure_dtype, unravel
from curvax.operators._parts import EXACT
from curvax.operators._structured import AbstractStructuredOperator

if TYPE_CHECKING:
    from curvax.operators._low_rank import LowRankPlusDiagonal


class LowRankInverse(AbstractStructuredOperator):
    """(d · I + U Uᵀ)⁻¹ = P (d + Σ²)⁻¹ Pᵀ + (I − P Pᵀ)/d with U = P Σ Wᵀ.

    Woodbury's identity takes a large v/d apart from a large U(…)Uᵀv/d², which leaves no digit where ‖UUᵀ‖ is 1/ε times
    d. Here each part has the size that it ends with; the projector is applied twice, so that what rounding has left of
    it in the span of P is not divided by d. Derivatives are those of a solve with the operator, to any order.
    """

    operator: "LowRankPlusDiagonal"
    basis: Float[Array, "n k"]
    values: Float[Array, " k"]  # the eigenvalues of the operator in it
    level: Scalar  # d, those outside
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, operator: "LowRankPlusDiagonal") -> None:
        structure = operator.in_structure()
        dtype = structure_dtype(structure)
        level, left = stop_gradient((operator.diagonal_part.astype(dtype), operator.left))
        columns = jax.vmap(lambda column: ravel(column, dtype), -1, 1)(left)
        finite = jnp.all(jnp.isfinite(columns))
        orthogonal, triangle = jnp.linalg.qr(jnp.where(finite, columns, 0))
        # Singular values, not eigenvalues of the square: the small ones are what stands beside d.
        mix, sizes, _ = jnp.linalg.svd(triangle, full_matrices=False)
        self.operator, self.level, self.tags = operator, level, operator.tags
        self.basis = jnp.matmul(orthogonal, mix, precision=EXACT)
        self.values = jnp.where(finite, level + sizes**2, jnp.nan)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """A⁻¹ v; differentiable in A."""
        structure = self.in_structure()
        solve = lambda _, b: unravel(self._solve(ravel(b, self.basis.dtype)), structure)  # noqa: E731
        return jax.lax.custom_linear_solve(self.operator.mv, vector, solve, symmetric=True)

    def _solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        inside = jnp.matmul(vector, self.basis, precision=EXACT)
        rest = vector - jnp.matmul(self.basis, inside, precision=EXACT)
        again = jnp.matmul(rest, self.basis, precision=EXACT)
        rest = rest - jnp.matmul(self.basis, again, precision=EXACT)
        return jnp.matmul(self.basis, (inside + again) / self.values, precision=EXACT) + rest / self.level

    def transpose(self) -> "LowRankInverse":
        """The operator itself."""
        return self

    def inverse(self) -> "LowRankPlusDiagonal":
        """What it is the inverse of."""
        return self.operator

    def power(self, exponent: float) -> "LowRankPlusDiagonal":
        """As a power of what it is the inverse of."""
        return self.operator.power(-exponent)

    def damped(self, damping: Scalar | float) -> "LowRankPlusDiagonal":
        """By Woodbury's identity."""
        return self.operator.woodbury().damped(damping)

    def trace(self) -> Scalar:
        """By Woodbury's identity."""
        return self.operator.woodbury().trace()

    def logdet(self) -> Scalar:
        """That of the operator, with the other sign."""
        return -self.operator.logdet()

    def diagonal(self) -> Float[Array, " n"]:
        """By Woodbury's identity."""
        return self.operator.woodbury().diagonal()

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.operator.in_structure()
