"""Lanczos' tridiagonal projection of a symmetric operator, with full reorthogonalisation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax.operators._parts import EXACT

Vector = Float[Array, " n"]
MatVec = Callable[[Vector], Vector]


class Krylov(NamedTuple):
    """H Z = V T + β v eₘᵀ with Vᵀ Z = I, where Z = V, or Z = M V with a preconditioner M.

    The space being exhausted after `steps`, the rest of `basis` and β are zero, and T goes on with its first entry,
    decoupled from what is before, which lies between its extreme eigenvalues.
    """

    basis: Float[Array, "m n"]  # the rows are Z
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m"]  # entry k couples k to k + 1; the last one is β
    steps: Int[Array, ""]
    norm: Float[Array, ""]  # of the start
    asymmetry: Float[Array, ""]  # see `lanczos`
    definite: Bool[Array, ""]  # whether M showed no negative curvature


def lanczos(product: MatVec, start: Vector, num_steps: int, precondition: MatVec | None = None) -> Krylov:
    """A basis of the Krylov space of `start`, and H projected on it, in `num_steps` products.

    Each new vector is orthogonalised twice against all before it. With `precondition`, M, the basis is that of H M,
    which is self-adjoint in uᵀ M v: with z = M v

        α_k = z_kᵀ H z_k,   w = H z_k − α_k v_k − β_{k−1} v_{k−1},   β_k² = wᵀ M w.

    Of z_jᵀ H z_k, which the orthogonalisation computes, all but α_k and β_{k−1} vanish for a symmetric H: `asymmetry`
    is the largest Euclidean norm of the others, relative to the largest row of T.

    Memory num_steps × n, twice that with `precondition`. More steps than n are not taken.

    Source: G. Golub and C. Van Loan, "Matrix computations", 4th edition, 2013, sections 10.3 and 11.5.
    """
    n, dtype = start.size, start.dtype
    num_steps = min(num_steps, n)
    rounding = 10 * n**0.5 * jnp.finfo(dtype).eps
    # No square of the start over- or underflows, and no division reaches a zero.
    largest = jnp.max(jnp.abs(start), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    scaled = start / unit
    image = scaled if precondition is None else precondition(scaled)
    square = _dot(scaled, image)
    size = jnp.sqrt(jnp.maximum(square, 0))
    safe = jnp.where(size > 0, size, 1)

    def step(k: Array, carry: tuple) -> tuple:
        v, z, beta, stored, diagonal, off, steps, scale, definite, asymmetry = carry
        active = k == steps
        # Without a preconditioner z = v, and there is one store for both.
        stored = tuple(
            store.at[k].set(jnp.where(active, new, 0)) for store, new in zip(stored, (z, v), strict=False)
        )
        images, bases = stored[0], stored[-1]
        w = product(z)
        alpha = _dot(z, w)
        along = _dot(images, w)
        index = jnp.arange(num_steps)
        expected = jnp.where(index == k, alpha, jnp.where(index == k - 1, beta, 0))
        excess = jnp.linalg.norm(along - expected)
        w = w - _dot(along, bases)
        w = w - _dot(_dot(images, w), bases)
        image = w if precondition is None else precondition(w)
        square = _dot(w, image)
        new = jnp.sqrt(jnp.maximum(square, 0))
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        # A NaN goes on, so that it shows.
        goes_on = active & ~(new <= rounding * scale)
        diagonal = diagonal.at[k].set(jnp.where(active, alpha, diagonal[0]))
        off = off.at[k].set(jnp.where(goes_on, new, 0))
        safe = jnp.where(goes_on, new, 1)
        return (
            jnp.where(goes_on, w / safe, v),
            jnp.where(goes_on, image / safe, z),
            jnp.where(goes_on, new, 0),
            stored,
            diagonal,
            off,
            steps + goes_on.astype(steps.dtype),
            scale,
            definite & ~(active & (square < -(jnp.finfo(dtype).eps ** 0.5) * _dot(w, w))),
            jnp.maximum(asymmetry, jnp.where(active, excess, 0)),
        )

    zero, zeros = jnp.zeros((), dtype), jnp.zeros(num_steps, dtype)
    stored = (jnp.zeros((num_steps, n), dtype),) * (1 if precondition is None else 2)
    carry = (
        *(scaled / safe, image / safe, zero, stored, zeros, zeros, jnp.zeros((), jnp.int32), zero),
        *(square > 0, zero),
    )
    carry = jax.lax.fori_loop(0, num_steps, step, carry)
    _, _, _, stored, diagonal, off, steps, scale, definite, asymmetry = carry
    asymmetry = asymmetry / jnp.where(scale > 0, scale, 1)
    steps = jnp.minimum(steps + 1, num_steps)
    return Krylov(stored[0], diagonal, off, steps, unit * size, asymmetry, definite)


def _dot(a: Array, b: Array) -> Array:
    """GPUs round the factors of a float32 product to ten bits unless they are told not to."""
    return jnp.matmul(a, b, precision=EXACT)


def ritz(krylov: Krylov, size: int | None = None) -> tuple[Float[Array, " size"], Float[Array, "size size"]]:
    """Eigenvalues, rising, and eigenvectors of T, or of the leading part of T; NaN values where T has a NaN."""
    size = krylov.diagonal.size if size is None else size
    diagonal, off = krylov.diagonal[:size], krylov.off_diagonal[: size - 1]
    matrix = jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)
    # `eigh` of a matrix with a NaN may hang or lie.
    finite = jnp.all(jnp.isfinite(matrix))
    values, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    return jnp.where(finite, values, jnp.nan), vectors
