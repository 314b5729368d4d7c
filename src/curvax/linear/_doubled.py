"""Products with a matrix in about twice the working precision, by error-free transformations."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The integer type of the bits, and how many of the low ones a half leaves out.
_BITS = {jnp.dtype("float32"): (jnp.uint32, 12), jnp.dtype("float64"): (jnp.uint64, 27)}


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding has left out, exactly."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _halves(a: Array) -> tuple[Array, Array]:
    """The leading half of the digits, and the rest; by the bits, since a compiler may contract Veltkamp's formula."""
    kind, dropped = _BITS[a.dtype]
    bits = jax.lax.bitcast_convert_type(a, kind)
    high = jax.lax.bitcast_convert_type((bits >> kind(dropped)) << kind(dropped), a.dtype)
    return high, a - high


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a · b rounded, and what the rounding has left out, up to underflow and the last bit of it."""
    product = a * b
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def doubled_residual(
    matrix: Float[Array, "m n"], x: Float[Array, " n"], rest: Float[Array, " n"], rhs: Float[Array, " m"]
) -> Float[Array, " m"]:
    """b − A (x + rest) as if computed in twice the precision, then rounded.

    Args:
        matrix: A.
        x: The solution.
        rest: What its rounding has left out, far smaller than x.
        rhs: b.

    Cost: about 20 operations an entry, memory three matrices.

    Source: T. Ogita, S. M. Rump, S. Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26, 2005.
    """
    products, errors = two_product(matrix, x[None, :])
    terms = jnp.concatenate([rhs[:, None], -products], axis=1)
    lost = -jnp.sum(errors, axis=1) - jnp.matmul(matrix, rest, precision=jax.lax.Precision.HIGHEST)
    # Pairs, pairs of pairs, …: each rounding error is caught and added at the end.
    length = 2 ** math.ceil(math.log2(terms.shape[1]))
    terms = jnp.pad(terms, ((0, 0), (0, length - terms.shape[1])))
    while terms.shape[1] > 1:
        terms, left_out = two_sum(terms[:, ::2], terms[:, 1::2])
        lost = lost + jnp.sum(left_out, axis=1)
    return terms[:, 0] + lost
