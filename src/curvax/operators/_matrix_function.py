"""The positive part and the absolute value of a small symmetric matrix, differentiable also at equal eigenvalues."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax.operators._damped import Damped, check_damping
from curvax.operators._dense import check_dense_size, ravel, unravel
from curvax.operators._parts import EXACT
from curvax.operators._structured import AbstractStructuredOperator

TAGS = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag])


class Floored(eqx.Module):
    """(max(λ, floor) + shift)ᵖ, or with |λ| in place of λ."""

    floor: Scalar
    shift: Scalar
    exponent: float = eqx.field(static=True)
    absolute: bool = eqx.field(static=True)

    def base(self, values: Array) -> Array:
        """max(λ, floor) or max(|λ|, floor)."""
        return jnp.maximum(jnp.abs(values) if self.absolute else values, self.floor.astype(values.dtype))

    def __call__(self, values: Array) -> Array:
        """The function, element by element."""
        raised = self.base(values) + self.shift.astype(values.dtype)
        return raised if self.exponent == 1 else raised**self.exponent

    def quotients(self, values: Float[Array, " n"]) -> Float[Array, "n n"]:
        """(f(λᵢ) − f(λⱼ))/(λᵢ − λⱼ), or f′ where they are equal.

        That of the base is exact to rounding however near the two are: it hands its argument through, or its negative.
        """
        base, (row, column) = self.base(values), (values[:, None], values[None, :])
        same = row == column
        moved = jnp.sign(row) if self.absolute else jnp.ones_like(row)
        slope = jnp.where(base[:, None] > self.floor.astype(values.dtype), moved, 0)
        ratio = jnp.where(same, slope, (base[:, None] - base) / jnp.where(same, 1, row - column))
        if self.exponent == 1:
            return ratio
        raised = base + self.shift.astype(values.dtype)
        x, y, p = raised[:, None], raised[None, :], self.exponent
        if p == -1:
            return -ratio / (x * y)
        near = jnp.abs(x - y) <= jnp.finfo(values.dtype).eps ** (1 / 3) * (x + y)
        middle = p * (0.5 * (x + y)) ** (p - 1)
        return ratio * jnp.where(near, middle, (x**p - y**p) / jnp.where(near, 1, x - y))

    def power(self, exponent: float) -> "Floored":
        """The function to a power."""
        return Floored(self.floor, self.shift, self.exponent * exponent, self.absolute)


@jax.custom_jvp
def matrix_function(fn: Floored, matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """F = f(H) of a symmetric matrix; its derivative is V (D ∘ VᵀḢV) Vᵀ with the divided differences D of f.

    That of the eigenvectors alone would be NaN where two eigenvalues are equal. (The second derivative is.)

    Source: Yu. L. Daleckii and S. G. Krein, 1951; N. Higham, "Functions of matrices", 2008, Corollary 3.12.
    """
    values, vectors = eigen(matrix)
    return _congruent(vectors, jnp.diag(fn(values)))


@matrix_function.defjvp
def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (fn, matrix), (fn_dot, matrix_dot) = primals, tangents
    values, vectors = eigen(matrix)
    result, direct = jax.jvp(lambda f: f(values), (fn,), (fn_dot,))
    inside = fn.quotients(values) * _congruent(vectors.T, 0.5 * (matrix_dot + matrix_dot.T))
    return _congruent(vectors, jnp.diag(result)), _congruent(vectors, inside + jnp.diag(direct))


class MatrixFunction(AbstractStructuredOperator):
    """f(H) written out, with H kept for its inverse and its powers."""

    source: Float[Array, "n n"]
    matrix: Float[Array, "n n"]
    fn: Floored
    space: Any = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True, default=TAGS)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """f(H) v."""
        flat = ravel(vector, self.matrix.dtype)
        return unravel(jnp.matmul(self.matrix, flat, precision=EXACT), self.in_structure())

    def as_matrix(self) -> Float[Array, "n n"]:
        """The matrix over raveled leaves. Raises `ValueError` above a size limit."""
        check_dense_size(self)
        return self.matrix

    def transpose(self) -> "MatrixFunction":
        """Itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        leaves, treedef = self.space
        return jax.tree.unflatten(treedef, leaves)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        return self.in_structure()

    def inverse(self) -> "MatrixFunction":
        """f(H)⁻¹, by the eigenvalues."""
        return self.power(-1.0)

    def power(self, exponent: float) -> "MatrixFunction":
        """f(H)ᵖ, by the eigenvalues."""
        fn = self.fn.power(exponent)
        return MatrixFunction(self.source, matrix_function(fn, self.source), fn, self.space)

    def damped(self, damping: Scalar | float) -> AbstractStructuredOperator:
        """f(H) + damping · I; in products only if this is itself a power."""
        check_damping(damping)
        if self.fn.exponent != 1:
            return Damped(self, damping)
        shift = jnp.asarray(damping, self.matrix.dtype)
        fn = eqx.tree_at(lambda f: f.shift, self.fn, self.fn.shift + shift)
        moved = self.matrix + shift * jnp.eye(len(self.matrix), dtype=self.matrix.dtype)
        return MatrixFunction(self.source, moved, fn, self.space)

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        return jnp.trace(self.matrix)

    def logdet(self) -> Scalar:
        """Σ log f(λ)."""
        values, _ = eigen(self.source)
        return self.fn.exponent * jnp.sum(jnp.log(self.fn.base(values) + self.fn.shift))

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonal of the matrix."""
        return jnp.diagonal(self.matrix)


def eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, rising, and eigenvectors; NaN where the matrix has one, which `eigh` alone does not promise."""
    finite = jnp.all(jnp.isfinite(matrix))
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), vectors


def _congruent(basis: Float[Array, "n n"], inside: Float[Array, "n n"]) -> Float[Array, "n n"]:
    return jnp.linalg.multi_dot([basis, inside, basis.T], precision=EXACT)
