"""Matrices with known spectra on which solvers break, in NumPy float64."""

import numpy as np
from scipy.linalg import hilbert as _hilbert

from helpers.dense import rotated


def definite(n, condition, seed=0):
    """Symmetric positive definite, eigenvalues log-uniform in [1 / condition, 1]."""
    return rotated(np.geomspace(1.0 / condition, 1.0, n), np.random.default_rng(seed))


def indefinite(n, condition, seed=0):
    """Symmetric with eigenvalues of both signs, absolute values log-uniform in [1 / condition, 1]."""
    signs = np.where(np.arange(n) % 3 == 0, -1.0, 1.0)
    return rotated(signs * np.geomspace(1.0 / condition, 1.0, n), np.random.default_rng(seed))


def kkt(n, m, condition, seed=0):
    """[[H, Cᵀ], [C, 0]]: H definite with this condition, C of m random rows. n + m rows in all."""
    rng = np.random.default_rng(seed)
    curvature = rotated(np.geomspace(1.0 / condition, 1.0, n), rng)
    constraints = rng.standard_normal((m, n)) / np.sqrt(n)
    return np.block([[curvature, constraints.T], [constraints, np.zeros((m, m))]])


def rotation(n, radius, angle, seed=0):
    """T with n/2 complex pairs radius · exp(±i angle) in a random orthogonal basis: ρ(T) = radius."""
    block = radius * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return basis @ np.kron(np.eye(n // 2), block) @ basis.T


def rotation_and_decay(n, seed=0):
    """A nonsymmetric matrix I − T: T rotates by 1.3 with radius 0.9 and is not normal."""
    upper = np.triu(np.random.default_rng(seed + 1).standard_normal((n, n)), 2) / n
    return np.eye(n) - rotation(n, 0.9, 1.3, seed) - 0.3 * upper


def hilbert(n):
    """1 / (i + j + 1): condition e^{3.5 n}, singular to float64 from n = 12 on."""
    return _hilbert(n)


def singular(n, nullity=1, seed=0, *, signs=False):
    """Symmetric with `nullity` zero eigenvalues; the others in [0.5, 2], of both signs on request.

    Returns the matrix and an orthonormal basis of its null space.
    """
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    values = np.concatenate([np.zeros(nullity), np.linspace(0.5, 2.0, n - nullity)])
    if signs:
        values = values * np.where(np.arange(n) % 2 == 0, -1.0, 1.0)
    matrix = (basis * values) @ basis.T
    return 0.5 * (matrix + matrix.T), basis[:, :nullity]
