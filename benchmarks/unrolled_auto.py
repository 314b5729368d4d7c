"""Claim: `mode="auto"` takes at most 1.2 times as long as the best mode, on twelve problems.

Two networks on the digits data and a sum of elementwise losses, by one, two, eight and many hyperparameters; the cost
model knows none of them. Candidates: mixed, reverse and forward mode without further checkpoints.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import optax
import problems

import curvax as cx

STEPS = 20
REPEATS = 7
MANY = 1000
NUMBERS = (1, 2, 8, MANY)
MODELS: dict[str, Any] = {
    "network 64-32-10": (64, 32, 10),
    "network 64-128-128-10": (64, 128, 128, 10),
    "elementwise": None,
}
MODES = ("auto", "mixed", "reverse", "forward")


def rates(phi: Any) -> Any:
    """One hyperparameter is a learning rate; with two the second is the momentum; more are weights of the data."""
    number = phi.size
    rate = 0.1 * jnp.exp(phi[0])
    return optax.sgd(rate, momentum=0.5 * jax.nn.sigmoid(phi[1]) if number == 2 else 0.5)


def weights(phi: Any, rows: int) -> Any:
    """A weight for each image: groups of images share one."""
    return 2 * jax.nn.sigmoid(jnp.resize(phi, (rows,))) if phi.size > 2 else jnp.ones(rows, phi.dtype)


def network(sizes: tuple[int, ...]) -> tuple[Callable, Callable, Any]:
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    theta = [
        (jax.random.normal(k, (a, b), jnp.float32) * a**-0.5, jnp.zeros(b, jnp.float32))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def losses(theta, batch):
        out = batch.images
        for i, (matrix, shift) in enumerate(theta):
            out = out @ matrix + shift
            out = jnp.tanh(out) if i + 1 < len(theta) else out
        return optax.softmax_cross_entropy_with_integer_labels(out, batch.labels)

    def inner(theta, phi, batch):
        return jnp.mean(weights(phi, len(batch.labels)) * losses(theta, batch))

    return inner, lambda theta, phi, batch: jnp.mean(losses(theta, batch)), theta


def elementwise() -> tuple[Callable, Callable, Any]:
    theta = jax.random.normal(jax.random.key(0), (20_000,), jnp.float32)

    def inner(theta, phi, batch):
        return jnp.sum(weights(phi, len(theta)) * jnp.logaddexp(0.0, theta - 1.0) ** 2)

    return inner, lambda theta, phi, batch: jnp.sum(theta**2), theta


def measure() -> harness.Report:
    training, validation = problems.digits(jnp.float32)
    rows, worst = [], 0.0
    for model, sizes in MODELS.items():
        inner, outer, theta = elementwise() if sizes is None else network(sizes)
        problem, solver = cx.Bilevel(inner=inner, outer=outer), cx.Steps(rates, STEPS)
        for number in NUMBERS:
            phi, calls, chosen = jnp.zeros(number, jnp.float32), {}, []
            for mode in MODES if number < MANY else MODES[:-1]:
                run = functools.partial(_run, problem, solver, cx.Unrolled(mode), chosen)
                arguments = (phi, theta, training, validation)
                calls[mode] = functools.partial(jax.jit(run).lower(*arguments).compile(), *arguments)
            times = {k: harness.milliseconds(v) for k, v in harness.in_turns(calls, repeats=REPEATS).items()}
            best = min((k for k in times if k != "auto"), key=times.__getitem__)
            ratio = times[chosen[0]] / times[best]
            worst = max(worst, ratio)
            rows.append(
                {"model": model, "hyperparameters": number, "auto takes": chosen[0], "best": best}
                | {f"{mode}, ms": times.get(mode, float("nan")) for mode in MODES}
                | {"÷ best": ratio}
            )
    return harness.Report(
        title="The mode that `auto` takes",
        setting=f"{STEPS} steps of gradient descent with momentum, float32; `÷ best` is of the mode that was taken.",
        rows=rows,
        claims=[harness.Claim("largest time ÷ that of the best mode", worst, at_most=1.2)],
    )


def _run(
    problem: Any, solver: Any, rule: Any, chosen: list, phi: Any, theta: Any, training: Any, validation: Any
) -> Any:
    hg = cx.hypergradient(
        problem,
        phi,
        theta,
        inner_solver=solver,
        rule=rule,
        inner_data=training,
        outer_data=validation,
        throw=False,
    )
    chosen.append(hg.stats.path.mode)
    return hg.value, hg.grad


if __name__ == "__main__":
    harness.main(measure)
