"""Claims: what an adjoint costs in Hessian products, and what a product costs in gradients.

Products: our conjugate gradients stop on their forward error. They are compared with Lineax's, which stop on the
residual at the same tolerance, and with the fewest steps that any conjugate gradients need for the true error
(found with the exact adjoint at hand, so that no solver can know it). Gradients: one product inside a loop against
one gradient inside a loop, with `jax.jvp` of the gradient and the hand-written product beside it.
"""

import harness
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import problems

import curvax as cx

RTOL = 1e-6
LOOP = 200
REPEATS = 11


def fewest_steps(curvature: np.ndarray, rhs: np.ndarray, exact: np.ndarray, rtol: float) -> int:
    """Steps of plain conjugate gradients until the true relative error is at most `rtol`."""
    x, r = np.zeros_like(rhs), rhs.copy()
    p, gamma = r.copy(), r @ r
    for step in range(1, 10 * len(rhs)):
        product = curvature @ p
        alpha = gamma / (p @ product)
        x, r = x + alpha * p, r - alpha * product
        if np.linalg.norm(x - exact) <= rtol * np.linalg.norm(exact):
            return step
        gamma, before = r @ r, gamma
        p = r + gamma / before * p
    raise RuntimeError(f"conjugate gradients did not reach a relative error of {rtol}")


def looped(product):
    """`LOOP` applications in one program; the result of one is the argument of the next."""

    def run(vector, weights, *arguments):
        return jax.lax.fori_loop(0, LOOP, lambda _, v: 0.1 * product(v, weights, *arguments), vector)

    return run


def gradient(vector, weights, phi, batch):
    del weights
    return jax.grad(problems.inner)(vector, phi, batch)


def hessian(vector, weights, phi, batch):
    return cx.operators.hessian(problems.inner, weights, phi, batch).mv(vector)


def linearised(vector, weights, phi, batch):
    return lx.linearise(cx.operators.hessian(problems.inner, weights, phi, batch)).mv(vector)


def by_hand(vector, weights, phi, batch):
    return jax.jvp(lambda w: jax.grad(problems.inner)(w, phi, batch), (weights,), (vector,))[1]


def closed_form(vector, weights, phi, batch):
    probabilities = jax.nn.softmax(batch.images @ weights, axis=1)
    weighted = probabilities * (batch.images @ vector)
    weighted = weighted - probabilities * jnp.sum(weighted, axis=1, keepdims=True)
    return batch.images.T @ weighted / len(batch.labels) + jnp.exp(phi) * vector


def measure() -> harness.Report:
    training, validation = problems.digits()
    phi, _ = problems.start()
    truth = problems.exact(phi, training, validation)
    weights = jnp.asarray(truth.weights)
    rhs = jax.grad(problems.outer)(weights, phi, validation)
    exact = np.linalg.solve(truth.curvature, np.asarray(rhs).ravel())

    operator = lx.TaggedLinearOperator(
        cx.operators.hessian(problems.inner, weights, phi, training), lx.positive_semidefinite_tag
    )
    solvers = {
        f"cx.linear.CG(rtol={RTOL:g})": cx.linear.CG(rtol=RTOL),
        # With atol=0 it stops after one step, wrong by 0.9 and without a word: digits has pixels that are always
        # zero, and a test relative to each element of the right-hand side is 0/0 there.
        f"lx.CG(rtol={RTOL:g}, atol=1e-12)": lx.CG(rtol=RTOL, atol=1e-12),
    }
    rows, steps, errors = [], {}, {}
    for name, solver in solvers.items():
        solution = lx.linear_solve(operator, rhs, solver)
        steps[name] = int(solution.stats["num_steps"])
        errors[name] = harness.relative_error(np.asarray(solution.value).ravel(), exact)
    fewest = fewest_steps(truth.curvature, np.asarray(rhs).ravel(), exact, RTOL)
    for name in solvers:
        rows.append(
            {
                "what": name,
                "products": steps[name],
                "relative error": errors[name],
                "µs": "–",
                "gradients": "–",
            }
        )
    rows.append(
        {"what": "fewest possible", "products": fewest, "relative error": RTOL, "µs": "–", "gradients": "–"}
    )

    variants = {
        "gradient": gradient,
        "cx.operators.hessian": hessian,
        "the same, linearised": linearised,
        "jax.jvp of jax.grad": by_hand,
        "closed form": closed_form,
    }
    arguments = (jnp.asarray(np.random.default_rng(0).standard_normal(weights.shape)), weights, phi, training)
    dense = (truth.curvature @ np.asarray(arguments[0]).ravel()).reshape(weights.shape)
    calls = {}
    for name, variant in variants.items():
        program = jax.jit(looped(variant)).lower(*arguments).compile()
        calls[name] = lambda program=program: program(*arguments)
    times = harness.in_turns(calls, REPEATS)
    for name, variant in variants.items():
        error = "–" if name == "gradient" else harness.relative_error(variant(*arguments), dense)
        rows.append(
            {
                "what": name,
                "products": 1,
                "relative error": error,
                "µs": harness.milliseconds(times[name]) * 1e3 / LOOP,
                "gradients": harness.ratio(times[name], times["gradient"]),
            }
        )
    ours = f"cx.linear.CG(rtol={RTOL:g})"
    return harness.Report(
        "Cost of the adjoint and of a product",
        "Softmax regression on digits (640 weights, float64), at the exact inner solution, cold adjoint.",
        rows,
        [
            harness.Claim("a Hessian product in gradients", rows[-4]["gradients"], at_most=1.3),
            harness.Claim("relative error of our adjoint ÷ tolerance", errors[ours] / RTOL, at_most=1.0),
            harness.Claim("our products ÷ fewest possible", steps[ours] / fewest, at_most=1.5),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
