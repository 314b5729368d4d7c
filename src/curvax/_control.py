"""Control flow that stays lazy under `vmap`."""

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
from jaxtyping import Array, Bool

_T = TypeVar("_T")


def run_if(needed: Bool[Array, ""], compute: Callable[[_T], _T], otherwise: _T) -> _T:
    """`compute(otherwise)` if `needed`, else `otherwise`, at no cost.

    A loop of at most one turn instead of `lax.cond`: under `vmap` a `cond` becomes a select that
    always computes both sides, a loop runs only while some example needs it.
    """
    return jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), compute(c[1])), (needed, otherwise)
    )[1]


class Packed(eqx.Module, Generic[_T]):
    """A tree of scalars and tiny arrays, held in one array for each dtype."""

    arrays: tuple[Array, ...]
    structure: Any = eqx.field(static=True)
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = eqx.field(static=True)  # of the parts of every array
    order: tuple[int, ...] = eqx.field(static=True)  # leaf ↦ its place among all parts

    @property
    def tree(self) -> _T:
        """What was packed."""
        # Primitives, since indexing is slow to trace and this is done a lot.
        parts: list[Array] = []
        for array, shapes in zip(self.arrays, self.shapes, strict=True):
            pieces = jax.lax.split(array, [math.prod(shape) for shape in shapes])
            parts += [jax.lax.reshape(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]
        return cast(_T, jax.tree.unflatten(self.structure, [parts[place] for place in self.order]))


def pack(tree: _T) -> Packed[_T]:
    """One array for each dtype."""
    leaves, structure = jax.tree.flatten(tree)
    leaves = [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        groups.setdefault(leaf.dtype, []).append(i)
    arrays = tuple(
        jax.lax.concatenate([jax.lax.reshape(leaves[i], (leaves[i].size,)) for i in group], 0)
        for group in groups.values()
    )
    places = {i: place for place, i in enumerate(i for group in groups.values() for i in group)}
    shapes = tuple(tuple(leaves[i].shape for i in group) for group in groups.values())
    return Packed(arrays, structure, shapes, tuple(places[i] for i in range(len(leaves))))


def in_one_kernel(fn: Callable[..., _T]) -> Callable[..., Packed[_T]]:
    """A function of scalars and tiny arrays, compiled as a whole on CPU; what is `Packed` is unpacked for it.

    There XLA makes a kernel of every scalar that has two uses, each to be compiled and to be called: half of both
    times for a loop over small vectors. A loop over fewer than 1024 bytes becomes one kernel, so that is what `fn` is
    put in: one of a single turn, which XLA cannot see. Not to be differentiated in reverse.
    """

    def unpacked(*args: Packed) -> Packed[_T]:
        return pack(fn(*(arg.tree for arg in args)))

    def call(*args: Any) -> Packed[_T]:
        # Whatever a loop carries is copied, one thing at a time.
        args = tuple(arg if isinstance(arg, Packed) else pack(arg) for arg in args)
        if jax.default_backend() != "cpu":
            return unpacked(*args)
        closed, like = jax.make_jaxpr(unpacked, return_shape=True)(*args)
        run = jax.extend.core.jaxpr_as_fun(closed)
        nothing = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(like)]
        once = jax.lax.optimization_barrier(jnp.asarray(True))
        leaves = jax.lax.while_loop(
            lambda carry: carry[0],
            lambda carry: (jnp.zeros_like(carry[0]), run(*jax.tree.leaves(args))),
            (once, nothing),
        )[1]
        return cast(Packed[_T], jax.tree.unflatten(jax.tree.structure(like), leaves))

    return call
