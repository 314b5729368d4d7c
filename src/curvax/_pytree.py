"""Arithmetic on pytrees of arrays. `None` leaves are empty subtrees, as everywhere in JAX."""

import functools as ft
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from curvax._control import one_kernel

HALF = (jnp.bfloat16, jnp.float16)


def tree_add(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`x + y`, leaf by leaf."""
    return jax.tree.map(jnp.add, x, y)


def tree_sub(x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`x - y`, leaf by leaf."""
    return jax.tree.map(jnp.subtract, x, y)


def tree_scale(scale: Scalar | float, x: PyTree[Array]) -> PyTree[Array]:
    """`scale * x`, in the dtype of each leaf."""
    return jax.tree.map(lambda leaf: jnp.asarray(scale, leaf.dtype) * leaf, x)


def tree_unscale(scale: Scalar | float, x: PyTree[Array]) -> PyTree[Array]:
    """`x / scale`, in the dtype of each leaf."""
    return jax.tree.map(lambda leaf: leaf / jnp.asarray(scale, leaf.dtype), x)


def tree_axpy(scale: Scalar | float, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`scale * x + y`, in the dtype of each leaf."""
    return jax.tree.map(lambda a, b: jnp.asarray(scale, a.dtype) * a + b, x, y)


def tree_neg(x: PyTree[Array]) -> PyTree[Array]:
    """`-x`, leaf by leaf."""
    return jax.tree.map(jnp.negative, x)


def tree_zeros_like(x: PyTree) -> PyTree[Array]:
    """Zeros of the shapes and dtypes of `x` (arrays or `ShapeDtypeStruct`s)."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)


def tree_where(pred: Bool[Array, ""] | bool, x: PyTree[Array], y: PyTree[Array]) -> PyTree[Array]:
    """`x` if `pred` else `y`, leaf by leaf; nothing is traced where `pred` is a Python boolean."""
    if isinstance(pred, bool):
        return x if pred else y
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), x, y)


def tree_dtype(x: PyTree) -> Any:
    """The dtype in which scalars about `x` are kept: at least float32, and float32 for no leaves."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(x)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def tree_dot(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    """`sum(x * y)` over all leaves, accumulated in `tree_dtype(x)` at the highest precision."""
    dtype = tree_dtype(x)
    terms = jax.tree.map(
        lambda a, b: jnp.vdot(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST), x, y
    )
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), dtype))


def tree_norm(x: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(tree_dot(x, x))


def tree_unit(x: PyTree[Array]) -> Float[Array, ""]:
    """A power of two that brings Σ|xᵢ| near one, so that squares neither vanish nor overflow.

    1 where all entries are zero or one is no number. Entries above 2⁻³² of the largest number that there is, infinities
    included, count as 2⁻³² of it.
    """
    dtype = tree_dtype(x)
    # The sum of all entries, not the largest: one kernel instead of three. Bounded, so that it does not overflow.
    bound = 2.0 ** (int(jnp.finfo(dtype).maxexp) - 32)
    sizes = lambda leaf: [jnp.minimum(jnp.abs(leaf), bound)]  # noqa: E731
    leaves = [leaf.astype(dtype).ravel() for leaf in jax.tree.leaves(x) if leaf.size]
    if not leaves:
        return jnp.ones((), dtype)
    # Within the range of every leaf.
    widest = 2.0 ** min(int(jnp.finfo(leaf.dtype).maxexp) - 3 for leaf in jax.tree.leaves(x))
    return _UNIT(widest, [term for leaf in leaves for term in _sums([leaf], sizes, 1)[0]])


def _unit(widest: float, sizes: list[Scalar]) -> Scalar:
    """1/Σ of these, rounded to a power of two between 1/`widest` and `widest`."""
    size = ft.reduce(jnp.add, sizes)
    kind, digits = {4: (jnp.uint32, 23), 8: (jnp.uint64, 52)}[size.dtype.itemsize]
    most = kind(2 * jnp.finfo(size.dtype).maxexp - 2)  # twice the bias of the exponent
    exponent = jax.lax.bitcast_convert_type(size, kind) >> kind(digits)
    opposite = jnp.clip(most - jnp.minimum(exponent, most - kind(1)), kind(1), most) << kind(digits)
    unit = jnp.clip(jax.lax.bitcast_convert_type(opposite, size.dtype), 1 / widest, widest)
    return jnp.where(size > 0, unit, 1)


_UNIT = one_kernel(_unit)


# Up to this size a stacked product is nearly as fast as one reduction, and compiles to no kernel but that of the stack.
_STACKED_SIZE = 1024
# Above these sizes a running sum would lose digits, and the compiler's own reductions are as fast.
_RUNNING_SUM_SIZE = {4: 8192, 8: 65536}


def tree_gram(
    *vectors: PyTree[Array], wanted: Collection[tuple[int, int]] | None = None, dtype: Any = None
) -> Float[Array, "n n"]:
    """Gram matrix of the vectors over all leaves; of large ones only the entries that are `wanted`, zeros elsewhere.

    One stacked product, or one reduction of many operands, instead of a reduction for every pair: on CPU each of those
    is two or three kernels to compile, which would be most of the compile time of an iterative solver. The matrix as a
    whole is for `in_one_kernel`: every entry taken out of it before is a kernel too.
    """
    dtype = tree_dtype(vectors) if dtype is None else dtype
    count = len(vectors)
    pairs = [(i, j) for i in range(count) for j in range(i, count) if wanted is None or (i, j) in wanted]

    def leaf(*arrays: Array) -> Float[Array, "n n"]:
        flat = [a.astype(dtype).ravel() for a in arrays]
        if arrays[0].size <= _STACKED_SIZE:
            stacked = jnp.stack(flat)
            return jnp.matmul(stacked, stacked.T, precision=jax.lax.Precision.HIGHEST)
        totals = [ft.reduce(jnp.add, terms) for terms in _inner_products(flat, pairs)]
        known = dict(zip(pairs, totals, strict=True))
        nothing = jnp.zeros((), dtype)
        entries = [known.get((min(i, j), max(i, j)), nothing) for i in range(count) for j in range(count)]
        return jnp.stack(entries).reshape(count, count)

    found = jax.tree.leaves(jax.tree.map(leaf, *vectors))
    return ft.reduce(jnp.add, found) if found else jnp.zeros((count, count), dtype)


def tree_products(
    vectors: Sequence[PyTree[Array]], pairs: Sequence[tuple[int, int]]
) -> list[tuple[Float[Array, ""], ...]]:
    """The inner products of these pairs of vectors, each as terms that are still to be added, in one kernel."""
    dtype = tree_dtype(vectors)
    terms = []
    for arrays in zip(*(jax.tree.leaves(vector) for vector in vectors), strict=True):
        if arrays[0].size:
            terms.append(_inner_products([a.astype(dtype).ravel() for a in arrays], pairs))
    if not terms:
        return [(jnp.zeros((), dtype),) for _ in pairs]
    return [tuple(itertools.chain(*parts)) for parts in zip(*terms, strict=True)]


def _inner_products(vectors: Sequence[Array], pairs: Sequence[tuple[int, int]]) -> list[list[Array]]:
    """The inner products of these pairs of vectors, (n,) each, as terms that are still to be added."""
    return _sums(vectors, lambda *parts: [parts[i] * parts[j] for i, j in pairs], len(pairs))


def _sums(vectors: Sequence[Array], products: Callable[..., list[Array]], count: int) -> list[list[Array]]:
    """The sums of the `count` arrays that `products` makes of the vectors, (n,) each, as terms still to be added.

    On CPU in one kernel, where two or three for each sum are the rule: fewer to compile and to call.
    """
    size, dtype = vectors[0].size, vectors[0].dtype
    if size > _RUNNING_SUM_SIZE.get(jnp.dtype(dtype).itemsize, 0) or jax.default_backend() != "cpu":
        return [[jnp.sum(product)] for product in products(*vectors)]
    # A running sum waits for its last addition: some of them side by side do not.
    parts = min(4 if count < 4 else 2, size)
    length = size // parts
    terms = [
        product
        for k in range(parts)
        for product in products(*(jax.lax.slice(v, (k * length,), ((k + 1) * length,)) for v in vectors))
    ]
    add = lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True))  # noqa: E731
    sums = jax.lax.reduce(tuple(terms), (np.zeros((), dtype),) * len(terms), add, (0,))
    totals = [list(sums[number::count]) for number in range(count)]
    if size % parts:
        rest = [jax.lax.slice(v, (parts * length,), (size,)) for v in vectors]
        for total, product in zip(totals, products(*rest), strict=True):
            total.append(jnp.sum(product))
    return totals


def tree_size(x: PyTree) -> int:
    """Number of elements over all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(x))


def tree_all_finite(x: PyTree[Array]) -> Bool[Array, ""]:
    """Whether no leaf holds a NaN or an infinity."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(x)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def tree_generic_like(x: PyTree, *, another: bool = False) -> PyTree[Array]:
    """A fixed vector in general position, entries in (-0.5, 0.5), of the shapes and dtypes of `x`; or `another` one.

    Multiplicative hashing of the index (Knuth): where any generic vector will do, this compiles in a fraction of
    the time of a random generator. The other one is mixed further, so that the two have nothing in common.
    """

    def leaf(array: Array, offset: int) -> Array:
        index = jax.lax.iota(jnp.uint32, array.size) + jnp.uint32(offset + 1)
        bits = index * jnp.uint32(2654435769)
        if another:
            bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822507)
            bits = (bits ^ (bits >> 13)) * jnp.uint32(3266489909)
        return ((bits >> 8).astype(array.dtype) / 2**24 - 0.5).reshape(array.shape)

    leaves, structure = jax.tree.flatten(x)
    offsets = [sum(other.size for other in leaves[:i]) % 2**31 for i in range(len(leaves))]
    return jax.tree.unflatten(structure, [leaf(a, offset) for a, offset in zip(leaves, offsets, strict=True)])


def tree_cast_like(x: PyTree[Array], like: PyTree) -> PyTree[Array]:
    """`x` in the dtypes of `like`."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), x, like)


def promote_half(x: PyTree[Array]) -> PyTree[Array]:
    """bfloat16 and float16 leaves as float32, all others untouched: a master copy."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype in HALF else leaf, x)


def stop_gradient(x: PyTree) -> PyTree:
    """`lax.stop_gradient` on the inexact arrays of any pytree (functions and integers pass)."""
    dynamic, static = eqx.partition(x, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(dynamic), static)


def strong(x: PyTree) -> PyTree:
    """Arrays without weak types: `jnp.full(shape, 1.0)` and its strongly typed sum with something are two programs."""
    return jax.tree.map(
        lambda leaf: leaf.astype(leaf.dtype) if getattr(leaf, "weak_type", False) else leaf, x
    )
