"""Claims: what one step of K-FAC costs, in gradients of the mean loss, and that no step stalls.

`cx.optim.kfac` in one `jit` with the gradient, on a multilayer perceptron in float32: sampled factors, learning rate
and momentum from the exact quadratic model, adaptive damping, factors factorised in shares, every one in five steps.
Beside it: all factors factorised at once, no adaptation at all, EKFAC and K-BFGS. Timed in turns with the gradient
alone. The peak is the slowest of the five steps of a period (medians over periods) ÷ the median of all steps. No peer
measures in this process: kfac-jax runs on an older JAX only.
"""

import functools as ft
import statistics

import harness
import jax
import jax.numpy as jnp
import optax
from kfac_factors import LOSS, perceptron_problem

import curvax as cx

PERIOD, REPEATS = 5, 75
Damping, Schedule = cx.optim.Damping, cx.optim.Schedule


def value_and_gradient(model_fn, params, x, y):
    return jax.value_and_grad(lambda p: jnp.mean(jax.vmap(lambda x, y: LOSS(model_fn(p, x), y))(x, y)))(
        params
    )


class Run:
    """Steps of an optimiser, one a call."""

    def __init__(self, make, model_fn, params, x, y):
        optimiser = make(model_fn, LOSS, example=x[0])

        def step(params, state, key, x, y):
            _, grads = value_and_gradient(model_fn, params, x, y)
            updates, state = optimiser.update(grads, state, params, inputs=x, targets=y, key=key)
            return optax.apply_updates(params, updates), state

        self.keys = list(jax.random.split(jax.random.key(0), 100 + REPEATS))
        self.carry, self.data = (params, optimiser.init(params)), (x, y)
        self.step = jax.jit(step).lower(*self.carry, self.keys[0], x, y).compile()
        for _ in range(PERIOD):
            self()

    def __call__(self):
        self.carry = self.step(*self.carry, self.keys.pop(), *self.data)
        return self.carry


EVERYTHING = "K-FAC, everything adaptive, inverses in shares"
RUNS = {
    EVERYTHING: cx.optim.kfac,
    "K-FAC, everything adaptive, inverses at once": ft.partial(
        cx.optim.kfac, schedule=Schedule(staggered=False)
    ),
    "K-FAC, learning rate and damping given": ft.partial(
        cx.optim.kfac, learning_rate=0.1, damping=Damping(every=None)
    ),
    "EKFAC, everything adaptive": cx.optim.ekfac,
    "K-BFGS, everything adaptive": cx.optim.kbfgs,
}


def measure() -> harness.Report:
    model_fn, params, x, y = perceptron_problem()
    gradient = jax.jit(ft.partial(value_and_gradient, model_fn)).lower(params, x, y).compile()
    calls = {name: Run(make, model_fn, params, x, y) for name, make in RUNS.items()}
    times = harness.in_turns({"gradient": lambda: gradient(params, x, y), **calls}, REPEATS, warm_ups=PERIOD)
    rows, claims = [], []
    for name, seconds in times.items():
        gradients = harness.ratio(seconds, times["gradient"])
        phases = [statistics.median(seconds[phase::PERIOD]) for phase in range(PERIOD)]
        peak = max(phases) / statistics.median(seconds)
        rows.append({"what": name, "ms": harness.milliseconds(seconds), "gradients": gradients, "peak": peak})
        if name == EVERYTHING:
            claims.append(harness.Claim(f"{name}, in gradients", gradients, at_most=4.5, aim=4.0))
            claims.append(harness.Claim(f"{name}, slowest step of a period ÷ median", peak, at_most=1.1))
    return harness.Report(
        "One step of K-FAC",
        "float32; perceptron 64-256-256-256-10 with 1797 examples, one sampled target for each; with the gradient.",
        rows,
        claims,
    )


if __name__ == "__main__":
    harness.main(measure)
