"""Sums of Kronecker products, and the ones nearest to a matrix."""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax.operators._base import as_tags
from curvax.operators._damped import check_damping, damped_part
from curvax.operators._dense import dense_matrix
from curvax.operators._dispatch import register
from curvax.operators._kronecker import Kronecker, congruence
from curvax.operators._parts import EXACT, eigen_of, tags_of, untagged
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric
from curvax.operators._written_out import written_out

_PSD = lx.positive_semidefinite_tag


class KroneckerSum(AbstractStructuredOperator):
    r"""A₁ ⊗ B₁ + … + A_k ⊗ B_k, never formed.

    Vectors are matrices V of shape (m, n), products Σ Aᵢ V Bᵢᵀ, as for `Kronecker`. That of a Sylvester equation,
    A V + V Bᵀ, is the sum of A ⊗ I and I ⊗ B.

    Products, transpose, trace and diagonal are sums over the terms. The inverse and the determinant have a structure
    for one term; for two of which one has positive definite factors and the other symmetric ones (so tagged): both
    are brought to diagonal form by one congruence; and for A ⊗ I + I ⊗ B with A and B tagged symmetric and I a
    `lx.IdentityLinearOperator`, which stays one of these when it is damped. `nearest()` gives a preconditioner for any
    number of terms.

    Args:
        *terms: `Kronecker` operators, or pairs (Aᵢ, Bᵢ) of matrices or Lineax operators over vectors.
        tags: Lineax tags that you know to hold for the sum, beside those that all terms have in common.

    Raises:
        ValueError: There is no term, or terms differ in shape or dtype; `inverse` or `logdet` of other terms than
            those above.

    Cost: a product the sum of those of the terms; `inverse` and `logdet` two factorisations and two eigendecompositions
        of sizes m and n, then 2mn(m + n) multiplications for each product with the inverse; `nearest` k²(m² + n²).

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        psd = lx.positive_semidefinite_tag
        a = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]), psd)
        b = lx.MatrixLinearOperator(jnp.array([[3.0, 0.0], [0.0, 1.0]]), psd)
        one = lx.MatrixLinearOperator(jnp.eye(2), psd)
        cx.operators.KroneckerSum((a, one), (one, b)).inverse().mv(jnp.ones((2, 2)))
        ```

    Source: C. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993, for `nearest`; the pencil in
        G. Golub and C. Van Loan, "Matrix computations", 4th edition, 2013, section 8.7.
    """

    terms: tuple[Kronecker, ...]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, *terms: Kronecker | tuple[Any, Any], tags: object | Iterable[object] = ()) -> None:
        self.terms = tuple(term if isinstance(term, Kronecker) else _as_product(term) for term in terms)
        if not self.terms:
            raise ValueError("`KroneckerSum` needs at least one term: a `Kronecker` or a pair (A, B).")
        spaces = {
            (term.in_structure().shape, term.out_structure().shape, term.in_structure().dtype)
            for term in self.terms
        }
        if len(spaces) > 1:
            found = ", ".join(f"{i} → {o} {dtype}" for i, o, dtype in sorted(spaces, key=str))
            raise ValueError(f"The terms of `KroneckerSum` must have one shape and one dtype, found {found}.")
        common = frozenset.intersection(*(tags_of(term) for term in self.terms))
        self.tags = as_tags(tags) | common

    def mv(self, vector: Float[Array, "m n"]) -> Float[Array, "p q"]:
        """Σ Aᵢ V Bᵢᵀ."""
        products = [term.mv(vector) for term in self.terms]
        return sum(products[1:], start=products[0])

    def transpose(self) -> "KroneckerSum":
        """Σ Aᵢᵀ ⊗ Bᵢᵀ."""
        return KroneckerSum(*(term.transpose() for term in self.terms), tags=lx.transpose_tags(self.tags))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return self.terms[0].in_structure()

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of the shape of the products."""
        return self.terms[0].out_structure()

    @property
    def has_inverse(self) -> bool:
        """Whether the inverse has a structure: see above."""
        return (
            len(self.terms) == 1 or _of_sylvester(self.terms) is not None or _base_of(self.terms) is not None
        )

    def inverse(self) -> lx.AbstractLinearOperator:
        """The inverse of one term, or of two through their joint diagonal form."""
        if len(self.terms) == 1:
            return self.terms[0].inverse()
        left, right, values, _ = self._diagonal_form("inverse")
        return _Congruence(left, right, 1 / values, self.tags | {lx.symmetric_tag})

    def damped(self, damping: Scalar | float) -> AbstractStructuredOperator:
        """With damping · I ⊗ I in a term that has an identity for a factor, or as one more; a single term damped."""
        if len(self.terms) == 1:
            return self.terms[0].damped(damping)
        kept = self.tags & {lx.symmetric_tag, _PSD}
        for i, term in enumerate(self.terms):
            if not (_is_identity(term.left) or _is_identity(term.right)):
                continue
            check_damping(damping)
            if _is_identity(term.right):
                moved = Kronecker(damped_part(term.left, damping), term.right)
            else:
                moved = Kronecker(term.left, damped_part(term.right, damping))
            return KroneckerSum(*self.terms[:i], moved, *self.terms[i + 1 :], tags=kept)
        (m, n), dtype = self.in_structure().shape, self.in_structure().dtype
        left = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(jnp.ones(m, dtype)), _PSD)
        right = lx.DiagonalLinearOperator(jnp.full(n, jnp.asarray(damping, dtype)))
        shift = Kronecker(left, lx.TaggedLinearOperator(right, _PSD))
        return KroneckerSum(*self.terms, shift, tags=kept)

    def trace(self) -> Scalar:
        """Σ tr Aᵢ · tr Bᵢ."""
        return jnp.sum(jnp.stack([term.trace() for term in self.terms]))

    def logdet(self) -> Scalar:
        """log |det| of one term, or of two through their joint diagonal form."""
        if len(self.terms) == 1:
            return self.terms[0].logdet()
        _, _, values, logdet = self._diagonal_form("logdet")
        return logdet + jnp.sum(jnp.log(jnp.abs(values)))

    def diagonal(self) -> Float[Array, " mn"]:
        """The sum of the diagonals, raveled."""
        return jnp.sum(jnp.stack([term.diagonal() for term in self.terms]), axis=0)

    def nearest(self) -> Kronecker:
        """The Kronecker product nearest to the sum in the Frobenius norm; positive semidefinite if all terms are."""
        lefts, rights = (
            jnp.stack([written_out(getattr(term, side)) for term in self.terms]) for side in ("left", "right")
        )
        outer, inner = (jnp.linalg.qr(x.reshape(len(x), -1).T) for x in (lefts, rights))
        u, s, vt = jnp.linalg.svd(jnp.matmul(outer[1], inner[1].T, precision=EXACT))
        left = jnp.matmul(outer[0], u[:, 0], precision=EXACT).reshape(lefts.shape[1:])
        right = jnp.matmul(inner[0], vt[0], precision=EXACT).reshape(rights.shape[1:])
        return _product(left, right, s[0], all(lx.is_positive_semidefinite(term) for term in self.terms))

    def _diagonal_form(self, method: str) -> tuple[Array, Array, Array, Scalar]:
        """P, Q, S with sum⁻¹ = (P ⊗ Q) diag(1/S) (P ⊗ Q)ᵀ, and log det (P ⊗ Q)⁻²."""
        sides = _of_sylvester(self.terms)
        if sides is not None:
            (left, a), (right, b) = map(eigen_of, sides)
            return left, right, a[:, None] + b, jnp.zeros((), a.dtype)
        base = _base_of(self.terms) if len(self.terms) == 2 else None
        if base is None:
            raise ValueError(
                f"{method}() of `KroneckerSum` needs one term; or two of which one has factors tagged "
                "`lx.positive_semidefinite_tag` and the other factors tagged symmetric; or A ⊗ I + I ⊗ B with A and B "
                "tagged symmetric and `lx.IdentityLinearOperator` for I. "
                f"Found {len(self.terms)} terms. Solve with `cx.linear.Auto` or `cx.linear.CG`, preconditioned with "
                "`nearest().inverse()`."
            )
        other = self.terms[1 - base]
        left, a, log_left = _pencil(self.terms[base].left, other.left)
        right, b, log_right = _pencil(self.terms[base].right, other.right)
        return left, right, 1 + jnp.outer(a, b), len(b) * log_left + len(a) * log_right


def nearest_kronecker(
    matrix: Array | lx.AbstractLinearOperator, left_shape: tuple[int, int], *, rank: int = 1
) -> Kronecker | KroneckerSum:
    """The sum of `rank` Kronecker products nearest to a matrix in the Frobenius norm.

    Args:
        matrix: M of shape (m′n′, mn), real; or an operator, which is written out.
        left_shape: (m′, m), the shape of the left factors; it must divide that of the matrix.
        rank: Number of terms, from 1 to min(m′m, n′n).

    Returns:
        A `Kronecker` for rank 1, else a `KroneckerSum` of terms that fall in norm. Rank 1 of an operator tagged
        positive semidefinite has positive semidefinite factors, tagged so.

    Raises:
        ValueError: The shapes do not divide, the rank is out of range, or the operator is too large to write out.

    Cost: one singular value decomposition of the entries, rearranged to (m′m) × (n′n).

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        matrix = jnp.kron(jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.eye(3))
        cx.operators.nearest_kronecker(matrix, (2, 2)).as_matrix()  # the same
        ```

    Source: C. Van Loan and N. Pitsianis, "Approximation with Kronecker products", 1993.
    """
    definite = isinstance(matrix, lx.AbstractLinearOperator) and lx.is_positive_semidefinite(matrix)
    entries = dense_matrix(matrix) if isinstance(matrix, lx.AbstractLinearOperator) else jnp.asarray(matrix)
    if entries.ndim != 2 or not jnp.issubdtype(entries.dtype, jnp.floating):
        raise ValueError(
            "`matrix` of `nearest_kronecker` must be a real floating-point matrix or an operator, found "
            f"{entries.dtype}{list(entries.shape)}."
        )
    sizes = list(zip(entries.shape, left_shape, strict=True)) if len(left_shape) == 2 else []
    if not sizes or any(part < 1 or whole % part for whole, part in sizes):
        raise ValueError(
            f"`left_shape` of `nearest_kronecker` must be two sizes that divide {entries.shape}, got {left_shape}."
        )
    (p, m), (q, n) = left_shape, (whole // part for whole, part in sizes)
    if not 1 <= rank <= min(p * m, q * n):
        raise ValueError(f"`rank` of `nearest_kronecker` must be from 1 to {min(p * m, q * n)}, got {rank}.")
    # Row (i, j) holds the block that entry (i, j) of the left factor multiplies.
    rearranged = entries.reshape(p, q, m, n).transpose(0, 2, 1, 3).reshape(p * m, q * n)
    u, s, vt = jnp.linalg.svd(rearranged, full_matrices=False)
    terms = [
        _product(u[:, i].reshape(p, m), vt[i].reshape(q, n), s[i], definite and rank == 1)
        for i in range(rank)
    ]
    return terms[0] if rank == 1 else KroneckerSum(*terms)


class _Congruence(lx.AbstractLinearOperator):
    """(P ⊗ Q) diag(S) (P ⊗ Q)ᵀ."""

    left: Float[Array, "m m"]
    right: Float[Array, "n n"]
    values: Float[Array, "m n"]
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """P (S ∘ PᵀVQ) Qᵀ."""
        return congruence(self.left, self.right, self.values, vector)

    def as_matrix(self) -> Array:
        """The matrix over raveled vectors. Raises `ValueError` above a size limit."""
        return dense_matrix(self)

    def transpose(self) -> "_Congruence":
        """Itself."""
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return jax.ShapeDtypeStruct(self.values.shape, self.values.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return self.in_structure()


register(_Congruence)


def _as_product(term: Any) -> Kronecker:
    if not (isinstance(term, tuple | list) and len(term) == 2):
        raise ValueError(
            f"A term of `KroneckerSum` must be a `Kronecker` or a pair (A, B), found {type(term).__name__}."
        )
    return Kronecker(*term)


def _is_identity(factor: lx.AbstractLinearOperator) -> bool:
    part = untagged(factor)
    square = part.in_structure() == part.out_structure()
    return isinstance(part, lx.IdentityLinearOperator) and square


def _of_sylvester(
    terms: tuple[Kronecker, ...],
) -> tuple[lx.AbstractLinearOperator, lx.AbstractLinearOperator] | None:
    """The symmetric A and B where the sum is A ⊗ I + I ⊗ B, in any order."""
    if len(terms) != 2:
        return None
    for one, other in (terms, terms[::-1]):
        if _is_identity(one.right) and _is_identity(other.left):
            if is_symmetric(one.left) and is_symmetric(other.right):
                return one.left, other.right
    return None


def _base_of(terms: tuple[Kronecker, ...]) -> int | None:
    """Which of two terms can be brought to the identity: definite factors, while the other has symmetric ones."""
    if len(terms) != 2:
        return None
    for base in (0, 1):
        definite = all(lx.is_positive_semidefinite(f) for f in (terms[base].left, terms[base].right))
        if definite and all(is_symmetric(f) for f in (terms[1 - base].left, terms[1 - base].right)):
            return base
    return None


def _pencil(
    base: lx.AbstractLinearOperator, other: lx.AbstractLinearOperator
) -> tuple[Float[Array, "n n"], Float[Array, " n"], Scalar]:
    """P and a with Pᵀ base P = I and Pᵀ other P = diag(a), and log det base. NaN where base is not definite."""
    lower = jnp.linalg.cholesky(written_out(base))
    half = jax.scipy.linalg.solve_triangular(lower, written_out(other), lower=True)
    whole = jax.scipy.linalg.solve_triangular(lower, half.T, lower=True)
    values, vectors = jnp.linalg.eigh(0.5 * (whole + whole.T))
    basis = jax.scipy.linalg.solve_triangular(lower, vectors, lower=True, trans=1)
    return basis, values, 2 * jnp.sum(jnp.log(jnp.diagonal(lower)))


def _product(left: Array, right: Array, norm: Scalar, definite: bool) -> Kronecker:
    """The product of two unit matrices times a norm, which is shared out evenly."""
    # Both signs may be turned: let the larger trace be positive.
    sign = jnp.where(jnp.trace(left) + jnp.trace(right) < 0, -1, 1) * jnp.sqrt(norm)
    left, right = sign * left, sign * right
    if not definite:
        return Kronecker(left, right)
    symmetric = (0.5 * (x + x.T) for x in (left, right))
    return Kronecker(*(lx.MatrixLinearOperator(x, _PSD) for x in symmetric))
