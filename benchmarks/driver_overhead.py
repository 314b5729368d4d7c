"""Claim: a step of `minimise`, with progress, callback and checkpoints on, costs at most 5 % over a hand-written loop.

The peers do the same warm-started hypergradients and optax updates, and nothing else: a Python loop around a jitted,
donated step that reads no number back, and one jitted `lax.scan` that stacks the losses. The faster one counts.
Curvax runs as a user would run it: a progress bar on a (discarded) terminal, a callback, a checkpoint object with
its default interval. Its steps are timed from the end of the first chunk to the end of the last; what a run costs
once (opening the folder, the checkpoint at the end) stands in a column of its own.
"""

import functools
import io
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import optax
import optimistix as optx
import problems

import curvax as cx

NUM_STEPS = 70
REPEATS = 7
IMAGES = 1000
PROBLEM = cx.Bilevel(inner=problems.inner, outer=problems.outer)
OPTIMIZER = optax.adam(0.05)
SOLVER = optx.LBFGS(rtol=1e-3, atol=1e-3)
RTOL, MAX_SWEEPS = 1e-3, 8  # for steps of 5 to 10 ms on two cores
DRIVER = "cx.minimise"


class Terminal(io.StringIO):
    """Takes what a progress bar writes and throws it away."""

    def isatty(self) -> bool:
        """A terminal, so that the bar is drawn."""
        return True


def loops(folder: pathlib.Path) -> dict[str, Callable[[], tuple[float, float, float]]]:
    """Ways to do one run; each returns seconds of the steps, seconds of all the rest, and the last loss."""
    training, validation = (jax.tree.map(lambda x: x[:IMAGES], batch) for batch in problems.digits())
    phi0, theta0 = problems.start()
    arguments = {"inner_solver": SOLVER, "inner_data": training, "outer_data": validation}
    first = cx.hypergradient(
        PROBLEM, phi0, theta0, rule=cx.Implicit(rtol=RTOL, max_sweeps=MAX_SWEEPS), **arguments
    )
    # What `minimise` would set itself; given, so that all do the same work.
    atol = float(0.01 * RTOL * jnp.linalg.norm(first.grad))
    rule = cx.Implicit(rtol=RTOL, max_sweeps=MAX_SWEEPS, atol=atol)

    def step(carry: tuple, data: tuple) -> tuple:
        phi, opt_state, grad, state = carry
        update, opt_state = OPTIMIZER.update(grad, opt_state, phi)
        phi = optax.apply_updates(phi, update)
        hg = cx.hypergradient(
            PROBLEM,
            phi,
            theta0,
            inner_solver=SOLVER,
            rule=rule,
            inner_data=data[0],
            outer_data=data[1],
            state=state,
            throw=False,
        )
        return (phi, opt_state, hg.grad, hg.state), hg.value

    jitted = jax.jit(step, donate_argnums=0)

    @functools.partial(jax.jit, donate_argnums=0)
    def scanned(carry: tuple, data: tuple) -> tuple:
        return jax.lax.scan(lambda c, _: step(c, data), carry, length=NUM_STEPS)

    def by_hand(run: Callable[[tuple], jax.Array]) -> tuple[float, float, float]:
        carry = jax.tree.map(jnp.copy, (phi0, OPTIMIZER.init(phi0), first.grad, first.state))
        jax.block_until_ready(carry)
        start = time.perf_counter()
        value = jax.block_until_ready(run(carry))
        return time.perf_counter() - start, 0.0, float(value)

    def python_loop(carry: tuple) -> jax.Array:
        for _ in range(NUM_STEPS):
            carry, value = jitted(carry, (training, validation))
        return value

    def scan_loop(carry: tuple) -> jax.Array:
        return scanned(carry, (training, validation))[1][-1]

    names = itertools.count()

    def driver() -> tuple[float, float, float]:
        ends = []
        stderr, sys.stderr = sys.stderr, Terminal()
        start = time.perf_counter()
        try:
            solution = cx.minimise(
                PROBLEM,
                phi0,
                theta0,
                rule=rule,
                optimizer=OPTIMIZER,
                num_steps=NUM_STEPS,
                callbacks=[lambda info: ends.append(time.perf_counter())],
                checkpoint=cx.Checkpoint(folder / str(next(names))),
                **arguments,
            )
        finally:
            sys.stderr = stderr
        total = time.perf_counter() - start
        return ends[-1] - ends[0], total - (ends[-1] - ends[0]), float(solution.value)

    return {
        "Python loop of a jitted step": lambda: by_hand(python_loop),
        "lax.scan": lambda: by_hand(scan_loop),
        DRIVER: driver,
    }


def measure() -> harness.Report:
    with tempfile.TemporaryDirectory() as folder:
        functions = loops(pathlib.Path(folder))
        runs = {name: [function()][1:] for name, function in functions.items()}  # the first one compiles
        for turn in range(REPEATS):
            for name in list(functions) if turn % 2 == 0 else list(functions)[::-1]:
                runs[name].append(functions[name]())
    steps = {name: [run[0] / NUM_STEPS for run in runs[name]] for name in runs}
    values = {name: runs[name][-1][2] for name in runs}
    peers = [name for name in runs if name != DRIVER]
    best = min(peers, key=lambda name: harness.milliseconds(steps[name]))
    rows = [
        {
            "loop": name,
            "ms a step": harness.milliseconds(steps[name]),
            "ms a run besides": harness.milliseconds([run[1] for run in runs[name]]),
            "last loss": values[name],
        }
        for name in runs
    ]
    return harness.Report(
        "Overhead of the driver",
        f"softmax regression on {IMAGES} digits, 640 penalties, {NUM_STEPS} warm-started hypergradients, float64",
        rows,
        [
            harness.Claim("ms a step of the best loop", harness.milliseconds(steps[best]), at_least=5.0),
            harness.Claim(
                "cx.minimise ÷ best hand-written loop, time a step",
                harness.ratio(steps[DRIVER], steps[best]),
                at_most=1.05,
            ),
            harness.Claim(
                "relative difference of the last losses",
                max(abs(values[name] / values[DRIVER] - 1) for name in peers),
                at_most=1e-4,
            ),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
