"""The curvature of K-BFGS: one BFGS update a step for the inverse of each factor of each layer."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._pytree import tree_generic_like
from curvax.capture import AbstractInputs, Moments, Site, statistics
from curvax.operators._gauss_newton import num_examples
from curvax.operators._kfac import of_group
from curvax.operators._kfac_statistics import passes
from curvax.optim._blocks import BlockInfo, Context, Matrices
from curvax.optim._estimates import Counts, OptimiserMoments, Pairs, empty, kept_dtype
from curvax.optim._inverses import EXACT, mean_eigenvalue, multiplied, shifted_inverses
from curvax.optim._kronecker import (
    AbstractCurvature,
    counts,
    diagonal_solve,
    learned,
    scale_of_curvature,
    wide,
)
from curvax.optim._options import Factors
from curvax.optim._start import full, identities

# Least curvature along a step, relative to what H says: Powell's damping.
LEAST_CURVATURE = 0.2
# ‖(A + √λ I) H z − z‖ / ‖z‖ for a probe z, above which H is computed anew: an update reaches one direction a step, and
# where λ or A has changed by much, all others would stay out of date.
DRIFT = 0.5


class Flow(NamedTuple):
    """Means over a batch of what flows through a layer.

    Attributes:
        inputs: Mean input, over examples and positions, (stack, in).
        gradients: Mean over the examples of the gradient in what the layer returns, positions summed, (stack, out).
    """

    inputs: Float[Array, "stack in"]
    gradients: Float[Array, "stack out"]


class QuasiNewtonState(NamedTuple):
    """The state of K-BFGS's curvature.

    Attributes:
        seen: Batches in the running means.
        factors: Second moments of the inputs of each layer, and the diagonal of those of the gradients; running means.
        inverses: H of the rows (gradients) and of the columns (inputs) of each layer.
        flow: Of the batch of the step, before it.
        rejected: Batches of which the statistics were not finite, and were left out.
        fallbacks: Updates of an inverse that were not finite or had no curvature, and were left out.
    """

    seen: Int[Array, ""]
    factors: Pairs
    inverses: Pairs
    flow: dict[str, Flow]
    rejected: Counts
    fallbacks: Counts


class Alike(NamedTuple):
    """Blocks whose factors are of one size: the same is done with all, once with their stacks as one.

    Attributes:
        names: Of the blocks.
        stacks: How many factors each has.
    """

    names: tuple[str, ...]
    stacks: tuple[int, ...]

    @classmethod
    def of(cls, infos: list[BlockInfo]) -> "Alike":
        """Of these blocks."""
        return cls(tuple(info.name for info in infos), tuple(info.shape[0] for info in infos))

    def together(self, value: Callable[[str], Array]) -> Array:
        """A value of each block, by its name, along one axis."""
        values = [value(name) for name in self.names]
        return values[0] if len(values) == 1 else jnp.concatenate(values)

    def apart(self, values: Array) -> list[Array]:
        """The inverse of `together`."""
        return [values] if len(self.stacks) == 1 else jnp.split(values, np.cumsum(self.stacks)[:-1].tolist())


def equal(infos: list[BlockInfo], axis: int) -> list[list[BlockInfo]]:
    """Blocks that are equally large along an axis, and of the same dtype, together."""
    kinds = dict.fromkeys((info.shape[axis], info.dtype) for info in infos)
    return [[info for info in infos if (info.shape[axis], info.dtype) == kind] for kind in kinds]


class _Measured(eqx.Module):
    """Sums over the examples of inputs and of cotangents; with moments, their second moments too.

    Attributes:
        moments: Whether.
        singles: Keys of the sites of which the diagonal of those of the cotangents is enough.
    """

    moments: bool = eqx.field(static=True)
    singles: frozenset[str] = eqx.field(static=True)

    def __call__(
        self, site: Site, inputs: AbstractInputs, cotangents: Array, aux: PyTree
    ) -> tuple[Moments | None, Flow | None]:
        """Of one member of the stack."""
        found = None
        if self.moments:
            wanted = (
                dataclasses.replace(site, cotangent_factor="diagonal") if site.key in self.singles else site
            )
            found = OptimiserMoments("expand")(wanted, inputs, cotangents, aux)
        if site.geometry is None or "diagonal" in (site.input_factor, site.cotangent_factor):
            return found, None
        means = inputs.mean(inputs.mask(cotangents)).astype(cotangents.dtype)
        return found, Flow(jnp.sum(means, axis=0), jnp.sum(cotangents, axis=(0, 1)))


class QuasiNewtonCurvature(AbstractCurvature):
    """H_G ⊗ H_A for every layer of one use; diagonals of the empirical Fisher matrix for all else."""

    options: Factors

    def init(self, infos: tuple[BlockInfo, ...]) -> QuasiNewtonState:
        """Identities."""
        factors = empty(infos, self.options)
        inverses: Pairs = {}
        flow: dict[str, Flow] = {}
        for info in infos:
            stack, rows, columns = info.shape
            dtype = kept_dtype(info, self.options)
            if info.single:
                inverses[info.name] = (identities(stack, rows, dtype), identities(stack, columns, dtype))
                flow[info.name] = Flow(full((stack, columns), 0, dtype), full((stack, rows), 0, dtype))
            if info.matrix:
                left, right = factors[info.name]
                diagonal = full(right.shape[:2], 0, right.dtype)
                factors[info.name] = (full(left.shape[:2], 0, left.dtype), right if info.single else diagonal)
        start = full((), 0, jnp.int32)
        return QuasiNewtonState(start, factors, inverses, flow, counts(infos), counts(infos))

    def observe(self, state: QuasiNewtonState, context: Context, damping: Scalar) -> QuasiNewtonState:
        """Second moments of the inputs, and one update of their inverses along what they do to the mean input.

        Where an inverse is out of date by more than `DRIFT`, all are computed anew instead.
        """
        moments, flow = self._measured(context, moments=True)
        pairs: Pairs = {}
        for group, info in zip(context.layers.groups, context.infos, strict=True):
            left, right = of_group(group, moments[group.name])
            if info.matrix:
                left, right = _diagonal(left), right if info.single else _diagonal(right)
            pairs[group.name] = (left, right)
        good = [state.seen - state.rejected[info.name] for info in context.infos if info.single]
        first = jnp.any(jnp.concatenate(good) == 0) if good else jnp.asarray(False)
        state = learned(state, pairs, context.infos, self.options)
        inverses, fallbacks = dict(state.inverses), dict(state.fallbacks)
        singles = [info for info in context.infos if info.single]
        alike = [Alike.of(found) for found in equal(singles, 2)]
        factors = [some.together(lambda name: wide(state.factors[name][1])) for some in alike]
        root = jnp.sqrt(damping)

        def start(old: list[Array]) -> tuple[list[Array], list[Array]]:
            shifts = [jnp.broadcast_to(root.astype(f.dtype), f.shape[:1]) for f in factors]
            found = shifted_inverses(factors, shifts, list(map(mean_eigenvalue, factors)))
            new = [inverse.astype(before.dtype) for (inverse, _), before in zip(found, old, strict=True)]
            return new, [failed.astype(jnp.int32) for _, failed in found]

        def update(old: list[Array]) -> tuple[list[Array], list[Array]]:
            new, bad = [], []
            for some, factor, before in zip(alike, factors, old, strict=True):
                inverse, inputs = wide(before), some.together(lambda name: wide(flow[name].inputs))
                s = _product(inverse, inputs.astype(factor.dtype))
                y = _product(factor, s) + root.astype(factor.dtype) * s
                updated, good = bfgs(inverse, s, y)
                new.append(jnp.where(good[:, None, None], updated, inverse).astype(before.dtype))
                bad.append((~good & ~jnp.all(s == 0, axis=1)).astype(jnp.int32))
            return new, bad

        def out_of_date(old: list[Array]) -> Bool[Array, ""]:
            drifts = []
            for factor, before in zip(factors, old, strict=True):
                probe = tree_generic_like(jax.ShapeDtypeStruct(factor.shape[:2], factor.dtype))
                x = _product(wide(before).astype(factor.dtype), probe)
                error = _product(factor, x) + root.astype(factor.dtype) * x - probe
                drifts.append(jnp.linalg.norm(error, axis=1) / jnp.linalg.norm(probe, axis=1))
            # What is not finite is out of date.
            return ~(jnp.max(jnp.concatenate(drifts)) <= DRIFT) if drifts else jnp.asarray(False)

        columns = [some.together(lambda name: state.inverses[name][1]) for some in alike]
        columns, bad = jax.lax.cond(first | out_of_date(columns), start, update, columns)
        for some, column, failed in zip(alike, columns, bad, strict=True):
            for name, part, count in zip(some.names, some.apart(column), some.apart(failed), strict=True):
                inverses[name] = (inverses[name][0], part)
                fallbacks[name] = fallbacks[name] + count
        kept = {
            info.name: jax.tree.map(
                lambda new, old: new.astype(old.dtype), flow[info.name], state.flow[info.name]
            )
            for info in singles
        }
        return state._replace(inverses=inverses, fallbacks=fallbacks, flow=kept)

    def apply(
        self, state: QuasiNewtonState, infos: tuple[BlockInfo, ...], matrices: Matrices, damping: Scalar
    ) -> Matrices:
        """Block by block."""
        rough = scale_of_curvature(state.factors, infos)
        results = {}
        for info in infos:
            vector = matrices[info.name]
            if info.single:
                left, right = (wide(side).astype(vector.dtype) for side in state.inverses[info.name])
                results[info.name] = multiplied(left, vector, right)
            elif info.matrix:
                left, right = (wide(side).astype(vector.dtype) for side in state.factors[info.name])
                results[info.name] = vector / (
                    left[:, :, None] * right[:, None, :] + damping.astype(vector.dtype)
                )
            else:
                results[info.name] = diagonal_solve(info, *state.factors[info.name], vector, damping, rough)
        return results

    def stepped(
        self, state: QuasiNewtonState, context: Context, step: Matrices, damping: Scalar
    ) -> QuasiNewtonState:
        """One update of the inverses of the gradients' factors, from what the step does to the batch."""
        moved = [
            leaf + part.astype(leaf.dtype)
            for leaf, part in zip(context.leaves, context.unpack(step), strict=True)
        ]
        there = context._replace(leaves=moved, params=context.with_leaves(moved))
        _, flow = self._measured(there, moments=False)
        weights, after = context.pack(context.leaves), context.pack(moved)
        inverses, fallbacks = dict(state.inverses), dict(state.fallbacks)
        for found in equal([info for info in context.infos if info.single], 1):
            some = Alike.of(found)
            changes = [self._change(state, flow, weights, after, name) for name in some.names]
            s, y, still = map(jnp.concatenate, zip(*changes, strict=True))
            inverse = wide(some.together(lambda name: state.inverses[name][0]))
            scale = jnp.sum(s * y, axis=1) / jnp.sum(y * y, axis=1)
            untouched = jnp.all(inverse == jnp.eye(inverse.shape[-1], dtype=inverse.dtype), axis=(1, 2))
            usable = jnp.isfinite(scale) & (scale > 0) & untouched & ~still
            inverse = jnp.where(usable[:, None, None], scale[:, None, None] * inverse, inverse)
            updated, good = bfgs(inverse, *damped(inverse, s, y, jnp.sqrt(damping).astype(s.dtype)))
            rows = jnp.where((good & ~still)[:, None, None], updated, inverse)
            bad = (~good & ~still).astype(jnp.int32)
            for name, row, count in zip(some.names, some.apart(rows), some.apart(bad), strict=True):
                inverses[name] = (row.astype(inverses[name][0].dtype), inverses[name][1])
                fallbacks[name] = fallbacks[name] + count
        return state._replace(inverses=inverses, fallbacks=fallbacks)

    def _change(
        self, state: QuasiNewtonState, flow: dict[str, Flow], weights: Matrices, after: Matrices, name: str
    ) -> tuple[Array, Array, Array]:
        """What a step changed in what a layer returns, and in its gradient; and whether that is nothing."""
        old = wide(state.flow[name])
        new = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), flow[name], old)
        s = _product(after[name], new.inputs) - _product(weights[name], old.inputs)
        # A change that is lost in the rounding of the means (of inputs of mean zero, say) is none.
        factor = wide(state.factors[name][1])
        spread = jnp.sqrt(mean_eigenvalue(factor) * factor.shape[-1]).astype(s.dtype)
        size = jnp.sqrt(jnp.sum(jnp.square(weights[name]), axis=(1, 2))).astype(s.dtype)
        still = jnp.linalg.norm(s, axis=1) <= jnp.finfo(s.dtype).eps * size * spread
        return s, new.gradients - old.gradients, still

    def _measured(self, context: Context, moments: bool) -> tuple[dict[str, list[Moments]], dict[str, Flow]]:
        """Second moments of all sites, and the flow through the layers, with the gradients of the examples."""
        taken = passes(context.layers, context.loss, "empirical", context.inputs, context.targets, None)
        groups = zip(context.layers.groups, context.infos, strict=True)
        singles = frozenset(group.sites[0].key for group, info in groups if info.single)
        found = statistics(
            context.layers,
            context.params,
            context.inputs,
            taken.cotangents,
            _Measured(moments, singles),
            targets=taken.targets,
        )
        size = num_examples(context.inputs)
        flow = {}
        for group, info in zip(context.layers.groups, context.infos, strict=True):
            if info.single:
                ((_, sums),) = found[group.name]
                flow[group.name] = Flow(sums.inputs / (size * group.sites[0].steps), sums.gradients / size)
        return {name: [m for m, _ in parts] for name, parts in found.items()}, flow


def bfgs(
    inverse: Float[Array, "stack n n"], s: Float[Array, "stack n"], y: Float[Array, "stack n"]
) -> tuple[Float[Array, "stack n n"], Bool[Array, " stack"]]:
    """(I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ, ρ = 1/sᵀy, and whether that is finite and ρ positive."""
    # The update is the same for any multiple of both; ρ² is not to overflow.
    size = jnp.maximum(jnp.max(jnp.abs(s), axis=1), jnp.max(jnp.abs(y), axis=1))[:, None]
    s, y = s / jnp.where(size > 0, size, 1), y / jnp.where(size > 0, size, 1)
    along = jnp.sum(s * y, axis=1)
    good = along > 0
    rho = 1 / jnp.where(good, along, 1)
    u = _product(inverse, y)
    outer = lambda a, b: a[:, :, None] * b[:, None, :]
    weight = rho**2 * jnp.sum(y * u, axis=1) + rho
    cross = outer(s, u)
    updated = (
        inverse - rho[:, None, None] * (cross + cross.swapaxes(1, 2)) + weight[:, None, None] * outer(s, s)
    )
    return updated, good & jnp.isfinite(jnp.sum(updated, axis=(1, 2)))


def damped(
    inverse: Float[Array, "stack n n"], s: Float[Array, "stack n"], y: Float[Array, "stack n"], shift: Scalar
) -> tuple[Float[Array, "stack n"], Float[Array, "stack n"]]:
    """Double damping: s with sᵀy ≥ 0.2 yᵀHy (Powell's, on H), then y + shift · s (Levenberg and Marquardt's)."""
    u = _product(inverse, y)
    along, modelled = jnp.sum(s * y, axis=1), jnp.sum(y * u, axis=1)
    short = along < LEAST_CURVATURE * modelled
    share = jnp.where(short, (1 - LEAST_CURVATURE) * modelled / jnp.where(short, modelled - along, 1), 1)[
        :, None
    ]
    s = share * s + (1 - share) * u
    return s, y + shift * s


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("sij,sj->si", matrix, vector, precision=EXACT)


def _diagonal(factor: Array) -> Array:
    return factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2)
