"""Products with a function of a large symmetric operator, by Lanczos."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_dtype
from curvax.operators._dense import dense_matrix, ravel, unravel
from curvax.operators._dispatch import register
from curvax.operators._lanczos import Krylov, lanczos, ritz
from curvax.operators._matrix_function import TAGS, Floored
from curvax.operators._parts import EXACT


class LanczosFunction(lx.AbstractLinearOperator):
    """f(H) through products: f(H)v ≈ ‖v‖ V f(T) e₁ in the Krylov space of v; made by `positive_part(method="lanczos")`.

    Each product takes `num_steps` products with H. The result is symmetric and linear up to its error, which
    `product` reports. Products are differentiable in the vector; in H they are not, and say so.

    Attributes:
        operator: H.
        fn: f.
        num_steps: Products with H for each product.
    """

    operator: lx.AbstractLinearOperator
    fn: Floored
    num_steps: int = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True, default=TAGS)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """f(H) v."""
        return self.product(vector)[0]

    def product(self, vector: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
        """f(H) v, and an estimate of the norm of its error.

        The estimate is the larger one of the change since half of the steps, and of the error of the polynomial that
        stands for f between the Ritz values. It is 1 to 10 times the error where that falls like 1/m, and much
        larger where it falls fast (like the error of half of the steps). No estimate from these products can see a part
        of the spectrum in which v hardly is.
        """
        return _product(self, vector)

    def as_matrix(self) -> Float[Array, "n n"]:
        """The matrix over raveled leaves, n · num_steps products with H. Raises `ValueError` above a size limit."""
        return dense_matrix(self)

    def transpose(self) -> "LanczosFunction":
        """Itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        return self.operator.in_structure()

    def inverse(self) -> "LanczosFunction":
        """1/f of H, likewise; needs a floor above 0."""
        floor = self.fn.floor
        if not isinstance(floor, jax.core.Tracer) and not float(floor) > 0:
            raise ValueError(
                "inverse() by Lanczos needs a `floor` above 0, in the units of the eigenvalues: without it there is no "
                "bound of what the steps have missed."
            )
        return LanczosFunction(self.operator, self.fn.power(-1.0), self.num_steps)


register(LanczosFunction)


@eqx.filter_jit
def _product(function: LanczosFunction, vector: PyTree[Array]) -> tuple[PyTree[Array], Scalar]:
    """One program, also where it is called outside of `jit`."""
    structure, dtype = function.in_structure(), tree_dtype(function.in_structure())
    flat = ravel(vector, dtype)
    applied = lx.linearise(function.operator)
    # What the operator's function hides comes into sight, so that a derivative in it is refused and not dropped.
    product = eqx.filter_closure_convert(lambda row: ravel(applied.mv(unravel(row, structure)), dtype), flat)
    arrays, rest = eqx.partition((product, function.fn), eqx.is_inexact_array)
    product, fn = eqx.combine(_constant(arrays), rest)
    steps = min(function.num_steps, flat.size)
    # f(H) as a symmetric linear map of which only products are known: the "system" itself is never used.
    solve = lambda _, start: _function_times(product, fn, start, steps)
    value, error = jax.lax.custom_linear_solve(lambda row: row, flat, solve, symmetric=True, has_aux=True)
    return unravel(value, structure), error


def _function_times(
    product: Any, fn: Floored, start: Float[Array, " n"], steps: int
) -> tuple[Float[Array, " n"], Scalar]:
    krylov = lanczos(product, start, steps)

    def weights(size: int) -> tuple[Array, Array, Array]:
        values, vectors = ritz(krylov, size)
        inside = jnp.matmul(vectors, fn(values) * vectors[0], precision=EXACT)
        return jnp.pad(inside, (0, steps - size)), values, vectors

    whole, values, vectors = weights(steps)
    half, _, _ = weights(max(1, steps // 2))
    between = _error_between(krylov, fn, whole, values, vectors)
    # Once the Krylov space is exhausted nothing but rounding is left.
    exhausted = krylov.off_diagonal[krylov.steps - 1] == 0
    missed = jnp.where(exhausted, 0, jnp.maximum(jnp.linalg.norm(whole - half), between))
    rounding = 10 * math.sqrt(start.size) * jnp.finfo(start.dtype).eps * jnp.linalg.norm(whole)
    error = krylov.norm * (missed + rounding)
    return krylov.norm * jnp.matmul(whole, krylov.basis, precision=EXACT), error


def _error_between(
    krylov: Krylov, fn: Floored, weights: Float[Array, " m"], values: Array, vectors: Array
) -> Scalar:
    """The error of the polynomial p that f(H)v is taken for, which is zero at the Ritz values, next to them.

    p = Σ cₖ qₖ in the orthonormal polynomials of T. A Ritz value stands for whatever of the spectrum is nearer to it
    than to the next ones and within its residual; the largest of |f − p| there, at some points and where f bends, is
    weighted like the Ritz value. Far from the data p is of no account: it is not trusted beyond the variation of f.
    """
    radius = krylov.off_diagonal[-1] * jnp.abs(vectors[-1])
    middle, end = 0.5 * (values[1:] + values[:-1]), jnp.full(1, jnp.inf, values.dtype)
    low = jnp.maximum(values - radius, jnp.concatenate([-end, middle]))
    high = jnp.minimum(values + radius, jnp.concatenate([middle, end]))
    floor = fn.floor.astype(values.dtype)
    bends = [-floor, jnp.zeros_like(floor), floor] if fn.absolute else [floor]
    inner = [low, high, 0.5 * (low + values), 0.5 * (high + values)]
    points = jnp.stack(inner + [jnp.clip(bend, low, high) for bend in bends])

    def add(carry: tuple[Array, Array, Array], row: tuple[Array, ...]) -> tuple[Any, None]:
        total, now, before = carry
        weight, alpha, earlier, beta = row
        later = ((points - alpha) * now - earlier * before) / jnp.where(beta > 0, beta, 1)
        return (total + weight * now, later, now), None

    beta = krylov.off_diagonal
    rows = weights, krylov.diagonal, jnp.concatenate([jnp.zeros_like(beta[:1]), beta[:-1]]), beta
    zero = jnp.zeros_like(points)
    (polynomial, _, _), _ = jax.lax.scan(add, (zero, zero + 1, zero), rows)
    error, variation = jnp.abs(fn(points) - polynomial), jnp.abs(fn(points) - fn(values))
    # An overflow of p is no number to compare; a NaN of H is one in the variation as well.
    trusted = jnp.max(jnp.where(error <= variation, error, variation), axis=0)
    return jnp.linalg.norm(vectors[0] * trusted)


@jax.custom_jvp
def _constant(arrays: PyTree[Array]) -> PyTree[Array]:
    return arrays


def _refuse(primals: Any, tangents: Any) -> Any:
    if any(not isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(tangents, is_leaf=_is_zero)):
        raise ValueError(
            'A product by `method="lanczos"` is differentiable in the vector only, not in the operator or the floor. '
            'Use `method="exact"` for a small operator, or `jax.lax.stop_gradient` on it.'
        )
    return primals[0], jax.tree.map(jnp.zeros_like, primals[0])


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


_constant.defjvp(_refuse, symbolic_zeros=True)
