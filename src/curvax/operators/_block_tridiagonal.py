"""Block-tridiagonal matrices, as chains in time or layers coupled to their neighbours make them."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar

from curvax.operators._base import as_tags
from curvax.operators._damped import Damped, check_damping, known_tags
from curvax.operators._dense import matrix_free_diagonal
from curvax.operators._parts import EXACT
from curvax.operators._structured import AbstractStructuredOperator

_SYMMETRIC = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag, lx.negative_semidefinite_tag])


class BlockTridiagonal(AbstractStructuredOperator):
    """Blocks Dᵢ on the diagonal, Lᵢ below and Uᵢ above it: (A v)ᵢ = Lᵢ₋₁ vᵢ₋₁ + Dᵢ vᵢ + Uᵢ vᵢ₊₁.

    Its vectors have shape (k, n). Without `upper` you assert that A is symmetric: then Uᵢ = Lᵢᵀ, the symmetric part of
    each diagonal block is used, and A is tagged symmetric.

    Args:
        diagonal: D, shape (k, n, n) with k ≥ 1.
        lower: L, shape (k − 1, n, n), block i in block row i + 1.
        upper: U, shape (k − 1, n, n), block i in block row i; None for a symmetric matrix.
        tags: Lineax tags that you know to hold. Symmetric and definite ones go with `upper=None` only.

    Raises:
        ValueError: Shapes or dtypes do not fit; `upper` is given for a matrix tagged symmetric or definite.

    Cost: a product 6kn² operations; `inverse` and `logdet` 14/3·kn³ (block LU) or 10/3·kn³ (block Cholesky, where
        tagged positive semidefinite), in k sequential steps. The inverse holds A's blocks and 3kn² (LU) or 2kn²
        (Cholesky) numbers more; a product of it is two solves of 6kn² (one is refinement) and one product of A.

    Block LU pivots inside of blocks only: it needs leading principal block minors that are not singular, as definite
    and block diagonally dominant matrices have. Where one is singular to working precision all products of the inverse
    are NaN, also for the few matrices which pivoting between blocks would have solved.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        chain = cx.operators.BlockTridiagonal(
            jnp.tile(4 * jnp.eye(2), (5, 1, 1)), jnp.tile(-jnp.eye(2), (4, 1, 1)), tags=lx.positive_semidefinite_tag
        )
        solution = chain.inverse().mv(jnp.ones((5, 2)))
        ```

    Source: G. H. Golub, C. F. Van Loan, "Matrix Computations", 4th edition, 2013, section 4.5 (block tridiagonal LU).
    """

    diagonal_blocks: Float[Array, "k n n"]
    lower: Float[Array, "k-1 n n"]
    upper: Float[Array, "k-1 n n"] | None
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        diagonal: Float[Array, "k n n"],
        lower: Float[Array, "k-1 n n"],
        upper: Float[Array, "k-1 n n"] | None = None,
        tags: object | Iterable[object] = (),
    ) -> None:
        diagonal, lower = jnp.asarray(diagonal), jnp.asarray(lower)
        upper = None if upper is None else jnp.asarray(upper)
        _check_blocks(diagonal, lower, upper)
        self.tags = as_tags(tags)
        if upper is None:
            diagonal = 0.5 * (diagonal + _transposed(diagonal))
            self.tags |= {lx.symmetric_tag}
        elif self.tags & _SYMMETRIC:
            raise ValueError(
                "`BlockTridiagonal` is tagged symmetric or definite: leave `upper` out, it is the transpose of "
                "`lower` then."
            )
        self.diagonal_blocks, self.lower, self.upper = diagonal, lower, upper

    def mv(self, vector: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """(A v)ᵢ = Lᵢ₋₁ vᵢ₋₁ + Dᵢ vᵢ + Uᵢ vᵢ₊₁."""
        _check_vector(self.in_structure(), vector)
        product = _times(self.diagonal_blocks, vector)
        product = product.at[1:].add(_times(self.lower, vector[:-1]))
        return product.at[:-1].add(_times(_upper(self), vector[1:]))

    def transpose(self) -> "BlockTridiagonal":
        """Dᵢᵀ on the diagonal, Uᵢᵀ below and Lᵢᵀ above; itself where symmetric."""
        if self.upper is None:
            return self
        diagonal, lower, upper = (_transposed(x) for x in (self.diagonal_blocks, self.upper, self.lower))
        return BlockTridiagonal(diagonal, lower, upper, lx.transpose_tags(self.tags))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """An array of shape (k, n)."""
        return jax.ShapeDtypeStruct(self.diagonal_blocks.shape[:2], self.diagonal_blocks.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """An array of shape (k, n)."""
        return self.in_structure()

    def inverse(self) -> "_Inverse":
        """A⁻¹ as an operator, factorised here and once."""
        return _Inverse(self, _factorise(self), False)

    def damped(self, damping: Scalar | float) -> "BlockTridiagonal":
        """With damping added to the diagonal."""
        check_damping(damping)
        shift = jnp.asarray(damping, self.lower.dtype) * jnp.eye(self.lower.shape[-1], dtype=self.lower.dtype)
        kept = known_tags(self) - {lx.negative_semidefinite_tag}
        return BlockTridiagonal(self.diagonal_blocks + shift, self.lower, self.upper, kept)

    def trace(self) -> Scalar:
        """Σ tr Dᵢ."""
        return jnp.sum(self.diagonal())

    def logdet(self) -> Scalar:
        """log |det A|, in a factorisation; −∞ where A is singular, NaN where block LU breaks down before the end."""
        return _factorise(self).logdet()

    def diagonal(self) -> Float[Array, " kn"]:
        """The diagonals of the blocks Dᵢ, one after the other."""
        return jnp.diagonal(self.diagonal_blocks, axis1=1, axis2=2).ravel()


class _BlockLU(eqx.Module):
    """A = (Sᵢ on the diagonal, Lᵢ below it) · (I on the diagonal, Wᵢ = Sᵢ⁻¹Uᵢ above it), with Sᵢ = Dᵢ − Lᵢ₋₁Wᵢ₋₁.

    `lower` has a zero block before the first, `gains` one behind the last, so that all steps are alike.
    """

    factors: Float[Array, "k n n"]
    pivots: Array
    lower: Float[Array, "k n n"]
    gains: Float[Array, "k n n"]
    singular: Bool[Array, " k"]

    def solve(self, vector: Float[Array, "k n"], transposed: bool) -> Float[Array, "k n"]:
        """A⁻¹ b or A⁻ᵀ b."""
        start = jnp.zeros_like(vector[0])
        bad = jnp.any(self.singular)
        if transposed:
            gains = jnp.roll(_transposed(self.gains), 1, 0)
            _, inside = jax.lax.scan(_sweep_unit, start, (gains, vector))
            coupling = jnp.roll(_transposed(self.lower), -1, 0)
            blocks = (self.factors, self.pivots, coupling, inside)
            _, solution = jax.lax.scan(_sweep_lu_transposed, start, blocks, reverse=True)
        else:
            _, inside = jax.lax.scan(_sweep_lu, start, (self.factors, self.pivots, self.lower, vector))
            _, solution = jax.lax.scan(_sweep_unit, start, (self.gains, inside), reverse=True)
        return jnp.where(bad, jnp.nan, solution)

    def logdet(self) -> Scalar:
        """Σ log |det Sᵢ|. A singular last block leaves the determinant known, an earlier one does not."""
        diagonal = jnp.diagonal(self.factors, axis1=1, axis2=2)
        logdet = jnp.sum(jnp.log(jnp.abs(diagonal)))
        logdet = jnp.where(self.singular[-1], -jnp.inf, logdet)
        return jnp.where(jnp.any(self.singular[:-1]) | jnp.any(jnp.isnan(diagonal)), jnp.nan, logdet)


class _BlockCholesky(eqx.Module):
    """A = C Cᵀ with triangular Cᵢ on the diagonal and Mᵢ = LᵢCᵢ⁻ᵀ below it; `couplings` begins with a zero block."""

    factors: Float[Array, "k n n"]
    couplings: Float[Array, "k n n"]
    singular: Bool[Array, " k"]
    finite: Bool[Array, ""]

    def solve(self, vector: Float[Array, "k n"], transposed: bool) -> Float[Array, "k n"]:
        """A⁻¹ b, which is A⁻ᵀ b."""
        start = jnp.zeros_like(vector[0])
        _, inside = jax.lax.scan(_sweep_triangular, start, (self.factors, self.couplings, vector))
        couplings = jnp.roll(_transposed(self.couplings), -1, 0)
        blocks = (self.factors, couplings, inside)
        _, solution = jax.lax.scan(_sweep_triangular_transposed, start, blocks, reverse=True)
        return jnp.where(jnp.any(self.singular), jnp.nan, solution)

    def logdet(self) -> Scalar:
        """2 Σ log Cᵢ. A positive semidefinite matrix that has no Cholesky factor is singular."""
        logdet = 2 * jnp.sum(jnp.log(jnp.diagonal(self.factors, axis1=1, axis2=2)))
        logdet = jnp.where(jnp.any(self.singular), -jnp.inf, logdet)
        return jnp.where(self.finite, logdet, jnp.nan)


class _Inverse(AbstractStructuredOperator):
    """A⁻¹ or A⁻ᵀ of a factorised block-tridiagonal A: not block tridiagonal itself, but known through its factors."""

    operator: BlockTridiagonal
    factors: _BlockLU | _BlockCholesky
    transposed: bool = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self, operator: BlockTridiagonal, factors: _BlockLU | _BlockCholesky, transposed: bool
    ) -> None:
        self.operator, self.factors, self.transposed = operator, factors, transposed
        tags = known_tags(operator)
        self.tags = lx.transpose_tags(tags) if transposed else tags

    def mv(self, vector: Float[Array, "k n"]) -> Float[Array, "k n"]:
        """A⁻¹ v, with one step of refinement: block LU does not pivot between blocks, and this mends most of it."""
        _check_vector(self.in_structure(), vector)
        solution = self.factors.solve(vector, self.transposed)
        matrix = self.operator.transpose() if self.transposed else self.operator
        return solution + self.factors.solve(vector - matrix.mv(solution), self.transposed)

    def transpose(self) -> "_Inverse":
        """A⁻ᵀ from the same factors; itself where symmetric."""
        return self if lx.is_symmetric(self) else _Inverse(self.operator, self.factors, not self.transposed)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """An array of shape (k, n)."""
        return self.operator.in_structure()

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """An array of shape (k, n)."""
        return self.operator.in_structure()

    def inverse(self) -> BlockTridiagonal:
        """A, or Aᵀ."""
        return self.operator.transpose() if self.transposed else self.operator

    def damped(self, damping: Scalar | float) -> Damped:
        """A⁻¹ + damping · I, known through its products."""
        return Damped(self, damping)

    def trace(self) -> Scalar:
        """In kn products."""
        return jnp.sum(self.diagonal())

    def logdet(self) -> Scalar:
        """−log |det A|."""
        return -self.factors.logdet()

    def diagonal(self) -> Float[Array, " kn"]:
        """In kn products."""
        return matrix_free_diagonal(self)


def _factorise(operator: BlockTridiagonal) -> _BlockLU | _BlockCholesky:
    diagonal, zero = operator.diagonal_blocks, jnp.zeros_like(operator.diagonal_blocks[:1])
    lower = jnp.concatenate([zero, operator.lower])
    if lx.is_positive_semidefinite(operator):
        start = jnp.eye(zero.shape[-1], dtype=zero.dtype)
        _, (factors, couplings, singular) = jax.lax.scan(_step_cholesky, start, (diagonal, lower))
        finite = jnp.all(jnp.isfinite(diagonal)) & jnp.all(jnp.isfinite(lower))
        return _BlockCholesky(factors, couplings, singular, finite)
    upper = jnp.concatenate([_upper(operator), zero])
    _, (factors, pivots, gains, singular) = jax.lax.scan(_step_lu, zero[0], (diagonal, lower, upper))
    return _BlockLU(factors, pivots, lower, gains, singular)


# The steps of the scans stand at module level: JAX compiles a scan again for every new function.


def _step_lu(gain, blocks):
    diagonal, lower, upper = blocks
    removed = _product(lower, gain)
    factor, pivots, order = jax.lax.linalg.lu(diagonal - removed)
    scale = jnp.max(jnp.abs(diagonal) + jnp.abs(removed), axis=1)[order]
    gain = jax.scipy.linalg.lu_solve((factor, pivots), upper)
    return gain, (factor, pivots, gain, _vanishes(jnp.abs(jnp.diagonal(factor)), scale))


def _step_cholesky(before, blocks):
    diagonal, lower = blocks
    coupling = _transposed(jax.scipy.linalg.solve_triangular(before, _transposed(lower), lower=True))
    left = diagonal - _product(coupling, _transposed(coupling))
    factor = jax.lax.linalg.cholesky(left, symmetrize_input=False)
    singular = _vanishes(jnp.diagonal(factor) ** 2, jnp.diagonal(diagonal))
    return factor, (factor, coupling, singular)


def _sweep_lu(before, blocks):
    factor, pivots, lower, vector = blocks
    solved = jax.scipy.linalg.lu_solve((factor, pivots), vector - _product(lower, before))
    return solved, solved


def _sweep_lu_transposed(after, blocks):
    factor, pivots, coupling, vector = blocks
    solved = jax.scipy.linalg.lu_solve((factor, pivots), vector - _product(coupling, after), trans=1)
    return solved, solved


def _sweep_unit(neighbour, blocks):
    coupling, vector = blocks
    solved = vector - _product(coupling, neighbour)
    return solved, solved


def _sweep_triangular(before, blocks):
    factor, coupling, vector = blocks
    right = vector - _product(coupling, before)
    solved = jax.scipy.linalg.solve_triangular(factor, right, lower=True)
    return solved, solved


def _sweep_triangular_transposed(after, blocks):
    factor, coupling, vector = blocks
    right = vector - _product(coupling, after)
    solved = jax.scipy.linalg.solve_triangular(factor, right, trans=1, lower=True)
    return solved, solved


def _vanishes(pivots: Float[Array, " n"], scale: Float[Array, " n"]) -> Bool[Array, ""]:
    """Whether a pivot is rounding alone, measured in its own row: then a solution would be one of noise."""
    # A few roundings, with fused multiply-adds or without; NaN counts as singular.
    return ~jnp.all(pivots > 16 * jnp.finfo(pivots.dtype).eps * scale)


def _product(matrix: Float[Array, "n n"], other: Array) -> Array:
    return jnp.matmul(matrix, other, precision=EXACT)


def _times(blocks: Float[Array, "k n n"], vector: Float[Array, "k n"]) -> Float[Array, "k n"]:
    return jnp.einsum("kij,kj->ki", blocks, vector, precision=EXACT)


def _transposed(blocks: Array) -> Array:
    return jnp.swapaxes(blocks, -1, -2)


def _upper(operator: BlockTridiagonal) -> Float[Array, "k-1 n n"]:
    return _transposed(operator.lower) if operator.upper is None else operator.upper


def _check_vector(structure: jax.ShapeDtypeStruct, vector: Array) -> None:
    # Einsum and slices would broadcast some wrong shapes silently.
    if jnp.shape(vector) != structure.shape:
        raise ValueError(f"`vector` must have the shape {structure.shape}, found {jnp.shape(vector)}.")


def _check_blocks(diagonal: Array, lower: Array, upper: Array | None) -> None:
    shape = diagonal.shape
    beside = [("lower", lower)] + ([] if upper is None else [("upper", upper)])
    if (
        len(shape) != 3
        or shape[1] != shape[2]
        or shape[0] < 1
        or not jnp.issubdtype(diagonal.dtype, jnp.floating)
    ):
        raise ValueError(
            "`diagonal` of `BlockTridiagonal` must be a real floating-point array of shape (k, n, n) with k ≥ 1, found "
            f"shape {shape} and dtype {diagonal.dtype}."
        )
    for name, blocks in beside:
        if blocks.shape != (shape[0] - 1, *shape[1:]) or blocks.dtype != diagonal.dtype:
            raise ValueError(
                f"`{name}` of `BlockTridiagonal` must have shape {(shape[0] - 1, *shape[1:])} and dtype "
                f"{diagonal.dtype}, as `diagonal` of shape {shape} asks, found shape {blocks.shape} and dtype "
                f"{blocks.dtype}."
            )
