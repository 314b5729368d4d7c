"""Claim: time and memory of every rule grow with T, m and d as the theory says.

T is the number of steps, m that of hyperparameters, d that of parameters. The inner loss costs d evaluations of tanh
whatever m, so that time is that of the rule. Each is doubled three times from a common base, and an exponent fitted to
time and to memory (XLA's plan of temporaries; what the hyperparameters themselves and the statistics of the path take
is in it).
"""

import functools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax as cx

# Large enough for the arrays of a step to leave the caches, and m for a full chunk of tangents.
BASE = {"T": 32, "m": 16, "d": 65536}
DOUBLINGS = 3
REPEATS = 3
TRUNCATED = 4  # few beside T, so that the exponent is that of many steps

# For each rule the exponents of time in T, m and d, and those of memory.
RULES: dict[str, tuple[Any, tuple[float, float, float], tuple[float, float, float]]] = {
    "mixed": (cx.Unrolled("mixed"), (1, 0, 1), (1, 0, 1)),
    'mixed, "sqrt"': (cx.Unrolled("mixed", "sqrt"), (1, 0, 1), (0.5, 0, 1)),
    'mixed, "binomial"': (cx.Unrolled("mixed", "binomial"), (1, 0, 1), (0.33, 0, 1)),
    "reverse": (cx.Unrolled("reverse"), (1, 0, 1), (1, 0, 1)),
    "forward": (cx.Unrolled("forward"), (1, 1, 1), (0, 0, 1)),
    "truncated": (cx.Unrolled("mixed", truncate=TRUNCATED), (1, 0, 1), (0, 0, 1)),
    "one step": (cx.OneStep(), (1, 0, 1), (0, 0, 1)),
    "finite difference": (cx.FiniteDifference(), (1, 0, 1), (0, 0, 1)),
    "first order": (cx.FirstOrder(), (1, 0, 1), (0, 0, 1)),
}
CLOSE = {"time": 0.3, "memory": 0.3}


def inner(theta, phi, batch):
    shift = jnp.mean(phi)
    return jnp.mean(jnp.tanh(theta * batch + shift) ** 2) + 0.05 * jnp.mean((theta - shift) ** 2)


def outer(theta, phi, batch):
    del batch
    return jnp.mean((theta - 1.0) ** 2) + 0.1 * jnp.mean(phi**2)


PROBLEM = cx.Bilevel(inner=inner, outer=outer)


def prepared(rule: Any, steps: int, m: int, d: int) -> tuple[Any, int]:
    """A compiled call and the bytes that it takes."""
    solver = cx.Steps(optax.sgd(0.5 * d, momentum=0.5), steps)

    def run(phi, theta, batch):
        hg = cx.hypergradient(
            PROBLEM, phi, theta, inner_solver=solver, rule=rule, inner_data=batch, throw=False
        )
        return hg.value, hg.grad

    keys = jax.random.split(jax.random.key(0), 3)
    sizes = ((m,), (d,), (d,))
    arguments = [jax.random.normal(k, size, jnp.float32) for k, size in zip(keys, sizes, strict=True)]
    program = jax.jit(run).lower(*arguments).compile()
    return functools.partial(program, *arguments), program.memory_analysis().temp_size_in_bytes


def fitted(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure() -> harness.Report:
    calls, memory = {}, {}
    for name, (rule, _, _) in RULES.items():
        for axis in BASE:
            for i in range(DOUBLINGS + 1):
                sizes = BASE | {axis: BASE[axis] * 2**i}
                key = (name, tuple(sizes.values()))
                if key not in calls:
                    calls[key], memory[key] = prepared(rule, *sizes.values())
    times = {k: min(v) for k, v in harness.in_turns(calls, repeats=REPEATS, warm_ups=1).items()}
    rows, claims = [], []
    for name, (_, *theory) in RULES.items():
        row: dict[str, Any] = {"rule": name}
        for what, values, wanted in zip(("time", "memory"), (times, memory), theory, strict=True):
            for axis, exponent in zip(BASE, wanted, strict=True):
                grown = [BASE[axis] * 2**i for i in range(DOUBLINGS + 1)]
                found = fitted(grown, [values[name, tuple((BASE | {axis: size}).values())] for size in grown])
                row[f"{what} in {axis}"] = f"{found:.2f} ({exponent:g})"
                row[f"_{what} in {axis}"] = found - exponent
        rows.append(row)
    for what in ("time", "memory"):
        worst = max(abs(row[f"_{what} in {axis}"]) for row in rows for axis in BASE)
        claims.append(
            harness.Claim(f"largest deviation of an exponent of {what}", worst, at_most=CLOSE[what])
        )
    base = tuple(BASE.values())
    for row in rows:
        for key in [key for key in row if key[0] == "_"]:
            del row[key]
        row["ms at the base"] = times[row["rule"], base] * 1e3
        row["kB at the base"] = memory[row["rule"], base] / 2**10
    return harness.Report(
        title="How time and memory of the rules grow",
        setting=(
            f"T steps, m hyperparameters, d parameters from {BASE['T']}, {BASE['m']}, {BASE['d']} on, each doubled "
            f"{DOUBLINGS} times; fitted exponents, in brackets those of the theory. Gradient descent with momentum, "
            f"float32; truncated to {TRUNCATED} steps."
        ),
        rows=rows,
        claims=claims,
    )


def picture(report: harness.Report, path: str) -> None:
    """Fitted exponents beside those of the theory."""
    import matplotlib.pyplot as plt

    names = [row["rule"] for row in report.rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for ax, what in zip(axes, ("time", "memory"), strict=True):
        for i, (axis, colour) in enumerate(zip(BASE, ("tab:blue", "tab:orange", "tab:green"), strict=True)):
            cells = [row[f"{what} in {axis}"].split(" (") for row in report.rows]
            places = np.arange(len(names)) + 0.25 * (i - 1)
            ax.barh(places, [float(c[0]) for c in cells], 0.22, color=colour, label=f"in {axis}")
            theory = "theory" if axis == "d" else None
            ax.plot([float(c[1][:-1]) for c in cells], places, "k|", markersize=8, label=theory)
        ax.set_title(f"exponent of {what}")
        ax.set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    harness.main(measure, picture)
