"""Control flow that stays lazy under `vmap`."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar, cast

import equinox as eqx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

_T = TypeVar("_T")
_S = TypeVar("_S")


def run_if(needed: Bool[Array, ""], compute: Callable[[_T], _T], otherwise: _T) -> _T:
    """`compute(otherwise)` if `needed`, else `otherwise`, at no cost.

    A loop of at most one turn instead of `lax.cond`: under `vmap` a `cond` becomes a select that
    always computes both sides, a loop runs only while some example needs it.
    """
    return jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), compute(c[1])), (needed, otherwise)
    )[1]


def map_in_chunks(fn: Callable[[_T], _S], xs: _T, size: int) -> _S:
    """`vmap(fn)(xs)` over the leading axis, at most `size` rows at a time, in order.

    Not `jax.lax.map(batch_size=...)`: that traces and compiles `fn` a second time for the rows that are left over, and
    runs the two loops side by side, which XLA on CPU does not always survive (it has been seen to wait for ever).
    Here rows are repeated to fill the last chunk, fewer than there are chunks.
    """
    count = len(jax.tree.leaves(xs)[0])
    chunks = -(-count // size)
    if chunks <= 1:
        return jax.vmap(fn)(xs)
    size = -(-count // chunks)
    rows = jnp.minimum(jnp.arange(chunks * size), count - 1).reshape(chunks, size)
    ys = jax.lax.map(lambda chunk: jax.vmap(fn)(jax.tree.map(lambda x: x[chunk], xs)), rows)
    return jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], ys)


class _Place(NamedTuple):
    """Where a leaf is kept: which part of which array."""

    array: int
    part: int


class Packed(eqx.Module, Generic[_T]):
    """A tree of scalars and tiny arrays, held in one array for each dtype; Python numbers in it are constants."""

    arrays: tuple[Array, ...]
    structure: Any = eqx.field(static=True)
    places: tuple[_Place | bool | int | float, ...] = eqx.field(static=True)  # of the leaves
    shapes: tuple[tuple[tuple[int, ...], ...], ...] = eqx.field(static=True)  # of the parts of every array

    # Primitives in what follows, since indexing is slow to trace and this is done a lot.

    @property
    def tree(self) -> _T:
        """What was packed."""
        split = [
            jax.lax.split(array, [math.prod(shape) for shape in shapes])
            for array, shapes in zip(self.arrays, self.shapes, strict=True)
        ]
        leaves = [
            jax.lax.reshape(split[place.array][place.part], self.shapes[place.array][place.part])
            if isinstance(place, _Place)
            else place
            for place in self.places
        ]
        return cast(_T, jax.tree.unflatten(self.structure, leaves))

    def pick(self, select: Callable[[_T], _S]) -> _S:
        """The part of it that `select` takes out; what else there is costs nothing."""

        def leaf(index: int) -> Any:
            place = self.places[index]
            if not isinstance(place, _Place):
                return place
            shapes = self.shapes[place.array]
            start = sum(math.prod(shape) for shape in shapes[: place.part])
            end = start + math.prod(shapes[place.part])
            taken = jax.lax.slice(self.arrays[place.array], (start,), (end,))
            return jax.lax.reshape(taken, shapes[place.part])

        chosen = select(jax.tree.unflatten(self.structure, range(len(self.places))))
        return cast(_S, jax.tree.map(leaf, chosen))


def pack(tree: _T) -> Packed[_T]:
    """One array for each dtype."""
    leaves, structure = jax.tree.flatten(tree)
    groups: dict[Any, list[Array]] = {}
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, bool | int | float):
            found.append(leaf)
            continue
        array = leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)
        parts = groups.setdefault(array.dtype, [])
        found.append(_Place(list(groups).index(array.dtype), len(parts)))
        parts.append(array)
    arrays = tuple(
        jax.lax.concatenate([jax.lax.reshape(part, (part.size,)) for part in parts], 0)
        for parts in groups.values()
    )
    shapes = tuple(tuple(part.shape for part in parts) for parts in groups.values())
    return Packed(arrays, structure, tuple(found), shapes)


def in_one_kernel(fn: Callable[..., _T]) -> Callable[..., Packed[_T]]:
    """`one_kernel` with one result for each dtype, and what is `Packed` among the arguments unpacked."""

    def unpacked(*args: Any) -> Packed[_T]:
        return pack(fn(*(arg.tree if isinstance(arg, Packed) else arg for arg in args)))

    return one_kernel(unpacked)


def one_kernel(fn: Callable[..., _T]) -> Callable[..., _T]:
    """A function of scalars and tiny arrays, compiled as a whole on CPU. Its results are arrays of their own.

    There XLA makes a kernel of every scalar that has two uses, each to be compiled and to be called: half of both
    times for a loop over small vectors. A loop that moves fewer than 1024 bytes in a turn becomes one kernel, so that
    is what `fn` is put in: one of a single turn, which XLA cannot see. Not to be differentiated in reverse.

    What is decorated once is traced once for arguments of a kind: keep the result where `fn` is no closure.
    """
    programs: dict[Any, Callable[..., _T]] = {}

    def call(*args: Any) -> _T:
        if jax.default_backend() != "cpu":
            return fn(*args)
        arrays, static = eqx.partition(args, eqx.is_array)
        leaves, structure = jax.tree.flatten(static)
        key = (structure, tuple(leaves), jax.tree.structure(arrays))
        if key not in programs:
            programs[key] = jax.jit(ft.partial(_in_a_loop, lambda given: fn(*eqx.combine(given, static))))
        return programs[key](arrays)

    return call


def _in_a_loop(fn: Callable[[_S], _T], args: _S) -> _T:
    """`fn(args)` in a loop of one turn, which XLA cannot see."""
    closed, like = jax.make_jaxpr(fn, return_shape=True)(args)
    run = jax.extend.core.jaxpr_as_fun(closed)
    given, results = jax.tree.leaves(args), jax.tree.leaves(like)
    # Results are written over arguments of their kind, which saves copies. What is left over starts at something that
    # is no pattern: XLA makes a kernel for zeros.
    free = list(range(len(given)))
    places: list[int | None] = []
    for result in results:
        place = next((i for i in free if _kind(given[i]) == _kind(result)), None)
        places.append(place)
        if place is not None:
            free.remove(place)
    start: list[Any] = [
        (np.arange(result.size) ** 2 % 97 + 3).astype(result.dtype).reshape(result.shape)
        if place is None
        else given[place]
        for place, result in zip(places, results, strict=True)
    ]
    once = jax.lax.optimization_barrier(jnp.asarray(True))

    def body(carry: tuple[Array, list[Any]]) -> tuple[Array, list[Any]]:
        now = dict(zip(places, carry[1], strict=True))
        return jnp.zeros_like(carry[0]), run(*(now.get(i, leaf) for i, leaf in enumerate(given)))

    leaves = jax.lax.while_loop(lambda carry: carry[0], body, (once, start))[1]
    return cast(_T, jax.tree.unflatten(jax.tree.structure(like), leaves))


def _kind(array: Any) -> tuple[Any, ...]:
    return array.shape, array.dtype
