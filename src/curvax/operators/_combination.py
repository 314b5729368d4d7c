"""Convex combinations of curvatures, such as a mix of the Fisher and the Hessian."""

from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_add, tree_dtype, tree_scale
from curvax.operators._base import as_tags
from curvax.operators._damped import (
    Damped,
    check_real,
    damped_part,
    diagonal_part,
    inverse_part,
    is_square,
    known_tags,
    logdet_part,
    signature,
    trace_part,
)
from curvax.operators._parts import untagged
from curvax.operators._structured import AbstractStructuredOperator


class ConvexCombination(AbstractStructuredOperator):
    """α₁G₁ + … + α_kG_k with αᵢ ≥ 0 and Σ αᵢ = 1.

    It is symmetric, positive or negative semidefinite, diagonal or triangular where all parts are tagged so. A mix of
    a Fisher matrix and a Hessian, which may be indefinite, is tagged symmetric only: for which α it is definite is a
    question of the spectrum (the condition number does not answer it, diag(1, −1) has the best one), which
    `lowest_curvature` answers with a few products.

    Trace and diagonal are those of the parts. A blend of several structured matrices has no structured inverse: solve
    in products, or blend the steps Gᵢ⁻¹g, which is another direction.

    Args:
        operators: G₁, …, G_k, real and square, over vectors of one structure; at least one.
        weights: α, k numbers or an array of shape (k,). Known values are checked, traced ones cannot be: a negative
            one makes the tags untrue.
        tags: Lineax tags that you know to hold for the sum, beside those that all parts have in common.

    Raises:
        ValueError: The operators do not fit together; the weights are known and negative, NaN, or do not add up to
            one, or are not k; `inverse`, `logdet` or `power` of more than one part.

    Cost: a product that of all parts; `inverse` and `logdet` of a single part those of the part; the diagonal of a
        part known through its products n of them.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        hessian = lx.MatrixLinearOperator(jnp.diag(jnp.array([2.0, -0.5])), lx.symmetric_tag)
        fisher = lx.MatrixLinearOperator(jnp.eye(2), lx.positive_semidefinite_tag)
        mix = cx.operators.ConvexCombination((hessian, fisher), (0.5, 0.5))
        cx.operators.lowest_curvature(mix, key=jax.random.key(0)).is_definite  # True: 0.25
        ```
    """

    operators: tuple[lx.AbstractLinearOperator, ...]
    weights: Float[Array, " k"]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        operators: Iterable[lx.AbstractLinearOperator],
        weights: Sequence[Scalar | float] | Float[Array, " k"],
        tags: object | Iterable[object] = (),
    ) -> None:
        self.operators = tuple(operators)
        _check_operators(self.operators)
        dtype = tree_dtype(self.operators[0].in_structure())
        known = _as_weights(weights, len(self.operators), dtype)
        # The weight of a single part is 1, also where it is traced and could not be checked.
        self.weights = known if len(self.operators) > 1 else jnp.ones_like(known)
        self.tags = as_tags(tags) | frozenset.intersection(*(known_tags(part) for part in self.operators))

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """Σ αᵢ Gᵢ v."""
        terms = [
            tree_scale(weight, part.mv(vector))
            for weight, part in zip(self.weights, self.operators, strict=True)
        ]
        total = terms[0]
        for term in terms[1:]:
            total = tree_add(total, term)
        return total

    def transpose(self) -> "ConvexCombination":
        """Σ αᵢ Gᵢᵀ."""
        parts = tuple(part.transpose() for part in self.operators)
        return ConvexCombination(parts, self.weights, lx.transpose_tags(self.tags))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the parts."""
        return self.operators[0].in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the parts."""
        return self.operators[0].out_structure()

    @property
    def has_inverse(self) -> bool:
        """Whether the inverse has a structure: there is one part."""
        return len(self.operators) == 1

    def inverse(self) -> lx.AbstractLinearOperator:
        """That of a single part."""
        return inverse_part(self._only("inverse"))

    def damped(self, damping: Scalar | float) -> AbstractStructuredOperator:
        """Σ αᵢ Gᵢ + damping · I: a `Damped`, or the part damped where there is one."""
        if self.has_inverse:
            part = untagged(damped_part(self.operators[0], damping))
            if isinstance(part, AbstractStructuredOperator):
                return part
        return Damped(self, damping)

    def trace(self) -> Scalar:
        """Σ αᵢ tr Gᵢ."""
        return jnp.sum(self.weights * jnp.stack([self._cast(trace_part(part)) for part in self.operators]))

    def logdet(self) -> Scalar:
        """That of a single part."""
        return logdet_part(self._only("logdet"))

    def diagonal(self) -> Float[Array, " n"]:
        """Σ αᵢ diag Gᵢ, raveled."""
        parts = [
            weight * self._cast(diagonal_part(part))
            for weight, part in zip(self.weights, self.operators, strict=True)
        ]
        return jnp.sum(jnp.stack(parts), axis=0)

    def _cast(self, array: Array) -> Array:
        return array.astype(self.weights.dtype)

    def _only(self, method: str) -> lx.AbstractLinearOperator:
        if not self.has_inverse:
            raise ValueError(
                f"{method}() of `ConvexCombination` has a structure for one part only, found {len(self.operators)}. "
                "Solve with `cx.linear.CG` (positive definite) or `cx.linear.Auto`, which need products only, or wrap "
                "`lx.MatrixLinearOperator(operator.as_matrix(), tags)` if it is small."
            )
        return self.operators[0]


@lx.linearise.register(ConvexCombination)
def _(operator):
    parts = tuple(lx.linearise(part) for part in operator.operators)
    return ConvexCombination(parts, operator.weights, operator.tags)


def _check_operators(operators: tuple[lx.AbstractLinearOperator, ...]) -> None:
    if not operators:
        raise ValueError("`operators` of `ConvexCombination` holds none: give at least one.")
    for i, part in enumerate(operators):
        if not isinstance(part, lx.AbstractLinearOperator):
            raise ValueError(
                f"`operators[{i}]` of `ConvexCombination` must be a Lineax operator, found {type(part).__name__}. Wrap "
                "a matrix in `lx.MatrixLinearOperator`."
            )
        check_real(part, f"`operators[{i}]` of `ConvexCombination`")
        first = operators[0].in_structure()
        dtypes = [[leaf.dtype for leaf in jax.tree.leaves(space)] for space in (part.in_structure(), first)]
        same = signature(part.in_structure()) == signature(first) and dtypes[0] == dtypes[1]
        if not (is_square(part) and same):
            raise ValueError(
                f"`operators[{i}]` of `ConvexCombination` must take vectors of the structure {first} to such, found "
                f"{part.out_structure()} from {part.in_structure()}."
            )


def _as_weights(
    weights: Sequence[Scalar | float] | Float[Array, " k"], count: int, dtype: jnp.dtype
) -> Float[Array, " k"]:
    """An array of them, checked where their values are known."""
    listed = isinstance(weights, Sequence)
    parts: list[Any] = []
    parts += weights if listed else [weights]
    wanted = [()] * count if listed else [(count,)]
    shapes = [jnp.shape(part) for part in parts]
    if shapes != wanted:
        raise ValueError(
            f"`weights` of `ConvexCombination` must be {count} numbers, one for each operator, found shapes {shapes}."
        )
    if not any(isinstance(w, jax.core.Tracer) for w in parts):
        values = np.concatenate([np.ravel(np.asarray(w, np.float64)) for w in parts])
        # Each of them may be rounded, to the dtype of the operators or to one that is wider.
        tolerance = 4 * (count + 1) * float(jnp.finfo(dtype).eps)
        if not (values.min() >= 0 and abs(values.sum() - 1) <= tolerance):
            raise ValueError(
                f"`weights` of `ConvexCombination` must be at least 0 and add up to 1, found {values.tolist()} with "
                f"the sum {values.sum()}. Divide them by their sum; for other combinations add Lineax operators, "
                "`a * A + b * B`."
            )
    return jnp.concatenate([jnp.ravel(jnp.asarray(w, dtype)) for w in parts])
