"""Claim: a Sylvester equation at SciPy's speed and accuracy, and its gradient for a fraction of a second solve.

A X + X B = C with n = 500 in float64. The gradient of Σ X² in A, B and C is what SciPy has no function for: there it
is a second call, with Aᵀ, Bᵀ and 2X, in the closed form. Ours keeps the Schur forms.
"""

import harness
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import scipy.linalg

from curvax.linear import solve_lyapunov, solve_sylvester

N = 500
REPEATS = 11


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices with spectra in the right half-plane, most eigenvalues in complex pairs."""
    rng = np.random.default_rng(0)
    shift = 1.5 * np.sqrt(N) * np.eye(N)
    a, b = rng.standard_normal((N, N)) + shift, rng.standard_normal((N, N)) + shift
    return a, b, rng.standard_normal((N, N))


def loss(a, b, c):
    return jnp.sum(solve_sylvester(a, b, c) ** 2)


def symmetric(a, b, c):
    tagged = lambda matrix: lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
    return solve_sylvester(tagged(a), tagged(b), c)


def scipy_gradient(a, b, c):
    x = scipy.linalg.solve_sylvester(a, b, c)
    adjoint = scipy.linalg.solve_sylvester(a.T, b.T, 2 * x)
    return -adjoint @ x.T, -x.T @ adjoint, adjoint


def residual(a, b, c, x) -> float:
    """‖AX + XB − C‖ ÷ ((‖A‖ + ‖B‖) ‖X‖)."""
    norm = np.linalg.norm
    return float(norm(a @ x + x @ b - c) / ((norm(a) + norm(b)) * norm(x)))


def slope_error(gradient, a, b, c) -> float:
    """Relative error of the directional derivative against central differences."""
    rng, step = np.random.default_rng(1), 1e-5
    directions = [rng.standard_normal(x.shape) for x in (a, b, c)]
    exact = sum(float(np.sum(np.asarray(g) * d)) for g, d in zip(gradient, directions, strict=True))
    ends = []
    for sign in (1, -1):
        moved = [x + sign * step * d for x, d in zip((a, b, c), directions, strict=True)]
        ends.append(float(np.sum(scipy.linalg.solve_sylvester(*moved) ** 2)))
    return abs((ends[0] - ends[1]) / (2 * step) / exact - 1)


def measure() -> harness.Report:
    a, b, c = problem()
    sym_a, sym_b = (a + a.T) / 2, (b + b.T) / 2
    on_device = [jnp.asarray(x) for x in (a, b, c)]
    sym_device = [jnp.asarray(x) for x in (sym_a, sym_b, c)]
    compiled = jax.jit(solve_sylvester).lower(*on_device).compile()
    lyapunov = jax.jit(solve_lyapunov).lower(on_device[0], on_device[2]).compile()
    tagged = jax.jit(symmetric).lower(*sym_device).compile()
    gradient = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*on_device).compile()
    calls = {
        "X, ours": lambda: compiled(*on_device),
        "X, SciPy": lambda: scipy.linalg.solve_sylvester(a, b, c),
        "Lyapunov, ours": lambda: lyapunov(on_device[0], on_device[2]),
        "Lyapunov, SciPy": lambda: scipy.linalg.solve_continuous_lyapunov(a, c),
        "symmetric, ours": lambda: tagged(*sym_device),
        "symmetric, SciPy": lambda: scipy.linalg.solve_sylvester(sym_a, sym_b, c),
        "gradient, ours": lambda: gradient(*on_device),
        "gradient, SciPy": lambda: scipy_gradient(a, b, c),
    }
    times = harness.in_turns(calls, REPEATS)
    ours, peer = (np.asarray(calls[f"X, {who}"]()) for who in ("ours", "SciPy"))
    found = gradient(*on_device)
    errors = {
        "X, ours": residual(a, b, c, ours),
        "X, SciPy": residual(a, b, c, peer),
        "Lyapunov, ours": residual(a, a.T, c, np.asarray(calls["Lyapunov, ours"]())),
        "Lyapunov, SciPy": residual(a, a.T, c, calls["Lyapunov, SciPy"]()),
        "symmetric, ours": residual(sym_a, sym_b, c, np.asarray(calls["symmetric, ours"]())),
        "symmetric, SciPy": residual(sym_a, sym_b, c, calls["symmetric, SciPy"]()),
        "gradient, ours": slope_error(found, a, b, c),
        "gradient, SciPy": slope_error(scipy_gradient(a, b, c), a, b, c),
    }
    rows = [
        {"what": name, "ms": harness.milliseconds(times[name]), "residual or slope error": errors[name]}
        for name in calls
    ]
    against = lambda what: harness.ratio(times[f"{what}, ours"], times[f"{what}, SciPy"])
    return harness.Report(
        "Sylvester and Lyapunov equations",
        f"A X + X B = C, n = {N}, float64, compiled; ours checks that the solution is unique, SciPy does not.",
        rows,
        [
            harness.Claim("our time ÷ SciPy's, X", against("X"), at_most=1.15, aim=1.0),
            harness.Claim("our time ÷ SciPy's, Lyapunov", against("Lyapunov"), at_most=1.15, aim=1.0),
            harness.Claim("our time ÷ SciPy's, symmetric", against("symmetric"), at_most=0.5),
            harness.Claim("our time ÷ SciPy's, gradient", against("gradient"), at_most=0.8),
            harness.Claim("our residual ÷ SciPy's", errors["X, ours"] / errors["X, SciPy"], at_most=2.0),
            harness.Claim(
                "gradient against SciPy's in closed form",
                harness.relative_error(found, scipy_gradient(a, b, c)),
                at_most=1e-11,
            ),
            harness.Claim("gradient against differences", errors["gradient, ours"], at_most=1e-5),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
