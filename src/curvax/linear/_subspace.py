"""The leading singular triplets of an operator from its products, by restarted block Krylov iteration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from curvax._control import map_in_chunks

EXACT = jax.lax.Precision.HIGHEST
# Vectors beyond those that are wanted, blocks of the Krylov space, and vectors pushed through the operator at once.
_MORE, _BLOCKS, _CHUNK = 8, 3, 16


class Triplets(NamedTuple):
    """A vᵢ = σᵢ uᵢ, in rows, σ falling; which have ‖Aᵀuᵢ − σᵢvᵢ‖ ≤ √eps · σᵢ."""

    left: Float[Array, "k m"]
    values: Float[Array, " k"]
    right: Float[Array, "k n"]
    settled: Bool[Array, " k"]
    num_cycles: Int[Array, ""]


def leading_triplets(
    product: Callable[[Float[Array, " n"]], Float[Array, " m"]],
    transposed: Callable[[Float[Array, " m"]], Float[Array, " n"]],
    sizes: tuple[int, int],
    *,
    rank: int,
    max_cycles: int,
    key: PRNGKeyArray,
    dtype: Any,
) -> Triplets:
    """`rank` triplets. A cycle spans V, AᵀAV, (AᵀA)²V and starts the next one from the best of it."""
    rows, columns = sizes
    rank = min(rank, rows, columns)
    width = min(rank + _MORE, rows, columns)
    # The last block may be what is left of the whole space.
    more = [min(width, columns - width * i) for i in range(1, _BLOCKS) if width * i < columns]
    forth = lambda block: map_in_chunks(product, block, _CHUNK)  # noqa: E731
    back = lambda block: map_in_chunks(transposed, block, _CHUNK)  # noqa: E731

    def cycle(carry: tuple[Array, Triplets]) -> tuple[Array, Triplets]:
        block, before = carry
        basis, images = [block], [forth(block)]
        for count in more:
            block = _orthogonal(back(images[-1][:count]), jnp.concatenate(basis))
            basis.append(block)
            images.append(forth(block))
        space, image = jnp.concatenate(basis), jnp.concatenate(images)
        # The SVD of A on this space, by rows: imageᵀ = A · spaceᵀ.
        finite = jnp.all(jnp.isfinite(image))
        mix, values, left = jnp.linalg.svd(jnp.where(finite, image, 0), full_matrices=False)
        values = jnp.where(finite, values, jnp.nan)[:width]
        right, left = jnp.matmul(mix.T[:width], space, precision=EXACT), left[:width]
        misfit = jnp.linalg.norm(back(left[:rank]) - values[:rank, None] * right[:rank], axis=1)
        # At the level of rounding in the largest there is nothing to converge to.
        noise = 100 * jnp.finfo(dtype).eps * values[0]
        settled = misfit <= jnp.finfo(dtype).eps ** 0.5 * values[:rank] + noise
        found = Triplets(left[:rank], values[:rank], right[:rank], settled, before.num_cycles + 1)
        return right, found

    def unfinished(carry: tuple[Array, Triplets]) -> Bool[Array, ""]:
        found = carry[1]
        # NaN ends it.
        bad = (found.num_cycles > 0) & ~jnp.all(jnp.isfinite(found.values))
        return ~jnp.all(found.settled) & ~bad & (found.num_cycles < max_cycles)

    first = jnp.linalg.qr(jax.random.normal(key, (columns, width), dtype))[0].T
    nothing = Triplets(
        jnp.zeros((rank, rows), dtype),
        jnp.zeros(rank, dtype),
        jnp.zeros((rank, columns), dtype),
        jnp.zeros(rank, bool),
        jnp.asarray(0),
    )
    return jax.lax.while_loop(unfinished, cycle, (first, nothing))[1]


def _orthogonal(block: Float[Array, "b n"], basis: Float[Array, "k n"]) -> Float[Array, "b n"]:
    """An orthonormal basis of a block less what is in the span of another one; twice, for the sake of rounding."""
    for _ in range(2):
        along = jnp.matmul(block, basis.T, precision=EXACT)
        rest = block - jnp.matmul(along, basis, precision=EXACT)
        # Directions of an exhausted space are any that QR comes up with, and made orthogonal in the second turn.
        size = jnp.linalg.norm(rest, axis=1, keepdims=True)
        block = jnp.linalg.qr((rest / jnp.where(size > 0, size, 1)).T)[0].T
    return block
