"""Dense linear algebra in NumPy, more accurate than the float64 that it checks."""

import numpy as np


def refined_solve(matrix, rhs, steps: int = 4):
    """`matrix⁻¹ rhs` by LU in float64 with residuals in long double.

    Accurate to about one unit in the last place as long as `eps * condition < 1`, so that it is
    truth for the matrix *as rounded*, up to a condition of 1e8 and beyond.
    """
    matrix = np.asarray(matrix, np.float64)
    rhs = np.asarray(rhs, np.float64)
    x = np.linalg.solve(matrix, rhs).astype(np.longdouble)
    for _ in range(steps):
        residual = rhs.astype(np.longdouble) - matrix.astype(np.longdouble) @ x
        x = x + np.linalg.solve(matrix, residual.astype(np.float64))
    return x.astype(np.float64)


def rotated(eigenvalues, rng):
    """A symmetric matrix with these eigenvalues in a random orthogonal basis."""
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    matrix = (basis * np.asarray(eigenvalues)) @ basis.T
    return 0.5 * (matrix + matrix.T)


def spectrum(kind: str, n: int, condition: float, rng):
    """`n` eigenvalues between `1 / condition` and 1: the shapes on which estimates break."""
    low = 1.0 / condition
    if kind == "log-uniform":
        values = np.logspace(np.log10(low), 0.0, n)
    elif kind == "log-random":
        values = np.exp(rng.uniform(np.log(low), 0.0, n))
    elif kind == "uniform":
        values = np.linspace(low, 1.0, n)
    elif kind == "outlier-low":
        values = np.concatenate([[low], rng.uniform(0.5, 1.0, n - 1)])
    elif kind == "outlier-high":
        values = np.concatenate([low * rng.uniform(1.0, 3.0, n - 1), [1.0]])
    elif kind == "clusters":
        centres = np.exp(rng.uniform(np.log(low), 0.0, 4))
        values = rng.choice(centres, n) * rng.uniform(0.99, 1.01, n)
    elif kind == "random":
        values = rng.uniform(0.0, 1.0, n) ** 4
    else:
        raise ValueError(f"no spectrum {kind!r}")
    # The two ends are pinned, so that `condition` is what it says.
    values = np.clip(values, low, 1.0)
    values[np.argmin(values)], values[np.argmax(values)] = low, 1.0
    if n > 1 and condition > 1.0 and np.ptp(values) == 0.0:
        values[0] = low
    return values


SPECTRA = ("log-uniform", "log-random", "uniform", "outlier-low", "outlier-high", "clusters", "random")
