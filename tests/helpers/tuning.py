"""A small ridge regression to be tuned, its optimum, and the objects of a run, built once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import scipy.optimize

import curvax as cx

FEATURES = 6


def inner(theta, phi, batch):
    """Mean squares with one L2 penalty exp(phi)."""
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ theta - targets) ** 2) + 0.5 * jnp.exp(phi) * jnp.sum(theta**2)


def outer(theta, phi, batch):
    """Mean squares on other data."""
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ theta - targets) ** 2)


PROBLEM = cx.Bilevel(inner=inner, outer=outer)
SOLVER = optx.BFGS(rtol=1e-8, atol=1e-8)
LOOSE = optx.BFGS(rtol=1e-2, atol=1e-2)
RULE = cx.Implicit(rtol=1e-4)
OPTIMIZER = optax.adam(0.2)


@functools.cache
def data(seed=0, dtype=np.float64):
    """Training and validation data for which a penalty near 0.2 is best."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(FEATURES)

    def draw(rows):
        inputs = rng.standard_normal((rows, FEATURES))
        targets = inputs @ truth + 2.0 * rng.standard_normal(rows)
        return jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype)

    return draw(12), draw(200)


def solve(log_l2, seed=0):
    """Inner solution and outer value by a dense solve in NumPy."""
    (x, y), (xv, yv) = (map(np.asarray, pair) for pair in data(seed))
    theta = np.linalg.solve(x.T @ x / len(y) + np.exp(log_l2) * np.eye(FEATURES), x.T @ y / len(y))
    return theta, 0.5 * np.mean((xv @ theta - yv) ** 2)


def optimum(seed=0):
    """The best log penalty, by a scalar search over dense solves."""
    found = scipy.optimize.minimize_scalar(lambda p: solve(p, seed)[1], bracket=(-3, -1), tol=1e-12)
    return found.x, found.fun


def minimise(num_steps=20, **changes):
    """`cx.minimise` on it, with what differs."""
    dtype = changes.pop("dtype", np.float64)
    train, valid = data(0, dtype)
    options = {
        "problem": PROBLEM,
        "phi0": jnp.asarray(0.0, dtype),
        "theta0": jnp.zeros(FEATURES, dtype),
        "inner_solver": SOLVER,
        "rule": RULE,
        "optimizer": OPTIMIZER,
        "inner_data": train,
        "outer_data": valid,
    }
    options |= changes
    return cx.minimise(
        options.pop("problem"), options.pop("phi0"), options.pop("theta0"), num_steps=num_steps, **options
    )


@functools.cache
def stochastic():
    """Outer minibatches, so that a key is part of what has to come back after a resume."""
    return cx.Minibatches(data()[1], batch_size=50)


def same_bits(a, b):
    """Whether two solutions are equal bit for bit: point, history, and all that the run carries."""

    def raw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    parts = [(s.phi, s.theta, s.value, s.history, s.state) for s in (a, b)]
    structures = [jax.tree.structure(part) for part in parts]
    if structures[0] != structures[1] or a.num_steps != b.num_steps:
        return False
    return all(raw(x) == raw(y) for x, y in zip(*map(jax.tree.leaves, parts), strict=True))
