"""A step for the Neumann series, from the spectrum that a short Arnoldi run sees."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

_KRYLOV = 20
_SQUARINGS = 20
_CANDIDATES = 64
# Ritz values fall short of the largest eigenvalue; a step of 2/λ would turn that into divergence.
_SAFETY = 0.8


def arnoldi(apply: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> Float[Array, "m m"]:
    """The operator compressed to the Krylov space of a fixed random vector, m = min(size, 20).

    Cost: m products and m + 1 vectors. Where the space is used up early the rest is the identity times
    the first diagonal entry, which adds no eigenvalue beyond the field of values.
    """
    m = min(_KRYLOV, size)
    seed = jax.random.normal(jax.random.key(0), (size,), dtype)
    basis = jnp.zeros((m + 1, size), dtype).at[0].set(seed / jnp.linalg.norm(seed))

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, compressed = carry
        w = apply(basis[k])
        length = jnp.linalg.norm(w)
        first = basis @ w
        w = w - first @ basis
        second = basis @ w
        w = w - second @ basis
        height = jnp.linalg.norm(w)
        used_up = ~(height > 100 * jnp.finfo(dtype).eps * length)
        column = (first + second).at[k + 1].set(jnp.where(used_up, 0, height))
        # A zero basis vector gives a zero column: put the Rayleigh quotient of the seed there instead.
        empty = ~(jnp.sum(basis[k] ** 2) > 0.5)
        filler = jnp.zeros_like(column).at[k].set(compressed[0, 0])
        return (
            basis.at[k + 1].set(jnp.where(used_up, 0, w / jnp.where(used_up, 1, height))),
            compressed.at[:, k].set(jnp.where(empty, filler, column)),
        )

    _, compressed = jax.lax.fori_loop(0, m, body, (basis, jnp.zeros((m + 1, m), dtype)))
    return compressed[:m]


def growth_rate(matrix: Float[Array, "m m"]) -> Scalar:
    """The spectral radius as Gelfand's ‖Mᵏ‖^(1/k), k = 2²⁰, by repeated squaring.

    Power iteration does not converge for a complex dominant pair; the growth rate does, and needs no
    nonsymmetric eigenvalue routine (JAX has that on the CPU only).
    """

    def body(_: Array, carry: tuple[Array, Scalar]) -> tuple[Array, Scalar]:
        power, log_norm = carry  # the power so far is exp(log_norm) · power, with ‖power‖ = 1
        power = power @ power
        norm = jnp.linalg.norm(power)
        safe = jnp.where(norm > 0, norm, 1)
        # Nilpotent matrices: the radius is zero.
        return power / safe, 2 * log_norm + jnp.where(norm > 0, jnp.log(safe), -jnp.inf)

    norm = jnp.linalg.norm(matrix)
    safe = jnp.where(norm > 0, norm, 1)
    begin = (matrix / safe, jnp.where(norm > 0, jnp.log(safe), -jnp.inf))
    _, log_norm = jax.lax.fori_loop(0, _SQUARINGS, body, begin)
    return jnp.exp(log_norm / 2**_SQUARINGS)


def series_step(apply: Callable[[Array], Array], size: int, dtype: jnp.dtype) -> tuple[Scalar, Scalar]:
    """The step α that contracts best, and the spectral radius of I − αA as far as it was seen.

    α is 0.8 of the minimiser of ρ(I − αH) over a grid of both signs, H the compressed operator. The
    steps that converge form an interval from 0 to min 2 Re λ/|λ|², so that the shorter step does too.
    """
    compressed = arnoldi(apply, size, dtype)
    radius = growth_rate(compressed)
    half = jnp.geomspace(1e-3, 2, _CANDIDATES // 2).astype(dtype) / jnp.where(radius > 0, radius, 1)
    steps = jnp.concatenate([half, -half])
    identity = jnp.eye(compressed.shape[0], dtype=dtype)
    rates = jax.vmap(lambda step: growth_rate(identity - step * compressed))(steps)
    step = _SAFETY * steps[jnp.argmin(rates)]
    return step, growth_rate(identity - step * compressed)
