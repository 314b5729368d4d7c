"""Matrices of one structure, one beside the other: as those of equal layers."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree, Scalar

from curvax.operators._base import as_tags
from curvax.operators._damped import (
    check_damping,
    check_real,
    damped_part,
    diagonal_part,
    inverse_part,
    is_square,
    known_tags,
    logdet_part,
    tagged,
    trace_part,
)
from curvax.operators._parts import power_of
from curvax.operators._structured import AbstractStructuredOperator

_T = TypeVar("_T")
_KEPT = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag, lx.negative_semidefinite_tag])
_POWER = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag])


class Stacked(AbstractStructuredOperator):
    """diag(A₁, ..., A_s) of s operators of one structure, held as ONE with a leading axis on every array.

    Its vectors are those of A, with the same leading axis. Whatever factorisation a method needs is compiled once, and
    done for all of them in one batched call; on CPU for one after the other (`docs/sharp-bits.md`).

    Args:
        operator: Made under `eqx.filter_vmap`: an operator over an array of which every array leaf has a leading axis.
        tags: Lineax tags that you know to hold, beside those that A has (symmetric and definite).

    Raises:
        ValueError: There is no array, their leading axes differ, or A is not real; a method needs a square A.

    Cost: s times that of A.

    Example:
        ```python
        import equinox as eqx, jax.numpy as jnp, curvax as cx

        left, right = jnp.stack([jnp.eye(2), 2 * jnp.eye(2)]), jnp.stack([jnp.eye(3)] * 2)
        layers = cx.operators.Stacked(eqx.filter_vmap(cx.operators.Kronecker)(left, right))
        layers.mv(jnp.ones((2, 2, 3)))  # ones, and twos
        ```
    """

    operator: lx.AbstractLinearOperator
    tags: frozenset[object] = eqx.field(static=True)
    size: int = eqx.field(static=True)
    structures: tuple[Any, Any] = eqx.field(static=True)
    square: bool = eqx.field(static=True)

    def __init__(self, operator: lx.AbstractLinearOperator, tags: object | Iterable[object] = ()) -> None:
        shapes = [leaf.shape for leaf in jax.tree.leaves(operator) if eqx.is_array(leaf)]
        sizes = {shape[:1] for shape in shapes}
        if len(sizes) != 1 or sizes == {()}:
            raise ValueError(
                "Every array of `operator` of `Stacked` must have the same leading axis, that of the stack; found the "
                f"shapes {shapes}. Make it under `eqx.filter_vmap`."
            )
        ((self.size,),) = sizes
        seen: list[Any] = []

        def look(one: lx.AbstractLinearOperator) -> Array:
            check_real(one, "`operator` of `Stacked`")
            seen.extend((one.in_structure(), one.out_structure(), known_tags(one) & _KEPT, is_square(one)))
            return jnp.zeros(())

        # Structures and tags are known of one of them alone.
        eqx.filter_eval_shape(eqx.filter_vmap(look), operator)
        ins, outs, common, self.square = seen
        if not isinstance(ins, jax.ShapeDtypeStruct) or not isinstance(outs, jax.ShapeDtypeStruct):
            raise ValueError(f"`operator` of `Stacked` must act on arrays, found {ins} and {outs}.")
        grown = lambda like: jax.ShapeDtypeStruct((self.size, *like.shape), like.dtype)
        self.structures = grown(ins), grown(outs)
        self.operator, self.tags = operator, as_tags(tags) | (common if self.square else frozenset())

    def mv(self, vector: Float[Array, "s *n"]) -> Float[Array, "s *m"]:
        """Each one times its part of the vector."""
        return eqx.filter_vmap(lambda one, v: one.mv(v))(self.operator, vector)

    def transpose(self) -> "Stacked":
        """diag(A₁ᵀ, ..., A_sᵀ)."""
        return Stacked(
            eqx.filter_vmap(lambda one: one.transpose())(self.operator), lx.transpose_tags(self.tags)
        )

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """That of A, with the leading axis."""
        return self.structures[0]

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """That of A, with the leading axis."""
        return self.structures[1]

    def each(self, change: Callable[[Any], lx.AbstractLinearOperator]) -> "Stacked":
        """The stack of what a function makes of each one.

        Args:
            change: Of one operator, to another one; traced once.
        """
        return Stacked(_of_each(change, self.operator))

    def inverse(self) -> "Stacked":
        """diag(A₁⁻¹, ..., A_s⁻¹)."""
        return self.each(self._of_square("inverse", inverse_part))

    def power(self, exponent: float) -> "Stacked":
        """diag(A₁ᵖ, ..., A_sᵖ), for positive semidefinite ones."""
        return self.each(self._of_square("power", lambda one: tagged(power_of(one, exponent), _POWER)))

    def damped(self, damping: Scalar | float) -> "Stacked":
        """diag(A₁ + damping · I, ..., A_s + damping · I)."""
        check_damping(damping)
        return self.each(self._of_square("damped", lambda one: damped_part(one, damping)))

    def trace(self) -> Scalar:
        """Σ tr Aᵢ."""
        return jnp.sum(self._mapped("trace", trace_part))

    def logdet(self) -> Scalar:
        """Σ log |det Aᵢ|."""
        return jnp.sum(self._mapped("logdet", logdet_part))

    def diagonal(self) -> Float[Array, " n"]:
        """The diagonals, one after the other."""
        return self._mapped("diagonal", diagonal_part).ravel()

    def _mapped(self, method: str, fn: Callable[[lx.AbstractLinearOperator], Array]) -> Array:
        return _of_each(self._of_square(method, fn), self.operator)

    def _of_square(
        self, method: str, fn: Callable[[lx.AbstractLinearOperator], PyTree]
    ) -> Callable[..., Any]:
        if not self.square:
            raise ValueError(
                f"{method}() of `Stacked` needs square operators; these take {self.structures[0]} to "
                f"{self.structures[1]}."
            )
        return fn


def _of_each(fn: Callable[[Any], _T], stacked: lx.AbstractLinearOperator) -> _T:
    """What a function makes of each member of a stack, stacked.

    On CPU in a loop: jaxlib's LAPACK kernels hand the members of a batch to the pool of threads that they run in, and
    wait; as many batches at a time as there are threads wait for ever.
    """
    if jax.default_backend() != "cpu":
        return cast(_T, eqx.filter_vmap(fn)(stacked))
    arrays, static = eqx.partition(stacked, eqx.is_array)
    rest: list[Any] = []

    def one(arrays: PyTree[Array]) -> PyTree[Array]:
        found, others = eqx.partition(fn(eqx.combine(arrays, static)), eqx.is_array)
        rest.append(others)
        return found

    found = jax.lax.map(one, arrays)
    return cast(_T, eqx.combine(found, rest[-1]))
