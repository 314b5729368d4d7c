"""A low-rank matrix kept up to date while new directions come in and old ones fade."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Int, PyTree, Scalar

from curvax._pytree import stop_gradient, tree_dtype, tree_size
from curvax.operators._damped import signature
from curvax.operators._dense import ravel, unravel
from curvax.operators._low_rank import LowRankPlusDiagonal
from curvax.operators._matrix_function import eigen
from curvax.operators._parts import EXACT
from curvax.operators._sketched import cut_columns
from curvax.operators._sketches import check_count, space_of

Tail = Literal["mean", "median", "harmonic"]


class LowRankWindow(eqx.Module):
    """The leading eigenpairs of M = Σ decayᵗ⁻ˢ wₛ vₛvₛᵀ, from one pass over the vectors, and the trace of the rest.

    `add` takes M to decay · M + w v vᵀ and keeps the `slots` largest of the slots + 1 eigenpairs that this makes of
    those kept; the trace of what falls out is kept, and fades alike. So the whole trace is exact, and so is M as long
    as its rank is at most `slots`. What is kept is never above M: each fold loses the directions of what it discards.

    It is a constant: no derivative flows through it to the vectors. All arrays have fixed shapes: a window can be
    carried by `jax.lax.scan`, and `add` compiles once. It is read by `operator`, as a `LowRankPlusDiagonal` of which
    the diagonal stands for the tail.

    Args:
        like: What the vectors are like: an operator (its input), or a pytree of real floating-point arrays or
            `jax.ShapeDtypeStruct`s of n elements in all.
        slots: How many eigenpairs to keep, from 1 to n.

    Attributes:
        basis: Orthonormal rows, over raveled vectors; those of value 0 mean nothing.
        values: The eigenvalues, falling, at least 0.
        rest: The trace of all that was discarded, faded.
        space: The structure of the vectors.

    Raises:
        ValueError: `like` has no element or one that is not real; `slots` out of range; a vector of another structure;
            a known weight or decay that is negative or NaN.

    Cost: `add` 2n slots² operations and an eigendecomposition of slots + 1 rows; memory n · slots.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        gradients = jax.random.normal(jax.random.key(0), (50, 10))
        window = cx.operators.LowRankWindow(jnp.zeros(10), 4)
        add = lambda window, g: (window.add(g, decay=0.9, weight=0.1), None)
        window, _ = jax.lax.scan(add, window, gradients)
        step = window.operator().damped(1e-3).inverse().mv(gradients[-1])
        ```

    Source: M. Brand, "Fast low-rank modifications of the thin singular value decomposition", 2006, for the update;
        A. Levy and M. Lindenbaum, "Sequential Karhunen-Loeve basis extraction", 2000, for the decay. Where the
        window is a scalar tail and few directions, Woodbury's small matrix I + (λᵢ − d)/(d + μ) is singular for
        d + μ = 0 only, where the operator is.
    """

    basis: Float[Array, "slots n"]
    values: Float[Array, " slots"]
    rest: Scalar
    space: Any = eqx.field(static=True)

    def __init__(self, like: Any, slots: int) -> None:
        structure = space_of("LowRankWindow", like)
        leaves, treedef = jax.tree.flatten(structure)
        dtype, n = tree_dtype(structure), tree_size(structure)
        slots = check_count("slots", "LowRankWindow", slots, n)
        self.space = (tuple(leaves), treedef)
        self.basis, self.values = jnp.eye(slots, n, dtype=dtype), jnp.zeros(slots, dtype)
        self.rest = jnp.zeros((), dtype)

    def structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        leaves, treedef = self.space
        return jax.tree.unflatten(treedef, leaves)

    def trace(self) -> Scalar:
        """Σ decayᵗ⁻ˢ wₛ ‖vₛ‖²: tr M, exactly."""
        return jnp.sum(self.values) + self.rest

    def add(
        self, vector: PyTree[Array], *, decay: Scalar | float = 1.0, weight: Scalar | float = 1.0
    ) -> "LowRankWindow":
        """The window of decay · M + weight · v vᵀ.

        Args:
            vector: v.
            decay: From 0 (forget all) to 1; with weight 1 − decay the window is a moving average.
            weight: At least 0.

        Returns:
            The new window; all NaN from the first NaN on.

        Raises:
            ValueError: A vector of another structure; a known weight or decay that is negative or NaN.
        """
        if signature(jax.eval_shape(lambda: vector)) != signature(self.structure()):
            raise ValueError(
                f"`vector` must have the structure {self.structure()} of the window, found "
                f"{jax.eval_shape(lambda: vector)}."
            )
        fade, dtype = _factor("decay", decay, self.values.dtype), self.values.dtype
        v = jnp.sqrt(_factor("weight", weight, dtype)) * ravel(vector, dtype)
        inside = jnp.matmul(self.basis, v, precision=EXACT)
        outside = v - jnp.matmul(inside, self.basis, precision=EXACT)
        # Once more: what is left of the first pass is as large as rounding makes it.
        again = jnp.matmul(self.basis, outside, precision=EXACT)
        inside, outside = inside + again, outside - jnp.matmul(again, self.basis, precision=EXACT)
        norm = jnp.linalg.norm(outside)
        rounding = 10 * v.size**0.5 * jnp.finfo(dtype).eps * jnp.linalg.norm(v)
        new = norm > rounding
        direction = jnp.where(new, outside / jnp.where(new, norm, 1), 0)
        part = jnp.append(inside, jnp.where(new, norm, 0))
        matrix = jnp.diag(jnp.append(fade * self.values, 0)) + jnp.outer(part, part)
        # A vector of the span has no direction to add: an eigenvalue apart from all others, so that none is mixed
        # with the zero row, and that falls out.
        apart = jnp.where(new, 0, -1 - jnp.max(jnp.abs(matrix)))
        values, rotation = eigen(matrix.at[-1, -1].add(apart))
        rows = jnp.concatenate([self.basis, direction[None]])
        basis = jnp.matmul(rotation[:, :0:-1].T, rows, precision=EXACT)
        rest = fade * self.rest + jnp.maximum(values[0], 0)
        return self._with(basis, jnp.maximum(values[:0:-1], 0), rest)

    def fold(self, rank: Int[Array, ""] | int) -> "LowRankWindow":
        """Only the `rank` largest eigenpairs are kept; the trace of the others goes to the rest."""
        kept = self._kept(rank)
        rest = self.rest + jnp.sum(jnp.where(kept, 0, self.values))
        return self._with(self.basis, jnp.where(kept, self.values, 0), rest)

    def operator(
        self, rank: Int[Array, ""] | int | None = None, *, tail: Tail = "mean"
    ) -> LowRankPlusDiagonal:
        """d · I + U diag(λ − d) Uᵀ of the `rank` largest eigenpairs, with d for the n − rank eigenvalues of the tail.

        Of those, the ones in the slots are known; the others, of which the trace is known, count as equal. Their mean
        keeps the trace and is the best d for M in the Frobenius norm, their harmonic mean the best one for M⁻¹ (0 if
        one is 0), and the median heeds neither a few large ones nor a few zeros.

        Args:
            rank: From 0 to `slots`, also traced; by default all slots.
            tail: "mean", "median" or "harmonic".

        Returns:
            A `LowRankPlusDiagonal` of `slots` columns, those beyond the rank zero, tagged positive semidefinite.
            An eigenvalue below d, as the mean of folded ones can be, is taken as d. Damp it before an inverse.

        Raises:
            ValueError: `rank` or `tail` is not one of these.
        """
        level = self.tail_value(rank, tail=tail)
        kept = self._kept(rank)
        gain = jnp.where(kept, jnp.sqrt(jnp.maximum(self.values - level, 0)), 0)
        # Zero times a NaN would be one, but so it shall be.
        columns = cut_columns((self.basis * gain[:, None]).T, self.structure())
        return LowRankPlusDiagonal(level, columns, tags=lx.positive_semidefinite_tag)

    def tail_value(self, rank: Int[Array, ""] | int | None = None, *, tail: Tail = "mean") -> Scalar:
        """The d of `operator`; 0 where there is no tail.

        Args:
            rank: As for `operator`.
            tail: As for `operator`.

        Returns:
            A scalar in the units of the eigenvalues.

        Raises:
            ValueError: `rank` or `tail` is not one of these.
        """
        kept, dtype = self._kept(rank), self.values.dtype
        unknown = self.basis.shape[1] - self.values.size
        values = jnp.append(self.values, self.rest / max(unknown, 1))
        counts = jnp.append(jnp.where(kept, 0, 1), unknown)
        many = jnp.sum(counts)
        weights, total = counts.astype(dtype), jnp.maximum(many, 1).astype(dtype)
        if tail == "mean":
            return jnp.sum(weights * values) / total
        if tail == "harmonic":
            there = counts > 0
            inverses = jnp.where(there, weights / jnp.where(there, values, 1), 0)
            return jnp.where(many > 0, total / jnp.where(many > 0, jnp.sum(inverses), 1), 0)
        if tail != "median":
            raise ValueError(f'`tail` must be "mean", "median" or "harmonic", found {tail!r}.')
        order = jnp.argsort(values)
        ends = jnp.cumsum(counts[order])
        pick = lambda place: values[order][jnp.argmax(ends > place)]
        return jnp.where(many > 0, 0.5 * (pick((many - 1) // 2) + pick(many // 2)), 0)

    def rank_by_tail(self, fraction: Scalar | float) -> Int[Array, ""]:
        """The least rank at which the tail has at most this fraction of the trace; `slots` if none is enough."""
        tails = self.rest + jnp.cumsum(self.values[::-1])[::-1]
        return jnp.sum(~(tails <= jnp.asarray(fraction, tails.dtype) * self.trace())).astype(jnp.int32)

    def rank_by_gradient(
        self,
        operator: lx.AbstractLinearOperator,
        gradient: PyTree[Array],
        *,
        rtol: Scalar | float,
        damping: Scalar | float,
        tail: Tail = "mean",
    ) -> tuple[Int[Array, ""], Float[Array, " slots+1"]]:
        """The least rank whose step p = (M_rank + damping · I)⁻¹ g has ‖g − Hp‖ ≤ rtol ‖g‖, with the true H.

        (‖g − H⁻¹g‖, which one also finds, measures how far H is from the identity.) A residual need not fall as
        the rank grows: all are returned.

        Args:
            operator: H, with its damping: the system that p should solve.
            gradient: g.
            rtol: The residual wanted.
            damping: What is added to the window, in the units of its eigenvalues.
            tail: As for `operator`.

        Returns:
            The rank, `slots` if none is enough; and the residuals of ranks 0 to `slots`, over ‖g‖.

        Cost: slots + 1 products with H.
        """
        dtype, structure = self.values.dtype, self.structure()
        applied, shift = lx.linearise(operator), jnp.asarray(damping, dtype)
        g = ravel(gradient, dtype)
        inside = jnp.matmul(self.basis, g, precision=EXACT)

        def residual(rank: Array) -> Array:
            level = self.tail_value(rank, tail=tail)
            gain = 1 / (jnp.maximum(self.values, level) + shift) - 1 / (level + shift)
            weights = jnp.where(self._kept(rank), gain * inside, 0)
            step = g / (level + shift) + jnp.matmul(weights, self.basis, precision=EXACT)
            return jnp.linalg.norm(g - ravel(applied.mv(unravel(step, structure)), dtype))

        ranks = jnp.arange(self.values.size + 1, dtype=jnp.int32)
        size = jnp.linalg.norm(g)
        residuals = jax.lax.map(residual, ranks) / jnp.where(size > 0, size, 1)
        enough = residuals <= jnp.asarray(rtol, dtype)
        first = jnp.argmax(enough).astype(jnp.int32)
        return jnp.where(jnp.any(enough), first, ranks[-1]), residuals

    def _kept(self, rank: Int[Array, ""] | int | None) -> Array:
        slots = self.values.size
        if rank is None:
            return jnp.ones(slots, bool)
        if not isinstance(rank, jax.core.Tracer) and not (jnp.shape(rank) == () and 0 <= int(rank) <= slots):
            raise ValueError(
                f"`rank` must be an integer from 0 to the number of slots, {slots}, found {rank}."
            )
        return jnp.arange(slots, dtype=jnp.int32) < jnp.asarray(rank, jnp.int32)

    def _with(self, basis: Array, values: Array, rest: Scalar) -> "LowRankWindow":
        # Equal eigenvalues, as the zeros of empty slots are, have no derivatives.
        new = stop_gradient((basis, values, rest))
        return eqx.tree_at(lambda w: (w.basis, w.values, w.rest), self, new)


def _factor(name: str, value: Scalar | float, dtype: Any) -> Scalar:
    if jnp.shape(value) != () or not (isinstance(value, jax.core.Tracer) or float(value) >= 0):
        raise ValueError(f"`{name}` must be a scalar of at least 0, found {value}.")
    return jnp.asarray(value, dtype)
