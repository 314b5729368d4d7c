"""The diagonal as a preconditioner, exact or estimated from random probes."""

import operator as op
from typing import Any

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Scalar

from curvax._pytree import stop_gradient, tree_dtype
from curvax.operators._damped import Damped, check_damping, diagonal_part, is_square
from curvax.operators._dense import ravel, unravel
from curvax.operators._parts import untagged
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric

# More products than this are not spent on a diagonal without being asked for.
MAX_EXACT_SIZE = 4096

# The diagonal of these is read off.
_WITH_ENTRIES = (
    AbstractStructuredOperator,
    lx.DiagonalLinearOperator,
    lx.IdentityLinearOperator,
    lx.MatrixLinearOperator,
    lx.PyTreeLinearOperator,
    lx.TridiagonalLinearOperator,
)


def jacobi(
    operator: lx.AbstractLinearOperator,
    *,
    damping: Scalar | float = 0.0,
    num_probes: int | None = None,
    key: PRNGKeyArray | None = None,
) -> lx.TaggedLinearOperator:
    """The inverse of |diag(A) + damping|, as a preconditioner for A + damping · I.

    The diagonal is read off where the operator has entries or a structure, and costs n products otherwise. With
    `num_probes` it is estimated: the mean of z ∘ Az over random signs z. An entry of the estimate has the standard
    deviation √(Σ_{j≠i} A_ij² / num_probes). For a positive semidefinite A it is raised to (A²)_ii / ‖A‖_F, estimated
    from the same probes: A_ii is never below that.

    The result is positive definite whatever A is. An entry that is exactly zero is replaced by the largest one: of a
    semidefinite A the whole row is then zero.

    It helps where the variables have different scales, or where A is nearly diagonal. It does nothing where the
    diagonal is constant, and it can be harmful: the condition number may grow, by a factor of at most
    n (the largest number of entries in a row, if A is sparse), since the unit diagonal is only that near to the best
    scaling. Estimated from few probes, the diagonal of a matrix with large entries outside of it is noise, which has
    no such bound: compare the number of steps with and without.

    Args:
        operator: A, real, square, tagged symmetric or definite; vectors of any structure, float32 or float64.
        damping: What will be added to the diagonal of A in the system, a scalar ≥ 0 in the units of A.
        num_probes: How many products to estimate the diagonal from, at least 1; None for the exact one.
        key: A JAX random key for the probes.

    Returns:
        A diagonal operator over the same vectors, tagged `lx.positive_semidefinite_tag`. It is a constant: no
        derivative flows through it. NaN where the diagonal is.

    Raises:
        ValueError: The operator is not square, real and tagged; a known damping is negative; `num_probes` below 1
            or without a `key`; n above 4096 where the exact diagonal would cost n products.

    Cost: none, n or `num_probes` products; 3 vectors.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.array([[4.0, 1.0], [1.0, 100.0]]), lx.positive_semidefinite_tag)
        options = {"preconditioner": cx.linear.jacobi(A)}
        lx.linear_solve(A, jnp.ones(2), cx.linear.CG(rtol=1e-5), options=options)
        ```

    Source: C. Bekas, E. Kokiopoulou, Y. Saad, "An estimator for the diagonal of a matrix", 2007 (of which the
        denominator is constant for random signs; the bound from below is ours); A. van der Sluis, "Condition
        numbers and equilibration of matrices", 1969, for the factor n.
    """
    check_system("jacobi", operator)
    check_damping(damping)
    structure = operator.in_structure()
    dtype = tree_dtype(structure)
    operator = stop_gradient(operator)
    shift = jnp.asarray(damping, dtype)
    if num_probes is None:
        if operator.in_size() > MAX_EXACT_SIZE and not diagonal_is_known(operator):
            raise ValueError(
                f"`jacobi` would need {operator.in_size()} products for the exact diagonal of a "
                f"{type(untagged(operator)).__name__}, over the limit of {MAX_EXACT_SIZE}. Estimate it, with "
                "`num_probes=100, key=jax.random.key(0)`."
            )
        size = jnp.abs(_diagonal(operator, dtype) + shift)
    else:
        num_probes = check_count("num_probes", "jacobi", num_probes)
        estimate, least = _estimate(operator, num_probes, check_key("jacobi", key), dtype)
        if lx.is_positive_semidefinite(operator):
            size = jnp.maximum(estimate, least) + shift
        else:
            size = jnp.maximum(jnp.abs(estimate + shift), least)
    # Below `tiny` the reciprocal overflows. A NaN stays one.
    empty = size < jnp.finfo(dtype).tiny
    largest = jnp.max(size, initial=0)
    size = jnp.where(empty, jnp.where(largest < jnp.finfo(dtype).tiny, 1, largest), size)
    inverse = unravel(jax.lax.stop_gradient(1 / size), structure)
    return lx.TaggedLinearOperator(lx.DiagonalLinearOperator(inverse), lx.positive_semidefinite_tag)


def check_system(name: str, operator: lx.AbstractLinearOperator) -> None:
    """Raise `ValueError` unless a preconditioner of this name can be made of the operator."""
    leaves = jax.tree.leaves((operator.in_structure(), operator.out_structure()))
    found = sorted({str(leaf.dtype) for leaf in leaves if not jnp.issubdtype(leaf.dtype, jnp.floating)})
    if found:
        raise ValueError(
            f"`operator` of `{name}` must act on real floating-point arrays, found {', '.join(found)}. Convert "
            "integers, and split a complex vector into two real leaves."
        )
    if not is_square(operator):
        raise ValueError(
            f"`operator` of `{name}` must be square, with one structure for input and output, found "
            f"{operator.out_structure()} from {operator.in_structure()}. For least squares pass "
            "`operator.T @ operator`, tagged `lx.positive_semidefinite_tag`."
        )
    if not is_symmetric(operator):
        raise ValueError(
            f"`operator` of `{name}` must be tagged `lx.symmetric_tag` or `lx.positive_semidefinite_tag`; if it is "
            "symmetric, wrap it: `lx.TaggedLinearOperator(operator, lx.symmetric_tag)`."
        )


def check_count(argument: str, name: str, value: Any) -> int:
    """A static number of at least 1."""
    try:
        count = op.index(value)
    except TypeError:
        raise ValueError(
            f"`{argument}` of `{name}` must be a Python integer, found {type(value).__name__}: it is the size of an "
            "array, which cannot be traced."
        ) from None
    if count < 1:
        raise ValueError(f"`{argument}` of `{name}` must be at least 1, found {count}.")
    return count


def check_key(name: str, key: Any) -> PRNGKeyArray:
    """A single random key, typed or raw."""
    array = isinstance(key, jax.Array)
    typed = array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    if typed or (array and key.dtype == jnp.uint32 and key.ndim == 1):
        return key
    found = f"an array of shape {key.shape} and dtype {key.dtype}" if array else repr(key)
    raise ValueError(f"`key` of `{name}` must be one random key, such as `jax.random.key(0)`, found {found}.")


def diagonal_is_known(operator: lx.AbstractLinearOperator) -> bool:
    """Whether `_diagonal` costs a product at most."""
    part = untagged(operator)
    if lx.is_diagonal(operator):
        return True
    if isinstance(part, lx.AddLinearOperator):
        return diagonal_is_known(part.operator1) and diagonal_is_known(part.operator2)
    if isinstance(part, lx.NegLinearOperator | lx.MulLinearOperator | lx.DivLinearOperator | Damped):
        return diagonal_is_known(part.operator)
    return isinstance(part, _WITH_ENTRIES)


def _diagonal(operator: lx.AbstractLinearOperator, dtype: Any) -> Float[Array, " n"]:
    """The diagonal over raveled leaves."""
    part = untagged(operator)
    if isinstance(part, lx.AddLinearOperator):
        return _diagonal(part.operator1, dtype) + _diagonal(part.operator2, dtype)
    if isinstance(part, Damped):
        return _diagonal(part.operator, dtype) + part.damping.astype(dtype)
    if isinstance(part, lx.NegLinearOperator):
        return -_diagonal(part.operator, dtype)
    if isinstance(part, lx.MulLinearOperator):
        return _diagonal(part.operator, dtype) * jnp.asarray(part.scalar, dtype)
    if isinstance(part, lx.DivLinearOperator):
        return _diagonal(part.operator, dtype) / jnp.asarray(part.scalar, dtype)
    if lx.is_diagonal(operator):
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), part.in_structure())
        return ravel(part.mv(ones), dtype)
    return diagonal_part(part).astype(dtype)


def _estimate(
    operator: lx.AbstractLinearOperator, num_probes: int, key: PRNGKeyArray, dtype: Any
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The mean of z ∘ Az, and that of (Az)² over ‖A‖_F.

    E (Az)ᵢ² = (A²)_ii, and (A²)_ii ≤ λmax A_ii ≤ ‖A‖_F A_ii for a positive semidefinite A.
    """
    applied, structure = lx.linearise(operator), operator.in_structure()
    size = operator.in_size()

    def add(sums: PyTree[Array], key: PRNGKeyArray) -> tuple[PyTree[Array], None]:
        signs: Bool[Array, " n"] = jax.random.bernoulli(key, shape=(size,))
        probe = jnp.where(signs, 1, -1).astype(dtype)
        product = jax.lax.stop_gradient(ravel(applied.mv(unravel(probe, structure)), dtype))
        return (sums[0] + probe * product, sums[1] + product * product), None

    zero = jnp.zeros(size, dtype)
    sums, _ = jax.lax.scan(add, (zero, zero), jax.random.split(key, num_probes))
    mean, squares = sums[0] / num_probes, sums[1] / num_probes
    norm = jnp.sqrt(jnp.sum(squares))
    return mean, squares / jnp.where(norm == 0, 1, norm)
