"""Whether a curvature is definite: its smallest eigenvalue by a few Lanczos steps."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar

from curvax._pytree import tree_dtype, tree_size
from curvax.operators._damped import check_real, is_square
from curvax.operators._dense import ravel, unravel
from curvax.operators._lanczos import lanczos, ritz
from curvax.operators._parts import EXACT
from curvax.operators._sketches import check_count
from curvax.operators._structured import is_symmetric


class LowestCurvature(eqx.Module):
    """What `lowest_curvature` found.

    Attributes:
        value: vᵀHv of the unit vector v below, the smallest Ritz value: λ_min(H) is at most that.
        lower: λ_min(H) is at least that, with the probability asked for; −∞ after too few steps for a statement.
        direction: v. Where `value` is negative, a direction of negative curvature.
        residual: ‖Hv − value · v‖: some eigenvalue is that near to `value`, not necessarily the smallest.
        largest: The largest Ritz value: λ_max(H) is at least that.
        rounding: What rounding may have moved `value` by, about ε ‖H‖ √n.
        num_products: Products with H that were spent.
    """

    value: Scalar
    lower: Scalar
    direction: PyTree[Array]
    residual: Scalar
    largest: Scalar
    rounding: Scalar
    num_products: int = eqx.field(static=True)

    @property
    def is_indefinite(self) -> Bool[Array, ""]:
        """Certain: vᵀHv is negative beyond rounding."""
        return self.value < -self.rounding

    @property
    def is_definite(self) -> Bool[Array, ""]:
        """Positive definite, with the probability asked for. Neither this nor `is_indefinite`: not known."""
        return self.lower > self.rounding


def lowest_curvature(
    operator: lx.AbstractLinearOperator,
    *,
    key: PRNGKeyArray,
    num_steps: int = 30,
    confidence: float = 0.99,
) -> LowestCurvature:
    """Bounds of λ_min(H) from m Lanczos steps with full reorthogonalisation, from a random start.

    The smallest Ritz value θ is a value of the quadratic form, and so an upper bound without any doubt. From below,
    λ_min ≥ θ − ε (λ_max − λ_min) with a probability of at least 1 − 1.648 √n exp(−√ε (2m − 1)) over the start, whatever
    H is; the same holds at the other end, so that λ_max − λ_min ≤ (θ_max − θ)/(1 − 2ε). A test of gᵀHg > 0 for one
    g, or the condition number, shows no definiteness: diag(1, −1) passes both.

    Args:
        operator: H, real, tagged symmetric or definite, over vectors of any structure.
        key: A JAX random key for the start.
        num_steps: m; at n all eigenvalues are found to rounding.
        confidence: Probability with which `lower` shall hold, above 0 and below 1.

    Returns:
        A `LowestCurvature`; NaN where H has one.

    Raises:
        ValueError: The operator is not square, real and tagged; `num_steps` or `confidence` out of range.

    Cost: min(m, n) + 1 products and 8 n m² operations; memory mn.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        H = lx.MatrixLinearOperator(jnp.diag(jnp.linspace(-0.1, 1.0, 50)), lx.symmetric_tag)
        found = cx.operators.lowest_curvature(H, key=jax.random.key(0))
        found.is_indefinite, found.direction  # True, with a proof
        ```

    Source: J. Kuczyński and H. Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms
        with a random start", 1992, Theorem 4.2, of H shifted and of −H.
    """
    check_real(operator, "`operator` of `lowest_curvature`")
    if not is_square(operator) or not is_symmetric(operator):
        raise ValueError(
            "`operator` of `lowest_curvature` must be square and tagged `lx.symmetric_tag` (or definite). If it is "
            "symmetric, wrap it: `lx.TaggedLinearOperator(operator, lx.symmetric_tag)`."
        )
    size = tree_size(operator.in_structure())
    if size == 0:
        raise ValueError("`operator` of `lowest_curvature` has no element.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` of `lowest_curvature` must lie between 0 and 1, found {confidence}.")
    steps = min(check_count("num_steps", "lowest_curvature", num_steps), size)
    return _lowest(operator, key, steps, float(confidence))


@eqx.filter_jit
def _lowest(
    operator: lx.AbstractLinearOperator, key: PRNGKeyArray, steps: int, confidence: float
) -> LowestCurvature:
    structure, dtype = operator.in_structure(), tree_dtype(operator.in_structure())
    size, applied = tree_size(structure), lx.linearise(operator)
    product = lambda v: ravel(applied.mv(unravel(v, structure)), dtype)
    krylov = lanczos(product, jax.random.normal(key, (size,), dtype), steps)
    values, vectors = ritz(krylov, steps)
    # Of an exhausted space the rest of T has Ritz values that belong to no vector.
    used = jnp.arange(steps, dtype=jnp.int32) < krylov.steps
    real = jnp.sum(jnp.where(used[:, None], vectors**2, 0), axis=0) > 0.5
    broken = jnp.any(jnp.isnan(values))
    lowest = jnp.argmin(jnp.where(real, values, jnp.inf))
    value = jnp.where(broken, jnp.nan, values[lowest])
    largest = jnp.where(broken, jnp.nan, jnp.max(jnp.where(real, values, -jnp.inf)))
    direction = jnp.matmul(vectors[:, lowest], krylov.basis, precision=EXACT)
    direction = direction / jnp.linalg.norm(direction)
    image = product(direction)
    scale = jnp.maximum(jnp.abs(value), jnp.abs(largest))
    rounding = jnp.asarray(10 * math.sqrt(size) * jnp.finfo(dtype).eps, dtype) * scale
    # Half of the risk for each end.
    root = math.log(2 * 1.648 * math.sqrt(size) / (1 - confidence)) / (2 * steps - 1)
    epsilon = root**2 if steps < size else 0.0
    # A random start has a part in every eigenspace: the space being exhausted, all eigenvalues are found.
    exhausted = (krylov.steps < steps) | jnp.asarray(steps == size)
    gap = jnp.asarray(epsilon / (1 - 2 * epsilon) if epsilon < 0.5 else math.inf, dtype)
    lower = value - jnp.where(exhausted, rounding, gap * (largest - value))
    return LowestCurvature(
        value=value,
        lower=jnp.where(broken, jnp.nan, lower),
        direction=unravel(direction, structure),
        residual=jnp.linalg.norm(image - value * direction),
        largest=largest,
        rounding=rounding,
        num_products=steps + 1,
    )
