"""Cholesky factorisation of a matrix that may need something added to its diagonal."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Scalar

_GROWTH = 10.0


class ShiftedCholesky(eqx.Module):
    """L Lᵀ = A + shift · I.

    Attributes:
        factor: L, lower triangular; NaN where `failed`.
        shift: What was added to the diagonal: 0 if nothing had to be.
        num_attempts: Factorisations that were tried.
        failed: Whether the cap was reached, or A has a NaN or an infinity.
    """

    factor: Float[Array, "n n"]
    shift: Scalar
    num_attempts: Int[Array, ""]
    failed: Bool[Array, ""]

    def solve(self, vector: Float[Array, " n"]) -> Float[Array, " n"]:
        """(A + shift · I)⁻¹ b; NaN where `failed`."""
        return jax.scipy.linalg.cho_solve((self.factor, True), vector)


def shifted_cholesky(
    matrix: Float[Array, "n n"],
    *,
    first_shift: Scalar | float | None = None,
    max_shift: Scalar | float | None = None,
) -> ShiftedCholesky:
    """The Cholesky factor of A + shift · I for the first shift of 0, s, 10 s, 100 s, … that has one.

    For matrices that are positive definite but for rounding (kernel matrices, covariances), and for Newton steps
    that must be descents. A shift is never silent: look at `shift`, which biases the solution, and at `failed`.

    Args:
        matrix: A, symmetric, float32 or float64; the lower triangle is read.
        first_shift: s > 0, in the units of A; by default √n · eps times the largest entry in size, the level of
            rounding.
        max_shift: Largest shift that may be tried, at least `first_shift`; by default ten times the largest
            absolute row sum, at which every finite matrix is positive definite.

    Returns:
        A `ShiftedCholesky`. Differentiable in A, forward and reverse, with the shift as a constant.

    Raises:
        ValueError: The matrix is not square, real and floating-point; a known shift is not above 0, or the cap
            below the first one: from 0 a shift would never grow.

    Cost: n³/3 operations an attempt, at most about 20 attempts by default, one if A is positive definite; under `vmap`
        as many as the slowest needs.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        kernel = jnp.ones((3, 3))  # of rank one
        found = cx.linear.shifted_cholesky(kernel)
        found.failed, found.shift  # False, about 2e-7
        ```

    Source: J. Nocedal, S. J. Wright, "Numerical optimization", 2nd edition, 2006, algorithm 3.3; the cap is ours.
    """
    matrix = jnp.asarray(matrix) if isinstance(matrix, np.ndarray) else matrix
    if not (eqx.is_array(matrix) and matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1]):
        raise ValueError(
            f"`matrix` of `shifted_cholesky` must be a square array, found shape {jnp.shape(matrix)}."
        )
    if matrix.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"`matrix` of `shifted_cholesky` must be float32 or float64, found {matrix.dtype}. Convert it with "
            "`astype`."
        )
    for argument, value in (("first_shift", first_shift), ("max_shift", max_shift)):
        if value is not None and not isinstance(value, jax.core.Tracer) and not 0 < float(value) < jnp.inf:
            raise ValueError(
                f"`{argument}` of `shifted_cholesky` must be above 0 and finite, found {value}: a shift that starts "
                "at 0 never grows. None chooses one."
            )
    if _known(first_shift) and _known(max_shift) and float(max_shift) < float(first_shift):  # type: ignore[arg-type]
        raise ValueError(
            f"`max_shift` of `shifted_cholesky` must be at least `first_shift`, found {max_shift} < {first_shift}."
        )
    if matrix.shape[0] == 0:
        return ShiftedCholesky(matrix, jnp.zeros((), matrix.dtype), jnp.asarray(0), jnp.asarray(False))
    first, most = (None if v is None else jnp.asarray(v, matrix.dtype) for v in (first_shift, max_shift))
    return _factorised(matrix, first, most)


@jax.jit
def _factorised(matrix: Float[Array, "n n"], first: Scalar | None, most: Scalar | None) -> ShiftedCholesky:
    """One program, also where it is called outside of `jit`."""
    size, dtype = matrix.shape[0], matrix.dtype
    constant = jax.lax.stop_gradient(matrix)
    constant = jnp.tril(constant) + jnp.tril(constant, -1).T
    largest = jnp.max(jnp.abs(constant))
    tiny = jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    least = jnp.maximum(size**0.5 * jnp.finfo(dtype).eps * largest, tiny)
    start = least if first is None else jax.lax.stop_gradient(first)
    limit = 10 * jnp.maximum(jnp.max(jnp.sum(jnp.abs(constant), axis=1)), start)
    limit = limit if most is None else jax.lax.stop_gradient(most)

    def attempt(shift: Scalar) -> Float[Array, "n n"]:
        return jnp.linalg.cholesky(constant + shift * jnp.eye(size, dtype=dtype), symmetrize_input=False)

    def again(carry: tuple[Array, ...]) -> Bool[Array, ""]:
        factor, _, following, _ = carry
        # Comparisons with NaN are false, and end it. A shift that was traced may be 0.
        return ~jnp.all(jnp.isfinite(factor)) & (following <= limit) & (following > 0) & jnp.isfinite(largest)

    def grow(carry: tuple[Array, ...]) -> Any:
        _, _, shift, count = carry
        return attempt(shift), shift, shift * _GROWTH, count + 1

    zero = jnp.zeros((), dtype)
    factor, shift, _, count = jax.lax.while_loop(again, grow, (attempt(zero), zero, start, jnp.asarray(1)))
    failed = ~jnp.all(jnp.isfinite(factor))
    factor = jnp.where(failed, jnp.nan, factor)
    return ShiftedCholesky(_with_derivative(matrix, factor), shift, count, failed)


@jax.custom_jvp
def _with_derivative(matrix: Float[Array, "n n"], factor: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`factor`, a constant, with the derivative of the factor of `matrix` plus a constant."""
    del matrix
    return factor


@_with_derivative.defjvp
def _with_derivative_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """L̇ = L Φ(L⁻¹ Ȧ L⁻ᵀ), Φ the lower triangle with half of the diagonal."""
    factor = _with_derivative(*primals)
    change = jnp.tril(tangents[0]) + jnp.tril(tangents[0], -1).T
    half = jax.scipy.linalg.solve_triangular(factor, change, lower=True)
    inner = jax.scipy.linalg.solve_triangular(factor, half.T, lower=True)
    phi = jnp.tril(inner) - 0.5 * jnp.diag(jnp.diagonal(inner))
    return factor, jnp.matmul(factor, phi, precision=jax.lax.Precision.HIGHEST)


def _known(value: Any) -> bool:
    return value is not None and not isinstance(value, jax.core.Tracer)
