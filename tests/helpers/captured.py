"""Ground truth for what flows through the layers of a model: `vjp` of one example, under `vmap`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx
from helpers.quick import quick


def random_like(tree, key):
    """Normal numbers in the place of floating-point arrays."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def example_gradients(model_fn, params, inputs, cotangents):
    """Gradients of cᵀ·model for each example, with its cotangent c: no part of the library is used."""
    varying, rest = eqx.partition(params, eqx.is_inexact_array)

    def one(x, c):
        _, pull = jax.vjp(lambda p: model_fn(eqx.combine(p, rest), x), varying)
        return pull(c)[0]

    return jax.vmap(one)(inputs, cotangents)


def assembled(layers, results):
    """The gradient of each example, from those of all sites."""
    matrices = {}
    for group in layers.groups:
        parts = [
            part.swapaxes(2, 3) if site.transposed else part
            for site, part in zip(group.sites, results[group.name], strict=True)
        ]
        if parts:
            matrices[group.name] = sum(parts)
    return jax.vmap(layers.unpack, in_axes=1)(matrices)


def agree(model_fn, params, inputs, key, rtol=1e-11):
    """Check every gradient of every example against the truth; returns the layers."""
    layers = cx.capture.find_layers(model_fn, params, jax.tree.map(lambda x: x[0], inputs))
    outputs = jax.eval_shape(jax.vmap(lambda x: model_fn(params, x)), inputs)
    cotangents = random_like(outputs, key)

    @quick
    def both(varying, inputs, cotangents):
        whole = eqx.combine(varying, rest)
        found = cx.capture.statistics(layers, whole, inputs, cotangents, cx.capture.PerExampleGradients())
        return assembled(layers, found), example_gradients(model_fn, whole, inputs, cotangents)

    varying, rest = eqx.partition(params, eqx.is_inexact_array)
    found, truth = both(varying, inputs, cotangents)
    compare(found, truth, rtol)
    return layers


def compare(found, truth, rtol):
    """Leaf by leaf, relative to the largest entry of a leaf."""
    assert jax.tree.structure(found) == jax.tree.structure(truth)
    leaves = jax.tree_util.tree_leaves_with_path(truth)
    for (path, expected), array in zip(leaves, jax.tree.leaves(found), strict=True):
        scale = np.max(np.abs(expected), initial=0.0)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(array, expected, rtol=0, atol=rtol * max(scale, 1e-300), err_msg=name)


def kinds(layers):
    """Kinds of the sites of each group."""
    return {group.name: [site.kind for site in group.sites] for group in layers.groups}


def shapes(layers):
    """(stack, rows, columns) of each block."""
    return {group.name: group.block.shape for group in layers.groups}


def normal(key, *shape, dtype=jnp.float64):
    """Normal numbers."""
    return jax.random.normal(key, shape, dtype)
