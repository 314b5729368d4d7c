"""Along which directions of φ a hypergradient is compared, and how far the first step goes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

# The first step changes every element by at most about a tenth of itself.
_FIRST_STEP = 0.1
# Elements this much smaller than their leaf's root mean square count as that fraction of it.
_SMALL = 1e-3
# Directions restricted to one leaf are added for so many leaves at most.
_MAX_LEAVES = 8


class Direction(NamedTuple):
    """A unit direction (Euclidean norm over all leaves) and the largest step along it."""

    name: str
    tree: PyTree[Array]
    step: float


def scales(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """The typical size of each element: its own, not below 1e-3 of the leaf's root mean square; 1 in a zero leaf."""

    def of_leaf(leaf):
        leaf = np.abs(np.asarray(leaf, np.float64))
        rms = float(np.sqrt(np.mean(leaf**2))) if leaf.size else 0.0
        if not (np.isfinite(rms) and rms > 0):
            return np.ones_like(leaf)
        # An exact zero says nothing about its scale, so it takes the leaf's.
        return np.where(leaf == 0, rms, np.maximum(leaf, _SMALL * rms))

    return jax.tree.map(of_leaf, tree)


def _direction(
    name: str, raw: PyTree[np.ndarray], scale: PyTree[np.ndarray], like: PyTree
) -> Direction | None:
    """`raw` normalised, with the step that moves no element by more than a tenth of its scale; None if zero."""
    leaves, sizes = jax.tree.leaves(raw), jax.tree.leaves(scale)
    norm = float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))
    if not (np.isfinite(norm) and norm > 0):
        return None
    largest = max(float(np.max(np.abs(a) / s)) for a, s in zip(leaves, sizes, strict=True) if a.size)
    tree = jax.tree.map(lambda a, leaf: jnp.asarray(a / norm, leaf.dtype), raw, like)
    return Direction(name, tree, _FIRST_STEP * norm / largest)


def random_direction(name: str, like: PyTree[Array], rng: np.random.Generator) -> Direction | None:
    """Random signs times 0.5 to 1.5 times the scale of each element: all move by the same fraction."""
    scale = scales(like)
    raw = jax.tree.map(lambda s: s * rng.uniform(0.5, 1.5, s.shape) * rng.choice([-1.0, 1.0], s.shape), scale)
    return _direction(name, raw, scale, like)


def paths(tree: PyTree) -> list[str]:
    """A readable name for each leaf: `['l2'][0]` or `.weight`; the empty string for a bare array."""
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def only_leaf(tree: PyTree, index: int) -> PyTree:
    """`tree` with every leaf but one set to zero."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [leaf if i == index else 0 * leaf for i, leaf in enumerate(leaves)])


def coordinate_directions(
    phi: PyTree[Array], grad: PyTree[Array], per_leaf: int | str, rng: np.random.Generator
) -> list[Direction]:
    """Single elements: all, or in each leaf the one of largest |hypergradient| and random others."""
    scale, zero = scales(phi), jax.tree.map(lambda leaf: np.zeros(leaf.shape), phi)
    leaves, structure = jax.tree.flatten(zero)
    found = []
    for i, (name, leaf, slope) in enumerate(zip(paths(phi), leaves, jax.tree.leaves(grad), strict=True)):
        count = leaf.size if per_leaf == "all" else min(int(per_leaf), leaf.size)
        if count == 0:
            continue
        size = np.abs(np.asarray(slope, np.float64)).ravel()
        first = int(np.argmax(np.where(np.isfinite(size), size, -1.0)))
        others = rng.permutation(np.delete(np.arange(leaf.size), first))[: count - 1]
        for flat in sorted([first, *others.tolist()]):
            one = np.zeros(leaf.shape)
            one.flat[flat] = 1.0
            index = ", ".join(str(k) for k in np.unravel_index(flat, leaf.shape))
            raw = jax.tree.unflatten(structure, [one if j == i else other for j, other in enumerate(leaves)])
            label = f"{name}[{index}]" if leaf.shape else (name or "phi")
            direction = _direction(f"phi{label}" if name or leaf.shape else label, raw, scale, phi)
            if direction is not None:
                found.append(direction)
    return found


def choose_directions(
    phi: PyTree[Array],
    grad: PyTree[Array],
    num_directions: int,
    coordinates: int | str,
    rng: np.random.Generator,
) -> list[Direction]:
    """The hypergradient's own direction, that of each leaf, random ones, and single coordinates.

    Along the hypergradient (scaled element by element with the square of the element's size, so that a step keeps
    signs and magnitudes) a wrong length shows most clearly; random directions show everything else.
    """
    scale = scales(phi)
    steepest = jax.tree.map(lambda s, g: s**2 * np.asarray(g, np.float64), scale, grad)
    found = [_direction("hypergradient", steepest, scale, phi)]
    names = paths(phi)
    if 1 < len(names) <= _MAX_LEAVES:
        found += [
            _direction(f"hypergradient {name}", only_leaf(steepest, i), scale, phi)
            for i, name in enumerate(names)
        ]
    found += [random_direction(f"random {i + 1}", phi, rng) for i in range(num_directions)]
    if sum(leaf.size for leaf in jax.tree.leaves(phi)) == 1:
        return coordinate_directions(phi, grad, 1, rng)  # there is no other direction
    return [d for d in found if d is not None] + coordinate_directions(phi, grad, coordinates, rng)
