"""Flat NumPy views of pytrees and the error between two of them."""

import equinox as eqx
import jax
import numpy as np


def flat(tree) -> np.ndarray:
    """All inexact leaves of `tree`, in order, as one float64 vector."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if eqx.is_inexact_array(leaf)]
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves] or [np.zeros(0)])


def absolute_error(got, expected) -> float:
    """Euclidean distance over all leaves."""
    got, expected = flat(got), flat(expected)
    assert got.shape == expected.shape, f"shapes differ: {got.shape} and {expected.shape}"
    return float(np.linalg.norm(got - expected))


def relative_error(got, expected) -> float:
    """Euclidean distance over all leaves, as a fraction of the norm of `expected`."""
    return absolute_error(got, expected) / float(np.linalg.norm(flat(expected)))


def unflatten(vector, like):
    """The inverse of `flat`: `vector` in the shapes of the inexact leaves of `like`, None elsewhere."""
    leaves, structure = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        if eqx.is_inexact_array(leaf):
            size = int(np.size(leaf))
            out.append(np.asarray(vector[start : start + size], np.float64).reshape(np.shape(leaf)))
            start += size
        else:
            out.append(None)
    return jax.tree.unflatten(structure, out)
