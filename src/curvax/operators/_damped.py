"""A matrix with a multiple of the identity added, and the parts of other operators over vectors of any structure."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_axpy
from curvax.operators._dense import matrix_free_diagonal, ravel, structure_dtype
from curvax.operators._parts import Inverse, inverse_of, logdet_of, tags_of, untagged
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric

_KEPT = frozenset(
    [
        lx.symmetric_tag,
        lx.positive_semidefinite_tag,
        lx.diagonal_tag,
        lx.lower_triangular_tag,
        lx.upper_triangular_tag,
    ]
)
# Their diagonal is read off; that of any other operator costs a product an entry.
_WITH_DIAGONAL = (
    AbstractStructuredOperator,
    Inverse,
    lx.MatrixLinearOperator,
    lx.PyTreeLinearOperator,
    lx.DiagonalLinearOperator,
    lx.TridiagonalLinearOperator,
)


class Damped(AbstractStructuredOperator):
    """A + damping · I, for any square Lineax operator A, over vectors of any structure.

    Products and transposes are those of A and one addition. The inverse and the determinant need entries or a
    structure: A must have a structure of its own (Kronecker, block diagonal, ...), or be a `MatrixLinearOperator`, a
    diagonal, a tridiagonal or the identity. Solve with others by `cx.linear.CG` or `cx.linear.Auto`, in products.

    Symmetric, positive semidefinite, diagonal and triangular tags of A are kept.

    Args:
        operator: A, real and square: its input and output have one structure.
        damping: A scalar ≥ 0, in the units of A's eigenvalues. A traced value cannot be checked: a negative one makes
            the tags untrue.

    Raises:
        ValueError: The operator is not square or not real; the damping is no scalar, or a known negative or NaN
            number; `inverse` or `logdet` of an operator of which products alone are known.

    Cost: a product that of A; `inverse` that of `A.damped(damping).inverse()`, or of one factorisation of the n × n
        matrix (n³/3 operations if tagged positive semidefinite, 2n³/3 otherwise; memory 2n²); trace and diagonal
        of an operator known through its products, n of them.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        curvature = lx.MatrixLinearOperator(jnp.array([[2.0, 1.0], [1.0, 2.0]]), lx.positive_semidefinite_tag)
        step = cx.operators.Damped(curvature, 0.1).inverse().mv(jnp.ones(2))
        ```

    Source: D. W. Marquardt, "An algorithm for least-squares estimation of nonlinear parameters", 1963, with the
        identity in place of a scaled diagonal (K. Levenberg, 1944).
    """

    operator: lx.AbstractLinearOperator
    damping: Scalar
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, operator: lx.AbstractLinearOperator, damping: Scalar | float) -> None:
        check_damping(damping)
        check_real(operator, "`operator` of `Damped`")
        if not is_square(operator):
            raise ValueError(
                "`operator` of `Damped` must be square, with one structure for input and output, found "
                f"{operator.out_structure()} from {operator.in_structure()}."
            )
        self.tags = known_tags(operator) & _KEPT
        self.damping = jnp.asarray(damping, structure_dtype(operator.in_structure()))
        if isinstance(operator, Damped):
            operator, self.damping = operator.operator, self.damping + operator.damping
        self.operator = operator

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """A v + damping · v."""
        return tree_axpy(self.damping, vector, self.operator.mv(vector))

    def transpose(self) -> "Damped":
        """Aᵀ + damping · I."""
        return Damped(self.operator.transpose(), self.damping)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of A."""
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of A."""
        return self.operator.out_structure()

    def inverse(self) -> lx.AbstractLinearOperator:
        """(A + damping · I)⁻¹, by the structure of A or by a factorisation of its entries."""
        return inverse_part(self._added("inverse"))

    def damped(self, damping: Scalar | float) -> "Damped":
        """Both dampings added up."""
        check_damping(damping)
        return Damped(self.operator, self.damping + jnp.asarray(damping, self.damping.dtype))

    def trace(self) -> Scalar:
        """Tr A + n · damping."""
        return trace_part(self.operator) + self.in_size() * self.damping

    def logdet(self) -> Scalar:
        """log |det (A + damping · I)|, where A has a structure or entries."""
        return logdet_part(self._added("logdet"))

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonal of A, raveled, plus damping."""
        return diagonal_part(self.operator) + self.damping

    def _added(self, method: str) -> lx.AbstractLinearOperator:
        added = damped_part(self.operator, self.damping)
        if isinstance(untagged(added), Damped):
            kind = type(untagged(self.operator)).__name__
            raise ValueError(
                f"{method}() of `Damped` needs the entries or a structure of `operator`; of a {kind} products alone "
                "are known. Solve with `cx.linear.CG` (positive definite) or `cx.linear.Auto`, which need products "
                "only, or wrap `lx.MatrixLinearOperator(operator.as_matrix(), tags)` if it is small."
            )
        return added


@lx.linearise.register(Damped)
def _(operator):
    return Damped(lx.linearise(operator.operator), operator.damping)


def check_damping(damping: Scalar | float) -> None:
    """Raise unless a damping is a scalar and, where its value is known, not negative."""
    if jnp.shape(damping) != ():
        raise ValueError(f"`damping` must be a scalar, found shape {jnp.shape(damping)}.")
    if not isinstance(damping, jax.core.Tracer) and not float(damping) >= 0:
        raise ValueError(
            f"`damping` must not be negative, found {float(damping)}: it would undo definiteness, which the tags "
            "promise. For a shift of another sign add `-c * lx.IdentityLinearOperator(...)`."
        )


def check_real(operator: lx.AbstractLinearOperator, name: str) -> None:
    """Raise unless all leaves of both structures are real floating-point arrays."""
    leaves = jax.tree.leaves((operator.in_structure(), operator.out_structure()))
    found = sorted({str(leaf.dtype) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)})
    if found:
        raise ValueError(
            f"{name} must act on real floating-point arrays, found {', '.join(found)}. Split a complex vector into "
            "two real leaves."
        )


def signature(structure: PyTree) -> tuple:
    """What two structures must have in common for a vector of one to be one of the other, but for dtypes."""
    leaves, treedef = jax.tree.flatten(structure)
    return treedef, tuple(jnp.shape(leaf) for leaf in leaves)


def is_square(operator: lx.AbstractLinearOperator) -> bool:
    """Whether input and output have one structure."""
    spaces = operator.in_structure(), operator.out_structure()
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(space)] for space in spaces]
    return signature(spaces[0]) == signature(spaces[1]) and dtypes[0] == dtypes[1]


def known_tags(operator: lx.AbstractLinearOperator) -> frozenset[object]:
    """`tags_of`, and symmetric where definite: Lineax does not conclude that for tags put around an operator."""
    return tags_of(operator) | ({lx.symmetric_tag} if is_symmetric(operator) else frozenset())


def tagged(operator: lx.AbstractLinearOperator, tags: frozenset[object]) -> lx.AbstractLinearOperator:
    """The operator, with tags put around it where it does not have them."""
    missing = tags - known_tags(operator)
    return lx.TaggedLinearOperator(operator, missing) if missing else operator


def damped_part(operator: lx.AbstractLinearOperator, damping: Scalar | float) -> lx.AbstractLinearOperator:
    """A + damping · I of the same kind as A; a `Damped` where products alone are known of A."""
    part, kept = untagged(operator), known_tags(operator) & _KEPT
    if isinstance(part, AbstractStructuredOperator):
        return tagged(part.damped(damping), kept)
    if isinstance(part, lx.IdentityLinearOperator):
        part = lx.DiagonalLinearOperator(
            jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), part.in_structure())
        )
    if isinstance(part, lx.DiagonalLinearOperator):
        moved = jax.tree.map(lambda d: d + jnp.asarray(damping, d.dtype), part.diagonal)
        return tagged(lx.DiagonalLinearOperator(moved), kept)
    if isinstance(part, lx.TridiagonalLinearOperator):
        moved = part.diagonal + jnp.asarray(damping, part.diagonal.dtype)
        return tagged(lx.TridiagonalLinearOperator(moved, part.lower_diagonal, part.upper_diagonal), kept)
    if isinstance(part, lx.MatrixLinearOperator):
        shift = jnp.asarray(damping, part.matrix.dtype) * jnp.eye(len(part.matrix), dtype=part.matrix.dtype)
        return lx.MatrixLinearOperator(part.matrix + shift, kept)
    return Damped(operator, damping)


def inverse_part(operator: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
    """A⁻¹ for a square A over vectors of any structure: by its own structure, or by a factorisation."""
    part = untagged(operator)
    if isinstance(part, AbstractStructuredOperator | lx.IdentityLinearOperator):
        inverse = inverse_of(part)
    elif isinstance(part, lx.DiagonalLinearOperator):
        inverse = lx.DiagonalLinearOperator(jax.tree.map(lambda d: 1 / d, part.diagonal))
    else:
        inverse = over(operator.in_structure(), inverse_of(operator))
    return tagged(inverse, known_tags(operator))


def over(
    structure: PyTree[jax.ShapeDtypeStruct], flat: lx.AbstractLinearOperator
) -> lx.AbstractLinearOperator:
    """An operator over raveled vectors as one over vectors of `structure`."""
    if isinstance(structure, jax.ShapeDtypeStruct) and len(structure.shape) == 1:
        return flat
    raveled = flat.in_structure()
    return (
        lx.IdentityLinearOperator(raveled, structure) @ flat @ lx.IdentityLinearOperator(structure, raveled)
    )


def diagonal_part(operator: lx.AbstractLinearOperator) -> Float[Array, " n"]:
    """The diagonal over raveled leaves, in their common dtype: read off, or in n products without the matrix."""
    part = untagged(operator)
    dtype = structure_dtype(part.in_structure())
    if isinstance(part, lx.IdentityLinearOperator):
        return jnp.ones(part.in_size(), dtype)
    if isinstance(part, _WITH_DIAGONAL):
        return ravel(lx.diagonal(part), dtype)
    return matrix_free_diagonal(part)


def trace_part(operator: lx.AbstractLinearOperator) -> Scalar:
    """The trace over vectors of any structure."""
    part = untagged(operator)
    return part.trace() if isinstance(part, AbstractStructuredOperator) else jnp.sum(diagonal_part(part))


def logdet_part(operator: lx.AbstractLinearOperator) -> Scalar:
    """log |det| over vectors of any structure."""
    part = untagged(operator)
    if isinstance(part, lx.IdentityLinearOperator):
        return jnp.zeros((), structure_dtype(part.in_structure()))
    return logdet_of(part if isinstance(part, AbstractStructuredOperator) else operator)
