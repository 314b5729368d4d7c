"""A training run that every mode must differentiate alike, and the same run as a plain loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax as cx

STEPS = 6


def inner(theta, phi, batch):
    """Weighted squares of a small network; every kind of leaf takes part."""
    inputs, targets = batch
    outputs = jnp.tanh(inputs @ theta["in"]) @ theta["out"] + theta["shift"]
    weights = jax.nn.sigmoid(phi["weights"])
    return jnp.mean(weights * (outputs - targets) ** 2) + jnp.exp(phi["log l2"]) * jnp.sum(theta["in"] ** 2)


def outer(theta, phi, batch):
    inputs, targets = batch
    outputs = jnp.tanh(inputs @ theta["in"]) @ theta["out"] + theta["shift"]
    return jnp.mean((outputs - targets) ** 2) + 0.1 * jnp.sum(phi["weights"] ** 2)


PROBLEM = cx.Bilevel(inner=inner, outer=outer)


def adam(phi, step):
    """Adam with a rate a step and its own first decay."""
    return optax.adam(phi["rates"][step], b1=phi["decay"], eps=1e-4)


def momentum(phi, step):
    return optax.sgd(phi["rates"][step], momentum=phi["decay"], nesterov=True)


def plain_descent(phi, step):
    return optax.sgd(phi["rates"][step])


def rmsprop(phi, step):
    return optax.rmsprop(phi["rates"][step], decay=phi["decay"], eps=1e-4)


def adamw(phi, step):
    return optax.adamw(phi["rates"][step], eps=1e-4, weight_decay=phi["decay"])


@functools.cache
def data(dtype=np.float64, dead=False):
    """Twelve examples; with `dead` the last input is always zero."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((12, 4))
    targets = np.sin(inputs @ np.arange(4.0))
    if dead:
        inputs[:, 3] = 0.0
    with jax.ensure_compile_time_eval():  # kept beyond the program that asks first
        return jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)


def start(dtype=np.float64, steps=STEPS):
    """φ and θ₀."""
    rng = np.random.default_rng(6)
    phi = {
        "weights": rng.standard_normal(12),
        "log l2": np.asarray(-3.0),
        "rates": np.linspace(0.1, 0.03, steps),
        "decay": np.asarray(0.8),
    }
    theta = {
        "in": 0.5 * rng.standard_normal((4, 3)),
        "out": rng.standard_normal(3),
        "shift": np.asarray(0.1),
        "empty": np.zeros((0, 2)),
    }
    convert = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    return convert(phi), convert(theta)


def plain(optimizer, phi, theta, batch, steps=STEPS, frozen=0):
    """θ after all steps by a plain scan over optax's own functions; the first `frozen` steps are held fixed."""

    def step(carry, i):
        theta, state = carry
        gradient = jax.grad(inner)(theta, phi, batch)
        updates, state = optimizer(phi, i).update(gradient, state, theta)
        return (jax.tree.map(lambda t, u: t + u.astype(t.dtype), theta, updates), state), None

    with jax.numpy_dtype_promotion("standard"):
        carry = (theta, optimizer(phi, 0).init(theta))
        if frozen:
            carry = jax.lax.stop_gradient(jax.lax.scan(step, carry, jnp.arange(frozen))[0])
        carry, _ = jax.lax.scan(step, carry, jnp.arange(frozen, steps))
    return carry[0]


@functools.cache
def truth(optimizer, frozen=0):
    """The outer loss and its derivative through the plain loop, by plain reverse mode."""
    phi, theta = start()
    batch = data()

    def loss(phi):
        return outer(plain(optimizer, phi, theta, batch, frozen=frozen), phi, batch)

    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(jax.value_and_grad(loss))(phi)


@functools.cache
def solver(optimizer, steps=STEPS, tolerance=None):
    """One `cx.Steps` for each setting."""
    return cx.Steps(optimizer, steps, tolerance)


def hypergradient(rule, optimizer=adam, *, dtype=np.float64, dead=False, **kwargs):
    """`cx.hypergradient` of the training run."""
    phi, theta = start(dtype)
    batch = data(dtype, dead)
    return cx.hypergradient(
        PROBLEM,
        kwargs.pop("phi", phi),
        theta,
        inner_solver=kwargs.pop("solver", None) or solver(optimizer),
        rule=rule,
        inner_data=batch,
        outer_data=batch,
        **kwargs,
    )
