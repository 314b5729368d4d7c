"""Matrices written out: allowed for small operators, and never without being asked for."""

import math

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from curvax._control import map_in_chunks

# 4096² float64 numbers are 134 MB; products with that many basis vectors are the larger cost.
MAX_DENSE_ELEMENTS = 4096**2
# Basis vectors pushed through the operator at once: each carries its own copy of the activations.
_CHUNK = 64


def structure_of(tree: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a tree of arrays, weak types forgotten."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), jax.eval_shape(lambda: tree)
    )


def structure_dtype(structure: PyTree[jax.ShapeDtypeStruct]) -> jnp.dtype:
    """The dtype that holds every leaf of `structure`; float32 where there is no leaf."""
    with jax.numpy_dtype_promotion("standard"):
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(structure)]
        return jnp.result_type(*dtypes) if dtypes else jnp.dtype(jnp.float32)


def ravel(tree: PyTree[Array], dtype: jnp.dtype) -> Float[Array, " n"]:
    """All leaves of `tree`, in order, as one vector of `dtype`."""
    leaves = [leaf.astype(dtype).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,), dtype)


def unravel(vector: Float[Array, " n"], structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """The inverse of `ravel`: a vector cut into the shapes and dtypes of `structure`."""
    leaves, treedef = jax.tree.flatten(structure)
    pieces, start = [], 0
    for leaf in leaves:
        size = math.prod(leaf.shape)
        pieces.append(vector[start : start + size].reshape(leaf.shape).astype(leaf.dtype))
        start += size
    return jax.tree.unflatten(treedef, pieces)


def check_dense_size(operator: lx.AbstractLinearOperator) -> None:
    """Raise `ValueError` when the matrix of `operator` is over `MAX_DENSE_ELEMENTS`."""
    rows, columns = operator.out_size(), operator.in_size()
    if rows * columns > MAX_DENSE_ELEMENTS:
        raise ValueError(
            f"as_matrix() of a {type(operator).__name__} was asked for a {rows} × {columns} matrix: "
            f"{rows * columns} elements, over the limit of {MAX_DENSE_ELEMENTS}. Nothing densifies "
            "silently here. Use a matrix-free solver (`curvax.linear.CG`, `MINRES`, `Auto`), or products "
            "`operator.mv(v)`; if the matrix is really wanted, build it with "
            "`jax.lax.map(operator.mv, basis_vectors)`."
        )


def dense_matrix(operator: lx.AbstractLinearOperator) -> Float[Array, "rows columns"]:
    """The matrix of `operator`, over raveled leaves, in their common dtype.

    Costs min(rows, columns) products, pushed through in chunks so that memory stays at a fixed
    multiple of one product. Raises `ValueError` above `MAX_DENSE_ELEMENTS`.
    """
    check_dense_size(operator)
    if operator.out_size() < operator.in_size():
        return matrix_by_columns(operator.transpose()).T
    return matrix_by_columns(operator)


def matrix_by_columns(operator: lx.AbstractLinearOperator) -> Float[Array, "rows columns"]:
    """The same for any size and without the transpose: by one product for each column."""
    rows, columns = operator.out_size(), operator.in_size()
    dtype = structure_dtype((operator.in_structure(), operator.out_structure()))
    if min(rows, columns) == 0:
        return jnp.zeros((rows, columns), dtype)
    applied = lx.linearise(operator)
    structure = applied.in_structure()

    def product(index: Array) -> Float[Array, " rows"]:
        basis = jnp.zeros((columns,), dtype).at[index].set(1)
        return ravel(applied.mv(unravel(basis, structure)), dtype)

    lines = map_in_chunks(product, jnp.arange(columns), _CHUNK)
    # XLA's CPU compiler (JAX 0.10) fails where an FFT feeds a factorisation directly.
    return jax.lax.optimization_barrier(lines.T)


def matrix_free_diagonal(operator: lx.AbstractLinearOperator) -> Float[Array, " n"]:
    """The diagonal of a square operator in n products, without its matrix."""
    dtype = structure_dtype(operator.in_structure())
    size = operator.in_size()
    applied = lx.linearise(operator)

    def entry(index: Array) -> Array:
        basis = jnp.zeros((size,), dtype).at[index].set(1)
        return ravel(applied.mv(unravel(basis, applied.in_structure())), dtype)[index]

    return map_in_chunks(entry, jnp.arange(size), _CHUNK)
