"""Small Krylov decompositions with full reorthogonalisation: what the monitors read spectra from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Int, PyTree

from curvax._pytree import tree_dtype

Vector = Float[Array, " n"]
MatVec = Callable[[Vector], Vector]


class Flat(NamedTuple):
    """A pytree seen as one vector in the dtype of `tree_dtype`."""

    pack: Callable[[PyTree], Vector]
    unpack: Callable[[Vector], PyTree]
    size: int
    dtype: jnp.dtype


def flatten_like(like: PyTree) -> Flat:
    """How to go between pytrees like `like` (arrays or `ShapeDtypeStruct`s, any mix of dtypes) and vectors."""
    leaves, structure = jax.tree.flatten(like)
    dtype = jnp.dtype(tree_dtype(like))
    sizes = [leaf.size for leaf in leaves]

    def pack(tree):
        parts = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
        return jnp.concatenate(parts) if parts else jnp.zeros((0,), dtype)

    def unpack(vector):
        out, start = [], 0
        for leaf, size in zip(leaves, sizes, strict=True):
            out.append(vector[start : start + size].reshape(leaf.shape).astype(leaf.dtype))
            start += size
        return jax.tree.unflatten(structure, out)

    return Flat(pack, unpack, sum(sizes), dtype)


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


class Tridiagonal(NamedTuple):
    """Ritz values of a self-adjoint operator, ascending, with residual norms and vectors."""

    values: Float[Array, " m"]
    residuals: Float[Array, " m"]
    weights: Float[Array, "m m"]  # column i holds Ritz vector i in terms of `basis`
    basis: Float[Array, "m n"]
    steps: Int[Array, ""]
    definite: Array  # whether the preconditioner showed no negative curvature


def lanczos(matvec: MatVec, start: Vector, num_steps: int, precondition: MatVec = lambda v: v) -> Tridiagonal:
    """Ritz values of `A M` in the inner product of `M`, from `num_steps` products with each.

    With z = M v, the operator A M is self-adjoint in uᵀ M v, so that its Lanczos matrix is

        α_k = z_kᵀ A z_k,   w = A z_k − α_k v_k − β_k v_{k−1},   β_{k+1}² = wᵀ M w,

    which is plain Lanczos for M = I. Each w is orthogonalised twice against all earlier vectors. After a
    breakdown (an invariant subspace was exhausted) the matrix is padded by the decoupled entry α_1, which
    lies between the extreme Ritz values and so moves neither.

    Memory: 2 (num_steps × n). Source: Golub and Van Loan, Matrix Computations, 10.3 and 11.5.
    """
    n, dtype = start.size, start.dtype
    eps = jnp.finfo(dtype).eps
    num_steps = min(num_steps, n)
    z0 = precondition(start)
    norm0 = jnp.sqrt(start @ z0)

    def step(k, carry):
        v, z, beta, bases, images, alphas, betas, steps, scale, definite = carry
        active = k == steps
        bases, images = bases.at[k].set(jnp.where(active, v, 0)), images.at[k].set(jnp.where(active, z, 0))
        w = matvec(z)
        alpha = w @ z
        for _ in range(2):
            w = w - bases.T @ (images @ w)
        image = precondition(w)
        square = w @ image
        scale = jnp.maximum(scale, jnp.abs(alpha) + beta)
        new = jnp.sqrt(jnp.maximum(square, 0))
        goes_on = active & (new > 10 * eps * scale)
        definite = definite & ~(active & (square < -jnp.sqrt(eps) * (w @ w)))
        safe = jnp.where(goes_on, new, 1)
        alphas = alphas.at[k].set(jnp.where(active, alpha, alphas[0]))
        betas = betas.at[k].set(jnp.where(goes_on, new, 0))
        keep = lambda a, b: jnp.where(goes_on, a, b)
        return (
            keep(w / safe, v), keep(image / safe, z), keep(new, 0), bases, images, alphas, betas,
            steps + goes_on.astype(steps.dtype), scale, definite,
        )  # fmt: skip

    zeros = jnp.zeros((num_steps, n), dtype)
    carry = (
        start / norm0, z0 / norm0, jnp.zeros((), dtype), zeros, zeros,
        jnp.zeros(num_steps, dtype), jnp.zeros(num_steps, dtype), jnp.zeros((), jnp.int32),
        jnp.zeros((), dtype), start @ z0 > 0,
    )  # fmt: skip
    carry = jax.lax.fori_loop(0, num_steps, step, carry)
    _, _, _, _, images, alphas, betas, steps, _, definite = carry
    matrix = jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1)
    # eigh of a matrix with a NaN may hang or lie: hand it zeros and put the NaN back.
    finite = jnp.all(jnp.isfinite(matrix))
    values, weights = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    values = jnp.where(finite, values, jnp.nan)
    residuals = jnp.where(finite, betas[-1] * jnp.abs(weights[-1]), jnp.nan)
    return Tridiagonal(values, residuals, weights, images, jnp.minimum(steps + 1, num_steps), definite)


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
