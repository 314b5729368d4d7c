"""Claim: in an outer loop a hypergradient from a warm start costs at most half of a cold one at the same accuracy.

The hyperparameters walk along a path of Adam steps on the outer loss. At each point one compiled program is called
twice: cold (zero weights, no state) and with the state of the point before. Both must reach the same requested
accuracy of 1e-6, and both are compared with a dense solution at the end of the path.
"""

import statistics
import time

import contenders
import harness
import jax
import jax.numpy as jnp
import optax
import problems

import curvax as cx

OUTER_STEPS = 20
LEARNING_RATE = 1e-2
ROUNDS = 5


def hypergradient(phi, weights, state, training, validation):
    """Hypergradient from `state`, which may be cold."""
    hg = cx.hypergradient(
        contenders.PROBLEM,
        phi,
        weights,
        inner_solver=contenders.INNER_SOLVER,
        rule=contenders.RULE,
        inner_data=training,
        outer_data=validation,
        state=state,
    )
    return hg.grad, hg.state, hg.stats


def measure() -> harness.Report:
    training, validation = problems.digits()
    phi, weights = problems.start()
    cold = cx.bilevel.initial_state(
        contenders.PROBLEM, phi, weights, inner_solver=contenders.INNER_SOLVER, rule=contenders.RULE
    )
    program = jax.jit(hypergradient).lower(phi, weights, cold, training, validation).compile()

    optimizer = optax.adam(LEARNING_RATE)
    optimizer_state, path = optimizer.init(phi), [phi]
    for _ in range(OUTER_STEPS):
        updates, optimizer_state = optimizer.update(
            program(path[-1], weights, cold, training, validation)[0], optimizer_state
        )
        path.append(jnp.asarray(optax.apply_updates(path[-1], updates)))

    times: dict[str, list[float]] = {"cold": [], "warm": []}
    products: dict[str, list[int]] = {"cold": [], "warm": []}
    for _ in range(ROUNDS):
        _, state, _ = program(path[0], weights, cold, training, validation)
        for point in path[1:]:
            results = {}
            for name, start in (("cold", cold), ("warm", state)):
                begin = time.perf_counter()
                results[name] = jax.block_until_ready(program(point, weights, start, training, validation))
                times[name].append(time.perf_counter() - begin)
                stats = results[name][2]
                products[name].append(int(stats.num_matvecs) + int(stats.num_inner_steps))
            state = results["warm"][1]

    truth = problems.exact(path[-1], training, validation).hypergradient
    errors = {name: harness.relative_error(result[0], truth) for name, result in results.items()}
    rows = [
        {
            "start": name,
            "ms": harness.milliseconds(times[name]),
            "gradients and products": statistics.median(products[name]),
            "relative error": errors[name],
            "its own estimate": float(results[name][2].relative_error),
        }
        for name in times
    ]
    return harness.Report(
        "Warm-started hypergradients in an outer loop",
        f"{contenders.setting()} {OUTER_STEPS} outer steps of Adam at {LEARNING_RATE:g} on the log penalties.",
        rows,
        [
            harness.Claim(
                "warm ÷ cold, time", harness.ratio(times["warm"], times["cold"]), at_most=0.5, aim=0.3
            ),
            harness.Claim("relative error, warm", errors["warm"], at_most=contenders.RTOL),
            harness.Claim("relative error, cold", errors["cold"], at_most=contenders.RTOL),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
