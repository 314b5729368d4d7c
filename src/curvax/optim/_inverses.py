"""Inverses and eigenvectors of many factors, those of equal shape in one batch, and what is done if one fails."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

EXACT = jax.lax.Precision.HIGHEST
# Sums of up to so many numbers are one kernel of XLA.
TINY = 32
# So many factors of a size are factorised one by one.
FEW = 4


def shifted_inverses(
    matrices: Sequence[Float[Array, "stack n n"]],
    shifts: Sequence[Float[Array, " stack"]],
    means: Sequence[Float[Array, " stack"]],
) -> list[tuple[Float[Array, "stack n n"], Bool[Array, " stack"]]]:
    """(F + shift I)⁻¹ by Cholesky factors; where there is none, I / (mean + shift), and True.

    Args:
        matrices: Symmetric, finite.
        shifts: One for each.
        means: Their mean eigenvalues.
    """

    def inverses(
        stacked: Float[Array, "stack n n"], shift: Float[Array, " stack"], mean: Float[Array, " stack"]
    ) -> tuple[Array, Array]:
        eye = jnp.eye(stacked.shape[-1], dtype=stacked.dtype)
        shifted = stacked + shift[:, None, None] * eye
        # LAPACK wants columns: of a symmetric matrix its transpose costs nothing.
        lower = jax.lax.linalg.cholesky(shifted.swapaxes(1, 2), symmetrize_input=False)
        inverted = jax.lax.linalg.triangular_solve(
            lower, jnp.broadcast_to(eye, stacked.shape), left_side=True, lower=True
        ).swapaxes(1, 2)
        found = jnp.einsum("sij,skj->sik", inverted, inverted, precision=EXACT)
        bad = ~jnp.isfinite(jnp.sum(found, axis=(1, 2)))
        rough = eye / (mean + shift)[:, None, None]
        return jnp.where(bad[:, None, None], rough, found), bad

    return _batched(inverses, matrices, shifts, means)


def eigenvectors(
    matrices: Sequence[Float[Array, "stack n n"]], means: Sequence[Float[Array, " stack"]]
) -> list[tuple[Float[Array, "stack n n"], Float[Array, "stack n"], Bool[Array, " stack"]]]:
    """U and s ≥ 0 with F = U diag(s) Uᵀ; where there are none U = I, s the mean of the diagonal, and True.

    Args:
        matrices: Symmetric, finite.
        means: Their mean eigenvalues.
    """

    def decomposed(
        stacked: Float[Array, "stack n n"], mean: Float[Array, " stack"]
    ) -> tuple[Array, Array, Array]:
        eye = jnp.eye(stacked.shape[-1], dtype=stacked.dtype)
        vectors, values = jax.lax.linalg.eigh(stacked.swapaxes(1, 2), symmetrize_input=False)
        # A decomposition that fails is NaN all over.
        bad = ~jnp.isfinite(values[:, -1])
        vectors = jnp.where(bad[:, None, None], eye, vectors)
        return vectors, jnp.where(bad[:, None], mean[:, None], jnp.maximum(values, 0)), bad

    return _batched(decomposed, matrices, means)


def _batched(function: Callable[..., tuple[Array, ...]], *arguments: Sequence[Array]) -> list:
    """The function of stacks, called once for all of equal size; on CPU for each of a few."""
    matrices = arguments[0]
    results: list = [None] * len(matrices)
    for size, dtype in dict.fromkeys((m.shape[-1], m.dtype) for m in matrices):
        same = [i for i, m in enumerate(matrices) if (m.shape[-1], m.dtype) == (size, dtype)]
        if jax.default_backend() == "cpu" and sum(len(matrices[i]) for i in same) <= FEW:
            # One after the other anyway, and compiled once; a loop takes copies, and is compiled apart.
            for i in same:
                members = range(len(matrices[i]))
                alone = [function(*(argument[i][j : j + 1] for argument in arguments)) for j in members]
                results[i] = (
                    alone[0] if len(alone) == 1 else tuple(map(jnp.concatenate, zip(*alone, strict=True)))
                )
            continue
        found = _one_by_one(function)(
            *(jnp.concatenate([argument[i] for i in same]) for argument in arguments)
        )
        start = 0
        for i in same:
            stack = len(matrices[i])
            results[i] = tuple(part[start : start + stack] for part in found)
            start += stack
    return results


def _one_by_one(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """The same function; on CPU in a loop over the members of the stack.

    There jaxlib's LAPACK kernels hand the members of a batch to the pool of threads that they run in, and wait: as many
    of them at a time as there are threads wait for ever (seen in JAX 0.10.2 with two threads). One matrix at a time
    does not go through the pool.
    """
    if jax.default_backend() != "cpu":
        return function

    def looped(*stacked: Array) -> tuple[Array, ...]:
        if len(stacked[0]) == 1:
            return function(*stacked)
        alone = lambda members: tuple(part[0] for part in function(*(member[None] for member in members)))
        return jax.lax.map(alone, stacked)

    return looped


def multiplied(
    left: Array | None, vectors: Float[Array, "stack rows columns"], right: Array | None, turned: bool = False
) -> Float[Array, "stack rows columns"]:
    """L V Rᵀ, or Lᵀ V R if turned; None is the identity, and an array (stack, n) a diagonal."""
    if left is not None and left.ndim == 2:
        vectors = left[:, :, None] * vectors
    elif left is not None:
        subscripts = "sji,sjk->sik" if turned else "sij,sjk->sik"
        vectors = jnp.einsum(subscripts, left, vectors, precision=EXACT)
    if right is not None and right.ndim == 2:
        return vectors * right[:, None, :]
    if right is not None:
        subscripts = "sij,sjk->sik" if turned else "sij,skj->sik"
        vectors = jnp.einsum(subscripts, vectors, right, precision=EXACT)
    return vectors


def shifts_of(
    left: Array, right: Array, damping: Array
) -> tuple[Float[Array, " stack"], Float[Array, " stack"]]:
    """π√damping and √damping/π, π² = (tr A / m) / (tr B / n)."""
    of_left, of_right = mean_eigenvalue(left), mean_eigenvalue(right)
    usable = (of_left > 0) & (of_right > 0)
    ratio = jnp.sqrt(jnp.where(usable, of_left, 1) / jnp.where(usable, of_right, 1))
    root = jnp.sqrt(damping.astype(ratio.dtype))
    return ratio * root, root / ratio


def mean_eigenvalue(factor: Array) -> Float[Array, " stack"]:
    """The mean of the diagonal. Every entry is read, and must be finite."""
    if factor.ndim == 2:
        return jnp.mean(factor, axis=1)
    size = factor.shape[-1]
    if size <= TINY:
        return jnp.mean(jnp.diagonal(factor, axis1=1, axis2=2), axis=1)
    # A product with I/n, which all factors of a size share: XLA on CPU compiles nothing for it.
    return jnp.einsum("sij,ij->s", factor, jnp.eye(size, dtype=factor.dtype) / size, precision=EXACT)
