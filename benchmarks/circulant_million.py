"""Claim: a circulant system with a million unknowns takes `Auto` a few Fourier transforms, damped or not.

The matrix smooths: c decays as 0.9^|i|, plus a multiple of the identity that sets the condition number to 1e4. Against
the three transforms by hand (NumPy, and JAX compiled), SciPy's `solve_circulant`, and conjugate gradients of Lineax and
JAX, whose products are given by the transforms too. `Auto` does more than the three by hand: it estimates the condition
number, computes the true residual, and refines where that is not small enough.
"""

import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import scipy.linalg

import curvax as cx

N = 1_000_000
CONDITION = 1e4
DAMPING = 1e-3
RTOL = 1e-10
REPEATS = 7


def column() -> np.ndarray:
    distance = np.minimum(np.arange(N), N - np.arange(N))
    smoothing = 0.1 / 1.9 * 0.9**distance
    spectrum = np.fft.rfft(smoothing).real
    return smoothing + (spectrum.max() / CONDITION - spectrum.min()) * (np.arange(N) == 0)


def solved(operator: lx.AbstractLinearOperator, solver: lx.AbstractLinearSolver) -> Callable[[Any], Any]:
    """A compiled solve, of which the operator's numbers are arguments too."""

    @eqx.filter_jit
    def solve(
        operator: lx.AbstractLinearOperator, vector: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        solution = lx.linear_solve(operator, vector, solver, throw=False)
        return solution.value, solution.result == lx.RESULTS.successful, solution.stats

    return lambda vector: solve(operator, vector)


def by_hand(c: Any, b: Any, numpy: Any) -> Any:
    return numpy.fft.irfft(numpy.fft.rfft(b) / numpy.fft.rfft(c), N)


def measure() -> harness.Report:
    first = column()
    right = np.random.default_rng(0).standard_normal(N)
    damped_first = first + DAMPING * (np.arange(N) == 0)
    exact = {"plain": by_hand(first, right, np), "damped": by_hand(damped_first, right, np)}
    b, c = jnp.asarray(right), jnp.asarray(first)
    circulant = cx.operators.Circulant(c, lx.positive_semidefinite_tag)
    damped = cx.operators.Damped(circulant, DAMPING)
    products = lx.FunctionLinearOperator(circulant.mv, circulant.in_structure(), lx.positive_semidefinite_tag)
    auto, auto_damped = (solved(operator, cx.linear.Auto(rtol=RTOL)) for operator in (circulant, damped))
    lineax_cg = solved(products, lx.CG(rtol=1e-8, atol=1e-8, max_steps=10_000))
    jax_cg = jax.jit(lambda b: jax.scipy.sparse.linalg.cg(circulant.mv, b, tol=1e-8, maxiter=10_000)[0])
    hand = jax.jit(lambda c, b: by_hand(c, b, jnp))
    calls = {
        "Auto": lambda: auto(b)[0],
        "Auto, damped": lambda: auto_damped(b)[0],
        "by hand, JAX": lambda: hand(c, b),
        "by hand, NumPy": lambda: by_hand(first, right, np),
        "scipy.linalg.solve_circulant": lambda: scipy.linalg.solve_circulant(first, right),
        "lx.CG": lambda: lineax_cg(b)[0],
        "jax.scipy cg": lambda: jax_cg(b),
    }
    fast = [name for name in calls if "cg" not in name.lower()]
    times = harness.in_turns({name: calls[name] for name in fast}, REPEATS)
    found = {name: calls[name]() for name in fast}
    # Most of a minute each: a second of compiling does not matter.
    for name in [name for name in calls if name not in fast]:
        start = time.perf_counter()
        found[name] = jax.block_until_ready(calls[name]())
        times[name] = [time.perf_counter() - start]
    rows = [
        {
            "solver": name,
            "ms": harness.milliseconds(times[name]),
            "relative error": harness.relative_error(value, exact["damped" if "damped" in name else "plain"]),
        }
        for name, value in found.items()
    ]
    against = lambda name: harness.milliseconds(times[name]) / harness.milliseconds(times["Auto"])
    methods = {int(program(b)[2]["method"]) for program in (auto, auto_damped)}
    errors = {row["solver"]: row["relative error"] for row in rows}
    return harness.Report(
        "A circulant system with a million unknowns",
        f"Condition number {CONDITION:g}, float64; Auto at {RTOL:g}, conjugate gradients at 1e-8 in the residual.",
        rows,
        [
            harness.Claim(
                "both by structure (1 for yes)", float(methods == {cx.linear.Method.structured}), at_least=1
            ),
            harness.Claim(
                "largest error of Auto", max(errors["Auto"], errors["Auto, damped"]), at_most=1e-10
            ),
            harness.Claim(
                "time, SciPy's solve_circulant ÷ Auto",
                against("scipy.linalg.solve_circulant"),
                at_least=0.8,
                aim=1.0,
            ),
            harness.Claim("time, by hand in NumPy ÷ Auto", against("by hand, NumPy"), at_least=0.3, aim=1.0),
            harness.Claim("time, by hand in JAX ÷ Auto", against("by hand, JAX"), at_least=0.35, aim=1.0),
            harness.Claim("time, lx.CG ÷ Auto", against("lx.CG"), at_least=10.0),
            harness.Claim("time, jax.scipy cg ÷ Auto", against("jax.scipy cg"), at_least=10.0),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
