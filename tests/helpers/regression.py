"""Ridge, kernel ridge and scalar logistic regression with hypergradients worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from helpers.dense import refined_solve
from helpers.problem import Case, Truth, as_jax, rounded


def _data(rows, n, rng):
    inputs = rng.standard_normal((rows, n)) * np.linspace(0.3, 2.0, n)
    return {"x": inputs, "y": inputs @ rng.standard_normal(n) + 0.5 * rng.standard_normal(rows)}


def mean_squares(theta, phi, batch):
    """(1/2N) ‖Xw − y‖², the outer loss of both ridge regressions (no direct term in φ)."""
    return 0.5 * jnp.mean((batch["x"] @ theta - batch["y"]) ** 2)


def ridge_half(theta, phi, batch):
    """(1/2N) ‖Xw − y‖² + (λ/2) ‖w‖²: cross derivative w."""
    return mean_squares(theta, phi, batch) + 0.5 * phi * jnp.sum(theta**2)


def ridge_full(theta, phi, batch):
    """(1/2N) ‖Xw − y‖² + λ ‖w‖²: cross derivative 2w."""
    return mean_squares(theta, phi, batch) + phi * jnp.sum(theta**2)


def ridge_features(theta, phi, batch):
    """(1/2N) ‖Xw − y‖² + ½ Σ exp(φ_i) w_i²."""
    return mean_squares(theta, phi, batch) + 0.5 * jnp.sum(jnp.exp(phi) * theta**2)


def ridge(variant="half", *, n=8, rows=30, seed=0, dtype=np.float64):
    """Ridge regression: `variant` is "half", "full" (one L2) or "features" (one log L2 each)."""
    rng = np.random.default_rng(seed + 4000)
    inner, outer = rounded(_data(rows, n, rng), dtype), rounded(_data(rows, n, rng), dtype)
    start = rng.uniform(-4.0, 0.0, n) if variant == "features" else np.asarray(0.17)
    phi = rounded(start, dtype)
    factor = {"half": 1.0, "full": 2.0, "features": None}[variant]
    gram = inner["x"].T @ inner["x"] / rows
    moment = inner["x"].T @ inner["y"] / rows

    def solve(phi):
        penalty = np.diag(np.exp(phi)) if variant == "features" else factor * phi * np.eye(n)
        theta = refined_solve(gram + penalty, moment)
        residual = outer["x"] @ theta - outer["y"]
        adjoint = refined_solve(gram + penalty, outer["x"].T @ residual / rows)
        grad = -np.exp(phi) * theta * adjoint if variant == "features" else -factor * theta @ adjoint
        return Truth(theta, float(0.5 * np.mean(residual**2)), np.asarray(grad))

    functions = {"half": ridge_half, "full": ridge_full, "features": ridge_features}
    return Case(
        name=f"ridge {variant}",
        kind="minimum",
        inner=functions[variant],
        outer=mean_squares,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(n, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=float(np.linalg.cond(gram)),
    )


def _kernel(left, right, log_length, xp):
    squares = (left[:, None] - right[None, :]) ** 2
    return xp.exp(-0.5 * squares * xp.exp(-2.0 * log_length))


def kernel_inner(theta, phi, batch):
    """½ αᵀ(K + λI)α − αᵀy with K the Gaussian kernel of length exp(φ₁) and λ = exp(φ₂)."""
    kernel = _kernel(batch["x"], batch["x"], phi["log_length"], jnp)
    quadratic = theta @ (kernel @ theta) + jnp.exp(phi["log_ridge"]) * (theta @ theta)
    return 0.5 * quadratic - theta @ batch["y"]


def kernel_outer(theta, phi, batch):
    """½ mean (K(x_v, x) α − y_v)²: the length scale also enters here, directly."""
    kernel = _kernel(batch["x_val"], batch["x"], phi["log_length"], jnp)
    return 0.5 * jnp.mean((kernel @ theta - batch["y_val"]) ** 2)


def kernel_ridge(*, rows=14, seed=0, dtype=np.float64):
    """Kernel ridge regression: length scale and ridge, with a direct and an implicit part."""
    rng = np.random.default_rng(seed + 5000)
    x, x_val = np.sort(rng.uniform(-2, 2, rows)), np.sort(rng.uniform(-2, 2, rows))
    inner = {"x": x, "y": np.sin(2 * x) + 0.1 * rng.standard_normal(rows)}
    outer = {"x": x, "x_val": x_val, "y_val": np.sin(2 * x_val)}
    inner, outer = rounded(inner, dtype), rounded(outer, dtype)
    phi = rounded({"log_length": np.asarray(-0.4), "log_ridge": np.asarray(-2.0)}, dtype)

    def solve(phi):
        length, ridge_term = phi["log_length"], np.exp(phi["log_ridge"])
        kernel = _kernel(inner["x"], inner["x"], length, np)
        cross = _kernel(outer["x_val"], inner["x"], length, np)
        # dK/dlog ℓ = K · d² / ℓ²
        kernel_slope = kernel * (inner["x"][:, None] - inner["x"][None]) ** 2 * np.exp(-2 * length)
        cross_slope = cross * (outer["x_val"][:, None] - inner["x"][None]) ** 2 * np.exp(-2 * length)
        matrix = kernel + ridge_term * np.eye(rows)
        theta = refined_solve(matrix, inner["y"])
        residual = (cross @ theta - outer["y_val"]) / rows
        adjoint = refined_solve(matrix, cross.T @ residual)
        grad = {
            "log_length": np.asarray(residual @ cross_slope @ theta - adjoint @ kernel_slope @ theta),
            "log_ridge": np.asarray(-ridge_term * adjoint @ theta),
        }
        return Truth(theta, float(0.5 * rows * residual @ residual), grad)

    return Case(
        name="kernel ridge",
        kind="minimum",
        inner=kernel_inner,
        outer=kernel_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(rows, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=float(2 * rows / np.exp(-2.0)),
    )


def logistic_inner(theta, phi, batch):
    """mean log(1 + exp(−y x w)) + ½ exp(φ) w²."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * batch["x"] * theta)) + 0.5 * jnp.exp(phi) * theta**2


def logistic_outer(theta, phi, batch):
    """mean log(1 + exp(−y x w)) on other data."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * batch["x"] * theta))


def scalar_logistic(*, rows=25, seed=0, dtype=np.float64):
    """One weight, found by bisection on the derivative; then `df/dφ = −exp(φ) w f′(w) / g″(w)`."""
    rng = np.random.default_rng(seed + 6000)

    def draw():
        x = rng.standard_normal(rows)
        return {"x": x, "y": np.sign(x + 0.7 * rng.standard_normal(rows))}

    inner, outer = rounded(draw(), dtype), rounded(draw(), dtype)
    phi = rounded(np.asarray(-2.3), dtype)

    def sigmoid(z):
        return 0.5 * (1.0 + np.tanh(0.5 * z))

    def slope(w, data):
        margin = data["y"] * data["x"]
        return np.mean(-margin * sigmoid(-margin * w))

    def solve(phi):
        low, high = -50.0, 50.0
        for _ in range(200):
            middle = 0.5 * (low + high)
            if slope(middle, inner) + np.exp(phi) * middle > 0:
                high = middle
            else:
                low = middle
        w = 0.5 * (low + high)
        weight = sigmoid(inner["x"] * w) * sigmoid(-inner["x"] * w)
        curvature = np.mean(inner["x"] ** 2 * weight) + np.exp(phi)
        grad = -np.exp(phi) * w * slope(w, outer) / curvature
        value = np.mean(np.logaddexp(0.0, -outer["y"] * outer["x"] * w))
        return Truth(np.asarray(w), float(value), np.asarray(grad))

    return Case(
        name="scalar logistic",
        kind="minimum",
        inner=logistic_inner,
        outer=logistic_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros((), dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
    )
