"""Quadratic inner problems: the hypergradient is two dense solves.

With `g = ½ wᵀHw − wᵀ(Bφ + b)` and `f = ½ (w − t)ᵀM(w − t) + cᵀw + ½ ρ‖φ‖²`:
`w* = H⁻¹(Bφ + b)` and `df/dφ = ρφ + Bᵀ H⁻¹ (M(w* − t) + c)`.
"""

import jax.numpy as jnp
import numpy as np

from helpers.dense import refined_solve, rotated, spectrum
from helpers.problem import Case, Truth, as_jax, rounded


def quadratic_inner(theta, phi, batch):
    """½ wᵀHw − wᵀ(Bφ + b)."""
    return 0.5 * theta @ (batch["H"] @ theta) - theta @ (batch["B"] @ phi + batch["b"])


def quadratic_outer(theta, phi, batch):
    """½ (w − t)ᵀM(w − t) + cᵀw + ½ ρ‖φ‖²."""
    offset = theta - batch["t"]
    return 0.5 * offset @ (batch["M"] @ offset) + batch["c"] @ theta + 0.5 * batch["rho"] * (phi @ phi)


def quadratic_map(theta, phi, batch):
    """One gradient step on the inner quadratic: a fixed-point form of the same problem."""
    return theta - batch["step"] * (batch["H"] @ theta - batch["B"] @ phi - batch["b"])


def quadratic_residual(theta, phi, batch):
    """The inner gradient: a root form. `H` need not be symmetric here."""
    return batch["H"] @ theta - batch["B"] @ phi - batch["b"]


def outer_data(n, rng, curved=True):
    """Data of `quadratic_outer` with a non-diagonal metric (or a linear loss)."""
    metric = rotated(rng.uniform(0.5, 2.0, n), rng) if curved else np.zeros((n, n))
    return {
        "M": metric,
        "t": rng.standard_normal(n),
        "c": rng.standard_normal(n),
        "rho": np.asarray(0.3),
    }


def reference(inner, outer):
    """The truth of `quadratic_*` for these data; H need not be symmetric."""

    def solve(phi):
        theta = refined_solve(inner["H"], inner["B"] @ phi + inner["b"])
        offset = theta - outer["t"]
        value = 0.5 * offset @ outer["M"] @ offset + outer["c"] @ theta + 0.5 * outer["rho"] * phi @ phi
        adjoint = refined_solve(inner["H"].T, outer["M"] @ offset + outer["c"])
        return Truth(theta, float(value), outer["rho"] * phi + inner["B"].T @ adjoint)

    return solve


def quadratic_case(matrix, *, dtype=np.float64, seed=0, name="quadratic", kind="minimum", curved=True):
    """A case with the curvature `matrix`, a square non-symmetric B and a non-diagonal outer metric."""
    rng = np.random.default_rng(seed)
    n = len(matrix)
    inner = {"H": matrix, "B": rng.standard_normal((n, n)), "b": rng.standard_normal(n)}
    if kind == "fixed_point":
        inner["step"] = np.asarray(1.0 / np.linalg.norm(matrix, 2))
    inner = rounded(inner, dtype)
    outer = rounded(outer_data(n, rng, curved), dtype)
    phi = rounded(rng.standard_normal(n), dtype)
    functions = {"minimum": quadratic_inner, "fixed_point": quadratic_map, "root": quadratic_residual}
    return Case(
        name=name,
        kind=kind,
        inner=functions[kind],
        outer=quadratic_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(n, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=reference(inner, outer),
        condition=float(np.linalg.cond(inner["H"])),
    )


def scaled_identity(scale, n=12, **kwargs):
    """H = c·I, where a conjugate gradient converges in one step and then divides by zero."""
    return quadratic_case(scale * np.eye(n), name=f"quadratic H={scale:g}I", **kwargs)


def conditioned(condition, n=12, kind="log-uniform", scale=1.0, seed=0, case="minimum", **kwargs):
    """A rotated H with eigenvalues `scale * [1 / condition, 1]`."""
    rng = np.random.default_rng(seed + 1000)
    matrix = scale * rotated(spectrum(kind, n, condition, rng), rng)
    name = f"quadratic {kind} condition {condition:g}"
    return quadratic_case(matrix, name=name, seed=seed, kind=case, **kwargs)


def nonsymmetric(n=12, seed=0, **kwargs):
    """A well-posed root problem with a non-symmetric Jacobian."""
    rng = np.random.default_rng(seed + 2000)
    matrix = 2.0 * np.eye(n) + 0.8 * rng.standard_normal((n, n)) / np.sqrt(n)
    matrix[0, -1] += 1.5
    return quadratic_case(matrix, name="linear root, non-symmetric", kind="root", seed=seed, **kwargs)


def coupled_inner(theta, phi, batch):
    """½ wᵀ(H + diag(exp φ))w − bᵀw: the cross derivative depends on w."""
    return 0.5 * theta @ (batch["H"] @ theta) + 0.5 * jnp.sum(jnp.exp(phi) * theta**2) - theta @ batch["b"]


def coupled(condition=1e4, n=12, seed=0, dtype=np.float64):
    """One log penalty per coordinate: `df/dφ_i = −exp(φ_i) w_i q_i + ρφ_i`, q the adjoint."""
    rng = np.random.default_rng(seed + 3000)
    matrix = rotated(spectrum("log-uniform", n, condition, rng), rng)
    inner = rounded({"H": matrix, "b": rng.standard_normal(n)}, dtype)
    outer = rounded(outer_data(n, rng), dtype)
    phi = rounded(rng.uniform(-8.0, -4.0, n), dtype)

    def solve(phi):
        curvature = inner["H"] + np.diag(np.exp(phi))
        theta = refined_solve(curvature, inner["b"])
        offset = theta - outer["t"]
        value = 0.5 * offset @ outer["M"] @ offset + outer["c"] @ theta + 0.5 * outer["rho"] * phi @ phi
        adjoint = refined_solve(curvature, outer["M"] @ offset + outer["c"])
        return Truth(theta, float(value), outer["rho"] * phi - np.exp(phi) * theta * adjoint)

    return Case(
        name=f"quadratic with log penalties, condition {condition:g}",
        kind="minimum",
        inner=coupled_inner,
        outer=quadratic_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(n, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=float(np.linalg.cond(inner["H"] + np.diag(np.exp(phi)))),
    )
