"""The curvature of K-FAC as an optimiser keeps it: factors, their inverses, and when each is computed again."""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Scalar

from curvax._pytree import tree_generic_like
from curvax.capture._second_moment import at_least_float32
from curvax.optim._blocks import BlockInfo, Context, Matrices
from curvax.optim._estimates import Counts, Pairs, blended, empty, estimates
from curvax.optim._inverses import (
    EXACT,
    eigenvectors,
    mean_eigenvalue,
    multiplied,
    shifted_inverses,
    shifts_of,
)
from curvax.optim._options import Damping, Factors, Schedule
from curvax.optim._start import full, identities
from curvax.optim._turns import Turns


class AbstractCurvature(eqx.Module):
    """What stands between a gradient and a direction: kept from step to step, learned from batches.

    Its state is a NamedTuple of arrays with the counts `rejected` (statistics that were not finite and were left out)
    and `fallbacks` (factors that had no inverse and were replaced by a multiple of the identity), by name of the block.
    """

    @abc.abstractmethod
    def init(self, infos: tuple[BlockInfo, ...]) -> Any:
        """The state before the first batch."""

    @abc.abstractmethod
    def observe(self, state: Any, context: Context, damping: Scalar) -> Any:
        """The state after what the model does on a batch."""

    @abc.abstractmethod
    def apply(
        self, state: Any, infos: tuple[BlockInfo, ...], matrices: Matrices, damping: Scalar
    ) -> Matrices:
        """(F + damping I)⁻¹ times a gradient."""

    def stepped(self, state: Any, context: Context, step: Matrices, damping: Scalar) -> Any:
        """The state after a step is known."""
        return state


class KroneckerState(NamedTuple):
    """The state of K-FAC's curvature.

    Attributes:
        seen: Batches in the running means.
        factors: Of the rows and of the columns of each block, running means.
        inverses: Of them; for exact damping eigenvectors and eigenvalues.
        rejected: Batches of which the statistics were not finite, and were left out.
        fallbacks: Factors that had no inverse, and were replaced by a multiple of the identity.
    """

    seen: Int[Array, ""]
    factors: Pairs
    inverses: Pairs
    rejected: Counts
    fallbacks: Counts


class Item(NamedTuple):
    """A factor that is a matrix: name of its block, and whether it is that of the columns."""

    name: str
    side: int


class KroneckerCurvature(AbstractCurvature):
    """G ⊗ A for every layer, with factored or exact damping."""

    options: Factors
    schedule: Schedule
    damping: Damping

    def init(self, infos: tuple[BlockInfo, ...]) -> KroneckerState:
        """Zeros, and identities for inverses."""
        factors = empty(infos, self.options)
        inverses = {
            info.name: tuple(
                identity(factor, self.damping.exact) if info.matrix else None for factor in factors[info.name]
            )
            for info in infos
        }
        return KroneckerState(full((), 0, jnp.int32), factors, inverses, counts(infos), counts(infos))  # type: ignore[arg-type]

    def observe(self, state: KroneckerState, context: Context, damping: Scalar) -> KroneckerState:
        """Statistics, running means, and a share of the inverses."""
        state = every(self.schedule.statistics, context, lambda s: self._learned(s, context), state)
        return self._refreshed(state, context, damping)

    def apply(
        self, state: KroneckerState, infos: tuple[BlockInfo, ...], matrices: Matrices, damping: Scalar
    ) -> Matrices:
        """Block by block."""
        rough = scale_of_curvature(state.factors, infos)
        results = {}
        for info in infos:
            vector, (left, right) = matrices[info.name], state.factors[info.name]
            if not info.matrix:
                results[info.name] = diagonal_solve(info, left, right, vector, damping, rough)
                continue
            sides = jax.tree.map(lambda leaf, like=vector: leaf.astype(like.dtype), state.inverses[info.name])
            if self.damping.exact:
                (u, s), (v, t) = sides
                inside = multiplied(u, vector, v, turned=True)
                inside = inside / (s[:, :, None] * t[:, None, :] + damping.astype(vector.dtype))
                results[info.name] = multiplied(u, inside, v)
            else:
                results[info.name] = multiplied(sides[0], vector, sides[1])
        return results

    def _learned(self, state: KroneckerState, context: Context) -> KroneckerState:
        """With the statistics of a batch in the running means."""
        pairs, _ = estimates(context, self.options)
        return learned(state, pairs, context.infos, self.options)

    def _refreshed(self, state: KroneckerState, context: Context, damping: Scalar) -> KroneckerState:
        """With the inverses whose turn it is."""
        infos = context.infos
        items = [Item(i.name, side) for i in infos if i.matrix for side in (0, 1) if i.dense[side]]
        shapes = [state.factors[item.name][item.side].shape for item in items]
        turns = Turns.of([float(s[0] * s[1] ** 3) for s in shapes], self.schedule, self.damping)
        shifts = {
            info.name: shifts_of(*_pair(state.factors, info.name), damping) for info in infos if info.matrix
        }

        means = [mean_eigenvalue(wide(state.factors[item.name][item.side])) for item in items]
        chosen = [[items[i] for i in share] for share in turns.shares]

        def work(share: tuple[int, ...], kept: list[Any]) -> list[Any]:
            found = self._factorised(
                state.factors, [items[i] for i in share], shifts, [means[i] for i in share]
            )
            return jax.tree.map(lambda new, old: new.astype(old.dtype), found, kept)

        # Beside an inverse, whether there was none: only of those that are made.
        before = [
            [
                (state.inverses[item.name][item.side], jnp.zeros_like(state.fallbacks[item.name]))
                for item in share
            ]
            for share in chosen
        ]
        drift = lambda share: self._drift(state, [items[i] for i in share], shifts)
        after = turns.run(context.count, drift, work, before)
        inverses: dict[str, Any] = {name: list(pair) for name, pair in state.inverses.items()}
        fallbacks = dict(state.fallbacks)
        for share, found in zip(chosen, after, strict=True):
            for item, (inverse, bad) in zip(share, found, strict=True):
                inverses[item.name][item.side] = inverse
                fallbacks[item.name] = fallbacks[item.name] + bad
        inverses = {name: tuple(pair) for name, pair in inverses.items()}
        return self._with_diagonals(state._replace(inverses=inverses, fallbacks=fallbacks), infos, shifts)

    def _factorised(self, factors: Pairs, items: list[Item], shifts: Pairs, means: list[Array]) -> list[Any]:
        """New inverses of some factors, and which there were not."""
        matrices = [wide(factors[item.name][item.side]) for item in items]
        if self.damping.exact:
            return [((u, s), bad) for u, s, bad in eigenvectors(matrices, means)]
        return list(shifted_inverses(matrices, [shifts[item.name][item.side] for item in items], means))

    def _with_diagonals(
        self, state: KroneckerState, infos: tuple[BlockInfo, ...], shifts: Pairs
    ) -> KroneckerState:
        """With the inverses of diagonal factors, which cost nothing."""
        inverses = dict(state.inverses)
        for info in infos:
            if info.matrix and not all(info.dense):
                pair: list[Any] = list(inverses[info.name])
                for side in (0, 1):
                    if not info.dense[side]:
                        factor, old = wide(state.factors[info.name])[side], pair[side]
                        shifted = factor + shifts[info.name][side][:, None]
                        new = (None, factor) if self.damping.exact else 1 / shifted
                        pair[side] = jax.tree.map(lambda new, old: new.astype(old.dtype), new, old)
                inverses[info.name] = tuple(pair)  # type: ignore[assignment]
        return state._replace(inverses=inverses)

    def _drift(self, state: KroneckerState, items: list[Item], shifts: Pairs) -> Scalar:
        """How far the inverses of a share are out of date: the largest relative residual of a probe."""
        residuals = []
        for item in items:
            factor = wide(state.factors[item.name][item.side])
            inverse = wide(state.inverses[item.name][item.side])
            probe = tree_generic_like(jax.ShapeDtypeStruct(factor.shape[:2], factor.dtype))
            if self.damping.exact:
                truth = _product(factor, probe)
                u, s = inverse
                model = _product(u, s * _product(u.swapaxes(1, 2), probe))
            else:
                truth, x = probe, _product(inverse, probe)
                model = _product(factor, x) + shifts[item.name][item.side][:, None] * x
            error = jnp.linalg.norm(model - truth, axis=1) / jnp.linalg.norm(truth, axis=1)
            residuals.append(jnp.max(jnp.where(jnp.isfinite(error), error, jnp.inf)))
        return jnp.max(jnp.stack(residuals))


def learned(state: Any, pairs: Pairs, infos: tuple[BlockInfo, ...], options: Factors) -> Any:
    """A state with factors of a batch in its running means, and count of those that were not finite."""
    factors, rejected = {}, {}
    for info in infos:
        if not info.measured:
            factors[info.name], rejected[info.name] = state.factors[info.name], state.rejected[info.name]
            continue
        weight = mean_weight(state.seen - state.rejected[info.name], options.decay)
        mixed, bad = blended(state.factors[info.name], wide(pairs[info.name]), weight)
        factors[info.name], rejected[info.name] = mixed, state.rejected[info.name] + bad.astype(jnp.int32)
    return state._replace(seen=state.seen + 1, factors=factors, rejected=rejected)


def mean_weight(seen: Int[Array, "..."], decay: float) -> Float[Array, "..."]:
    """What the next of a running mean counts: all alike at first, then 1 − decay."""
    dtype = jnp.zeros(()).dtype
    return jnp.maximum(1 / (seen.astype(dtype) + 1), jnp.asarray(1 - decay, dtype))


def every(period: int, context: Context, change: Any, state: PyTree) -> PyTree:
    """The changed state, in every so many steps."""
    if period == 1:
        return change(state)
    return jax.lax.cond(context.count % period == 0, change, lambda state: state, state)


def scale_of_curvature(factors: Pairs, infos: tuple[BlockInfo, ...]) -> Scalar:
    """The mean eigenvalue over all blocks with statistics."""
    total, size = jnp.zeros(()), 0
    for info in infos:
        if info.measured:
            left, right = wide(factors[info.name])
            product = mean_eigenvalue(left) * mean_eigenvalue(right)
            total = total + jnp.mean(product).astype(total.dtype) * (
                info.shape[0] * info.shape[1] * info.shape[2]
            )
            size += info.shape[0] * info.shape[1] * info.shape[2]
    return total / max(size, 1)


def diagonal_solve(
    info: BlockInfo, left: Array, right: Array, vector: Array, damping: Scalar, rough: Scalar
) -> Array:
    """Of a block that is a diagonal; without statistics, of the mean curvature of all others."""
    damping = damping.astype(vector.dtype)
    if not info.measured:
        return vector / (rough.astype(vector.dtype) + damping)
    values = (left * mean_eigenvalue(right)[:, None]).astype(vector.dtype)
    return vector / (values[:, :, None] + damping)


def counts(infos: tuple[BlockInfo, ...]) -> Counts:
    """Zero, for each member of each block; of a block that the model does not use nothing is counted."""
    return {info.name: full((info.shape[0] * info.used,), 0, jnp.int32) for info in infos}


def wide(tree: PyTree) -> PyTree:
    """Arrays in at least float32."""
    return jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), tree)


def _pair(factors: Pairs, name: str) -> tuple[Array, Array]:
    return wide(factors[name])


def identity(factor: Array, exact: bool) -> Any:
    """The inverse of a factor before anything is known of it; exact: eigenvectors and eigenvalues."""
    stack, size = factor.shape[:2]
    ones = full((stack, size), 1, factor.dtype)
    if factor.ndim == 2:
        return (None, ones) if exact else ones
    eye = identities(stack, size, factor.dtype)
    return (eye, ones) if exact else eye


def _product(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("sij,sj->si", matrix, vector, precision=EXACT)
