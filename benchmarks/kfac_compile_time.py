"""Claims: what one step of a second-order optimiser takes to compile, beside one of Adam.

`init`, and tracing, lowering and compiling one step with the gradient of the mean loss in one `jit`, on the perceptron
of `kfac_step.py` in float32. Each optimiser in a fresh process without a persistent cache, in turns. A program is
compiled before, so that what XLA does once counts for none.
"""

import json
import statistics
import subprocess
import sys
import time

import harness
import jax
import jax.numpy as jnp
import optax
from kfac_factors import LOSS, perceptron_problem
from kfac_step import value_and_gradient

import curvax as cx

REPEATS = 5
OPTIMISERS = {
    "Adam": None,
    "K-FAC": cx.optim.kfac,
    "EKFAC": cx.optim.ekfac,
    "K-BFGS": cx.optim.kbfgs,
    "trust region": cx.optim.kf_trust_region,
}
# At most so many times what Adam takes; where it is a claim.
BOUNDS = {"K-FAC": 7.0}


def one(name: str) -> tuple[float, float]:
    """Seconds that the state, and tracing, lowering and compiling take in this process."""
    model_fn, params, x, y = perceptron_problem()
    make = OPTIMISERS[name]
    optimiser = optax.adam(1e-3) if make is None else make(model_fn, LOSS, example=x[0])

    def step(params, state, key, x, y):
        _, grads = value_and_gradient(model_fn, params, x, y)
        batch = {} if make is None else {"inputs": x, "targets": y, "key": key}
        updates, state = optimiser.update(grads, state, params, **batch)
        return optax.apply_updates(params, updates), state

    jax.jit(lambda x: jnp.sin(x)).lower(x).compile()
    start = time.perf_counter()
    state = optimiser.init(params)
    ready = time.perf_counter()
    jax.jit(step).lower(params, state, jax.random.key(0), x, y).compile()
    return ready - start, time.perf_counter() - ready


def in_fresh_process(name: str) -> tuple[float, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", name]
    return tuple(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def measure() -> harness.Report:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMISERS}
    for turn in range(REPEATS):
        for name in list(times) if turn % 2 == 0 else list(times)[::-1]:
            times[name].append(in_fresh_process(name))
    whole = {name: [sum(both) for both in seconds] for name, seconds in times.items()}
    rows, claims = [], []
    for name, seconds in times.items():
        value = harness.ratio(whole[name], whole["Adam"])
        rows.append(
            {
                "optimiser": name,
                "init, s": statistics.median(first for first, _ in seconds),
                "first step, s": statistics.median(second for _, second in seconds),
                "÷ Adam": value,
            }
        )
        if name in BOUNDS:
            claims.append(harness.Claim(f"{name} ÷ Adam, both together", value, at_most=BOUNDS[name]))
    return harness.Report(
        "Compile time of a second-order step",
        "float32; perceptron 64-256-256-256-10 with 1797 examples; everything adaptive.",
        rows,
        claims,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2])))
    else:
        harness.main(measure)
