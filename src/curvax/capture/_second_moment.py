"""The symmetric product all Kronecker factors are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Blocks of so many columns are multiplied out: below it the halves are not worth their overhead.
SMALLEST_BLOCK = 128


def second_moment(x: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """XᵀX, the SUM over rows of their outer products; half-precision rows are summed in float32.

    On CPU the two diagonal blocks and one of the other two are computed, over and over, which takes half the time of
    the product for a few hundred columns.

    Args:
        x: Rows, shape (n, d).

    Returns:
        A symmetric matrix, shape (d, d).

    Cost: n·d²/2 multiplications on CPU (n·d² elsewhere and up to 128 columns).

    Example:
        >>> print(cx.capture.second_moment(jnp.array([[1.0, 2.0], [0.0, 1.0]])))
        [[1. 2.]
         [2. 5.]]
    """
    return _halved(x) if jax.default_backend() == "cpu" else _product(x, x)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """What sums over many entries of this dtype are kept in."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def _product(x: Array, y: Array) -> Array:
    kept = at_least_float32(x.dtype)
    return jnp.matmul(x.T, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=kept)


def _halved(x: Array) -> Array:
    columns = x.shape[1]
    if columns <= SMALLEST_BLOCK:
        return _product(x, x)
    half = -(-columns // (2 * SMALLEST_BLOCK)) * SMALLEST_BLOCK
    left, right = x[:, :half], x[:, half:]
    corner = _product(left, right)
    return jnp.block([[_halved(left), corner], [corner.T, _halved(right)]])
