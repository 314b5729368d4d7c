"""Small problems for the optimisers, and their steps."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx
from helpers.quick import quick

SQUARED, SOFTMAX = cx.operators.SquaredError(), cx.operators.SoftmaxCrossEntropy()
EMPIRICAL, EXACT = cx.optim.Factors("empirical"), cx.optim.Factors("exact")
FIXED = cx.optim.Damping(0.05, every=None, kl_clip=None)


def normal(key, *shapes, dtype=jnp.float64):
    """Normal numbers of several shapes."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.normal(k, shape, dtype) for k, shape in zip(keys, shapes, strict=True)]


def tanh_net(params, x):
    """Two layers with biases."""
    return params["v"] @ jnp.tanh(params["w"] @ x + params["b"]) + params["c"]


def tanh_problem(key, dtype=jnp.float64, examples=12):
    """Parameters, inputs and targets for it: 3 inputs, 4 units, 2 outputs."""
    w, b, v, c, x, y = normal(key, (4, 3), (4,), (2, 4), (2,), (examples, 3), (examples, 2), dtype=dtype)
    return {"w": w, "b": 0.1 * b, "v": v, "c": 0.1 * c}, x, y


def objective(model_fn, loss, params, x, y, penalty=0.0):
    """The mean loss, and ½ penalty ‖θ‖²."""
    mean = jnp.mean(jax.vmap(lambda x, y: loss(model_fn(params, x), y))(x, y))
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(eqx.filter(params, eqx.is_inexact_array)))
    return mean + 0.5 * penalty * squares


def stepper(optimiser, model_fn, loss, penalty=0.0, compiled=quick):
    """`step(params, state, x, y, key)` → params, state, updates, grads."""

    def whole(params, state, x, y, key):
        grads = eqx.filter_grad(lambda p: objective(model_fn, loss, p, x, y, penalty))(params)
        updates, state = optimiser.update(grads, state, params, inputs=x, targets=y, key=key)
        return eqx.apply_updates(params, updates), state, updates, grads

    def step(params, state, x, y, key=None):
        arrays, static = eqx.partition(params, eqx.is_array)
        statics.append(static)
        arrays, state, updates, grads = jitted(arrays, state, x, y, jax.random.key(0) if key is None else key)
        return eqx.combine(arrays, static), state, updates, grads

    @compiled
    def jitted(arrays, state, x, y, key):
        params, state, updates, grads = whole(eqx.combine(arrays, statics[-1]), state, x, y, key)
        return eqx.filter(params, eqx.is_array), state, updates, grads

    statics = []
    return step


def dense_curvature(model_fn, params, x):
    """The Gauss–Newton matrix of the mean of squared errors, from a dense Jacobian; no part of the library is used."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = jax.jacobian(lambda flat: jax.vmap(lambda x: model_fn(unravel(flat), x))(x).ravel())(flat)
    return np.asarray(jacobian.T @ jacobian) / len(x)
