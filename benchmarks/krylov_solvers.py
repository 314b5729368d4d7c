"""Claim: our Krylov solvers are at least as fast as those of JAX, Lineax and SciPy, at the same error.

Time to a relative error of 1e-8 in the solution (against a direct solve in float64). No two libraries mean the same by
their tolerance, so each gets the loosest one with which it gets there on this very system, to a quarter of a decade:
the best it could do. A solver that gets there with none stands in the table with a dash.

SciPy has the matrix, sparse or dense. Of the two curvatures there are products alone: the same as the others have.

Compile time is that of the first call, in the same process, in turns, without a cache.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import jax
import lineax as lx
import numpy as np
import scipy.sparse.linalg
import systems

import curvax as cx

ERROR = 1e-8
REPEATS, COMPILE_REPEATS = 15, 5
MAX_STEPS = 20_000
DECADES = range(4, 15)
Solve = Callable[[jax.Array], jax.Array]


def tagged(system: systems.System) -> lx.AbstractLinearOperator:
    tags = (
        [lx.positive_semidefinite_tag] if system.definite else [lx.symmetric_tag] if system.symmetric else []
    )
    structure = jax.ShapeDtypeStruct(system.rhs.shape, system.rhs.dtype)
    return lx.FunctionLinearOperator(system.matvec, structure, tags)


def with_lineax(make: Callable[[float], Any]) -> Callable[[systems.System, float], Solve]:
    def build(system: systems.System, tolerance: float) -> Solve:
        solver = make(tolerance)
        return jax.jit(lambda b: lx.linear_solve(tagged(system), b, solver, throw=False).value)

    return build


def with_jax(name: str, **options: Any) -> Callable[[systems.System, float], Solve]:
    solver = getattr(jax.scipy.sparse.linalg, name)
    return lambda system, tolerance: jax.jit(lambda b: solver(system.matvec, b, tol=tolerance, **options)[0])


def with_scipy(name: str, **options: Any) -> Callable[[systems.System, float], Solve]:
    solver = getattr(scipy.sparse.linalg, name)

    def build(system: systems.System, tolerance: float) -> Solve:
        rhs, operator = np.asarray(system.rhs), system.for_scipy()
        return lambda _: solver(operator, rhs, rtol=tolerance, maxiter=MAX_STEPS, **options)[0]

    return build


GROUPS: dict[str, dict[str, Callable[[systems.System, float], Solve]]] = {
    "CG": {
        "cx.linear.CG": with_lineax(lambda tol: cx.linear.CG(rtol=tol)),
        "lx.CG": with_lineax(lambda tol: lx.CG(rtol=tol, atol=tol, max_steps=MAX_STEPS)),
        "jax.scipy cg": with_jax("cg", maxiter=MAX_STEPS),
        "SciPy cg": with_scipy("cg"),
    },
    "MINRES": {
        "cx.linear.MINRES": with_lineax(lambda tol: cx.linear.MINRES(rtol=tol, max_steps=MAX_STEPS)),
        "SciPy minres": with_scipy("minres"),
    },
    "GMRES": {
        "cx.linear.FGMRES": with_lineax(
            lambda tol: cx.linear.FGMRES(rtol=tol, max_steps=MAX_STEPS, restart=40)
        ),
        "lx.GMRES": with_lineax(lambda tol: lx.GMRES(rtol=tol, atol=tol, restart=40, max_steps=MAX_STEPS)),
        "jax.scipy gmres": with_jax("gmres", restart=40, maxiter=MAX_STEPS // 40, solve_method="incremental"),
        "SciPy gmres": with_scipy("gmres", restart=40),
    },
}


def cases() -> list[tuple[str, systems.System]]:
    definite = [
        systems.poisson(100),
        systems.softmax_hessian(),
        systems.spectrum(1e4),
        systems.gauss_newton(),
    ]
    return (
        [("CG", system) for system in definite]
        + [("MINRES", systems.kkt()), ("MINRES", systems.poisson(100))]
        + [("GMRES", systems.convection_diffusion(40)), ("GMRES", systems.convection_diffusion(100))]
    )


def loosest(
    build: Callable[[systems.System, float], Solve], system: systems.System
) -> tuple[Solve, float] | None:
    """The solver at the loosest tolerance that is tight enough, and its error."""

    def found(exponent: float) -> tuple[Solve, float] | None:
        solve = build(system, 10.0**-exponent)
        error = harness.relative_error(solve(system.rhs), system.exact)
        return (solve, error) if error <= ERROR else None

    for decade in DECADES:
        if (best := found(decade)) is None:
            continue
        for quarter in (0.25, 0.5, 0.75):
            if (looser := found(decade - quarter)) is None:
                break
            best = looser
        return best
    return None


def compile_times(group: str, system: systems.System) -> dict[str, list[float]]:
    names = [name for name in GROUPS[group] if not name.startswith("SciPy")]
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(COMPILE_REPEATS):
        for name in names if turn % 2 == 0 else names[::-1]:
            jax.clear_caches()
            solve = GROUPS[group][name](system, 1e-9)
            start = time.perf_counter()
            solve.lower(system.rhs).compile()
            times[name].append(time.perf_counter() - start)
    return times


def measure(only: str = "") -> harness.Report:
    rows, claims = [], []
    for group, system in cases():
        if only not in f"{group}: {system.name}":
            continue
        found = {name: loosest(build, system) for name, build in GROUPS[group].items()}
        compiled = compile_times(group, system)
        times = harness.in_turns(
            {
                name: (lambda solve=pair[0], rhs=system.rhs: solve(rhs))
                for name, pair in found.items()
                if pair
            },
            repeats=REPEATS,
        )
        ours = next(iter(GROUPS[group]))
        for name, pair in found.items():
            rows.append(
                {
                    "system": system.name,
                    "solver": name,
                    "ms": harness.milliseconds(times[name]) if pair else "–",
                    "time ÷ ours": harness.ratio(times[name], times[ours]) if pair and found[ours] else "–",
                    "relative error": pair[1] if pair else "–",
                    "compile s": float(np.median(compiled[name])) if name in compiled else "–",
                }
            )
            if name != ours:
                value = harness.ratio(times[name], times[ours]) if pair else float("inf")
                claims.append(harness.Claim(f"{system.name}: time, {name} ÷ ours", value, at_least=1.0))
                if name in compiled:
                    value = harness.ratio(compiled[name], compiled[ours])
                    claims.append(
                        harness.Claim(f"{system.name}: compile time, {name} ÷ ours", value, at_least=1.0)
                    )
    return harness.Report(
        "Krylov solvers", f"Time to a relative error of {ERROR:g} in the solution, float64.", rows, claims
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore", RuntimeWarning)
    harness.main(measure)
