"""What the monitors read spectra from: operators on flat vectors, and Arnoldi's projection of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_dtype, tree_size
from curvax.operators._dense import ravel, unravel
from curvax.operators._lanczos import MatVec, Vector


class Flat(NamedTuple):
    """A pytree seen as one vector in the dtype of `tree_dtype`."""

    pack: Callable[[PyTree], Vector]
    unpack: Callable[[Vector], PyTree]
    size: int
    dtype: jnp.dtype


def flatten_like(like: PyTree) -> Flat:
    """How to go between pytrees like `like` (arrays or `ShapeDtypeStruct`s, any mix of dtypes) and vectors."""
    dtype = jnp.dtype(tree_dtype(like))
    return Flat(lambda tree: ravel(tree, dtype), lambda vector: unravel(vector, like), tree_size(like), dtype)


def flat_operator(operator: lx.AbstractLinearOperator, name: str) -> tuple[MatVec, Flat]:
    """The matrix–vector product of a square Lineax operator on flat vectors.

    Raises:
        TypeError: if `operator` is no Lineax operator.
        ValueError: if it is not square or has no elements.
    """
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise TypeError(
            f"`{name}` must be a Lineax operator, found {type(operator).__name__}. Wrap a linear "
            "function in `lx.FunctionLinearOperator`, a matrix in `lx.MatrixLinearOperator`."
        )
    if operator.in_size() != operator.out_size():
        raise ValueError(
            f"`{name}` must be square, found {operator.out_size()} rows and {operator.in_size()} columns."
        )
    flat, out = flatten_like(operator.in_structure()), flatten_like(operator.out_structure())
    if flat.size == 0:
        raise ValueError(f"`{name}` has no elements.")
    return lambda v: out.pack(operator.mv(flat.unpack(v))), flat


def coarsest_eps(like: PyTree) -> float:
    """Unit roundoff of the leaf of lowest precision: products with an operator are no better than that."""
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(like))


def symmetry_tolerance(eps: float) -> float:
    """Relative asymmetry up to which products pass for those of a symmetric matrix; GPUs round float32 coarsely."""
    return min(4 * eps**0.5, 0.1)


class Hessenberg(NamedTuple):
    """Arnoldi's Hessenberg matrix of an operator on an orthonormal basis."""

    matrix: Float[Array, "m m"]
    next_norm: Float[Array, ""]


def arnoldi(matvec: MatVec, start: Vector, num_steps: int) -> Hessenberg:
    """The projection of an operator on the Krylov space of `start`, by `num_steps` products.

    After a breakdown the remaining rows and columns are zero. Memory: num_steps × n.
    Source: Golub and Van Loan, Matrix Computations, 10.5.
    """
    n, dtype = start.size, start.dtype
    eps = jnp.finfo(dtype).eps
    num_steps = min(num_steps, n)

    def step(k, carry):
        v, basis, matrix, alive, _ = carry
        basis = basis.at[k].set(jnp.where(alive, v, 0))
        w = matvec(v)
        size = jnp.linalg.norm(w)
        column = basis @ w
        w = w - basis.T @ column
        again = basis @ w
        column, w = column + again, w - basis.T @ again
        norm = jnp.linalg.norm(w)
        goes_on = alive & (norm > 10 * eps * size)
        matrix = matrix.at[:, k].set(jnp.where(alive, column, 0))
        matrix = matrix.at[k + 1, k].set(jnp.where(goes_on, norm, 0), mode="drop")
        return (
            jnp.where(goes_on, w / jnp.where(goes_on, norm, 1), v), basis, matrix, goes_on,
            jnp.where(goes_on, norm, 0),
        )  # fmt: skip

    carry = (
        start / jnp.linalg.norm(start), jnp.zeros((num_steps, n), dtype),
        jnp.zeros((num_steps, num_steps), dtype), jnp.asarray(True), jnp.zeros((), dtype),
    )  # fmt: skip
    _, _, matrix, _, norm = jax.lax.fori_loop(0, num_steps, step, carry)
    return Hessenberg(matrix, norm)
