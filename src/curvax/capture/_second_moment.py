"""The symmetric product all Kronecker factors are made of."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def second_moment(x: Float[Array, "n d"]) -> Float[Array, "d d"]:
    """XᵀX, the SUM over rows of their outer products; half-precision rows are summed in float32.

    Multiplied out in one product. Leaving out what is symmetric, block by block, takes copies of the columns: where the
    product runs near the speed of the machine they cost what is saved, and three times the memory.

    Args:
        x: Rows, shape (n, d).

    Returns:
        A symmetric matrix, shape (d, d).

    Cost: n·d² multiplications.

    Example:
        >>> print(cx.capture.second_moment(jnp.array([[1.0, 2.0], [0.0, 1.0]])))
        [[1. 2.]
         [2. 5.]]
    """
    kept = at_least_float32(x.dtype)
    return jnp.matmul(x.T, x, precision=jax.lax.Precision.HIGHEST, preferred_element_type=kept)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """What sums over many entries of this dtype are kept in."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)
