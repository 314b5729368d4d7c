"""Kronecker factors of a batch, and their running means."""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from curvax.capture import AbstractInputs, Moments, Site, statistics
from curvax.operators._gauss_newton import num_examples
from curvax.operators._kfac import of_group
from curvax.operators._kfac_statistics import FactorMoments, Squares, passes
from curvax.optim._blocks import BlockInfo, Context, Matrices, part_of
from curvax.optim._options import Factors
from curvax.optim._start import full

Pairs = dict[str, tuple[Array, Array]]
Counts = dict[str, Int[Array, " stack"]]


class OptimiserMoments(eqx.Module):
    """`FactorMoments`, but the diagonal for whatever is no matrix."""

    sharing: Literal["expand", "reduce"] = eqx.field(static=True)
    part: Literal["both", "inputs", "cotangents"] = eqx.field(static=True, default="both")

    def __call__(self, site: Site, inputs: AbstractInputs, cotangents: Array, aux: PyTree) -> Moments:
        """Of one member of the stack; what is not asked for is not computed."""
        if site.geometry is None:
            site = dataclasses.replace(site, cotangent_factor="diagonal")
        return FactorMoments(self.sharing, self.part)(site, inputs, cotangents, aux)


class MomentsAndSquares(eqx.Module):
    """The factors and, along the eigenvectors in `aux`, the second moments of the gradients, in one pass."""

    sharing: Literal["expand", "reduce"] = eqx.field(static=True)

    def __call__(
        self, site: Site, inputs: AbstractInputs, cotangents: Array, aux: PyTree
    ) -> tuple[Moments, Array | None]:
        """Of one member of the stack."""
        moments = OptimiserMoments(self.sharing)(site, inputs, cotangents, None)
        return moments, None if site.geometry is None else Squares()(site, inputs, cotangents, aux)


def estimates(context: Context, options: Factors, bases: Pairs | None = None) -> tuple[Pairs, Matrices]:
    """The factors of every block for this batch; with bases, also the second moments of the gradients along them.

    Args:
        context: Of the step.
        options: How.
        bases: By name of a block with two factors, their eigenvectors (None for unit vectors).
    """
    layers, params = context.layers, context.params
    inputs, targets = part_of(context.inputs, context.targets, options.fraction, context.count)
    taken = passes(layers, context.loss, options.kind, inputs, targets, context.key)
    size = num_examples(inputs)

    def measure(cotangents, statistic, directions, aux=None):  # type: ignore[no-untyped-def]
        return statistics(
            layers, params, inputs, cotangents, statistic, aux, targets=taken.targets, directions=directions
        )

    squares: dict[str, list[Any]] = {}
    if taken.directions:
        read = measure(taken.mixed, OptimiserMoments(options.sharing, "inputs"), False)
        returned = measure(taken.cotangents, OptimiserMoments(options.sharing, "cotangents"), True)
        sums = {
            name: [
                m._replace(cotangents=g.cotangents) for m, g in zip(read[name], returned[name], strict=True)
            ]
            for name in read
        }
        if bases is not None:
            found = measure(taken.cotangents, Squares(), True, bases)
            squares = {name: list(parts) for name, parts in found.items()}
    elif bases is None:
        found = measure(taken.cotangents, OptimiserMoments(options.sharing), False)
        sums = {name: list(parts) for name, parts in found.items()}
    else:
        found = measure(taken.cotangents, MomentsAndSquares(options.sharing), False, bases)
        sums = {name: [moments for moments, _ in parts] for name, parts in found.items()}
        squares = {name: [square for _, square in parts] for name, parts in found.items()}
    pairs = {group.name: of_group(group, sums[group.name]) for group in layers.groups}
    corrected: Matrices = {}
    for group in layers.groups:
        if bases is not None and group.name in bases:
            parts = zip(group.sites, squares[group.name], strict=True)
            turned = [found.swapaxes(1, 2) if site.transposed else found for site, found in parts]
            corrected[group.name] = sum(turned[1:], start=turned[0]) / size
    return pairs, corrected


def empty(infos: tuple[BlockInfo, ...], options: Factors) -> Pairs:
    """Zeros like the factors; of no size where there are no statistics."""
    found = {}
    for info in infos:
        stack, rows, columns = info.shape
        left = (stack, rows, rows) if info.dense[0] else (stack, rows)
        right = (stack, columns, columns) if info.dense[1] or not info.matrix else (stack, columns)
        if not info.measured:
            left, right = (stack, 0), (stack, 0)
        dtype = kept_dtype(info, options)
        found[info.name] = (full(left, 0, dtype), full(right, 0, dtype))
    return found


def kept_dtype(info: BlockInfo, options: Factors) -> jnp.dtype:
    """What the factors of a block are kept in."""
    return jnp.dtype(info.dtype if options.dtype is None else options.dtype)


def blended(old: PyTree, new: PyTree, weight: Float[Array, " stack"]) -> tuple[PyTree, Array]:
    """old + weight · (new − old) for the members of a stack of which the new is finite, and which are not."""
    leaves = jax.tree.leaves(new)
    sums = [jnp.sum(leaf, axis=tuple(range(1, leaf.ndim))) for leaf in leaves]
    # Sums of what is not finite are not finite; sums of squares that overflow are no use either.
    good = jnp.all(jnp.stack([jnp.isfinite(s) for s in sums]), axis=0)

    def mix(old: Array, new: Array) -> Array:
        kept = new.dtype
        share, usable = (part.reshape(-1, *(1,) * (new.ndim - 1)) for part in (weight.astype(kept), good))
        mixed = old.astype(kept) + share * (new - old.astype(kept))
        return jnp.where(usable, mixed, old.astype(kept)).astype(old.dtype)

    return jax.tree.map(mix, old, new), ~good
