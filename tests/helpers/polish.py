"""Truth of a nonlinear problem near a given point: dense Newton in float64, then dense solves.

Truth is polished from the point that was reached, never taken from another minimiser: two minimisers
may end in two minima, and each has a hypergradient of its own. The derivatives are JAX's dense ones, compiled
once per problem; all solves are NumPy's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Polished(NamedTuple):
    """A stationary point, its hypergradient (flat), and how far both can be trusted."""

    theta: Any
    grad: np.ndarray
    residual: float
    distance: float
    smallest_eigenvalue: float


def polisher(inner, outer, theta_like, phi_like, steps=12):
    """(theta, phi, inner data, outer data) ↦ `Polished`, for θ and φ of these structures.

    The hypergradient is `∂f/∂φ − (∂²g/∂θ∂φ)ᵀ (∂²g/∂θ²)⁻¹ ∂f/∂θ` at the end of Newton's method.
    """
    theta_of, phi_of = ravel_pytree(theta_like)[1], ravel_pytree(phi_like)[1]

    @jax.jit
    def parts(t, p, inner_data, outer_data):
        def slope(t, p):
            return jax.grad(lambda s: inner(theta_of(s), phi_of(p), inner_data))(t)

        def loss(t, p):
            return outer(theta_of(t), phi_of(p), outer_data)

        pull, direct = jax.grad(loss, argnums=(0, 1))(t, p)
        curvature, cross = jax.jacfwd(slope, argnums=(0, 1))(t, p)
        return slope(t, p), curvature, cross, pull, direct

    def run(theta, phi, inner_data, outer_data) -> Polished:
        start, p = np.asarray(ravel_pytree(theta)[0]), ravel_pytree(phi)[0]
        t = start
        for _ in range(steps):
            slope, curvature, *_ = (np.asarray(x) for x in parts(jnp.asarray(t), p, inner_data, outer_data))
            t = t - np.linalg.solve(curvature, slope)
        slope, curvature, cross, pull, direct = (
            np.asarray(x) for x in parts(jnp.asarray(t), p, inner_data, outer_data)
        )
        return Polished(
            theta=theta_of(jnp.asarray(t)),
            grad=direct - cross.T @ np.linalg.solve(curvature.T, pull),
            residual=float(np.linalg.norm(slope)),
            distance=float(np.linalg.norm(t - start)),
            smallest_eigenvalue=float(np.linalg.eigvalsh(curvature)[0]),
        )

    return run
