"""Nonlinear inner problems and points on the way to their minima."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def logistic_inner(theta, phi, batch):
    """mean log(1 + exp(−y xᵀw)) + ½ Σ exp(φ_i) w_i², one log L2 a feature."""
    margin = batch["y"] * (batch["x"] @ theta)
    return jnp.mean(jax.nn.softplus(-margin)) + 0.5 * jnp.sum(jnp.exp(phi) * theta**2)


def logistic_outer(theta, phi, batch):
    """mean log(1 + exp(−y xᵀw)) on validation data."""
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ theta)))


def network(theta, inputs):
    """x → W₂ tanh(W₁x + b₁) + b₂, one output."""
    hidden = jnp.tanh(inputs @ theta["w1"] + theta["b1"])
    return hidden @ theta["w2"] + theta["b2"]


def network_inner(theta, phi, batch):
    """½ mean squares + ½ Σ exp(φ) θ², φ shaped like θ: one log L2 a parameter."""
    fit = 0.5 * jnp.mean((network(theta, batch["x"]) - batch["y"]) ** 2)
    penalties = jax.tree.map(lambda p, t: 0.5 * jnp.sum(jnp.exp(p) * t**2), phi, theta)
    return fit + sum(jax.tree.leaves(penalties))


def network_outer(theta, phi, batch):
    """½ mean squares on validation data."""
    return 0.5 * jnp.mean((network(theta, batch["x"]) - batch["y"]) ** 2)


def logistic_problem(seed, n=12, rows=60, strength=(-7.0, -2.0)):
    """(θ₀, φ, inner data, outer data) with feature scales over two decades."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(n)

    def draw():
        x = rng.standard_normal((rows, n)) * np.logspace(-1.0, 1.0, n)
        return {"x": x, "y": np.sign(x @ truth + rng.standard_normal(rows))}

    return np.zeros(n), rng.uniform(*strength, n), draw(), draw()


def network_problem(seed, width=5, n=4, rows=40, strength=(-4.0, -2.5), scale=1.0):
    """(θ₀, φ, inner data, outer data); 31 parameters with strong L2."""
    rng = np.random.default_rng(seed)
    theta = {
        "w1": rng.standard_normal((n, width)) / np.sqrt(n),
        "b1": 0.1 * rng.standard_normal(width),
        "w2": rng.standard_normal(width) / np.sqrt(width),
        "b2": np.zeros(()),
    }
    phi = jax.tree.map(lambda leaf: rng.uniform(*strength, leaf.shape), theta)
    direction = rng.standard_normal(n)

    def draw():
        x = rng.standard_normal((rows, n))
        return {"x": x, "y": scale * np.sin(x @ direction) + 0.1 * rng.standard_normal(rows)}

    return theta, phi, draw(), draw()


def stacked(problems):
    """One leading axis over a list of problems of the same shapes."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *problems)


def snapshots(inner, theta0, phi, data, *, times, rate):
    """θ after each of `times` steps of heavy-ball gradient descent from one start."""
    start, theta_of = ravel_pytree(theta0)

    def step(carry, _):
        theta, velocity = carry
        slope = jax.grad(lambda s: inner(theta_of(s), phi, data))(theta)
        velocity = 0.9 * velocity - rate * slope
        return (theta + velocity, velocity), theta

    _, path = jax.lax.scan(step, (start, jnp.zeros_like(start)), None, length=max(times) + 1)
    return jax.vmap(theta_of)(path[jnp.asarray(times)])
