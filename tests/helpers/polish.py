"""Truth of a nonlinear problem near a given point: dense Newton in float64, then dense solves.

Truth is polished from the point that was reached, never taken from another minimiser: two minimisers
may end in two minima, and each has a hypergradient of its own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree


class Polished(NamedTuple):
    """A stationary point, its hypergradient (flat), and how far both can be trusted."""

    theta: Any
    grad: Any
    residual: Any
    distance: Any
    smallest_eigenvalue: Any
    largest_eigenvalue: Any


def dense_hypergradient(inner, outer, theta, phi, inner_data, outer_data):
    """`∂f/∂φ − (∂²g/∂θ∂φ)ᵀ (∂²g/∂θ²)⁻ᵀ ∂f/∂θ` from dense derivatives, as a flat vector."""
    flat_theta, theta_of = ravel_pytree(theta)
    flat_phi, phi_of = ravel_pytree(phi)

    def slope(t, p):
        return jax.grad(lambda s: inner(theta_of(s), phi_of(p), inner_data))(t)

    def loss(t, p):
        return outer(theta_of(t), phi_of(p), outer_data)

    curvature = jax.jacfwd(slope)(flat_theta, flat_phi)
    cross = jax.jacfwd(slope, argnums=1)(flat_theta, flat_phi)
    pull, direct = jax.grad(loss, argnums=(0, 1))(flat_theta, flat_phi)
    return direct - cross.T @ jnp.linalg.solve(curvature.T, pull)


def polish(inner, outer, theta, phi, inner_data, outer_data, steps=8) -> Polished:
    """Newton's method on the inner gradient from `theta`; works under `jit` and `vmap`."""
    start, theta_of = ravel_pytree(theta)

    def slope(t):
        return jax.grad(lambda s: inner(theta_of(s), phi, inner_data))(t)

    def newton(t, _):
        return t - jnp.linalg.solve(jax.jacfwd(slope)(t), slope(t)), None

    end, _ = jax.lax.scan(newton, start, None, length=steps)
    eigenvalues = jnp.linalg.eigvalsh(jax.jacfwd(slope)(end))
    return Polished(
        theta=theta_of(end),
        grad=dense_hypergradient(inner, outer, theta_of(end), phi, inner_data, outer_data),
        residual=jnp.linalg.norm(slope(end)),
        distance=jnp.linalg.norm(end - start),
        smallest_eigenvalue=eigenvalues[0],
        largest_eigenvalue=eigenvalues[-1],
    )
