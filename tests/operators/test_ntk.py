"""The Gauss–Newton matrix of a wide network has the spectrum of its tangent kernel, which has a closed form."""

import jax
import jax.numpy as jnp
import numpy as np

import curvax.operators as ops
from helpers.quick import quick

POINTS, FEATURES = 5, 3


def _model(p, x):
    return p["v"] @ jax.nn.relu(p["w"] @ x) / jnp.sqrt(jnp.asarray(len(p["v"]), x.dtype))


def _kernel(x):
    """E v² relu′(w·x) relu′(w·z) x·z + E relu(w·x) relu(w·z) for normal w, v: arc-cosine kernels of order 0 and 1."""
    norms = np.linalg.norm(x, axis=1)
    product = np.outer(norms, norms)
    cosine = np.clip(x @ x.T / product, -1, 1)
    angle = np.arccos(cosine)
    of_outputs = product * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
    return of_outputs + x @ x.T * (np.pi - angle) / (2 * np.pi)


def test_limit_of_wide_networks(key):
    """JJᵀ → the kernel as 1/√width, and its eigenvectors u make eigenvectors Jᵀu of the GGN, of eigenvalue λ/N."""
    x = jax.random.normal(key, (POINTS, FEATURES))
    limit = _kernel(np.asarray(x))

    @quick
    def of_width(w, v):
        params = {"w": w, "v": v}
        push, pull = jax.vjp(lambda p: jax.vmap(lambda x: _model(p, x))(x), params)
        gradients = jax.vmap(lambda u: pull(u)[0])(jnp.eye(POINTS))
        rows = jnp.concatenate([leaf.reshape(POINTS, -1) for leaf in jax.tree.leaves(gradients)], axis=1)
        kernel = rows @ rows.T
        values, vectors = jnp.linalg.eigh(kernel)
        curvature = ops.gauss_newton(_model, ops.SquaredError(), params, x, jnp.zeros(POINTS))

        def residual(value, u):
            (v,) = pull(u)
            gap = jax.tree.map(lambda a, b: a - value / POINTS * b, curvature.mv(v), v)
            return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gap)))

        return kernel, values, jax.vmap(residual)(values, vectors.T)

    errors = []
    for width in (100, 10000):
        first, second = jax.random.split(jax.random.fold_in(key, width))
        draws = jax.random.normal(first, (width, FEATURES)), jax.random.normal(second, (width,))
        kernel, values, residuals = of_width(*draws)
        assert np.max(residuals) < 1e-12 * np.max(values)
        errors.append(np.linalg.norm(kernel - limit) / np.linalg.norm(limit))
    print(f"relative distance from the limit: {errors[0]:.3f}, {errors[1]:.4f}")
    assert errors[1] < 0.03 and errors[1] < 0.5 * errors[0]
