"""How much to damp without a look at the data: from a condition number, and from the diagonal."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import PRNGKeyArray, Scalar

from curvax._pytree import stop_gradient, tree_dtype
from curvax.linear._jacobi import MAX_EXACT_SIZE, check_count, check_key, check_system
from curvax.linear._quadrature import entries_of, gauss_rule, product_of
from curvax.operators._damped import diagonal_part
from curvax.operators._lanczos import lanczos
from curvax.operators._parts import untagged
from curvax.operators._structured import AbstractStructuredOperator


def damping_for_condition(
    operator: lx.AbstractLinearOperator,
    target: Scalar | float,
    *,
    num_steps: int = 60,
    key: PRNGKeyArray | None = None,
    dense_size: int = 512,
) -> Scalar:
    """The least λ ≥ 0 for which the condition number of A + λI is at most `target`.

    λ = (λmax − target · λmin) / (target − 1), 0 if that is negative. Eigenvalues that rounding made negative count as
    zero. For an operator that is not symmetric, or is indefinite, take JᵀJ, tagged: a shift of an indefinite
    matrix can make it singular.

    Args:
        operator: A, real, square, tagged `lx.positive_semidefinite_tag`; vectors of any structure.
        target: Condition number, above 1.
        num_steps: Lanczos steps for an operator above `dense_size`.
        key: For their random start; needed there.
        dense_size: Up to this size the eigenvalues are computed from the matrix.

    Returns:
        λ, a constant without derivative. Above `dense_size`: the largest eigenvalue is a Ritz value plus its residual
        norm, the smallest taken to be 0 where its Ritz value has not converged to 10 %, so that the condition number is
        below `target` rather than above.

    Raises:
        ValueError: The operator is not square, real and tagged positive semidefinite; `target` is not above 1; no `key`
            where it is needed.

    Cost: n products and 4n³/3 operations for the eigenvalues, or `num_steps` products and as many vectors.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.array([1e-8, 1.0, 100.0])), lx.positive_semidefinite_tag)
        cx.linear.damping_for_condition(A, 101.0)  # 1
        ```
    """
    name = "damping_for_condition"
    _check(name, operator, "of such only is A + λI a damped A, an indefinite one can be made singular by it")
    if jnp.shape(target) != () or (
        not isinstance(target, jax.core.Tracer) and not 1 < float(target) < np.inf
    ):
        raise ValueError(f"`target` of `{name}` must be a finite number above 1, found {target}.")
    limit = jnp.asarray(target, tree_dtype(operator.in_structure()))
    if operator.in_size() <= dense_size:
        return _for_condition(operator, limit, None, 0)
    steps = min(check_count("num_steps", name, num_steps), operator.in_size())
    return _for_condition(operator, limit, check_key(name, key), steps)


def _check(name: str, operator: lx.AbstractLinearOperator, reason: str) -> None:
    check_system(name, operator)
    if operator.in_size() == 0:
        raise ValueError(f"`operator` of `{name}` has no rows: there is nothing to damp.")
    if not lx.is_positive_semidefinite(operator):
        raise ValueError(
            f"`operator` of `{name}` must be tagged `lx.positive_semidefinite_tag`: {reason}. Pass "
            "`operator.T @ operator`, tagged."
        )


@eqx.filter_jit
def _for_condition(
    operator: lx.AbstractLinearOperator, limit: Scalar, key: PRNGKeyArray | None, num_steps: int
) -> Scalar:
    """One program, also where it is called outside of `jit`."""
    operator, limit = stop_gradient((operator, limit))
    if key is None:
        matrix, sound = entries_of(operator, limit.dtype)
        values = jnp.linalg.eigvalsh(matrix) * sound
        smallest, largest = values[0], values[-1]
    else:
        start = jax.random.normal(key, (operator.in_size(),), limit.dtype)
        nodes, _, last = gauss_rule(lanczos(product_of(operator, limit.dtype), start, num_steps))
        residuals = jnp.abs(last)
        smallest = jnp.where(residuals[0] <= 0.1 * nodes[0], nodes[0] - residuals[0], 0)
        largest = nodes[-1] + residuals[-1]
    smallest = jnp.maximum(smallest, 0)
    value = jnp.maximum((largest - limit * smallest) / (limit - 1), 0)
    return jnp.where(limit > 1, value, jnp.nan)


def damping_from_diagonal(operator: lx.AbstractLinearOperator, fraction: Scalar | float = 1e-3) -> Scalar:
    """`fraction` times the median of the diagonal of A: a damping in the units of A, at hardly any cost.

    The median and not the mean: a few parameters of very large curvature do not raise it. A rule of thumb, which knows
    nothing of the condition number or the noise.

    Args:
        operator: A, real, square, tagged `lx.positive_semidefinite_tag`; vectors of any structure.
        fraction: What to take of it, at least 0.

    Returns:
        λ, a constant without derivative.

    Raises:
        ValueError: The operator is not square, real and tagged positive semidefinite; `fraction` is a known negative
            number; n is above 4096 where the diagonal costs n products.

    Cost: none where the operator has entries or a structure, n products otherwise.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 2.0, 1e6])), lx.positive_semidefinite_tag)
        cx.linear.damping_from_diagonal(A, 0.01)  # 0.02
        ```
    """
    name = "damping_from_diagonal"
    _check(name, operator, "the diagonal of others says nothing of its size")
    if jnp.shape(fraction) != () or (not isinstance(fraction, jax.core.Tracer) and not float(fraction) >= 0):
        raise ValueError(f"`fraction` of `{name}` must be a number of at least 0, found {fraction}.")
    part = untagged(operator)
    known = isinstance(part, AbstractStructuredOperator | lx.MatrixLinearOperator) or lx.is_diagonal(operator)
    if operator.in_size() > MAX_EXACT_SIZE and not known:
        raise ValueError(
            f"`{name}` would need {operator.in_size()} products for the diagonal of a {type(part).__name__}, over the "
            f"limit of {MAX_EXACT_SIZE}. Use `damping_for_condition`, which needs 60."
        )
    diagonal = diagonal_part(stop_gradient(operator))
    return jax.lax.stop_gradient(jnp.asarray(fraction, diagonal.dtype) * jnp.median(diagonal))
