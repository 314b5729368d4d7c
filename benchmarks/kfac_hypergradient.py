"""Claim: where the penalty is weak, K-FAC as preconditioner takes fewer products for a hypergradient (aim: 5 times).

An autoencoder learns to return what a better one returns (distillation), from weights φ which it must stay near: the
inner objective is the mean squared error and λ/2 ‖θ − φ‖², the outer one the error on other digits, and the
hyperparameters are the numbers φ themselves (implicit MAML, transfer). The adjoint is solved to a relative error of
1e-2, the accuracy that `cx.Implicit` has by default: without a preconditioner, with K-FAC, with factors from one
sampled target for each image, and with EKFAC. Errors are against a solve to 1e-4. Times include those of the factors.

K-FAC leaves out what couples the layers. Where their changes cancel the curvature is λ, and K-FAC takes it for large:
the more such directions, the less it gains, and where the outputs of all examples are hardly more than the weights (the
large network here) it loses. The weaker the penalty, the more products conjugate gradients need without it.
"""

import time

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from sklearn.datasets import load_digits

import curvax as cx

# Sizes of the layers, and the examples.
SMALL, LARGE = ((64, 64, 64, 64), 4000), ((64, 256, 256, 64), 2000)
VALIDATION = 1000
# Networks, and λ as a share of the largest eigenvalue of the Gauss–Newton matrix; the claim is of the last.
CASES = ((LARGE, 1e-4), (SMALL, 1e-4), (SMALL, 1e-6))
STEPS, NEWTON_STEPS = 60, 2
DISTANCE = 1e-3
RTOL = 1e-2
LOSS = cx.operators.SquaredError()


def model_fn(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(weight @ x + bias)
    return params[-1][0] @ x + params[-1][1]


def error(params, data):
    return jnp.mean(jax.vmap(lambda x, y: LOSS(model_fn(params, x), y))(*data))


def inner(theta, phi, data):
    *data, penalty = data
    apart = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), theta, phi)
    return error(theta, data) + 0.5 * penalty * sum(jax.tree.leaves(apart))


# One step so small that it changes nothing: the solution is there.
STAY = cx.Steps(optax.sgd(1e-12), 1)
PROBLEM = cx.Bilevel(inner=inner, outer=lambda theta, phi, data: error(theta, data))


@jax.jit
def trained(params, data):
    optimiser = cx.optim.kfac(model_fn, LOSS, example=data[0][0])

    def step(carry, key):
        params, state = carry
        extra = {"inputs": data[0], "targets": data[1], "key": key}
        updates, state = optimiser.update(jax.grad(error)(params, data), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), STEPS)
    return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]


@jax.jit
def largest_curvature(params, data):
    """Of the Gauss–Newton matrix, by the power method."""
    curvature = cx.operators.gauss_newton(model_fn, LOSS, params, *data)

    def turn(_, v):
        product = curvature.mv(v)
        size = optax.global_norm(product)
        return jax.tree.map(lambda leaf: leaf / size, product)

    start = jax.tree.map(lambda leaf: leaf / optax.global_norm(params), params)
    return optax.global_norm(curvature.mv(jax.lax.fori_loop(0, 20, turn, start)))


@jax.jit
def inner_solution(theta, phi, data):
    """By Gauss–Newton steps, each solved by preconditioned CG."""
    *pairs, penalty = data

    def step(theta, _):
        curvature = cx.operators.Damped(cx.operators.gauss_newton(model_fn, LOSS, theta, *pairs), penalty)
        solver = cx.linear.CG(rtol=0.1, max_steps=500)
        options = {"preconditioner": kfac(theta, (phi, data), key=jax.random.key(1))}
        slope = jax.grad(inner)(theta, phi, data)
        change = lx.linear_solve(curvature, slope, solver, options=options, throw=False).value
        return jax.tree.map(jnp.subtract, theta, change), None

    return jax.lax.scan(step, theta, None, length=NEWTON_STEPS)[0]


def kfac(theta, args, make=cx.operators.kfac, key=None):
    """(K-FAC + λ)⁻¹, the damping in the eigenbases of the factors; from sampled targets with a key."""
    x, y, penalty = args[1]
    kind = "exact" if key is None else "monte_carlo"
    return make(model_fn, LOSS, theta, x, y, kind=kind, key=key).damped(penalty).inverse()


PRECONDITIONERS = {
    "none": None,
    "K-FAC": kfac,
    "K-FAC, sampled": lambda theta, args: kfac(theta, args, key=jax.random.key(0)),
    "EKFAC": lambda theta, args: kfac(theta, args, make=cx.operators.ekfac),
}


def solver(preconditioner, rtol):
    rule = cx.Implicit(
        rtol=None, linear_solver=cx.linear.CG(rtol=rtol, max_steps=10_000), preconditioner=preconditioner
    )

    @eqx.filter_jit
    def call(phi, theta, training, validation):
        return cx.hypergradient(
            PROBLEM, phi, theta, inner_solver=STAY, rule=rule,
            inner_data=training, outer_data=validation, throw=False,
        )  # fmt: skip

    return call


def timed(call, *arguments):
    start = time.perf_counter()
    found = jax.block_until_ready(call(*arguments))
    return found, time.perf_counter() - start


def digits():
    """Digits, and each of them moved by one pixel to all four sides; in an order of chance."""
    images = (load_digits().data / 16).reshape(-1, 8, 8)
    moves = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    x = np.concatenate([np.roll(images, move, (1, 2)) for move in moves]).reshape(-1, 64)
    return np.random.default_rng(0).permutation(x)


def problem(sizes, training):
    """φ, the teacher and the data."""
    rng, x = np.random.default_rng(1), digits()
    start = [
        (rng.standard_normal((o, i)) * i**-0.5, np.zeros(o)) for i, o in zip(sizes, sizes[1:], strict=False)
    ]
    narrow = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
    x, others = x[:training], wide(x[training:][:VALIDATION])
    teacher, x = wide(trained(narrow(start), narrow((x, x)))), wide(x)
    moved = lambda leaf: leaf + DISTANCE * jnp.std(leaf) * rng.standard_normal(leaf.shape)
    return (
        jax.tree.map(moved, teacher),
        teacher,
        (x, jax.vmap(lambda x: model_fn(teacher, x))(x)),
        (others, others),
    )


def measure() -> harness.Report:
    rows = []
    for (sizes, examples), relative in CASES:
        phi, teacher, training, validation = problem(sizes, examples)
        data = (*training, relative * largest_curvature(teacher, training))
        arguments = phi, inner_solution(teacher, phi, data), data, validation
        compiled = lambda made, rtol, arguments=arguments: solver(made, rtol).lower(*arguments).compile()
        calls = {name: compiled(made, RTOL) for name, made in PRECONDITIONERS.items()}
        exact = jax.block_until_ready(compiled(kfac, 1e-4)(*arguments))
        of_plain = None
        for name, call in calls.items():
            found, seconds = timed(call, *arguments)
            products = int(found.stats.num_matvecs)
            of_plain = of_plain or (products, seconds)
            rows.append(
                {
                    "weights": sum(leaf.size for leaf in jax.tree.leaves(phi)),
                    "λ ÷ largest curvature": relative,
                    "preconditioner": name,
                    "products": products,
                    "products without ÷ with": of_plain[0] / products,
                    "relative error": harness.relative_error(found.grad, exact.grad),
                    "s": seconds,
                    "time without ÷ with": of_plain[1] / seconds,
                }
            )
    weak = {row["preconditioner"]: row for row in rows[-len(PRECONDITIONERS) :]}
    claims = [
        harness.Claim(
            f"weak penalty: products without ÷ with {name}",
            weak[name]["products without ÷ with"],
            at_least=5.0,
        )
        for name in ("K-FAC", "K-FAC, sampled")
    ]
    claims.append(
        harness.Claim("largest relative error", max(r["relative error"] for r in rows), at_most=RTOL)
    )
    return harness.Report(
        "K-FAC preconditions the hypergradient of a network",
        f"float64, autoencoders {' and '.join('-'.join(map(str, sizes)) for sizes, _ in (SMALL, LARGE))} with "
        f"{SMALL[1]} and {LARGE[1]} digits; the weights are the hyperparameters.",
        rows,
        claims,
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
