"""What a problem with a known hypergradient is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helpers import compare


class Truth(NamedTuple):
    """The inner solution, the outer loss and its total derivative, in NumPy float64."""

    theta: Any
    value: float
    grad: Any


@dataclass(frozen=True)
class Case:
    """An inner and an outer function with data, and `reference`, which knows the answer.

    `inner` is a scalar function for `kind == "minimum"`, a map for `"fixed_point"`, a residual for
    `"root"`. `reference(phi)` is written in NumPy alone and never calls `inner` or `outer`.
    """

    name: str
    kind: str
    inner: Callable
    outer: Callable
    phi: Any
    theta0: Any
    inner_data: Any
    outer_data: Any
    reference: Callable[[Any], Truth]
    condition: float = 1.0

    @property
    def truth(self) -> Truth:
        """The exact answer at `phi`."""
        return self.reference(as_numpy(self.phi))


def as_numpy(tree):
    """Inexact leaves as NumPy float64, all others as they are."""

    def convert(leaf):
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.asarray(leaf, np.float64)
        return leaf

    return jax.tree.map(convert, tree)


def as_jax(tree, dtype):
    """Inexact NumPy leaves as JAX arrays of `dtype`, all others as they are."""

    def convert(leaf):
        if isinstance(leaf, np.ndarray | np.floating) and np.issubdtype(leaf.dtype, np.inexact):
            return jnp.asarray(leaf, dtype)
        return leaf

    return jax.tree.map(convert, tree)


def rounded(tree, dtype):
    """Float64 copies of what `tree` becomes in `dtype`: the data that the library really sees."""
    return as_numpy(as_jax(tree, dtype))


def finite_difference(reference, phi, direction, step: float = 1e-5) -> float:
    """Fourth-order central difference of the true outer loss along `direction` (a flat vector)."""
    centre = compare.flat(phi)

    def value(scale):
        moved = compare.unflatten(centre + scale * direction, phi)
        moved = jax.tree.map(
            lambda old, new: old if new is None else new, phi, moved, is_leaf=lambda leaf: leaf is None
        )
        return reference(moved).value

    near = value(step) - value(-step)
    far = value(2 * step) - value(-2 * step)
    return float((8 * near - far) / (12 * step))
