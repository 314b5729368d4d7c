"""Kronecker products, as the curvature of a layer with inputs and outputs is made of."""

from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax.operators._base import as_tags
from curvax.operators._damped import check_damping, damped_part
from curvax.operators._parts import (
    EXACT,
    check_symmetric,
    eigen_of,
    inverse_of,
    logdet_of,
    power_of,
    tags_of,
    trace_of,
    untagged,
)
from curvax.operators._structured import AbstractStructuredOperator, as_operator

_SEMIDEFINITE = {lx.positive_semidefinite_tag, lx.negative_semidefinite_tag}


class Kronecker(AbstractStructuredOperator):
    r"""A ⊗ B, of a left factor A (m′ × m) and a right factor B (n′ × n), never formed.

    Its vectors are matrices V of shape (m, n), and (A ⊗ B) V = A V Bᵀ of shape (m′, n′). With rows raveled one after
    the other (as `ravel_pytree` does) this is the matrix `jnp.kron(A, B)`: for a weight of shape (outputs, inputs) A is
    the factor of the outputs. Papers that stack columns write B ⊗ A.

    Args:
        left: A, a real matrix or a Lineax operator over vectors (which may have a structure of its own).
        right: B, likewise.
        tags: Lineax tags that you know to hold for the product, beside those that follow from the tags of the factors
            (symmetric, definite, diagonal and triangular factors make a product of their kind).

    Raises:
        ValueError: A factor is not a real matrix or an operator over vectors; a method needs square, symmetric or
            definite factors.

    Cost: a product m′·m·n + m′·n′·n multiplications; `inverse` one factorisation of each factor, `damped` and
        `power` one eigendecomposition of each; memory that of the factors.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        left = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]), lx.positive_semidefinite_tag)
        curvature = cx.operators.Kronecker(left, lx.DiagonalLinearOperator(jnp.array([1.0, 3.0, 5.0])))
        step = curvature.damped(0.1).inverse().mv(jnp.ones((2, 3)))
        ```

    Source: C. Van Loan, "The ubiquitous Kronecker product", 2000. (A ⊗ B + λI)⁻¹ is taken in the joint eigenbasis:
        A⁻¹ ⊗ B⁻¹ of separately damped factors is another matrix.
    """

    left: lx.AbstractLinearOperator
    right: lx.AbstractLinearOperator
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        left: Array | lx.AbstractLinearOperator,
        right: Array | lx.AbstractLinearOperator,
        tags: object | Iterable[object] = (),
    ) -> None:
        self.left, self.right = as_operator(left, "left"), as_operator(right, "right")
        dtypes = {self.left.in_structure().dtype, self.right.in_structure().dtype}
        if len(dtypes) > 1:
            raise ValueError(
                f"`left` and `right` of `Kronecker` must have one dtype, found {sorted(map(str, dtypes))}."
            )
        self.tags = as_tags(tags) | _common_tags(tags_of(self.left), tags_of(self.right))

    def mv(self, vector: Float[Array, "m n"]) -> Float[Array, "p q"]:
        """A V Bᵀ."""
        if jnp.shape(vector) != self.in_structure().shape:
            raise ValueError(
                f"`vector` of a `Kronecker` must be a matrix V of shape {self.in_structure().shape}, found shape "
                f"{jnp.shape(vector)}. A raveled one goes through `v.reshape(m, n)`."
            )
        return jax.vmap(self.left.mv, 1, 1)(jax.vmap(self.right.mv)(vector))

    def transpose(self) -> "Kronecker":
        """Aᵀ ⊗ Bᵀ."""
        return Kronecker(self.left.transpose(), self.right.transpose(), lx.transpose_tags(self.tags))

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        shape = (self.left.in_size(), self.right.in_size())
        return jax.ShapeDtypeStruct(shape, self.left.in_structure().dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m′, n′)."""
        shape = (self.left.out_size(), self.right.out_size())
        return jax.ShapeDtypeStruct(shape, self.left.in_structure().dtype)

    def inverse(self) -> "Kronecker":
        """A⁻¹ ⊗ B⁻¹."""
        _check_square(self)
        return Kronecker(inverse_of(self.left), inverse_of(self.right), tags_of(self))

    def power(self, exponent: float) -> "Kronecker":
        """Aᵖ ⊗ Bᵖ, for positive semidefinite factors."""
        return Kronecker(power_of(self.left, exponent), power_of(self.right, exponent))

    def damped(self, damping: Scalar | float) -> "EigenKronecker":
        """A ⊗ B + damping · I in the joint eigenbasis, for symmetric factors."""
        return self.eigen().damped(damping)

    def damped_factors(self, damping: Scalar | float) -> "Kronecker":
        """(A + π√damping I) ⊗ (B + √damping/π I), π² = (tr A / m) / (tr B / n), for positive semidefinite factors.

        Not `damped`: it is larger by π√damping I ⊗ B + A ⊗ √damping/π I, and its inverse needs no eigenvectors.

        Args:
            damping: A scalar ≥ 0, in the units of the eigenvalues of A ⊗ B.

        Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature",
            2015, arXiv 1503.05671, section 6.3.
        """
        check_damping(damping)
        _check_square(self)
        left, right = trace_of(self.left) / self.left.in_size(), trace_of(self.right) / self.right.in_size()
        ratio = jnp.sqrt(jnp.where((left > 0) & (right > 0), left / right, 1))
        root = jnp.sqrt(jnp.asarray(damping, ratio.dtype))
        return Kronecker(damped_part(self.left, ratio * root), damped_part(self.right, root / ratio))

    def eigen(self) -> "EigenKronecker":
        """The same matrix in its eigenbasis, for symmetric factors."""
        check_symmetric(self.left, "The eigenbasis of `Kronecker`")
        check_symmetric(self.right, "The eigenbasis of `Kronecker`")
        left, left_values = _eigen_factor(self.left)
        right, right_values = _eigen_factor(self.right)
        return EigenKronecker(left, right, jnp.outer(left_values, right_values), tags_of(self))

    def trace(self) -> Scalar:
        """tr A · tr B."""
        _check_square(self)
        return trace_of(self.left) * trace_of(self.right)

    def logdet(self) -> Scalar:
        """n log |det A| + m log |det B|."""
        _check_square(self)
        return self.right.in_size() * logdet_of(self.left) + self.left.in_size() * logdet_of(self.right)

    def diagonal(self) -> Float[Array, " mn"]:
        """The outer product of the diagonals, raveled."""
        _check_square(self)
        # Lineax gives that of an identity in the default dtype.
        left, right = (
            lx.diagonal(factor).astype(self.in_structure().dtype) for factor in (self.left, self.right)
        )
        return jnp.outer(left, right).ravel()


class EigenKronecker(AbstractStructuredOperator):
    """(U ⊗ V) diag(S) (U ⊗ V)ᵀ with orthonormal U (m × m), V (n × n) and any S (m × n).

    A Kronecker product of symmetric factors has S = λ(A) λ(B)ᵀ; damping adds to S, and EKFAC replaces it.

    Args:
        left: U, orthonormal columns; None for the identity.
        right: V, likewise.
        values: S, the eigenvalues.
        tags: Lineax tags that you know to hold; symmetry is always tagged.

    Cost: a product 2mn(m + n) multiplications; inverse, powers, trace and determinant mn.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        operator = cx.operators.EigenKronecker(jnp.eye(2), jnp.eye(3), jnp.arange(1.0, 7.0).reshape(2, 3))
        operator.inverse().mv(jnp.ones((2, 3)))
        ```

    Source: T. George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", 2018,
        arXiv 1806.03884.
    """

    left: Float[Array, "m m"] | None
    right: Float[Array, "n n"] | None
    values: Float[Array, "m n"]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        left: Float[Array, "m m"] | None,
        right: Float[Array, "n n"] | None,
        values: Float[Array, "m n"],
        tags: object | Iterable[object] = (),
    ) -> None:
        whole = (values.shape[0],) * 2, (values.shape[-1],) * 2, values.shape
        shapes = left is None or left.shape, right is None or right.shape, values.shape
        if any(a not in (b, True) for a, b in zip(shapes, whole, strict=True)) or values.ndim != 2:
            raise ValueError(
                "`EigenKronecker` needs `left` (m, m), `right` (n, n) and `values` (m, n), found the shapes "
                f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
            )
        self.left, self.right, self.values = left, right, values
        self.tags = (as_tags(tags) & _SEMIDEFINITE) | {lx.symmetric_tag}

    def mv(self, vector: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """U (S ∘ UᵀXV) Vᵀ."""
        return congruence(self.left, self.right, self.values, vector)

    def transpose(self) -> "EigenKronecker":
        """Itself."""
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return jax.ShapeDtypeStruct(self.values.shape, self.values.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """A matrix of shape (m, n)."""
        return self.in_structure()

    def inverse(self) -> "EigenKronecker":
        """With 1/S."""
        return EigenKronecker(self.left, self.right, 1 / self.values, self.tags)

    def power(self, exponent: float) -> "EigenKronecker":
        """With S to a power; negative eigenvalues give NaN."""
        return EigenKronecker(self.left, self.right, self.values**exponent, self.tags)

    def damped(self, damping: Scalar | float) -> "EigenKronecker":
        """With S + damping. A positive semidefinite matrix stays so: damping must not be negative."""
        kept = self.tags - {lx.negative_semidefinite_tag}
        return EigenKronecker(self.left, self.right, self.values + damping, kept)

    def trace(self) -> Scalar:
        """Σ S."""
        return jnp.sum(self.values)

    def logdet(self) -> Scalar:
        """Σ log |S|."""
        return jnp.sum(jnp.log(jnp.abs(self.values)))

    def diagonal(self) -> Float[Array, " mn"]:
        """(U∘U) S (V∘V)ᵀ, raveled."""
        squares = [None if basis is None else basis**2 for basis in (self.left, self.right)]
        return _sandwich(squares[0], self.values, squares[1]).ravel()


def congruence(
    left: Float[Array, "m m"] | None,
    right: Float[Array, "n n"] | None,
    values: Float[Array, "m n"],
    vector: Float[Array, "m n"],
) -> Float[Array, "m n"]:
    """(P ⊗ Q) diag(S) (P ⊗ Q)ᵀ V, for any square P and Q; None is the identity."""
    turned = [None if basis is None else basis.T for basis in (left, right)]
    inside = _sandwich(turned[0], vector, turned[1])
    return _sandwich(left, values * inside, right)


def _sandwich(
    left: Float[Array, "p m"] | None, vector: Float[Array, "m n"], right: Float[Array, "q n"] | None
) -> Float[Array, "p q"]:
    """P V Qᵀ."""
    if left is not None and right is not None:
        return jnp.linalg.multi_dot([left, vector, right.T], precision=EXACT)
    if left is not None:
        return jnp.matmul(left, vector, precision=EXACT)
    return vector if right is None else jnp.matmul(vector, right.T, precision=EXACT)


def _eigen_factor(operator: lx.AbstractLinearOperator) -> tuple[Array | None, Array]:
    """`eigen_of`, but no eigenvectors of a diagonal: they are the unit vectors."""
    inner = untagged(operator)
    if not isinstance(inner, lx.DiagonalLinearOperator):
        return eigen_of(operator)
    values = lx.diagonal(inner)
    if lx.is_positive_semidefinite(operator):
        values = jnp.maximum(values, 0)
    if lx.is_negative_semidefinite(operator):
        values = jnp.minimum(values, 0)
    return None, values


def _common_tags(left: frozenset[object], right: frozenset[object]) -> frozenset[object]:
    """What follows for a Kronecker product from the tags of its factors."""
    both = (left & right) - _SEMIDEFINITE
    positive, negative = lx.positive_semidefinite_tag, lx.negative_semidefinite_tag
    if (positive in left and positive in right) or (negative in left and negative in right):
        return both | {positive}
    if (positive in left and negative in right) or (negative in left and positive in right):
        return both | {negative}
    return both


def _check_square(operator: Kronecker) -> None:
    for name, part in (("left", operator.left), ("right", operator.right)):
        if part.in_size() != part.out_size():
            raise ValueError(
                f"`{name}` of `Kronecker` is {part.out_size()} × {part.in_size()}; inverse, trace, determinant and "
                "diagonal need square factors."
            )
