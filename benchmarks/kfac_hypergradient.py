"""Claim: K-FAC as preconditioner takes at least five times fewer products for the adjoint of a network's hypergradient.

A multilayer perceptron with 1e5 weights learns digits from weights φ that it must stay near: the inner objective is the
mean squared error of one-hot targets and λ/2 ‖θ − φ‖², the outer one the error of the other digits, and the
hyperparameters are the 1e5 numbers φ themselves (implicit MAML, transfer). At the inner solution the adjoint is solved
by conjugate gradients to a relative error of 1e-3: without a preconditioner, with K-FAC, with factors from one sampled
target for each image, and with EKFAC. Hypergradients are compared with one of a much smaller tolerance.
"""

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
from sklearn.datasets import load_digits

import curvax as cx

SIZES = (64, 280, 280, 10)
TRAINING = 1000
PENALTY = 1e-3
STEPS = 1500
REPEATS = 3
LOSS = cx.operators.SquaredError()


def model_fn(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(weight @ x + bias)
    return params[-1][0] @ x + params[-1][1]


def error(params, data):
    return jnp.mean(jax.vmap(lambda x, y: LOSS(model_fn(params, x), y))(*data))


def inner(theta, phi, data):
    return error(theta, data) + 0.5 * PENALTY * sum(
        jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(theta), jax.tree.leaves(phi), strict=True)
    )


PROBLEM = cx.Bilevel(inner=inner, outer=lambda theta, phi, data: error(theta, data))


@jax.jit
def pretrained(params, data):
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(error)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), None, length=STEPS)[0][0]


def curvatures(training):
    """Preconditioners of the inner Hessian, by name: functions of θ."""
    damped = lambda make, **options: (
        lambda theta, args: make(model_fn, LOSS, theta, *training, **options).damped(PENALTY).inverse()
    )
    return {
        "no preconditioner": None,
        "K-FAC": damped(cx.operators.kfac),
        "K-FAC, sampled": damped(cx.operators.kfac, kind="monte_carlo", key=jax.random.key(0)),
        "EKFAC": damped(cx.operators.ekfac),
    }


def measure() -> harness.Report:
    digits, rng = load_digits(), np.random.default_rng(0)
    x = jnp.asarray(digits.data / 16, jnp.float32)
    y = jax.nn.one_hot(digits.target, 10, dtype=jnp.float32)
    training, validation = (x[:TRAINING], y[:TRAINING]), (x[TRAINING:], y[TRAINING:])
    start = [
        (jnp.asarray(rng.standard_normal((o, i)) * i**-0.5, jnp.float32), jnp.zeros(o, jnp.float32))
        for i, o in zip(SIZES, SIZES[1:], strict=False)
    ]
    phi = pretrained(start, training)

    def solver(preconditioner, rtol):
        rule = cx.Implicit(
            rtol=None, linear_solver=cx.linear.CG(rtol=rtol, max_steps=5000), preconditioner=preconditioner
        )

        @eqx.filter_jit
        def call(phi, training, validation):
            return cx.hypergradient(
                PROBLEM, phi, phi, inner_solver=optx.LBFGS(rtol=1e-5, atol=1e-5), rule=rule,
                inner_data=training, outer_data=validation, throw=False,
            )  # fmt: skip

        return lambda: call(phi, training, validation)

    calls = {name: solver(made, 1e-3) for name, made in curvatures(training).items()}
    exact = solver(curvatures(training)["EKFAC"], 1e-5)()
    times = harness.in_turns(calls, REPEATS, warm_ups=1)
    found = {name: call() for name, call in calls.items()}
    products = {name: int(hg.stats.num_matvecs) for name, hg in found.items()}
    rows = [
        {
            "preconditioner": name,
            "products": products[name],
            "relative error": harness.relative_error(hg.grad, exact.grad),
            "ms, the inner solution included": harness.milliseconds(times[name]),
        }
        for name, hg in found.items()
    ]
    plain = products["no preconditioner"]
    claims = [
        harness.Claim("products without ÷ with K-FAC", plain / products["K-FAC"], at_least=5.0),
        harness.Claim(
            "products without ÷ with sampled K-FAC", plain / products["K-FAC, sampled"], at_least=5.0
        ),
        harness.Claim("largest relative error", max(row["relative error"] for row in rows), at_most=1e-2),
    ]
    count = sum(leaf.size for leaf in jax.tree.leaves(phi))
    return harness.Report(
        "K-FAC preconditions the hypergradient of a network",
        f"float32, perceptron {'-'.join(map(str, SIZES))} with {count} weights, which are the hyperparameters, λ = "
        f"{PENALTY:g}, {TRAINING} digits.",
        rows,
        claims,
    )


if __name__ == "__main__":
    harness.main(measure)
