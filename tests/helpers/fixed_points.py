"""The fixed point of `tanh(Wθ + Uφ + b)` with a non-symmetric W, as a fixed point and as a root."""

import jax.numpy as jnp
import numpy as np

from helpers.problem import Case, Truth, as_jax, rounded


def tanh_map(theta, phi, batch):
    """tanh(Wθ + Uφ + b)."""
    return jnp.tanh(batch["W"] @ theta + batch["U"] @ phi + batch["b"])


def tanh_residual(theta, phi, batch):
    """θ − tanh(Wθ + Uφ + b)."""
    return theta - tanh_map(theta, phi, batch)


def tanh_outer(theta, phi, batch):
    """½ ‖θ − t‖² + ½ ρ‖φ‖²."""
    return 0.5 * jnp.sum((theta - batch["t"]) ** 2) + 0.5 * batch["rho"] * jnp.sum(phi**2)


def tanh_layer(kind="fixed_point", *, radius=0.9, n=8, m=5, seed=0, dtype=np.float64):
    """A deep-equilibrium layer with ‖W‖₂ = `radius`; the adjoint solves `(I − DW)ᵀ`."""
    rng = np.random.default_rng(seed + 7000)
    weights = rng.standard_normal((n, n))
    weights *= radius / np.linalg.norm(weights, 2)
    inner = {"W": weights, "U": rng.standard_normal((n, m)), "b": 0.3 * rng.standard_normal(n)}
    inner = rounded(inner, dtype)
    outer = rounded({"t": rng.standard_normal(n), "rho": np.asarray(0.2)}, dtype)
    phi = rounded(0.5 * rng.standard_normal(m), dtype)

    def solve(phi):
        shift = inner["U"] @ phi + inner["b"]
        theta = np.zeros(n)
        for _ in range(200):
            theta = np.tanh(inner["W"] @ theta + shift)
        for _ in range(5):
            step = np.tanh(inner["W"] @ theta + shift)
            jacobian = np.eye(n) - (1 - step**2)[:, None] * inner["W"]
            theta = theta - np.linalg.solve(jacobian, theta - step)
        slope = 1 - theta**2
        jacobian = np.eye(n) - slope[:, None] * inner["W"]
        adjoint = np.linalg.solve(jacobian.T, theta - outer["t"])
        grad = outer["rho"] * phi + inner["U"].T @ (slope * adjoint)
        value = 0.5 * np.sum((theta - outer["t"]) ** 2) + 0.5 * outer["rho"] * np.sum(phi**2)
        return Truth(theta, float(value), grad)

    return Case(
        name=f"tanh layer as {kind}",
        kind=kind,
        inner=tanh_map if kind == "fixed_point" else tanh_residual,
        outer=tanh_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(n, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=1.0 / (1.0 - radius),
    )
