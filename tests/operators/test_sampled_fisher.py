"""Estimates of the empirical Fisher matrix from some examples, against that of all, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax.operators as ops
from helpers.quick import quick

COUNT, SIZE = 60, 10


def _problem(key):
    first, second, third = jax.random.split(key, 3)
    params = {"w": jax.random.normal(first, (2, 3)), "b": jnp.zeros(2)}
    x = jax.random.normal(second, (COUNT, 3)) * jnp.logspace(-1.5, 1.5, COUNT)[:, None]
    return params, x, jax.random.normal(third, (COUNT, 2))


def _model(p, x):
    return jnp.tanh(p["w"] @ x) + p["b"] + 0.1 * p["w"] @ x


LOSS = ops.SquaredError()


@pytest.mark.parametrize("sampling", ["uniform", "importance", "stratified"])
def test_unbiased_and_the_variance_is_shown(sampling, key):
    """Over 2000 draws: the mean is that of all examples, the variances shown are that of the values on average."""
    params, x, y = _problem(key)
    v = jax.tree.map(jnp.ones_like, params)

    @quick
    def everything(keys):
        whole = ops.fisher(_model, LOSS, params, x, y, kind="empirical")
        exact = ravel_pytree(whole.mv(v))[0]

        def one(key):
            some = ops.sampled_fisher(_model, LOSS, params, x, y, SIZE, sampling=sampling, key=key)
            return ravel_pytree(some.operator.mv(v))[0], *some.quadratic(v)

        return exact, ravel_pytree(v)[0] @ exact, jax.lax.map(one, keys)

    exact, quadratic, (products, values, variances) = everything(jax.random.split(key, 2000))
    for draws, truth in ((products, exact), (values, quadratic)):
        draws = np.asarray(draws)
        error = draws.std(0) / np.sqrt(len(draws))
        assert np.all(np.abs(draws.mean(0) - truth) <= 5 * error + 1e-12)
    assert 0.8 < np.mean(variances) / np.var(values) < 1.25
    np.testing.assert_allclose(products @ ravel_pytree(v)[0], values, rtol=1e-10)
    spread = np.std(values) / float(quadratic)
    print(f"{sampling}: relative standard deviation {spread:.3f}")
    assert {"uniform": 0.5, "importance": 0.05, "stratified": 0.02}[sampling] < spread < 2


def test_importance_and_strata_are_worth_it(key):
    """The error of the matrix (Frobenius), on average over draws, from gradients of very different size."""
    params, x, y = _problem(key)
    keys = jax.random.split(key, 40)

    @quick
    def errors(keys):
        exact = ops.fisher(_model, LOSS, params, x, y, kind="empirical").as_matrix()
        found = []
        for sampling in ("uniform", "importance", "stratified"):
            make = lambda key, s=sampling: ops.sampled_fisher(
                _model, LOSS, params, x, y, SIZE, sampling=s, key=key
            )
            found.append(
                jax.lax.map(lambda key, m=make: jnp.sum((m(key).operator.as_matrix() - exact) ** 2), keys)
            )
        return jnp.mean(jnp.stack(found), axis=1)

    uniform, importance, stratified = np.asarray(errors(keys))
    assert importance < 0.5 * uniform and stratified < 0.8 * uniform


def test_anchor_takes_the_variance_away_nearby(key):
    params, x, y = _problem(key)
    near = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    v = jax.tree.map(jnp.ones_like, params)

    @quick
    def everything(key):
        some = ops.sampled_fisher(_model, LOSS, params, x, y, SIZE, sampling="uniform", key=key)
        anchored, exact = some.anchored(near), ops.fisher(_model, LOSS, params, x, y, kind="empirical")
        dot = lambda a, b: sum(
            jnp.vdot(p, q) for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        return (
            some.quadratic(v),
            anchored.quadratic(v),
            dot(v, anchored.operator.mv(v)),
            dot(v, exact.mv(v)),
            some.anchored(params).quadratic(v),
        )

    plain, anchored, product, exact, same = everything(key)
    np.testing.assert_allclose(anchored[0], product, rtol=1e-10)
    assert anchored[1] < 1e-3 * plain[1]
    assert abs(anchored[0] - exact) < 5 * np.sqrt(anchored[1]) + 1e-12
    np.testing.assert_allclose(same[0], exact, rtol=1e-10)
    assert same[1] < 1e-20 * plain[1]


def test_bad_arguments(key):
    params, x, y = _problem(key)
    make = lambda size, **options: ops.sampled_fisher(_model, LOSS, params, x, y, size, key=key, **options)
    with pytest.raises(ValueError, match="sampling"):
        make(4, sampling="best")
    with pytest.raises(ValueError, match="size"):
        make(1)
    with pytest.raises(ValueError, match="even"):
        make(5, sampling="stratified")
