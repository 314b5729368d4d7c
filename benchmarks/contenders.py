"""The implicit hypergradient of softmax regression as a user of each library would write it.

Every contender is a function `phi, weights, training, validation -> (outer loss, hypergradient)` that can be
compiled; data are arguments for all of them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import harness
import jax
import optimistix as optx
import problems

import curvax as cx

with warnings.catch_warnings():
    # jaxopt announces on import that it is no longer maintained.
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

Contender = Callable[[Any, Any, Any, Any], tuple[Any, Any]]

INNER_TOLERANCE = 1e-8  # of the peers' inner solvers; ours stops early and sweeps
OUR_INNER_TOLERANCE = 1e-2
MAX_STEPS = 2000
RTOL = 1e-6  # of the hypergradient
MAX_SWEEPS = 8

PROBLEM = cx.Bilevel(inner=problems.inner, outer=problems.outer)
INNER_SOLVER = optx.LBFGS(rtol=OUR_INNER_TOLERANCE, atol=OUR_INNER_TOLERANCE)
RULE = cx.Implicit(rtol=RTOL, max_sweeps=MAX_SWEEPS)


def curvax(phi: Any, weights: Any, training: Any, validation: Any) -> tuple[Any, Any]:
    """Curvax, error estimate on, accuracy of the hypergradient requested."""
    hg = cx.hypergradient(
        PROBLEM,
        phi,
        weights,
        inner_solver=INNER_SOLVER,
        rule=RULE,
        inner_data=training,
        outer_data=validation,
    )
    return hg.value, hg.grad


def curvax_plain(phi: Any, weights: Any, training: Any, validation: Any) -> tuple[Any, Any]:
    """Curvax as the peers work: the inner solver to the end, no error estimate."""
    hg = cx.hypergradient(
        PROBLEM,
        phi,
        weights,
        inner_solver=optx.LBFGS(rtol=INNER_TOLERANCE, atol=INNER_TOLERANCE),
        rule=cx.Implicit(rtol=None),
        inner_data=training,
        outer_data=validation,
    )
    return hg.value, hg.grad


def optimistix(phi: Any, weights: Any, training: Any, validation: Any) -> tuple[Any, Any]:
    """Optimistix: L-BFGS and the default adjoint."""
    solver = optx.LBFGS(rtol=INNER_TOLERANCE, atol=INNER_TOLERANCE)

    def loss(phi: Any) -> Any:
        solution = optx.minimise(
            lambda w, args: problems.inner(w, *args), solver, weights, (phi, training), max_steps=MAX_STEPS
        )
        return problems.outer(solution.value, phi, validation)

    return jax.value_and_grad(loss)(phi)


def jaxopt_(phi: Any, weights: Any, training: Any, validation: Any) -> tuple[Any, Any]:
    """jaxopt: L-BFGS and its default implicit differentiation."""
    solver = jaxopt.LBFGS(problems.inner, tol=INNER_TOLERANCE, maxiter=MAX_STEPS)
    return jax.value_and_grad(
        lambda p: problems.outer(solver.run(weights, p, training).params, p, validation)
    )(phi)


CONTENDERS: dict[str, Contender] = {"Curvax": curvax, "Optimistix": optimistix, "jaxopt": jaxopt_}


def compiled(contender: Contender, *arguments: Any) -> tuple[Any, Callable[[], Any]]:
    """The compiled program of a contender, and a call of it with these arguments."""
    program = jax.jit(contender).lower(*arguments).compile()
    return program, lambda: program(*arguments)


def setting() -> str:
    """One sentence about the problem, for the reports."""
    return (
        f"Softmax regression, digits, {problems.TRAINING_IMAGES} training images, one L2 penalty a weight (640), "
        f"float64. Peers: L-BFGS at tolerance {INNER_TOLERANCE:g}; Curvax: L-BFGS at {OUR_INNER_TOLERANCE:g}, "
        f"then sweeps until its own error estimate is below {RTOL:g}."
    )


__all__ = ["CONTENDERS", "INNER_SOLVER", "PROBLEM", "RTOL", "RULE", "compiled", "harness", "setting"]
