"""Claims: a cold implicit hypergradient at 1e-6 is faster than the peers', and its error estimate is cheap.

Peers at the accuracy that their users get: Optimistix (L-BFGS 1e-8, default adjoint) and jaxopt (L-BFGS tol 1e-8,
default adjoint). The truth is a dense Newton solution with a dense adjoint, in NumPy.
"""

import contenders
import harness
import jax
import optimistix as optx
import problems

import curvax as cx

REPEATS = 15


def measure() -> harness.Report:
    training, validation = problems.digits()
    phi, weights = problems.start()
    arguments = (phi, weights, training, validation)
    truth = problems.exact(phi, training, validation).hypergradient

    calls, rows, errors = {}, [], {}
    for name, contender in contenders.CONTENDERS.items():
        _, calls[name] = contenders.compiled(contender, *arguments)
        errors[name] = harness.relative_error(calls[name]()[1], truth)

    # The price of the estimate: the same inner solve and adjoint, with the estimate and without.
    tight = optx.LBFGS(rtol=contenders.INNER_TOLERANCE, atol=contenders.INNER_TOLERANCE)
    for name, rule in (
        ("Curvax, L-BFGS 1e-8, one sweep", cx.Implicit(rtol=contenders.RTOL)),
        ("Curvax, L-BFGS 1e-8, no estimate", cx.Implicit(rtol=None)),
    ):

        def call(phi, weights, training, validation, rule=rule):
            hg = cx.hypergradient(
                contenders.PROBLEM,
                phi,
                weights,
                inner_solver=tight,
                rule=rule,
                inner_data=training,
                outer_data=validation,
            )
            return hg.value, hg.grad

        _, calls[name] = contenders.compiled(call, *arguments)
        errors[name] = harness.relative_error(calls[name]()[1], truth)

    times = harness.in_turns(calls, REPEATS)
    hg = cx.hypergradient(
        contenders.PROBLEM,
        phi,
        weights,
        inner_solver=contenders.INNER_SOLVER,
        rule=contenders.RULE,
        inner_data=training,
        outer_data=validation,
    )
    estimate = float(hg.stats.relative_error)
    for name in calls:
        rows.append(
            {
                "library": name,
                "ms": harness.milliseconds(times[name]),
                "relative error": errors[name],
                "its own estimate": estimate if name == "Curvax" else "–",
            }
        )
    with_estimate, without = "Curvax, L-BFGS 1e-8, one sweep", "Curvax, L-BFGS 1e-8, no estimate"
    return harness.Report(
        "Cold implicit hypergradient",
        contenders.setting(),
        rows,
        [
            harness.Claim("relative error of Curvax", errors["Curvax"], at_most=1e-6),
            harness.Claim("estimate ÷ true error", estimate / errors["Curvax"], at_least=0.5, at_most=5.0),
            harness.Claim(
                "Optimistix ÷ Curvax, time",
                harness.ratio(times["Optimistix"], times["Curvax"]),
                at_least=5.0,
                aim=8.0,
            ),
            harness.Claim(
                "jaxopt ÷ Curvax, time", harness.ratio(times["jaxopt"], times["Curvax"]), at_least=1.0
            ),
            harness.Claim("jaxopt ÷ Curvax, error", errors["jaxopt"] / errors["Curvax"], at_least=100.0),
            harness.Claim(
                "time with ÷ without the estimate",
                harness.ratio(times[with_estimate], times[without]),
                at_most=1.3,
            ),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
