"""The sandwich: what an estimate varies by, whether the model is right or not."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from curvax.operators._base import as_arrays, split
from curvax.operators._dense import structure_dtype, unravel
from curvax.operators._fisher import fisher
from curvax.operators._gauss_newton import check_examples, num_examples
from curvax.operators._hessian import hessian
from curvax.operators._parts import EXACT


class Sandwich(eqx.Module):
    """The covariance of an estimate, made by `sandwich`.

    Attributes:
        covariance: H⁺FH⁺/N over the raveled parameters, robust: right whether or not the model is.
        model_based: F⁺/N, the Cramér–Rao bound: right if the data follow the model.
        standard_errors: √diag of `covariance`, like the parameters; infinite where the data say nothing.
        model_standard_errors: Likewise of `model_based`.
        misspecification: ‖H − F‖ / ‖H‖ in the Frobenius norm. Near zero (as 1/√N) if the data follow the model:
            Bartlett's second identity.
        unidentified: How many directions of the parameters the curvature H does not see.
    """

    covariance: Float[Array, "n n"]
    model_based: Float[Array, "n n"]
    standard_errors: PyTree[Array]
    model_standard_errors: PyTree[Array]
    misspecification: Scalar
    unidentified: Int[Array, ""]


def sandwich(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    params: PyTree,
    inputs: PyTree[Array],
    targets: PyTree[Array],
) -> Sandwich:
    """The covariance V/N = H⁻¹FH⁻¹/N of the minimiser of a mean loss over N examples, and standard errors.

    H is the Hessian of the MEAN loss and F the mean of ∇ℓᵢ∇ℓᵢᵀ, both at `params`, which must be the minimiser (without
    a penalty). Inverses are pseudo-inverses: directions with eigenvalues of |H| below n·eps of the largest are not
    identified, and take no part.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example.
        loss: `loss(output, target)` → scalar, for one example: −log-likelihood, or any other for an M-estimate.
        params: The minimiser, any pytree; only its floating-point arrays vary, n ≤ 4096 numbers in all.
        inputs: Examples, stacked along the leading axis of every leaf; independent of each other.
        targets: Likewise.

    Returns:
        A `Sandwich`. NaN in the parameters or the data gives NaN.

    Raises:
        ValueError: No floating-point parameter, a complex one, too many of them, or examples that do not fit.

    Cost: n products with each of H and F, and eigendecompositions of n × n matrices.

    Source: P. J. Huber, "The behavior of maximum likelihood estimates under nonstandard conditions", 1967; H. White,
    "A heteroskedasticity-consistent covariance matrix estimator and a direct test for heteroskedasticity", 1980.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]), jnp.array([0.0, 2.0, 3.0])
        w = jnp.linalg.lstsq(x, y)[0]
        found = cx.operators.sandwich(lambda w, x: x @ w, cx.operators.SquaredError(), w, x, y)
        found.standard_errors  # of the two coefficients, whatever the variances of the errors are
        ```
    """
    dynamic, _ = split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    like = jax.eval_shape(lambda: dynamic)
    dtype = structure_dtype(like)

    def mean(params: PyTree, data: PyTree) -> Scalar:
        return jnp.mean(jax.vmap(lambda x, y: loss(model_fn(params, x), y))(*data))

    curvature = hessian(mean, as_arrays(params), (inputs, targets)).as_matrix()
    outer = fisher(model_fn, loss, params, inputs, targets, kind="empirical").as_matrix()
    examples = num_examples(inputs)
    inverse, unidentified, blind = _pseudo_inverse(curvature)
    of_model, _, blind_model = _pseudo_inverse(outer)
    covariance = jnp.linalg.multi_dot([inverse, outer, inverse], precision=EXACT) / examples

    def errors(matrix: Array, blind: Array) -> PyTree[Array]:
        spread = jnp.where(blind, jnp.inf, jnp.sqrt(jnp.maximum(jnp.diagonal(matrix), 0)))
        return unravel(jnp.where(jnp.isnan(jnp.diagonal(matrix)), jnp.nan, spread).astype(dtype), like)

    distance = jnp.linalg.norm(curvature - outer) / jnp.linalg.norm(curvature)
    return Sandwich(
        covariance,
        of_model / examples,
        errors(covariance, blind),
        errors(of_model / examples, blind_model),
        distance,
        unidentified,
    )


def _pseudo_inverse(matrix: Float[Array, "n n"]) -> tuple[Array, Array, Array]:
    """The inverse without the directions of eigenvalue zero, their number, and which entries they touch."""
    values, vectors = jnp.linalg.eigh(matrix)
    size = jnp.abs(values)
    null = size <= len(matrix) * jnp.finfo(matrix.dtype).eps * jnp.max(size)
    inverse = jnp.matmul(
        vectors * jnp.where(null, 0, 1 / jnp.where(null, 1, values)), vectors.T, precision=EXACT
    )
    touched = jnp.sum(jnp.where(null, vectors**2, 0), axis=1) > jnp.sqrt(jnp.finfo(matrix.dtype).eps)
    return inverse, jnp.sum(null), touched
