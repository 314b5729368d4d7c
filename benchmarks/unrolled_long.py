"""Claim: 10,000 steps of Adam are differentiated with forty stored states, at most 1.6 times as slow as with √T.

A small network (64-16-10, 15 kB of parameters and optimiser's state) on 64 digits, 64 sample weights and the learning
rate as hyperparameters, float32. Adam's ε is 1e-2 and the rate e⁻⁸, so that the path is tame: its adjoint hardly grows,
and all schedules give the same derivative; on a chaotic path they would not. Peers: one loop that stores every state,
and two nested `lax.scan` with `jax.checkpoint`, written by hand. Three memory budgets are asked for and measured as
well. Memory is XLA's plan of temporaries.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import problems
from unrolled_digits import inner, network, outer

import curvax as cx

SIZES = (64, 16, 10)
STEPS = 10_000
IMAGES = 64
LOG_RATE = -8.0
EPSILON = 1e-2
BUDGETS = (2**20, 4 * 2**20, 32 * 2**20)
MOST_STORED = 40
REPEATS = 5


def start() -> tuple[Any, Any]:
    """Hyperparameters and weights of the network."""
    phi = {"weights": jnp.zeros(IMAGES, jnp.float32), "log rate": jnp.asarray(LOG_RATE, jnp.float32)}
    return phi, network(SIZES)


def optimizer(phi):
    return optax.adam(jnp.exp(phi["log rate"]), eps=EPSILON, eps_root=1e-12)


PROBLEM = cx.Bilevel(inner=inner, outer=outer)
SOLVER = cx.Steps(optimizer, STEPS)


def curvax(rule: Any, said: list) -> Callable:
    """Ours; what the path tells goes into `said`."""

    def run(phi, theta, training, validation):
        hg = cx.hypergradient(
            PROBLEM, phi, theta, inner_solver=SOLVER, rule=rule, inner_data=training, outer_data=validation
        )
        said.append(hg.stats.path)
        return hg.value, hg.grad, hg.stats.path.growth

    return run


def by_hand(levels: tuple[int, ...]) -> Callable:
    """`jax.grad` through nested scans, checkpointed."""

    def loss(phi, theta, training, validation):
        transformation = optimizer(phi)

        def step(carry, _):
            theta, state = carry
            updates, state = transformation.update(jax.grad(inner)(theta, phi, training), state, theta)
            return (optax.apply_updates(theta, updates), state), None

        run = step
        for length in reversed(levels):
            run = functools.partial(_scan, jax.checkpoint(run, prevent_cse=False), length)
        (theta, _), _ = run((theta, transformation.init(theta)), None)
        return outer(theta, phi, validation)

    return jax.value_and_grad(loss)


def _scan(body, length, carry, _):
    return jax.lax.scan(body, carry, length=length)[0], None


def measure() -> harness.Report:
    data = [problems.Batch(b.images[:IMAGES], b.labels[:IMAGES]) for b in problems.digits(jnp.float32)]
    phi, theta = start()
    rules = {
        'Curvax, checkpoint="none"': cx.Unrolled("mixed"),
        'Curvax, checkpoint="sqrt"': cx.Unrolled("mixed", "sqrt"),
        'Curvax, checkpoint="binomial"': cx.Unrolled("mixed", "binomial"),
    } | {f"Curvax, {b // 2**20} MB": cx.Unrolled("mixed", cx.MemoryBudget(b)) for b in BUDGETS}
    said: dict[str, list] = {name: [] for name in rules}
    functions = {name: curvax(rule, said[name]) for name, rule in rules.items()} | {
        "JAX, one checkpointed scan": by_hand((STEPS,)),
        "JAX, two nested": by_hand((100, 100)),
    }
    arguments = (phi, theta, *data)
    programs = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    calls = {name: functools.partial(program, *arguments) for name, program in programs.items()}
    results = {name: call() for name, call in calls.items()}
    times = harness.in_turns(calls, repeats=REPEATS, warm_ups=0)
    taken = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    state = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(theta))
    exact = results["JAX, one checkpointed scan"][1]
    rows = [
        {
            "contender": name,
            "stored states": " + ".join(map(str, said[name][0].lengths)) if name in said else "",
            "seconds": harness.milliseconds(times[name]) / 1e3,
            "temporaries, kB": taken[name] / 2**10,
            "in states": taken[name] / state,
            "difference": harness.relative_error(results[name][1], exact),
        }
        for name in calls
    ]
    least, root = 'Curvax, checkpoint="binomial"', 'Curvax, checkpoint="sqrt"'
    claims = [
        harness.Claim("stored states", float(said[least][0].num_stored), at_most=MOST_STORED),
        harness.Claim(
            "time ÷ that of two nested loops", harness.ratio(times[least], times[root]), at_most=1.6
        ),
        harness.Claim(
            "time ÷ that of two nested scans by hand",
            harness.ratio(times[least], times["JAX, two nested"]),
            at_most=1.6,
        ),
        harness.Claim("growth of the adjoint", float(results[least][2]), at_most=10.0),
        harness.Claim(
            "difference from the derivative that stores every state",
            harness.relative_error(results[least][1], exact),
            at_most=1e-3,
        ),
    ]
    claims += [
        harness.Claim(
            f"memory ÷ the budget of {b // 2**20} MB", taken[f"Curvax, {b // 2**20} MB"] / b, at_most=1.0
        )
        for b in BUDGETS
    ]
    return harness.Report(
        title="10,000 steps of Adam",
        setting=(
            f"Network {'-'.join(map(str, SIZES))}, {IMAGES} digits, a state of {state / 2**10:.1f} kB, float32; "
            "hyperparameters: a weight for each image and the learning rate. Stored states: of each nested loop."
        ),
        rows=rows,
        claims=claims,
    )


if __name__ == "__main__":
    harness.main(measure)
