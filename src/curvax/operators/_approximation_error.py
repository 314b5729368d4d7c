"""How far an approximation is from the operator that it stands for, from random probes."""

import math
import operator as op

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PRNGKeyArray, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import tree_dtype, tree_size
from curvax.operators._damped import check_real, signature
from curvax.operators._dense import ravel, unravel

_CHUNK = 16


class ApproximationError(eqx.Module):
    """What random probes say of E = A − Â; made by `approximation_error`.

    Attributes:
        frobenius: Estimate of ‖E‖_F; its square has the mean ‖E‖_F².
        deviation: Standard error of `frobenius`, from the scatter of the probes.
        relative: `frobenius` over the estimate of ‖A‖_F from the same probes; infinite or NaN for A = 0.
        spectral_bound: At least ‖E‖₂, with the probability `confidence` over the probes.
        confidence: That probability.
        num_probes: Products with A, and with Â, that were spent.
    """

    frobenius: Scalar
    deviation: Scalar
    relative: Scalar
    spectral_bound: Scalar
    confidence: float = eqx.field(static=True)
    num_probes: int = eqx.field(static=True)


def approximation_error(
    operator: lx.AbstractLinearOperator,
    approximation: lx.AbstractLinearOperator,
    *,
    key: PRNGKeyArray,
    num_probes: int = 10,
    confidence: float = 0.99,
) -> ApproximationError:
    """‖A − Â‖ from products with m random vectors ω of independent normal entries.

    E ‖(A − Â)ω‖² = ‖A − Â‖_F², with a variance of 2‖EᵀE‖_F² ≤ 2‖E‖_F⁴ for E = A − Â: the relative standard error of
    the estimate is at most 1/√(2m), and less where many singular values share the error. And
    α √(2/π) max ‖Eωᵢ‖ ≥ ‖E‖₂ with probability 1 − α^{−m}, whatever E is, for any α > 1.

    All this is about the draw of the probes, so that the approximation must not depend on them: take a key of its own,
    not the one that the sketch was made of.

    Args:
        operator: A, real, over vectors of any structure.
        approximation: Â, over the same vectors.
        key: A JAX random key that had no part in Â.
        num_probes: m, at least 2.
        confidence: Probability with which `spectral_bound` shall hold, above 0 and below 1.

    Returns:
        An `ApproximationError`; NaN where either operator has one.

    Raises:
        ValueError: The operators differ in structure or are not real; `num_probes` below 2; `confidence` out of range.

    Cost: m products with A and with Â, at most 16 at a time; memory that of these.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.DiagonalLinearOperator(jnp.logspace(0, -6, 50))
        guess = lx.DiagonalLinearOperator(jnp.where(jnp.arange(50) < 10, jnp.logspace(0, -6, 50), 0))
        cx.operators.approximation_error(A, guess, key=jax.random.key(0)).relative
        ```

    Source: N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", 2011 (arXiv:0909.4061), Lemma
        4.1, for the bound (theirs has α = 10).
    """
    check_real(operator, "`operator` of `approximation_error`")
    for structure in ("in_structure", "out_structure"):
        wanted, found = getattr(operator, structure)(), getattr(approximation, structure)()
        if signature(wanted) != signature(found):
            raise ValueError(
                f"`approximation` of `approximation_error` must act on the vectors of `operator`: found {found} "
                f"for {wanted}."
            )
    try:
        count = op.index(num_probes)
    except TypeError:
        count = 0
    if count < 2:
        raise ValueError(
            f"`num_probes` of `approximation_error` must be an integer of at least 2 (one says nothing about the "
            f"scatter), found {num_probes}."
        )
    if not 0 < confidence < 1:
        raise ValueError(
            f"`confidence` of `approximation_error` must lie between 0 and 1, found {confidence}."
        )
    return _estimate(operator, approximation, key, count, float(confidence))


@eqx.filter_jit
def _estimate(
    operator: lx.AbstractLinearOperator,
    approximation: lx.AbstractLinearOperator,
    key: PRNGKeyArray,
    count: int,
    confidence: float,
) -> ApproximationError:
    structure = operator.in_structure()
    dtype = tree_dtype((structure, operator.out_structure()))
    whole, part = lx.linearise(operator), lx.linearise(approximation)

    def norms(probe: Array) -> tuple[Array, Array]:
        vector = unravel(probe, structure)
        image, other = ravel(whole.mv(vector), dtype), ravel(part.mv(vector), dtype)
        return jnp.linalg.norm(image - other), jnp.linalg.norm(image)

    probes = jax.random.normal(key, (count, tree_size(structure)), dtype)
    errors, sizes = map_in_chunks(norms, probes, _CHUNK)
    # In units of the largest, so that squares neither vanish nor overflow.
    largest = jnp.max(errors)
    unit = jnp.where(largest > 0, largest, 1)
    squares = (errors / unit) ** 2
    mean = jnp.mean(squares)
    root = jnp.sqrt(mean)
    scatter = jnp.sqrt(jnp.sum((squares - mean) ** 2) / (count * (count - 1)))
    widest = jnp.max(sizes)
    whole_norm = widest * jnp.sqrt(jnp.mean((sizes / jnp.where(widest > 0, widest, 1)) ** 2))
    frobenius = unit * root
    alpha = (1 - confidence) ** (-1 / count)
    return ApproximationError(
        frobenius=frobenius,
        deviation=unit * scatter / (2 * jnp.where(root > 0, root, 1)),
        relative=frobenius / whole_norm,
        spectral_bound=jnp.asarray(alpha * math.sqrt(2 / math.pi), dtype) * largest,
        confidence=confidence,
        num_probes=count,
    )
