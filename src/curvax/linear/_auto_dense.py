"""The direct part of `Auto`: a matrix written out, factorised once, and solves that are refined while that helps."""

import functools as ft
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, Scalar

from curvax._control import map_in_chunks, run_if
from curvax._pytree import tree_dot, tree_generic_like, tree_norm, tree_where
from curvax.operators._dense import check_dense_size, ravel, structure_dtype, unravel
from curvax.operators._parts import untagged

# Elements of the arrays inside the products that are taken at once: they should stay in a cache.
_TOGETHER = 2**18
_MOST_REFINEMENTS = 3
_GENERIC = 4

Matrix = Float[Array, "n n"]


class Written(eqx.Module):
    """A matrix A, as its rows or as those of its transpose."""

    rows: Matrix
    transposed: bool = eqx.field(static=True)

    @property
    def matrix(self) -> Matrix:
        """A."""
        return self.rows.T if self.transposed else self.rows

    def transpose(self) -> "Written":
        """Aᵀ."""
        return Written(self.rows, not self.transposed)

    def multiply(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """A v."""
        return jnp.matmul(self.matrix, vector, precision=jax.lax.Precision.HIGHEST)


def has_entries(operator: lx.AbstractLinearOperator) -> bool:
    """Whether the matrix is there, so that writing it out costs no product."""
    return isinstance(untagged(operator), lx.MatrixLinearOperator)


def written_out(operator: lx.AbstractLinearOperator, widest: int) -> Written:
    """The matrix of a square operator over raveled leaves, as rows: n products, some at a time.

    Args:
        operator: Linearised.
        widest: Elements of the largest array inside a product.
    """
    if not isinstance(untagged(operator), lx.FunctionLinearOperator):
        return Written(operator.as_matrix(), False)
    check_dense_size(operator)
    structure, size = operator.in_structure(), operator.in_size()
    dtype = structure_dtype(structure)

    def column(index: Array) -> Float[Array, " n"]:
        basis = jnp.zeros((size,), dtype).at[index].set(1)
        return ravel(operator.mv(unravel(basis, structure)), dtype)

    columns = map_in_chunks(column, jnp.arange(size), max(64, _TOGETHER // widest))
    # XLA's CPU compiler (JAX 0.10) fails where an FFT feeds a factorisation directly.
    return Written(jax.lax.optimization_barrier(columns), True)


class Factors(eqx.Module):
    """A matrix, one factorisation of it and its condition number ‖A‖ ‖A⁻¹‖ in the Frobenius norm.

    Cholesky's where the matrix is tagged definite, LU with row exchanges otherwise. If a matrix that is tagged turns
    out not to be definite, a solve factorises it anew.
    """

    written: Written
    factor: Matrix
    permutation: Int[Array, " n"] | None  # of LU: A[permutation] = L U
    definite: Bool[Array, ""]
    condition: Scalar
    sign: int = eqx.field(static=True)
    adjoint: bool = eqx.field(static=True)  # whether A is the transpose of what was factorised

    def transpose(self) -> "Factors":
        """Of the transposed matrix: the same, read the other way."""
        parts = (self.factor, self.permutation, self.definite, self.condition, self.sign)
        return Factors(self.written.transpose(), *parts, not self.adjoint)

    def solve(self, vectors: Float[Array, "n k"]) -> Float[Array, "n k"]:
        """A⁻¹V."""
        by = ft.partial(jax.lax.linalg.triangular_solve, self.factor, left_side=True)
        if self.permutation is None:
            return by(by(self.sign * vectors, lower=True), lower=True, transpose_a=True)
        if not self.adjoint:
            return by(by(vectors[self.permutation], lower=True, unit_diagonal=True))
        inner = by(by(vectors, transpose_a=True), lower=True, transpose_a=True, unit_diagonal=True)
        return jnp.zeros_like(inner).at[self.permutation].set(inner, unique_indices=True)


def factors(written: Written, sign: int) -> Factors:
    """Factorise; `sign` is +1 or −1 where the matrix should be positive or negative definite, else 0.

    Cost: n³/3 (Cholesky) or 2n³/3 (LU) multiplications, and a solve for the condition number.
    """
    return factors_and_solution(written, sign, jnp.zeros((len(written.rows), 0), written.rows.dtype))[0]


def factors_and_solution(
    written: Written, sign: int, vectors: Float[Array, "n k"]
) -> tuple[Factors, Float[Array, "n k"]]:
    """`factors`, and A⁻¹V in one solve with what the condition number takes: several columns cost little more than one.

    The condition number is ‖A‖ ‖A⁻¹‖ in the Frobenius norm, that of A⁻¹ from the images of a few generic vectors of
    variance one. The mean of ‖A⁻¹v‖² is that norm squared. Where one direction dominates, the smallest of the estimates
    for it from four vectors is rarely below a third.
    """
    if sign == 0:
        factor, _, permutation = jax.lax.linalg.lu(written.matrix)
        definite = jnp.asarray(False)
    else:
        # The transpose of rows are columns, as LAPACK wants them.
        factor = jax.lax.linalg.cholesky(sign * written.rows.T, symmetrize_input=False)
        permutation = None
        # All of it is NaN where a pivot was not positive; and what is not finite comes to the last pivot.
        definite = jnp.isfinite(factor[-1, -1])
    f = Factors(written, factor, permutation, definite, jnp.ones((), factor.dtype), sign, False)
    like, count = jax.ShapeDtypeStruct((len(factor), _GENERIC), factor.dtype), vectors.shape[1]
    images = f.solve(jnp.concatenate([vectors, 12**0.5 * tree_generic_like(like, another=True)], 1))
    square = tree_dot(images[:, count:], images[:, count:]) / _GENERIC * tree_dot(written.rows, written.rows)
    return eqx.tree_at(lambda f: f.condition, f, jnp.sqrt(square)), images[:, :count]


class DirectSolution(NamedTuple):
    """A solution, its true residual, and an estimate of the condition number ‖A‖ ‖A⁻¹‖ in the Frobenius norm."""

    x: Float[Array, " n"]
    r: Float[Array, " n"]
    condition: Scalar

    @property
    def singular(self) -> Bool[Array, ""]:
        """Whether the matrix is singular to working precision; so is one whose condition number is not a number."""
        # Of singular matrices it was never below 150: Gaussian, Gram and Laplacian ones with n from 30 to 800.
        return ~(self.condition * 10 * jnp.finfo(self.x.dtype).eps < 1)


def solve(
    f: Factors,
    vector: Float[Array, " n"],
    x: Float[Array, " n"],
    r: Float[Array, " n"],
    target: Scalar,
    correction: Float[Array, " n"] | None = None,
) -> DirectSolution:
    """A⁻¹b by the factors from a start x with residual r, refined while that is needed and helps.

    `correction` is what the factors give for r, where that is known.
    """
    found = _refined(f, vector, x, r, target, correction)
    if f.sign == 0:
        return found

    def by_lu(_: DirectSolution) -> DirectSolution:
        # Of the transpose of the rows too, or XLA would copy them outside of this branch.
        written = f.written if f.written.transposed else f.written.transpose()
        # Under `vmap` both factorisations are made: one after the other (docs/sharp-bits.md).
        written = Written(jnp.where(f.definite, 0, written.rows), written.transposed)
        again = factors(written, 0)
        return _refined(again if f.written.transposed else again.transpose(), vector, x, r, target)

    return run_if(~f.definite, by_lu, found)


class _Turn(NamedTuple):
    x: Float[Array, " n"]
    r: Float[Array, " n"]
    norm: Scalar
    turns: Int[Array, ""]
    again: Bool[Array, ""]


def _refined(
    f: Factors,
    vector: Float[Array, " n"],
    x: Float[Array, " n"],
    r: Float[Array, " n"],
    target: Scalar,
    correction: Float[Array, " n"] | None = None,
) -> DirectSolution:
    def turn(c: _Turn, correction: Float[Array, " n"] | None = None) -> _Turn:
        x = c.x + (f.solve(c.r[:, None])[:, 0] if correction is None else correction)
        r = vector - f.written.multiply(x)
        norm = tree_norm(r)
        # A first solve that is not finite is what there is to report.
        again = ~(norm <= target) & (norm <= 0.5 * c.norm) & (c.turns < _MOST_REFINEMENTS)
        kept = tree_where((norm < c.norm) | (c.turns == 0), (x, r, norm), (c.x, c.r, c.norm))
        return _Turn(kept[0], kept[1], kept[2], c.turns + 1, again)

    # The first turn in the open: for a loop alone XLA would copy the factor.
    start = _Turn(x, r, tree_norm(r), jnp.zeros((), jnp.int32), jnp.asarray(True))
    first = turn(start, correction)
    end = jax.lax.while_loop(lambda c: c.again, turn, first)
    return DirectSolution(end.x, end.r, f.condition)
