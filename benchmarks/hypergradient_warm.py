"""Claim: in an outer loop a warm-started hypergradient costs at most half of a cold one at the same accuracy.

The hyperparameters walk along a path of Adam steps on the outer loss. At each point the hypergradient is taken cold
(zero weights, no state), with the state of the point before, and with that state and a preconditioner: the inverse of
the inner Hessian at the first point, formed once; its time is shared out over the steps of the path. All must
reach the requested accuracy of 1e-6, and all are compared with a dense solution at the end of the path.
"""

import statistics
import time

import contenders
import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import lineax as lx
import optax
import problems

import curvax as cx

OUTER_STEPS = 100
LEARNING_RATE = 1e-2
ROUNDS = 2


def hypergradient(phi, weights, state, training, validation, inverse=None):
    """Hypergradient from `state`, which may be cold."""
    rule = contenders.RULE
    if inverse is not None:
        operator = lx.FunctionLinearOperator(
            lambda v: (inverse @ v.ravel()).reshape(v.shape),
            jax.eval_shape(lambda: weights),
            lx.positive_semidefinite_tag,
        )
        rule = cx.Implicit(rtol=contenders.RTOL, max_sweeps=contenders.MAX_SWEEPS, preconditioner=operator)
    hg = cx.hypergradient(
        contenders.PROBLEM,
        phi,
        weights,
        inner_solver=contenders.INNER_SOLVER,
        rule=rule,
        inner_data=training,
        outer_data=validation,
        state=state,
    )
    return hg.grad, hg.state, hg.stats


def inverse_curvature(weights, phi, training):
    """The inverse of the inner Hessian, dense."""
    shape = weights.shape
    hessian = jax.hessian(lambda w: problems.inner(w.reshape(shape), phi, training))(weights.ravel())
    return jnp.linalg.inv(0.5 * (hessian + hessian.T))


def without_directions(state):
    """Under a preconditioner of the user's nothing is recycled."""
    return eqx.tree_at(lambda s: s.recycled, state, None, is_leaf=lambda x: x is None)


def measure() -> harness.Report:
    training, validation = problems.digits()
    phi, weights = problems.start()
    cold = cx.bilevel.initial_state(
        contenders.PROBLEM, phi, weights, inner_solver=contenders.INNER_SOLVER, rule=contenders.RULE
    )
    program = jax.jit(hypergradient).lower(phi, weights, cold, training, validation).compile()
    invert = jax.jit(inverse_curvature).lower(weights, phi, training).compile()
    inverse = invert(program(phi, weights, cold, training, validation)[1].theta, phi, training)
    bare = without_directions(cold)
    preconditioned = jax.jit(hypergradient).lower(phi, weights, bare, training, validation, inverse).compile()

    optimizer = optax.adam(LEARNING_RATE)
    optimizer_state, path = optimizer.init(phi), [phi]
    for _ in range(OUTER_STEPS):
        updates, optimizer_state = optimizer.update(
            program(path[-1], weights, cold, training, validation)[0], optimizer_state
        )
        path.append(jnp.asarray(optax.apply_updates(path[-1], updates)))

    names = ("cold", "warm", "warm, preconditioned")
    times: dict[str, list[float]] = {name: [] for name in names}
    products: dict[str, list[int]] = {name: [] for name in names}
    results: dict = {}
    for _ in range(ROUNDS):
        _, state, _ = program(path[0], weights, cold, training, validation)
        states = {"warm": state, "warm, preconditioned": without_directions(state)}
        begin = time.perf_counter()
        inverse = jax.block_until_ready(invert(state.theta, path[0], training))
        share = (time.perf_counter() - begin) / OUTER_STEPS
        for point in path[1:]:
            for name in names:
                extra = (inverse,) if name == "warm, preconditioned" else ()
                run = preconditioned if extra else program
                begin = time.perf_counter()
                start = states.get(name, cold)
                results[name] = jax.block_until_ready(
                    run(point, weights, start, training, validation, *extra)
                )
                times[name].append(time.perf_counter() - begin + (share if extra else 0.0))
                stats = results[name][2]
                products[name].append(int(stats.num_matvecs) + int(stats.num_inner_steps))
                if name in states:
                    states[name] = results[name][1]

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
            harness.Claim(
                "warm and preconditioned ÷ cold, time",
                harness.ratio(times["warm, preconditioned"], times["cold"]),
                at_most=0.5,
                aim=0.3,
            ),
            harness.Claim(
                "warm ÷ cold, gradients and products",
                harness.ratio(products["warm"], products["cold"]),
                at_most=0.5,
                aim=0.3,
            ),
            harness.Claim("relative error, warm", errors["warm"], at_most=contenders.RTOL),
            harness.Claim(
                "relative error, warm and preconditioned",
                errors["warm, preconditioned"],
                at_most=contenders.RTOL,
            ),
            harness.Claim("relative error, cold", errors["cold"], at_most=contenders.RTOL),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
