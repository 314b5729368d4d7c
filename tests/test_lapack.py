"""Factorisations on CPU: one matrix at a time, whatever the user vectorises over."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import curvax as cx
from curvax._lapack import eigh


def test_eigh_is_that_of_numpy_with_derivatives(rng):
    matrices = rng.standard_normal((3, 5, 5))
    matrices = jnp.asarray(matrices + matrices.swapaxes(1, 2))
    values, vectors = jax.jit(jax.vmap(eigh))(matrices)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), rtol=1e-12)
    np.testing.assert_allclose(matrices @ vectors, vectors * values[:, None, :], atol=1e-12)

    def invariant(matrix):  # of the signs of the vectors
        values, vectors = eigh(matrix)
        return jnp.sum((vectors * jnp.sin(values)) @ vectors.T * jnp.arange(25.0).reshape(5, 5))

    check_grads(invariant, (matrices[0],), order=2, modes=["fwd", "rev"], atol=1e-5, rtol=1e-5)
    found, wanted = (
        jax.vmap(jax.grad(lambda m, fn=fn: jnp.sum(jnp.sin(fn(m)[0]))))(matrices)
        for fn in (eigh, jnp.linalg.eigh)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def plain(output, target):
    return jnp.sum(jnp.log(jnp.cosh(output - target))) + 0.1 * jnp.sum(output) ** 2


def layers(weights, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, weights["hidden"])
    return weights["out"] @ x


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_no_batch_goes_to_lapack(rng, name):
    """Of Hessians of a loss, and of equal layers: several batches at a time wait for ever on two cores."""
    if jax.default_backend() != "cpu":
        pytest.skip("of the kernels on CPU")
    weights = {
        "hidden": jnp.asarray(rng.standard_normal((3, 6, 6))),
        "out": jnp.asarray(rng.standard_normal((2, 6))),
    }
    x, y = jnp.asarray(rng.standard_normal((40, 6))), jnp.asarray(rng.standard_normal((40, 2)))

    def steps(weights, x, y):
        curvature = getattr(cx.operators, name)(layers, plain, weights, x, y, kind="exact")
        return [curvature.damped(damping).inverse().mv(weights) for damping in (0.1, 0.2, 0.3)]

    compiled = jax.jit(steps).lower(weights, x, y).compile()
    calls = re.findall(r" = \(?f64\[([\d,]*)\][^\n]*custom_call_target=\"lapack_(\w+)\"", compiled.as_text())
    assert len(calls) > 3
    for shape, kernel in calls:
        assert np.prod([int(n) for n in shape.split(",")[:-2]], initial=1) == 1, (kernel, shape)
    jax.block_until_ready(compiled(weights, x, y))
