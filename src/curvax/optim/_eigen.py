"""The curvature of EKFAC as an optimiser keeps it: eigenvectors of the factors, and second moments along them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Scalar

from curvax.optim._blocks import BlockInfo, Context, Matrices
from curvax.optim._estimates import Counts, Pairs, blended, empty, estimates
from curvax.optim._inverses import eigenvectors, mean_eigenvalue, multiplied
from curvax.optim._kronecker import (
    AbstractCurvature,
    Item,
    counts,
    diagonal_solve,
    every,
    identity,
    mean_weight,
    scale_of_curvature,
    wide,
)
from curvax.optim._options import Damping, Factors, Schedule
from curvax.optim._start import full
from curvax.optim._turns import WARM_UP, Turns


class EigenState(NamedTuple):
    """The state of EKFAC's curvature.

    Attributes:
        seen: Batches in the running means.
        factors: Of the rows and of the columns of each block, running means.
        bases: Their eigenvectors; None for unit vectors.
        values: Second moments of the gradients along them, running means.
        rejected: Batches of which the statistics were not finite, and were left out.
        fallbacks: Factors that had no eigenvectors, and got unit vectors.
    """

    seen: Int[Array, ""]
    factors: Pairs
    bases: dict[str, tuple[Array | None, Array | None]]
    values: Matrices
    rejected: Counts
    fallbacks: Counts


class EigenCurvature(AbstractCurvature):
    """(U ⊗ V) diag(S) (U ⊗ V)ᵀ for every layer."""

    options: Factors
    schedule: Schedule
    damping: Damping

    def init(self, infos: tuple[BlockInfo, ...]) -> EigenState:
        """Unit vectors, and ones."""
        factors = empty(infos, self.options)
        bases = {
            info.name: tuple(identity(factor, True)[0] for factor in factors[info.name])
            for info in infos
            if info.matrix
        }
        values = {
            info.name: full(info.shape, 1, factors[info.name][0].dtype) for info in infos if info.matrix
        }
        start = full((), 0, jnp.int32)
        return EigenState(start, factors, bases, values, counts(infos), counts(infos))  # type: ignore[arg-type]

    def observe(self, state: EigenState, context: Context, damping: Scalar) -> EigenState:
        """Statistics, running means, and a share of the eigenvectors."""
        state = every(self.schedule.statistics, context, lambda s: self._learned(s, context), state)
        return self._refreshed(state, context)

    def apply(
        self, state: EigenState, infos: tuple[BlockInfo, ...], matrices: Matrices, damping: Scalar
    ) -> Matrices:
        """Block by block."""
        rough = scale_of_curvature(state.factors, infos)
        results = {}
        for info in infos:
            vector = matrices[info.name]
            if not info.matrix:
                left, right = state.factors[info.name]
                results[info.name] = diagonal_solve(info, left, right, vector, damping, rough)
                continue
            cast = lambda leaf: leaf.astype(vector.dtype)  # noqa: B023
            u, v = jax.tree.map(cast, state.bases[info.name])
            inside = multiplied(u, vector, v, turned=True)
            inside = inside / (cast(state.values[info.name]) + damping.astype(vector.dtype))
            results[info.name] = multiplied(u, inside, v)
        return results

    def _learned(self, state: EigenState, context: Context) -> EigenState:
        pairs, squares = estimates(context, self.options, wide(state.bases))
        factors, values, rejected = dict(state.factors), dict(state.values), dict(state.rejected)
        for info in context.infos:
            if not info.measured:
                continue
            old, new = (state.factors[info.name],), (wide(pairs[info.name]),)
            if info.matrix:
                old, new = (*old, state.values[info.name]), (*new, wide(squares[info.name]))  # type: ignore[assignment]
            weight = mean_weight(state.seen - state.rejected[info.name], self.options.decay)
            mixed, bad = blended(old, new, weight)
            factors[info.name] = mixed[0]
            if info.matrix:
                values[info.name] = mixed[1]
            rejected[info.name] = rejected[info.name] + bad.astype(jnp.int32)
        return state._replace(seen=state.seen + 1, factors=factors, values=values, rejected=rejected)

    def _refreshed(self, state: EigenState, context: Context) -> EigenState:
        infos = [info for info in context.infos if info.matrix]
        costs = [
            float(
                info.shape[0]
                * sum(n**3 for n, is_dense in zip(info.shape[1:], info.dense, strict=True) if is_dense)
            )
            for info in infos
        ]
        turns = Turns.of(costs, self.schedule, self.damping)
        starting = context.count < WARM_UP

        chosen = [[infos[i] for i in share] for share in turns.shares]

        def work(share: tuple[int, ...], kept: Any) -> Any:
            return self._decomposed(state, kept, [infos[i] for i in share], starting)

        # Beside bases and values, how many of the former there were not: only of those that are made.
        before = [
            {
                info.name: (
                    state.bases[info.name],
                    state.values[info.name],
                    jnp.zeros_like(state.fallbacks[info.name]),
                )
                for info in share
            }
            for share in chosen
        ]
        drift = lambda share: self._drift(state, [infos[i] for i in share])
        bases, values, fallbacks = dict(state.bases), dict(state.values), dict(state.fallbacks)
        for share in turns.run(context.count, drift, work, before):
            for name, (basis, value, bad) in share.items():
                bases[name], values[name], fallbacks[name] = basis, value, fallbacks[name] + bad
        return state._replace(bases=bases, values=values, fallbacks=fallbacks)

    def _decomposed(
        self, state: EigenState, kept: dict[str, Any], infos: list[BlockInfo], starting: Bool[Array, ""]
    ) -> dict[str, Any]:
        """New eigenvectors of some blocks, what is known along them, and how many of the former there were not."""
        results = {}
        items = [Item(info.name, side) for info in infos for side in (0, 1) if info.dense[side]]
        factors = [wide(state.factors[item.name][item.side]) for item in items]
        found = dict(zip(items, eigenvectors(factors, list(map(mean_eigenvalue, factors))), strict=True))
        for info in infos:
            bases, values, missing = kept[info.name]
            sides: list[Array | None] = []
            eigenvalues = []
            turned = wide(values)
            for side in (0, 1):
                factor, old = wide(state.factors[info.name])[side], wide(bases[side])
                if not info.dense[side]:
                    sides.append(None)
                    eigenvalues.append(factor)
                    continue
                vectors, along, bad = found[Item(info.name, side)]
                # What is known along the old vectors, as if nothing were correlated along them.
                shares = jnp.square(jnp.einsum("sij,sik->sjk", vectors, old))
                turned = multiplied(shares, turned, None) if side == 0 else multiplied(None, turned, shares)
                missing = missing + bad.astype(jnp.int32)
                sides.append(vectors.astype(bases[side].dtype))
                eigenvalues.append(along)
            product = eigenvalues[0][:, :, None] * eigenvalues[1][:, None, :]
            following = jnp.where(starting, product, turned).astype(values.dtype)
            results[info.name] = (tuple(sides), following, missing)
        return results

    def _drift(self, state: EigenState, infos: list[BlockInfo]) -> Scalar:
        """How far from diagonal the factors are in their bases: ‖off-diagonal‖ / ‖diagonal‖ of Uᵀ F U, the largest."""
        found = []
        for info in infos:
            for side in (0, 1):
                if info.dense[side]:
                    factor, basis = wide(state.factors[info.name])[side], wide(state.bases[info.name][side])
                    inside = multiplied(
                        basis, multiplied(None, factor, basis.swapaxes(1, 2)), None, turned=True
                    )
                    diagonal = jnp.sum(jnp.square(jnp.diagonal(inside, axis1=1, axis2=2)), axis=1)
                    rest = jnp.sum(jnp.square(inside), axis=(1, 2)) - diagonal
                    ratio = jnp.sqrt(jnp.maximum(rest, 0) / diagonal)
                    found.append(jnp.max(jnp.where(jnp.isfinite(ratio), ratio, jnp.inf)))
        return jnp.max(jnp.stack(found)) if found else jnp.zeros(())
