"""Claim: `Auto` takes at most 1.3 times as long as the best solver that one could have picked by hand.

Every system goes to `Auto` as it is, with its tags, and to the solvers that someone might have picked: conjugate
gradients, MINRES, GMRES and BiCGSTAB of this library, Lineax and JAX, and a dense factorisation of Lineax, which
writes out the matrix where products are given. All to the same relative error in the solution: 1e-8, or ten times that
of a direct solve in NumPy where that is more. No two solvers mean the same by their tolerance, so each gets the loosest
power of ten with which it gets there on this very system. `Auto` must say that it succeeded, too.

Systems that take microseconds have a claim of their own: what `Auto` does besides solving (the right-hand side to
scale, the true residual, the condition number, statistics) is some tens of small kernels.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import krylov_solvers
import lineax as lx
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import systems

import curvax as cx

ERROR = 1e-8
REPEATS = 15
MAX_STEPS = 20_000
RESTART = 40
DENSE = 2500  # above it no dense solve
TOLERANCES = [10.0**-k for k in range(4, 15)]
PATIENCE = 3.0  # seconds that a solver may take at a tolerance before tighter ones are left out
FRACTION = 5.0  # solvers that take more than this many times the best are timed once only
SMALL_MS = 0.1

Program = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A system, and whether its matrix is given or products with it."""

    system: systems.System
    given: bool = False

    @property
    def name(self) -> str:
        return f"{self.system.name}, {'matrix' if self.given else 'products'}"

    def program(self, solve: Callable[[lx.AbstractLinearOperator, jax.Array, jax.Array], Any]) -> Program:
        """`solve(operator, b, tolerance)`, compiled; a matrix is an argument of it, as it would be for a user."""
        products = krylov_solvers.tagged(self.system)
        if not self.given:
            return jax.jit(lambda b, tolerance: solve(products, b, tolerance))
        with_matrix = jax.jit(
            lambda matrix, b, tolerance: solve(lx.MatrixLinearOperator(matrix, products.tags), b, tolerance)
        )
        matrix = jnp.asarray(self.system.matrix)
        return lambda b, tolerance: with_matrix(matrix, b, tolerance)


def with_lineax(make: Callable[[jax.Array], lx.AbstractLinearSolver]) -> Callable[[Case], Program]:
    def solve(
        operator: lx.AbstractLinearOperator, b: jax.Array, tolerance: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        solution = lx.linear_solve(operator, b, make(tolerance), throw=False)
        return solution.value, solution.result == lx.RESULTS.successful, solution.stats

    return lambda case: case.program(solve)


def with_jax(name: str, **options: Any) -> Callable[[Case], Program]:
    solver = getattr(jax.scipy.sparse.linalg, name)

    def solve(
        operator: lx.AbstractLinearOperator, b: jax.Array, tolerance: jax.Array
    ) -> tuple[jax.Array, Any, dict[str, Any]]:
        return solver(operator.mv, b, tol=tolerance, **options)[0], True, {}

    return lambda case: case.program(solve)


AUTO = "Auto"
auto = with_lineax(lambda tol: cx.linear.Auto(rtol=tol))
minres = with_lineax(lambda tol: cx.linear.MINRES(rtol=tol, max_steps=MAX_STEPS))
fgmres = with_lineax(lambda tol: cx.linear.FGMRES(rtol=tol, max_steps=MAX_STEPS, restart=RESTART))
bicgstab = with_lineax(lambda tol: lx.BiCGStab(rtol=tol, atol=tol, max_steps=MAX_STEPS))
lu = with_lineax(lambda _: lx.LU())
DEFINITE = {
    "cx.linear.CG": with_lineax(lambda tol: cx.linear.CG(rtol=tol, max_steps=MAX_STEPS)),
    "cx.linear.MINRES": minres,
    "lx.CG": with_lineax(lambda tol: lx.CG(rtol=tol, atol=tol, max_steps=MAX_STEPS)),
    "jax.scipy cg": with_jax("cg", maxiter=MAX_STEPS),
    "lx.Cholesky": with_lineax(lambda _: lx.Cholesky()),
}
INDEFINITE = {
    "cx.linear.MINRES": minres,
    "cx.linear.FGMRES": fgmres,
    "lx.BiCGStab": bicgstab,
    "lx.LU": lu,
}
GENERAL = {
    "cx.linear.FGMRES": fgmres,
    "lx.GMRES": with_lineax(lambda tol: lx.GMRES(rtol=tol, atol=tol, restart=RESTART, max_steps=MAX_STEPS)),
    "lx.BiCGStab": bicgstab,
    "jax.scipy bicgstab": with_jax("bicgstab", maxiter=MAX_STEPS),
    "lx.LU": lu,
}


def cases() -> list[Case]:
    dense = [systems.spectrum(10.0**k) for k in (1, 4, 7, 10)]
    dense += [systems.hilbert(8), systems.hilbert(10), systems.kkt(50, 10), systems.kkt(), systems.graded()]
    products = [systems.diagonal(10.0**k) for k in (1, 4, 7, 10)] + [systems.diagonal(1e4, 5000)]
    products += [systems.spectrum(1e2), systems.spectrum(1e6), systems.kkt(), systems.sparse_kkt()]
    products += [systems.poisson(side) for side in (15, 40, 100)]
    products += [systems.convection_diffusion(side) for side in (15, 40, 100)]
    products += [systems.softmax_hessian(), systems.logistic_hessian(1e-4)]
    products += [systems.logistic_hessian(penalty, pairs=True) for penalty in (1e-3, 1e-6)]
    products += [systems.gauss_newton(damping) for damping in (1e-2, 1e-4, 1e-6)] + [
        systems.gauss_newton(1e-4, 30)
    ]
    return [Case(system, True) for system in dense] + [Case(system) for system in products]


def contenders(case: Case) -> dict[str, Callable[[Case], Program]]:
    system = case.system
    by_hand = DEFINITE if system.definite else INDEFINITE if system.symmetric else GENERAL
    fits = {
        name: build for name, build in by_hand.items() if len(system.exact) <= DENSE or name not in DIRECT
    }
    return {AUTO: auto} | fits


DIRECT = ("lx.Cholesky", "lx.LU")


def wanted_error(system: systems.System) -> float:
    rhs = np.asarray(system.rhs)
    if scipy.sparse.issparse(system.matrix):
        found = scipy.sparse.linalg.spsolve(system.matrix.tocsc(), rhs)
    else:
        found = np.linalg.solve(system.matrix, rhs)
    return max(ERROR, 10 * harness.relative_error(found, system.exact))


@dataclasses.dataclass(frozen=True)
class Found:
    """A solver at the loosest tolerance that is tight enough."""

    call: Callable[[], Any]
    error: float
    stats: dict[str, Any]
    seconds: float


def loosest(program: Program, case: Case, wanted: float, direct: bool) -> Found | None:
    """None where there is no such tolerance."""
    rhs = case.system.rhs
    program(rhs, jnp.asarray(0.5))
    for tolerance in map(jnp.asarray, TOLERANCES[:1] if direct else TOLERANCES):
        start = time.perf_counter()
        value, success, stats = jax.block_until_ready(program(rhs, tolerance))
        seconds = time.perf_counter() - start
        error = harness.relative_error(value, case.system.exact)
        if error <= wanted and success:
            return Found(lambda tolerance=tolerance: program(rhs, tolerance), error, stats, seconds)
        if seconds > PATIENCE:
            return None
    return None


def study(case: Case) -> dict[str, Any]:
    """One row: `Auto` and the best of the others."""
    wanted = wanted_error(case.system)
    found = {
        name: loosest(build(case), case, wanted, name in DIRECT) for name, build in contenders(case).items()
    }
    fastest = min(one.seconds for one in found.values() if one is not None)
    racing = {
        name: one.call
        for name, one in found.items()
        if one is not None and (one.seconds <= FRACTION * fastest or name == AUTO)
    }
    times = harness.in_turns(racing, REPEATS)
    by_hand = {name: harness.milliseconds(times[name]) for name in racing if name != AUTO}
    best = min(by_hand, key=by_hand.__getitem__, default=None)
    ours = found[AUTO]
    said = {} if ours is None else ours.stats
    return {
        "system": case.name,
        "Auto chose": "–" if ours is None else cx.linear.Method(int(said["method"])).name,
        "because": "–" if ours is None else cx.linear.Reason(int(said["reason"])).name,
        "ms": float("nan") if ours is None else harness.milliseconds(times[AUTO]),
        "error": float("nan") if ours is None else ours.error,
        "best by hand": "–" if best is None else best,
        "its ms": float("nan") if best is None else by_hand[best],
        "Auto ÷ best": (
            float("inf") if ours is None else 0.0 if best is None else harness.ratio(times[AUTO], times[best])
        ),
    }


def measure(only: str = "") -> harness.Report:
    rows = []
    for case in cases():
        if only not in case.name:
            continue
        rows.append(study(case))
        jax.clear_caches()
    small = [row for row in rows if row["its ms"] <= SMALL_MS]
    large = [row for row in rows if row not in small]
    # 0 where no other solver got there.
    ratios = [row["Auto ÷ best"] for row in large if row["Auto ÷ best"] > 0]
    claims = [
        harness.Claim(f"{row['system']}: time, Auto ÷ best", row["Auto ÷ best"], at_most=1.3) for row in large
    ]
    claims += [
        harness.Claim("largest of these", max(ratios, default=0.0), at_most=1.3),
        harness.Claim("geometric mean", float(np.exp(np.mean(np.log(ratios or [1.0])))), at_most=1.2),
        harness.Claim(
            "systems that another one solved and Auto did not",
            sum(row["Auto ÷ best"] == float("inf") for row in rows),
            at_most=0,
        ),
        harness.Claim(
            f"systems of less than {SMALL_MS:g} ms: most that Auto adds, ms",
            max((row["ms"] - row["its ms"] for row in small), default=0.0),
            at_most=0.1,
        ),
    ]
    return harness.Report(
        "The automatic choice of a solver",
        f"Time to a relative error of {ERROR:g} (or 10 × that of a direct solve), float64, one right-hand side.",
        rows,
        claims,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore", RuntimeWarning)
    harness.main(measure)
