"""Toeplitz matrices: convolutions without periodicity, and stationary kernels on a regular grid."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, Scalar

from curvax.operators._base import as_tags
from curvax.operators._circulant import Circulant, as_real, check_shape
from curvax.operators._dense import check_dense_size, dense_matrix
from curvax.operators._dispatch import register
from curvax.operators._parts import tags_of
from curvax.operators._structured import AbstractStructuredOperator

# A pivot below this many ε of the largest number that went into it has no correct digit left; a matrix with a
# condition number over 1/(this many ε) counts as singular.
_LOST = 32
# The relative residual of one refined solve, above which the computed inverse is not one.
_UNRELIABLE = 0.02


class Toeplitz(AbstractStructuredOperator):
    r"""T with T_ij = column_{i − j} on and below the diagonal and row_{j − i} above it (n × n), never formed.

    Args:
        column: The first column, of shape (n,): real float32 or float64.
        row: The first row, of shape (n,) and the same dtype; `row[0]` is ignored in favour of `column[0]`, as in
            `scipy.linalg.toeplitz`. Left out, T is symmetric and tagged so.
        tags: Lineax tags that you know to hold besides.

    Raises:
        ValueError: `column` or `row` is not a real float32 or float64 vector, is empty, or differs from the other in
            shape or dtype; a vector has another shape.

    Cost: a product two Fourier transforms of about 2n numbers, and one of the column, O(n log n); `inverse` and
        `logdet` O(n²) once, by n steps that follow one another, then O(n log n) for each product with the inverse (and
        for derivatives of either); memory O(n).

    The recursion behind `inverse` and `logdet` goes through all leading minors without pivoting. It is stable for
    well-conditioned definite matrices; an indefinite one may be regular and still have a leading minor near zero.
    Where one vanishes up to rounding, the condition number is over about 1/(32 ε), or a trial solve fails, the inverse
    is NaN; `logdet` is then −∞ if all smaller minors are regular, else NaN. Products with the inverse are refined once.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        kernel = jnp.exp(-0.5 * (jnp.arange(100.0) / 5) ** 2)
        covariance = cx.operators.Toeplitz(kernel, tags=lx.positive_semidefinite_tag).damped(0.1)
        weights = covariance.inverse().mv(jnp.ones(100))
        ```

    Source: N. Levinson, "The Wiener RMS error criterion in filter design and prediction", 1946, in the form for
        nonsymmetric matrices of W. F. Trench, 1964; I. Gohberg and A. Semencul, "On the inversion of finite Toeplitz
        matrices and their continuous analogs", 1972.
    """

    column: Float[Array, " n"]
    row: Float[Array, " n"] | None
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self, column: ArrayLike, row: ArrayLike | None = None, tags: object | Iterable[object] = ()
    ) -> None:
        self.column = as_real(column, "column")
        self.row = None if row is None else as_real(row, "row")
        if self.column.ndim != 1 or self.column.size == 0:
            raise ValueError(
                f"`column` must be a vector of at least one entry, found shape {self.column.shape}."
            )
        if self.row is not None and (self.row.shape, self.row.dtype) != (
            self.column.shape,
            self.column.dtype,
        ):
            raise ValueError(
                "`row` must have the shape and dtype of `column` (only square matrices are covered), found "
                f"{self.row.dtype}{list(self.row.shape)} and {self.column.dtype}{list(self.column.shape)}."
            )
        self.tags = as_tags(tags) | ({lx.symmetric_tag} if row is None else frozenset())

    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """T v, as a corner of a circulant matrix of at least 2n − 1 rows."""
        check_shape(vector, self.column)
        size = self.column.size
        padding = _fast_length(2 * size - 1) - (2 * size - 1)
        around = jnp.concatenate([self.column, jnp.zeros((padding,), self.column.dtype), _row(self)[:0:-1]])
        return Circulant(around).mv(jnp.pad(vector, (0, around.size - size)))[:size]

    def transpose(self) -> "Toeplitz":
        """Tᵀ: row and column exchanged."""
        if self.row is None:
            return self
        return Toeplitz(self.row.at[0].set(self.column[0]), self.column, lx.transpose_tags(self.tags))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return jax.ShapeDtypeStruct(self.column.shape, self.column.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return self.in_structure()

    def as_matrix(self) -> Float[Array, "n n"]:
        """The matrix, gathered from column and row. Raises `ValueError` above a size limit."""
        check_dense_size(self)
        index = jnp.arange(self.column.size)
        offset = index[:, None] - index
        return jnp.where(offset >= 0, self.column[jnp.abs(offset)], _row(self)[jnp.abs(offset)])

    def inverse(self) -> "ToeplitzInverse":
        """T⁻¹, through its first and last column."""
        first, last, _ = _corners(self.column, _row(self))
        return ToeplitzInverse(self, first, last, tags_of(self))

    def damped(self, damping: Scalar | float) -> "Toeplitz":
        """T + damping · I. A positive semidefinite matrix stays so: damping must not be negative."""
        kept = (tags_of(self) - {lx.negative_semidefinite_tag}) | (self.tags & {lx.tridiagonal_tag})
        return Toeplitz(self.column.at[0].add(jnp.asarray(damping, self.column.dtype)), self.row, kept)

    def trace(self) -> Scalar:
        """n times the first entry."""
        return self.column.size * self.column[0]

    def logdet(self) -> Scalar:
        """log |det T|, the sum over the pivots of the recursion."""
        return _corners(self.column, _row(self))[2]

    def diagonal(self) -> Float[Array, " n"]:
        """n times the first entry."""
        return jnp.full(self.column.shape, self.column[0])


class ToeplitzInverse(lx.AbstractLinearOperator):
    """T⁻¹ = (L(x) U(y′) − L(Zy) U(Zx′)) / x₀, from its first column x and its last column y.

    L(c) is lower triangular Toeplitz with first column c, U(r) upper triangular Toeplitz with first row r, ′ reverses
    a vector, and Z shifts it by one, a zero first (Gohberg and Semencul).
    """

    matrix: Toeplitz
    first: Float[Array, " n"]
    last: Float[Array, " n"]
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """T⁻¹ v, with one step of refinement."""
        check_shape(vector, self.first)
        solution = self._once(vector)
        return solution + self._once(vector - self.matrix.mv(solution))

    def as_matrix(self) -> Float[Array, "n n"]:
        """T⁻¹ written out, in n products. Raises `ValueError` above a size limit."""
        return jax.lax.optimization_barrier(dense_matrix(self))

    def transpose(self) -> "ToeplitzInverse":
        """The inverse of Tᵀ, which is T read backwards."""
        return ToeplitzInverse(
            self.matrix.transpose(), self.last[::-1], self.first[::-1], lx.transpose_tags(self.tags)
        )

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return self.matrix.in_structure()

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of n."""
        return self.matrix.in_structure()

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonal: partial sums, as each entry adds one product to the entry above it."""
        lower, upper = self._triangles()
        return jnp.cumsum(lower[0] * upper[0] - lower[1] * upper[1]) / self.first[0]

    def diagonal_sums(self) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Σ (T⁻¹)_ij over i − j = k, and over j − i = k, for k = 0, …, n − 1: the derivative of log |det T|.

        Entry (i, j) of L(u) U(w) is Σ_m u_{i−m} w_{j−m}; a product u_p w_q stands in n − max(p, q) entries.
        """
        lower, upper = self._triangles()
        count = jnp.arange(self.first.size, 0, -1, dtype=self.first.dtype)
        below, above = _correlate(upper, count * lower), _correlate(lower, count * upper)
        return (below[0] - below[1]) / self.first[0], (above[0] - above[1]) / self.first[0]

    def _once(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        lower, upper = self._triangles()
        inner = _correlate(upper, vector)
        length = _fast_length(2 * vector.size - 1)
        product = jnp.fft.rfft(lower, length) * jnp.fft.rfft(inner, length)
        return jnp.fft.irfft(product[0] - product[1], length)[: vector.size] / self.first[0]

    def _triangles(self) -> tuple[Float[Array, "2 n"], Float[Array, "2 n"]]:
        """First columns of the lower and first rows of the upper factors."""
        lower = jnp.stack([self.first, _shift(self.last)])
        upper = jnp.stack([self.last[::-1], _shift(self.first[::-1])])
        return lower, upper


@jax.custom_jvp
def _corners(
    column: Float[Array, " n"], row: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Scalar]:
    """First and last column of T⁻¹, and log |det T|, by Levinson's recursion.

    With T_k the leading k × k matrix, it carries the vectors a with T_k a = p e_0, a_0 = 1 and b with T_k b =
    p e_{k−1}, b_{k−1} = 1, and the pivot p = det T_k / det T_{k−1}. A zero put behind a or before b solves T_{k+1} up
    to one entry, which a multiple of the other vector takes away.
    """
    return _recursion(column, row)


# One program, also where it is called outside of `jit`.
@jax.jit
def _recursion(
    column: Float[Array, " n"], row: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Scalar]:
    size, dtype = column.size, column.dtype
    lost = _LOST * jnp.finfo(dtype).eps
    # Entry i of the slice that starts at n − 1 − k is column[k − i].
    backwards = jnp.concatenate([column[::-1], jnp.zeros((size,), dtype)])
    largest = jnp.maximum(jnp.max(jnp.abs(column)), jnp.max(jnp.abs(row.at[0].set(column[0]))))

    def step(k: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        a, b, pivot, logdet, scale, vanishing, broken = carry
        b = jnp.roll(b, 1)  # its last entry is still zero
        below = jnp.sum(jax.lax.dynamic_slice(backwards, (size - 1 - k,), (size,)) * a)
        above = jnp.sum(row * b)
        a, b = a - (below / pivot) * b, b - (above / pivot) * a
        change = below * (above / pivot)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(pivot), jnp.abs(change)))
        pivot = pivot - change
        logdet = logdet + jnp.log(jnp.abs(pivot))
        return a, b, pivot, logdet, scale, jnp.abs(pivot) <= lost * scale, broken | vanishing

    unit = jnp.zeros((size,), dtype).at[0].set(1)
    start = jnp.abs(column[0])
    carry = (unit, unit, column[0], jnp.log(start), start, start <= lost * largest, jnp.asarray(False))
    a, b, pivot, logdet, _, singular, broken = jax.lax.fori_loop(1, size, step, carry)
    first, last = a / pivot, b / pivot

    inverse = ToeplitzInverse(Toeplitz(column, row), first, last, frozenset())
    # A null vector with small ends leaves no trace in the two columns, but any irregular vector has a part along it.
    probe = jnp.sin(jnp.arange(1, size + 1, dtype=dtype) ** 2)
    solved = inverse.mv(probe)
    residual = jnp.linalg.norm(inverse.matrix.mv(solved) - probe) / jnp.linalg.norm(probe)
    # ‖T‖₁ times the norm of what T⁻¹ was seen to do: a lower bound of the condition number, up to norms.
    norm = jnp.sum(jnp.abs(column)) + jnp.sum(jnp.abs(row[1:]))
    seen = jnp.linalg.norm(solved) / jnp.linalg.norm(probe)
    seen = jnp.maximum(seen, jnp.maximum(jnp.sum(jnp.abs(first)), jnp.sum(jnp.abs(last))))
    condition = norm * seen
    singular = singular | (lost * condition >= 1)
    reliable = ~(singular | broken) & (residual < _UNRELIABLE)
    honest = jnp.where(reliable, 1, jnp.nan).astype(dtype)
    logdet = jnp.where(singular & ~broken, -jnp.inf, logdet * honest)
    return first * honest, last * honest, logdet


@_corners.defjvp
def _(primals, tangents):
    """d(T⁻¹e) = −T⁻¹ dT T⁻¹e and d log |det T| = tr(T⁻¹ dT): O(n log n), and nothing of the recursion is stored."""
    first, last, logdet = _corners(*primals)
    inverse = ToeplitzInverse(Toeplitz(*primals), first, last, frozenset())
    change = Toeplitz(*tangents)
    below, above = inverse.diagonal_sums()
    dlogdet = jnp.sum(above * tangents[0]) + jnp.sum(below[1:] * tangents[1][1:])
    moved = (-inverse.mv(change.mv(first)), -inverse.mv(change.mv(last)), dlogdet)
    return (first, last, logdet), moved


def _row(operator: Toeplitz) -> Float[Array, " n"]:
    return operator.column if operator.row is None else operator.row


def _shift(vector: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.roll(vector, 1).at[0].set(0)


def _correlate(left: Float[Array, "*m n"], right: Float[Array, "*m n"]) -> Float[Array, "*m n"]:
    """Σ_q left_q right_{q + k} for k = 0, …, n − 1, along the last axis."""
    size = left.shape[-1]
    length = _fast_length(2 * size - 1)
    product = jnp.conj(jnp.fft.rfft(left, length)) * jnp.fft.rfft(right, length)
    return jnp.fft.irfft(product, length)[..., :size]


def _fast_length(minimum: int) -> int:
    """The least 2ᵃ 3ᵇ 5ᶜ that is at least `minimum`: transforms of such lengths are fastest."""
    best = 1 << (minimum - 1).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            best = min(best, odd << (-(-minimum // odd) - 1).bit_length())
            odd *= 3
        five *= 5
    return best


register(ToeplitzInverse, own_diagonal=True)


@lx.materialise.register(ToeplitzInverse)
def _(operator):
    check_dense_size(operator)
    return lx.MatrixLinearOperator(operator.as_matrix(), operator.tags)
