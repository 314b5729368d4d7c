"""Low rank plus diagonal: the shape of quasi-Newton memories, Nyström approximations and windowed Fisher matrices."""

import math
from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_add
from curvax.operators._base import as_arrays, as_tags
from curvax.operators._dense import structure_dtype
from curvax.operators._low_rank_inverse import LowRankInverse
from curvax.operators._parts import EXACT
from curvax.operators._structured import AbstractStructuredOperator


class LowRankPlusDiagonal(AbstractStructuredOperator):
    r"""D + U Vᵀ with a diagonal D and tall U, V of r columns; symmetric D + U Uᵀ where V is left out.

    Vectors are pytrees. A leaf of shape s of the vector has a leaf of shape (\*s, r) in `left` and in `right`: for
    plain vectors U and V are n × r matrices.

    Args:
        diagonal: D, a pytree shaped like the vectors, or one scalar array for D = d · I.
        left: U, a pytree like the vectors with a last axis of length r in every leaf.
        right: V, like `left`; None for V = U.
        tags: Lineax tags that you know to hold (`lx.positive_semidefinite_tag`, say). Without `right` the operator is
            tagged symmetric.

    Raises:
        ValueError: Structures, shapes or ranks do not fit; a leaf is not real floating-point; `power` of a D that is
            not d · I or of an operator that is not tagged positive semidefinite.

    Cost: a product 4nr multiplications; `inverse` nr² + r³, 4nr² for a scalar D without `right`; `logdet` nr² + r³,
        `trace` and `diagonal` nr; memory 2nr.

    The inverse is D⁻¹ − D⁻¹U (I + VᵀD⁻¹U)⁻¹ VᵀD⁻¹ (Woodbury), again of this class. The r × r matrix is singular exactly
    when the operator is, and the result is then infinite or NaN; so it is where D has a zero: damp it. Digits are lost
    where UVᵀ is very much larger than D: a relative error of about ε ‖UVᵀ‖/min D, so that in float32 none is left at
    1e7. For a scalar D without `right` the inverse is taken in the basis of the eigenvectors instead, and keeps them
    all; its `trace`, `diagonal` and `damped`, and `power`, do not.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        operator = cx.operators.LowRankPlusDiagonal(jnp.ones(4), jnp.ones((4, 1)))
        operator.inverse().mv(jnp.ones(4))  # 1/5 each
        ```

    Source: M. A. Woodbury, "Inverting modified matrices", 1950.
    """

    diagonal_part: PyTree[Array]
    left: PyTree[Array]
    right: PyTree[Array] | None
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(
        self,
        diagonal: PyTree[Array],
        left: PyTree[Array],
        right: PyTree[Array] | None = None,
        tags: object | Iterable[object] = (),
    ) -> None:
        self.left, self.right = as_arrays(left), as_arrays(right)
        self.diagonal_part = as_arrays(diagonal)
        _check(self.diagonal_part, self.left, self.right)
        self.tags = as_tags(tags) | ({lx.symmetric_tag} if right is None else frozenset())

    @property
    def rank(self) -> int:
        """r, the number of columns of U."""
        return jax.tree.leaves(self.left)[0].shape[-1]

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """D v + U (Vᵀ v)."""
        inside = _inner(self._other, vector, self._dtype)
        return tree_add(_scaled(self.diagonal_part, vector), _outer(self.left, inside))

    def transpose(self) -> "LowRankPlusDiagonal":
        """D + V Uᵀ."""
        if self.right is None:
            return self
        return LowRankPlusDiagonal(self.diagonal_part, self.right, self.left, lx.transpose_tags(self.tags))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[:-1], leaf.dtype), self.left)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.in_structure()

    def inverse(self) -> "LowRankPlusDiagonal | LowRankInverse":
        """A⁻¹, in its eigenbasis where D is a scalar and `right` left out, else by Woodbury's identity."""
        return LowRankInverse(self) if self._has_eigenbasis else self.woodbury()

    def woodbury(self) -> "LowRankPlusDiagonal":
        """D⁻¹ − (D⁻¹U C⁻¹)(D⁻¹V)ᵀ, C = I + VᵀD⁻¹U."""
        inverse_diagonal = jax.tree.map(lambda d: 1 / d, self.diagonal_part)
        scaled, core = self._core(inverse_diagonal)
        weights = -jnp.linalg.inv(core)
        left = jax.tree.map(lambda u: jnp.matmul(u, weights.astype(u.dtype), precision=EXACT), scaled)
        right = scaled if self.right is None else _scaled_columns(inverse_diagonal, self.right)
        return LowRankPlusDiagonal(inverse_diagonal, left, right, self.tags)

    def power(self, exponent: float) -> "LowRankPlusDiagonal":
        """(d · I + U Uᵀ) to a real power, for a scalar D and a positive semidefinite operator."""
        if not (self._has_eigenbasis and lx.is_positive_semidefinite(self)):
            raise ValueError(
                f"power({exponent}) of `LowRankPlusDiagonal` needs a scalar `diagonal`, no `right`, and the tag "
                "`lx.positive_semidefinite_tag`."
            )
        values, vectors = jnp.linalg.eigh(_grams(self.left, self.left, self._dtype))
        values = jnp.maximum(values, 0)
        d = self.diagonal_part.astype(values.dtype)
        # ((d + s)ᵖ − dᵖ)/s, whose limit at s = 0 is p dᵖ⁻¹.
        small = values <= jnp.finfo(values.dtype).eps * jnp.abs(d)
        safe = jnp.where(small, 1, values)
        gain = jnp.where(small, exponent * d ** (exponent - 1), ((d + safe) ** exponent - d**exponent) / safe)
        mix = jnp.matmul(vectors * gain, vectors.T, precision=EXACT)
        left = jax.tree.map(lambda u: jnp.matmul(u, mix.astype(u.dtype), precision=EXACT), self.left)
        kept = self.tags | {lx.symmetric_tag}
        return LowRankPlusDiagonal(self.diagonal_part**exponent, left, self.left, kept)

    def damped(self, damping: Scalar | float) -> "LowRankPlusDiagonal":
        """With D + damping · I."""
        diagonal = jax.tree.map(lambda d: d + jnp.asarray(damping, d.dtype), self.diagonal_part)
        return LowRankPlusDiagonal(
            diagonal, self.left, self.right, self.tags - {lx.negative_semidefinite_tag}
        )

    def trace(self) -> Scalar:
        """tr D + Σ U ∘ V."""
        return jnp.sum(self.diagonal())

    def logdet(self) -> Scalar:
        """log |det D| + log |det(I + VᵀD⁻¹U)|."""
        _, core = self._core(jax.tree.map(lambda d: 1 / d, self.diagonal_part))
        return jnp.sum(jnp.log(jnp.abs(self._full_diagonal()))) + jnp.linalg.slogdet(core)[1]

    def diagonal(self) -> Float[Array, " n"]:
        """D + Σ over the columns of U ∘ V, raveled."""
        parts = jax.tree.map(
            lambda u, v: jnp.sum(u * v, axis=-1).astype(self._dtype).ravel(), self.left, self._other
        )
        leaves = jax.tree.leaves(parts)
        return self._full_diagonal() + (jnp.concatenate(leaves) if leaves else jnp.zeros(0, self._dtype))

    @property
    def _has_eigenbasis(self) -> bool:
        """d · I + U Uᵀ, with the eigenvectors of U Uᵀ."""
        scalar = isinstance(self.diagonal_part, jax.Array) and self.diagonal_part.ndim == 0
        return scalar and self.right is None

    @property
    def _other(self) -> PyTree[Array]:
        return self.left if self.right is None else self.right

    @property
    def _dtype(self) -> Any:
        return structure_dtype(self.in_structure())

    def _full_diagonal(self) -> Float[Array, " n"]:
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), self.in_structure())
        leaves = jax.tree.leaves(_scaled(self.diagonal_part, ones))
        return jnp.concatenate([leaf.astype(self._dtype).ravel() for leaf in leaves])

    def _core(self, inverse_diagonal: PyTree[Array]) -> tuple[PyTree[Array], Float[Array, "r r"]]:
        """D⁻¹U and I + VᵀD⁻¹U."""
        scaled = _scaled_columns(inverse_diagonal, self.left)
        return scaled, jnp.eye(self.rank, dtype=self._dtype) + _grams(self._other, scaled, self._dtype)


def _is_scalar(diagonal: PyTree[Array], like: PyTree[Array]) -> bool:
    return jax.tree.structure(diagonal) != jax.tree.structure(like) or (
        isinstance(diagonal, jax.Array) and diagonal.ndim == 0
    )


def _scaled(diagonal: PyTree[Array], vector: PyTree[Array]) -> PyTree[Array]:
    if _is_scalar(diagonal, vector):
        return jax.tree.map(lambda v: diagonal.astype(v.dtype) * v, vector)
    return jax.tree.map(lambda d, v: d * v, diagonal, vector)


def _scaled_columns(diagonal: PyTree[Array], columns: PyTree[Array]) -> PyTree[Array]:
    if _is_scalar(diagonal, columns):
        return jax.tree.map(lambda u: diagonal.astype(u.dtype) * u, columns)
    return jax.tree.map(lambda d, u: d[..., None] * u, diagonal, columns)


def _flat(columns: Array) -> Float[Array, "n r"]:
    return columns.reshape(math.prod(columns.shape[:-1]), columns.shape[-1])


def _inner(columns: PyTree[Array], vector: PyTree[Array], dtype: Any) -> Float[Array, " r"]:
    terms = jax.tree.map(
        lambda u, v: jnp.matmul(v.ravel(), _flat(u), precision=EXACT).astype(dtype), columns, vector
    )
    leaves = jax.tree.leaves(terms)
    return sum(leaves[1:], start=leaves[0])


def _outer(columns: PyTree[Array], weights: Float[Array, " r"]) -> PyTree[Array]:
    return jax.tree.map(lambda u: jnp.matmul(u, weights.astype(u.dtype), precision=EXACT), columns)


def _grams(a: PyTree[Array], b: PyTree[Array], dtype: Any) -> Float[Array, "r r"]:
    terms = jax.tree.map(lambda x, y: jnp.matmul(_flat(x).T, _flat(y), precision=EXACT).astype(dtype), a, b)
    leaves = jax.tree.leaves(terms)
    return sum(leaves[1:], start=leaves[0])


def _check(diagonal: PyTree[Array], left: PyTree[Array], right: PyTree[Array] | None) -> None:
    leaves = jax.tree.leaves(left)
    if not leaves:
        raise ValueError("`left` of `LowRankPlusDiagonal` has no array.")
    for name, tree in (("diagonal", diagonal), ("left", left), ("right", right)):
        for leaf in jax.tree.leaves(tree):
            if not (eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
                found = leaf.dtype if eqx.is_array(leaf) else type(leaf).__name__
                raise ValueError(
                    f"`{name}` of `LowRankPlusDiagonal` must hold real floating-point arrays, found {found}."
                )
    ranks = {leaf.shape[-1] if leaf.ndim else None for leaf in leaves}
    if len(ranks) != 1 or None in ranks:
        raise ValueError(
            "Every leaf of `left` of `LowRankPlusDiagonal` needs a last axis of one length, the rank; found shapes "
            f"{[leaf.shape for leaf in leaves]}."
        )
    if right is not None:
        shapes = [leaf.shape for leaf in jax.tree.leaves(right)]
        if jax.tree.structure(right) != jax.tree.structure(left) or shapes != [leaf.shape for leaf in leaves]:
            raise ValueError(
                f"`right` of `LowRankPlusDiagonal` must be like `left`: found shapes {shapes} for "
                f"{[leaf.shape for leaf in leaves]} (or another structure)."
            )
    if isinstance(diagonal, jax.Array) and diagonal.ndim == 0:
        return
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(diagonal)]
    if jax.tree.structure(diagonal) != jax.tree.structure(left) or found != [
        leaf.shape[:-1] for leaf in leaves
    ]:
        raise ValueError(
            f"`diagonal` of `LowRankPlusDiagonal` must be a scalar array or like a vector: found shapes {found} for "
            f"vectors of shapes {[leaf.shape[:-1] for leaf in leaves]} (or another structure)."
        )
