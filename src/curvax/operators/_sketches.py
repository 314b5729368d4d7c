"""Random tall matrices S with E[S Sᵀ] = I, which compress vectors of any structure to k numbers."""

import abc
import math
import operator as op
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from curvax._pytree import tree_dtype, tree_size
from curvax.operators._base import as_arrays
from curvax.operators._dense import check_dense_size, ravel, structure_of, unravel
from curvax.operators._dispatch import register
from curvax.operators._parts import EXACT

# A Hadamard transform of 2ᵖ numbers takes p/5 products with small matrices instead of p passes of additions.
_RADIX = 5


class AbstractSketch(lx.AbstractLinearOperator):
    """S of n rows and k columns as an operator: `mv` takes k numbers to a vector, `adjoint` a vector to k numbers.

    Subclasses give the two over raveled vectors, `expand` and `compress`.
    """

    space: eqx.AbstractVar[Any]

    @abc.abstractmethod
    def expand(self, weights: Float[Array, " k"]) -> Float[Array, " n"]:
        """S w."""

    @abc.abstractmethod
    def compress(self, vector: Float[Array, " n"]) -> Float[Array, " k"]:
        """Sᵀ v."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of columns, k."""

    def mv(self, vector: Float[Array, " k"]) -> PyTree[Array]:
        """S w, a vector of the full space."""
        return unravel(self.expand(vector), self.out_structure())

    def adjoint(self, vector: PyTree[Array]) -> Float[Array, " k"]:
        """Sᵀ v, k numbers."""
        return self.compress(ravel(vector, self.in_structure().dtype))

    def as_matrix(self) -> Float[Array, "n k"]:
        """The matrix over raveled leaves, in k products. Raises `ValueError` above a size limit."""
        check_dense_size(self)
        return jax.vmap(self.expand, out_axes=1)(jnp.eye(self.size, dtype=self.in_structure().dtype))

    def transpose(self) -> lx.AbstractLinearOperator:
        """Sᵀ as an operator, from vectors to k numbers."""
        return _Transpose(self)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """A vector of k."""
        return jax.ShapeDtypeStruct((self.size,), tree_dtype(self.out_structure()))

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors of the full space."""
        leaves, treedef = self.space
        return jax.tree.unflatten(treedef, leaves)


class _Transpose(lx.AbstractLinearOperator):
    """Sᵀ."""

    sketch: AbstractSketch
    tags: frozenset[object] = eqx.field(static=True, default=frozenset())

    def mv(self, vector: PyTree[Array]) -> Float[Array, " k"]:
        return self.sketch.adjoint(vector)

    def as_matrix(self) -> Float[Array, "k n"]:
        return self.sketch.as_matrix().T

    def transpose(self) -> AbstractSketch:
        return self.sketch

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.sketch.out_structure()

    def out_structure(self) -> jax.ShapeDtypeStruct:
        return self.sketch.in_structure()


class GaussianSketch(AbstractSketch):
    """S with independent normal entries of variance 1/k, so that E[S Sᵀ] = I.

    The best guarantees and the only kind whose columns are in general position for certain. S is held: its numbers
    would cost more to draw again in every product than the product.

    Args:
        like: What S acts on: an operator (its input), or a pytree of real floating-point arrays or
            `jax.ShapeDtypeStruct`s of n elements in all.
        size: k, the number of columns, from 1 to n.
        key: A JAX random key.

    Raises:
        ValueError: `like` has no element or one that is not real; `size` out of range.

    Cost: a product with S or Sᵀ 2nk operations; memory nk.

    Example:
        ```python
        sketch = cx.operators.GaussianSketch(jnp.zeros(100), 10, key=jax.random.key(0))
        sketch.transpose().mv(jnp.ones(100))  # ten numbers whose squares add up to about 100
        ```

    Source: N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", 2011 (arXiv:0909.4061).
    """

    rows: Float[Array, "k n"]
    space: Any = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, like: Any, size: int, *, key: PRNGKeyArray) -> None:
        self.space, n, size = _check("GaussianSketch", like, size)
        dtype = tree_dtype(self.space[0])
        self.rows = jax.random.normal(key, (size, n), dtype) / jnp.asarray(math.sqrt(size), dtype)
        self.tags = frozenset()

    @property
    def size(self) -> int:
        """The number of columns, k."""
        return self.rows.shape[0]

    def expand(self, weights: Float[Array, " k"]) -> Float[Array, " n"]:
        """S w."""
        return jnp.matmul(weights, self.rows, precision=EXACT)

    def compress(self, vector: Float[Array, " n"]) -> Float[Array, " k"]:
        """Sᵀ v."""
        return jnp.matmul(self.rows, vector, precision=EXACT)


class SparseSketch(AbstractSketch):
    """S with `nonzeros` entries ±1/√nonzeros in every row, so that E[S Sᵀ] = I (its diagonal is 1 in every draw).

    The columns are cut into `nonzeros` runs of nearly equal lengths, and a row has one entry in each, at a random
    place and of random sign. One nonzero a row is the count sketch: cheapest, and it needs the most columns (of the
    order of r² for a subspace of dimension r, against r log r with about log r nonzeros). S is never formed.

    Args:
        like: What S acts on: an operator (its input), or a pytree of real floating-point arrays or
            `jax.ShapeDtypeStruct`s of n elements in all.
        size: k, the number of columns, from 1 to n.
        key: A JAX random key.
        nonzeros: How many a row, from 1 to `size`; by default 8, or `size` if that is smaller.

    Raises:
        ValueError: `like` has no element or one that is not real; `size` or `nonzeros` out of range.

    Cost: a product with S or Sᵀ 2n · nonzeros operations, gathered or scattered; memory 5n · nonzeros bytes.

    Example:
        ```python
        sketch = cx.operators.SparseSketch(jnp.zeros(1000), 50, key=jax.random.key(0), nonzeros=4)
        sketch.transpose().mv(jnp.ones(1000))
        ```

    Source: D. Kane and J. Nelson, "Sparser Johnson-Lindenstrauss transforms", 2014 (arXiv:1012.1577), the block
        construction; K. Clarkson and D. Woodruff, "Low rank approximation and regression in input sparsity time",
        2013 (arXiv:1207.6365), for one nonzero.
    """

    places: Int[Array, "s n"]
    signs: Int[Array, "s n"]
    columns: int = eqx.field(static=True)
    space: Any = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, like: Any, size: int, *, key: PRNGKeyArray, nonzeros: int | None = None) -> None:
        self.space, n, size = _check("SparseSketch", like, size)
        count = min(8, size) if nonzeros is None else check_count("nonzeros", "SparseSketch", nonzeros, size)
        edges = (np.arange(count + 1) * size // count).astype(np.int32)[:, None]
        place_key, sign_key = jax.random.split(key)
        self.places = jax.random.randint(place_key, (count, n), edges[:-1], edges[1:], jnp.int32)
        self.signs = jax.random.rademacher(sign_key, (count, n), jnp.int8)
        self.columns, self.tags = size, frozenset()

    @property
    def size(self) -> int:
        """The number of columns, k."""
        return self.columns

    def expand(self, weights: Float[Array, " k"]) -> Float[Array, " n"]:
        """S w."""
        # Row by row XLA fuses gather, sign and sum: 20 times as fast on CPU as all of them at once and then the sum.
        picked = [weights.at[places].get(mode="promise_in_bounds") for places in self.places]
        total = sum(signs.astype(weights.dtype) * w for signs, w in zip(self.signs, picked, strict=True))
        return total / jnp.asarray(math.sqrt(len(self.signs)), weights.dtype)

    def compress(self, vector: Float[Array, " n"]) -> Float[Array, " k"]:
        """Sᵀ v."""
        return jnp.zeros(self.size, vector.dtype).at[self.places].add(self._entries(vector.dtype) * vector)

    def _entries(self, dtype: Any) -> Float[Array, "s n"]:
        return self.signs.astype(dtype) / jnp.asarray(math.sqrt(len(self.signs)), dtype)


class HadamardSketch(AbstractSketch):
    """S = √(N/k) · D H P: k columns P of the Hadamard matrix H of N = 2ᵖ ≥ n, its rows cut to n, with random signs D.

    The subsampled randomised Hadamard transform. H is orthonormal, and P draws k of N columns without replacement:
    E[S Sᵀ] = I, and every row of S has norm 1. It is applied by the fast Walsh–Hadamard transform of the vector padded
    by zeros; S is never formed.

    Args:
        like: What S acts on: an operator (its input), or a pytree of real floating-point arrays or
            `jax.ShapeDtypeStruct`s of n elements in all.
        size: k, the number of columns, from 1 to n.
        key: A JAX random key.

    Raises:
        ValueError: `like` has no element or one that is not real; `size` out of range.

    Cost: a product with S or Sᵀ N log₂ N additions (done as p/5 products with matrices of 32 rows); memory n bytes, and
        2N numbers while it works.

    Example:
        ```python
        sketch = cx.operators.HadamardSketch(jnp.zeros(1000), 50, key=jax.random.key(0))
        sketch.transpose().mv(jnp.ones(1000))
        ```

    Source: J. A. Tropp, "Improved analysis of the subsampled randomized Hadamard transform", 2011 (arXiv:1011.1595).
    """

    signs: Int[Array, " n"]
    chosen: Int[Array, " k"]
    space: Any = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, like: Any, size: int, *, key: PRNGKeyArray) -> None:
        self.space, n, size = _check("HadamardSketch", like, size)
        sign_key, place_key = jax.random.split(key)
        self.signs = jax.random.rademacher(sign_key, (n,), jnp.int8)
        self.chosen = jax.random.choice(place_key, _padded(n), (size,), replace=False).astype(jnp.int32)
        self.tags = frozenset()

    @property
    def size(self) -> int:
        """The number of columns, k."""
        return len(self.chosen)

    def expand(self, weights: Float[Array, " k"]) -> Float[Array, " n"]:
        """S w."""
        n = len(self.signs)
        spread = (
            jnp.zeros(_padded(n), weights.dtype).at[self.chosen].set(self._scale(weights.dtype) * weights)
        )
        return self.signs.astype(weights.dtype) * hadamard_transform(spread)[:n]

    def compress(self, vector: Float[Array, " n"]) -> Float[Array, " k"]:
        """Sᵀ v."""
        n = len(self.signs)
        signed = jnp.pad(self.signs.astype(vector.dtype) * vector, (0, _padded(n) - n))
        return self._scale(vector.dtype) * hadamard_transform(signed)[self.chosen]

    def _scale(self, dtype: Any) -> Array:
        return jnp.asarray(math.sqrt(_padded(len(self.signs)) / self.size), dtype)


def hadamard_transform(vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """The orthonormal Walsh–Hadamard transform in Sylvester's order, of a vector whose length is a power of two.

    H of 2ᵖ is a Kronecker product of smaller ones, each a product along one axis of the vector folded up.
    """
    exponent = vector.size.bit_length() - 1
    parts = [_RADIX] * (exponent // _RADIX) + ([exponent % _RADIX] if exponent % _RADIX else [])
    folded = vector.reshape([2**part for part in parts])
    for part in parts:
        # The first axis is transformed and becomes the last: after one round they are in order again.
        small = jnp.asarray(_hadamard(part) / math.sqrt(2**part), vector.dtype)
        folded = jnp.tensordot(folded, small, axes=(0, 0), precision=EXACT)
    return folded.reshape(-1)


def _hadamard(exponent: int) -> np.ndarray:
    """The entries ±1 of 2ᵖ rows, by Sylvester's doubling."""
    matrix = np.ones((1, 1))
    for _ in range(exponent):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _padded(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << (size - 1).bit_length()


def space_of(name: str, like: Any) -> PyTree[jax.ShapeDtypeStruct]:
    """The structure of the vectors meant by an operator or by a pytree like them.

    Raises:
        ValueError: There is no element, or one is not real floating-point.
    """
    structure = (
        like.in_structure() if isinstance(like, lx.AbstractLinearOperator) else structure_of(as_arrays(like))
    )
    found = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(structure)})
    real = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(structure))
    if tree_size(structure) == 0 or not real:
        raise ValueError(
            f"`like` of `{name}` must be an operator, or a pytree of real floating-point arrays with at least one "
            f"element, found {tree_size(structure)} elements of dtypes {found}. Split a model with "
            "`eqx.filter(model, eqx.is_inexact_array)`."
        )
    return structure


def _check(name: str, like: Any, size: Any) -> tuple[Any, int, int]:
    """The space as something hashable, its dimension, and k."""
    leaves, treedef = jax.tree.flatten(space_of(name, like))
    n = tree_size(leaves)
    return (tuple(leaves), treedef), n, check_count("size", name, size, n)


def check_count(argument: str, name: str, value: Any, most: int | None = None) -> int:
    """A static number of at least 1, and at most `most`."""
    try:
        count = op.index(value)
    except TypeError:
        count = 0
    if count < 1 or (most is not None and count > most):
        wanted = "of at least 1" if most is None else f"from 1 to {most}"
        raise ValueError(f"`{argument}` of `{name}` must be an integer {wanted}, found {value}.")
    return count


register(AbstractSketch)
register(_Transpose)
