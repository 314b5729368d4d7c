"""Claim: tuning one L2 penalty for each of a million weights costs at most twice the training it contains.

An MLP 64-968-968-10 (1,008,656 weights, no biases), digits, 256 training and 256 validation images, float32. One
outer step trains for 150 steps of Adam and takes the hypergradient with respect to all penalties. Nobody can form
a matrix of that size (4 TB): Optimistix's default adjoint would. The curvature of an MLP that is not trained to
the end is indefinite, so the adjoint is damped, and the error estimate, which counts the bias of damping, is off.
jaxopt gets the same training, the same damping and as many steps of its conjugate gradients.
"""

import functools
import warnings

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
from sklearn.datasets import load_digits

import curvax as cx

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt

WIDTH = 968
IMAGES = 256
STEPS = 150
LOG_PENALTY = -7.0
DAMPING = 0.1
REPEATS = 3
OPTIMIZER = optax.adam(1e-3)


def data() -> tuple[problems.Batch, problems.Batch]:
    """256 training and 256 validation images in float32."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: 2 * IMAGES]
    images, labels = jnp.asarray(images[order] / 16.0, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return problems.Batch(images[:IMAGES], labels[:IMAGES]), problems.Batch(images[IMAGES:], labels[IMAGES:])


def logits(layers, images):
    """Outputs (n, 10) of the network."""
    for weights in layers[:-1]:
        images = jnp.tanh(images @ weights)
    return images @ layers[-1]


def inner(layers, log_penalties, batch):
    penalty = sum(jnp.sum(jnp.exp(p) * w**2) for p, w in zip(log_penalties, layers, strict=True))
    return problems.cross_entropy(logits(layers, batch.images), batch.labels) + 0.5 * penalty


def outer(layers, log_penalties, batch):
    del log_penalties
    return problems.cross_entropy(logits(layers, batch.images), batch.labels)


def start():
    """Log penalties and initial weights."""
    shapes = [(64, WIDTH), (WIDTH, WIDTH), (WIDTH, problems.CLASSES)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    layers = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, shapes, strict=True)]
    return [jnp.full(s, LOG_PENALTY) for s in shapes], layers


def training_alone(log_penalties, layers, training):
    """The training that an outer step contains."""

    def step(carry, _):
        layers, state = carry
        gradient = jax.grad(inner)(layers, log_penalties, training)
        updates, state = OPTIMIZER.update(gradient, state, layers)
        return (optax.apply_updates(layers, updates), state), None

    return jax.lax.scan(step, (layers, OPTIMIZER.init(layers)), length=STEPS)[0][0]


PROBLEM = cx.Bilevel(inner=inner, outer=outer)


def ours(log_penalties, layers, training, validation):
    """One outer step of Curvax: hypergradient, where it was taken, and the number of products."""
    hg = cx.hypergradient(
        PROBLEM,
        log_penalties,
        layers,
        inner_solver=cx.Steps(OPTIMIZER, STEPS),
        rule=cx.Implicit(rtol=None, damping=DAMPING),
        inner_data=training,
        outer_data=validation,
    )
    return hg.grad, hg.theta, hg.stats.num_matvecs


def theirs(log_penalties, layers, training, validation, steps):
    """The same with jaxopt."""
    solver = jaxopt.OptaxSolver(
        inner,
        OPTIMIZER,
        maxiter=STEPS,
        tol=0.0,
        implicit_diff=True,  # its default here is to differentiate through all the steps
        implicit_diff_solve=functools.partial(
            jaxopt.linear_solve.solve_cg, ridge=DAMPING, maxiter=steps, tol=0.0
        ),
    )
    gradient = jax.grad(lambda p: outer(solver.run(layers, p, training).params, p, validation))(log_penalties)
    return gradient, None


def damped_hypergradient(log_penalties, layers, training, validation):
    """Independent answer at the same weights: 200 steps of SciPy's conjugate gradients in float64 vectors."""
    from jax.flatten_util import ravel_pytree
    from scipy.sparse.linalg import LinearOperator, cg

    flat, unravel = ravel_pytree(layers)
    gradient = jax.grad(inner)

    @jax.jit
    def product(v, layers, log_penalties, training):
        tangent = jax.jvp(lambda t: gradient(t, log_penalties, training), (layers,), (unravel(v),))[1]
        return ravel_pytree(tangent)[0] + DAMPING * v

    def as_float64(v):
        v = jnp.asarray(v.ravel(), flat.dtype)
        return np.asarray(product(v, layers, log_penalties, training), np.float64)

    rhs = ravel_pytree(jax.grad(outer)(layers, log_penalties, validation))[0]
    operator = LinearOperator((flat.size, flat.size), matvec=as_float64, dtype=np.float64)
    adjoint, _ = cg(operator, np.asarray(rhs, np.float64), rtol=1e-7, maxiter=200)
    adjoint = unravel(jnp.asarray(adjoint, flat.dtype))
    return [-jnp.exp(p) * w * q for p, w, q in zip(log_penalties, layers, adjoint, strict=True)]


def measure() -> harness.Report:
    training, validation = data()
    phi, layers = start()
    alone = jax.jit(training_alone).lower(phi, layers, training).compile()
    step = jax.jit(ours).lower(phi, layers, training, validation).compile()
    gradient, theta, products = step(phi, layers, training, validation)
    peer = (
        jax.jit(lambda *a: theirs(*a, steps=int(products))).lower(phi, layers, training, validation).compile()
    )
    truth = damped_hypergradient(phi, theta, training, validation)
    errors = {
        "Curvax": harness.relative_error(gradient, truth),
        "jaxopt": harness.relative_error(peer(phi, layers, training, validation)[0], truth),
    }
    programs = {"training alone": alone, "Curvax": step, "jaxopt": peer}
    times = harness.in_turns(
        {
            "training alone": lambda: alone(phi, layers, training),
            "Curvax": lambda: step(phi, layers, training, validation),
            "jaxopt": lambda: peer(phi, layers, training, validation),
        },
        REPEATS,
        warm_ups=1,
    )
    rows = [
        {
            "program": name,
            "s": harness.milliseconds(times[name]) / 1e3,
            "time ÷ training": harness.ratio(times[name], times["training alone"]),
            "MB": harness.memory_mb(program),
            "relative error (damped)": errors.get(name, "–"),
        }
        for name, program in programs.items()
    ]
    count = sum(w.size for w in layers)
    return harness.Report(
        "A million hyperparameters",
        f"MLP 64-{WIDTH}-{WIDTH}-10, {count:,} weights with a penalty each, {IMAGES} images, float32; an outer step is "
        f"{STEPS} Adam steps and a hypergradient with damping {DAMPING:g} ({int(products)} Hessian products).",
        rows,
        [
            harness.Claim("time of an outer step ÷ its training", rows[1]["time ÷ training"], at_most=2.0),
            harness.Claim(
                "memory of an outer step ÷ its training", rows[1]["MB"] / rows[0]["MB"], at_most=2.0
            ),
            harness.Claim("relative error of the damped hypergradient", errors["Curvax"], at_most=1e-2),
            harness.Claim(
                "jaxopt ÷ Curvax, time", harness.ratio(times["jaxopt"], times["Curvax"]), at_least=0.9
            ),
        ],
    )


if __name__ == "__main__":
    harness.main(measure)
