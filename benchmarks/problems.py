"""The problems of the benchmarks, with exact hypergradients that do not pass through any autodiff.

Softmax regression on the digits data: `g(W, φ) = mean CE(X W, y) + ½ Σ exp(φ) W²` on 1000 training images, one
log penalty φ per weight (64 × 10), and the outer loss is the mean cross entropy on the other 797.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import cho_factor, cho_solve
from sklearn.datasets import load_digits

TRAINING_IMAGES = 1000
CLASSES = 10
LOG_PENALTY = -5.0


class Batch(NamedTuple):
    images: jax.Array  # (n, 64), in [0, 1]
    labels: jax.Array  # (n,)


def digits(dtype=jnp.float64, seed: int = 0) -> tuple[Batch, Batch]:
    """Training and validation images, shuffled by `seed`."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order] / 16.0, labels[order]
    split = TRAINING_IMAGES
    return (
        Batch(jnp.asarray(images[:split], dtype), jnp.asarray(labels[:split])),
        Batch(jnp.asarray(images[split:], dtype), jnp.asarray(labels[split:])),
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy of `logits` (n, classes) against integer `labels` (n,)."""
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)


def inner(weights: jax.Array, log_penalties: jax.Array, batch: Batch) -> jax.Array:
    """Regularised training loss."""
    penalty = 0.5 * jnp.sum(jnp.exp(log_penalties) * weights**2)
    return cross_entropy(batch.images @ weights, batch.labels) + penalty


def outer(weights: jax.Array, log_penalties: jax.Array, batch: Batch) -> jax.Array:
    """Validation loss."""
    del log_penalties
    return cross_entropy(batch.images @ weights, batch.labels)


def start(dtype=jnp.float64) -> tuple[jax.Array, jax.Array]:
    """Log penalties and weights at which a cold call starts."""
    return jnp.full((64, CLASSES), LOG_PENALTY, dtype), jnp.zeros((64, CLASSES), dtype)


class Exact(NamedTuple):
    weights: np.ndarray
    hypergradient: np.ndarray
    curvature: np.ndarray  # dense Hessian, (640, 640)


def exact(log_penalties: jax.Array, training: Batch, validation: Batch) -> Exact:
    """Dense Newton to rounding level and a dense adjoint, from the closed form of the softmax's derivatives.

    With P the class probabilities, ∇g = Xᵀ(P − Y)/n + e^φ W and
    H = Xᵀ(diag(p) − p pᵀ)X/n + diag(e^φ); the hypergradient is −e^φ W q with H q = ∇f.
    """
    x, y = np.asarray(training.images, np.float64), np.asarray(training.labels)
    x_outer, y_outer = np.asarray(validation.images, np.float64), np.asarray(validation.labels)
    penalties = np.exp(np.asarray(log_penalties, np.float64))
    weights = np.zeros_like(penalties)
    for _ in range(100):
        probabilities = _softmax(x @ weights)
        gradient = _cross_entropy_gradient(x, y, probabilities) + penalties * weights
        factor = cho_factor(_curvature(x, probabilities, penalties))
        step = cho_solve(factor, gradient.ravel()).reshape(weights.shape)
        weights = weights - step
        if np.linalg.norm(step) <= 1e-14 * np.linalg.norm(weights):
            break
    else:
        raise RuntimeError("dense Newton did not converge: no exact hypergradient to compare with")
    curvature = _curvature(x, _softmax(x @ weights), penalties)
    outer_gradient = _cross_entropy_gradient(x_outer, y_outer, _softmax(x_outer @ weights))
    adjoint = cho_solve(cho_factor(curvature), outer_gradient.ravel()).reshape(weights.shape)
    return Exact(weights, -penalties * weights * adjoint, curvature)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _cross_entropy_gradient(x: np.ndarray, y: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    residuals = probabilities.copy()
    residuals[np.arange(len(y)), y] -= 1.0
    return x.T @ residuals / len(y)


def _curvature(x: np.ndarray, probabilities: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    features, classes = penalties.shape
    blocks = np.zeros((features, classes, features, classes))
    for a in range(classes):
        for b in range(classes):
            weight = probabilities[:, a] * ((a == b) - probabilities[:, b])
            blocks[:, a, :, b] = x.T @ (weight[:, None] * x) / len(x)
    return blocks.reshape(features * classes, -1) + np.diag(penalties.ravel())
