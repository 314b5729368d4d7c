"""Sylvester and Lyapunov equations, dense or with a right-hand side of low rank, and their derivatives."""

from typing import Any, TypeAlias, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from curvax._pytree import stop_gradient
from curvax.linear._bartels_stewart import (
    SchurFactors,
    check_schur,
    factorise,
    product,
    solve,
    solve_and_check,
)
from curvax.linear._low_rank_sylvester import LowRankSolution, solve_low_rank
from curvax.operators._structured import is_symmetric

_NONFINITE = (
    "`{name}`: an argument holds NaN or infinity. Look for the operation that made it with "
    "`jax.config.update('jax_debug_nans', True)`; `throw=False` returns NaN instead of raising."
)
_NOT_UNIQUE = (
    "`{name}`: the equation has no unique solution to working precision: {common}, or so nearly that rounding errors "
    "decide the solution. Shift `A`{or_b}, use float64, or pass `throw=False` to get NaN."
)
_COMMON = {
    "solve_sylvester": ("`A` and −`B` have an eigenvalue in common", " or `B`"),
    "solve_lyapunov": ("two eigenvalues of `A` add up to zero", ""),
}

Matrix: TypeAlias = Float[Array, "n n"] | lx.AbstractLinearOperator
Factored: TypeAlias = tuple[Float[Array, "n r"], Float[Array, "m r"]]


@overload
def solve_sylvester(
    A: Matrix, B: Matrix, C: Float[Array, "n m"], *, throw: bool = ...
) -> Float[Array, "n m"]: ...


@overload
def solve_sylvester(
    A: Matrix,
    B: Matrix,
    C: Factored,
    *,
    throw: bool = ...,
    rtol: float | None = ...,
    max_steps: int | None = ...,
    inverses: tuple[lx.AbstractLinearOperator, lx.AbstractLinearOperator] | None = ...,
) -> LowRankSolution: ...


def solve_sylvester(
    A: Matrix,
    B: Matrix,
    C: Any,
    *,
    throw: bool = True,
    rtol: float | None = None,
    max_steps: int | None = None,
    inverses: tuple[lx.AbstractLinearOperator, lx.AbstractLinearOperator] | None = None,
) -> Any:
    r"""The solution X of A X + X B = C.

    It is unique if and only if no eigenvalue of A is one of −B. That is checked to working precision: on the
    eigenvalues, and on how far rounding errors in C would move X.

    **C an array**: the algorithm of Bartels and Stewart, from real Schur forms of A and B. For symmetric matrices,
    `lx.MatrixLinearOperator(A, lx.symmetric_tag)`, from eigenvectors, which is about four times as fast and runs on
    GPU too; JAX has Schur forms on CPU only. Differentiable any number of times, in forward and in reverse mode, in A,
    B and C: with X̄ the cotangent of X, AᵀΛ + ΛBᵀ = X̄ is solved from the same factors, and C̄ = Λ, Ā = −ΛXᵀ, B̄ = −XᵀΛ.

    **C a pair (U, V)**, which stands for U Vᵀ with few columns r: the solution comes as a `LowRankSolution`, and n × m
    numbers are never stored. A and B enter through products. X is sought in block Krylov spaces of A and Bᵀ, so that
    the equation is solved there exactly (Galerkin); with `inverses` in extended Krylov spaces, which take far fewer
    steps. Meant for A and B whose symmetric parts are positive definite, or both negative definite; otherwise the
    small equations can be singular without A and B being at fault. It has no derivative and refuses one.

    Args:
        A: Array (n, n), float32 or float64, or a Lineax operator between vectors of n.
        B: Array (m, m) or operator, likewise.
        C: Array (n, m), or a pair of arrays (n, r) and (m, r).
        throw: Raise where there is no solution. Otherwise it is NaN, and so are its derivatives; of a
            `LowRankSolution`, `converged` tells.
        rtol: For a pair: the residual ‖AX + XB − C‖/‖C‖ at which to stop; by default 1e-8, or 1e-4 in float32.
        max_steps: For a pair: most steps, each of which adds r columns to a space (2r with `inverses`); by default
            50, less where the spaces would be full.
        inverses: For a pair: operators for A⁻¹ and B⁻¹.

    Returns:
        X (n, m), or a `LowRankSolution` for a pair.

    Raises:
        ValueError: Shapes or dtypes do not fit; no Schur form on this device; an argument belongs to the other kind
            of C.
        RuntimeError: With `throw=True` (inside `jit` the error of `eqx.error_if`): no unique solution, an argument
            that is not finite, or `max_steps` reached.

    Cost: about 25 (n³ + m³) for the Schur forms, 5nm (n + m) for a solution, again for every tangent and cotangent;
        memory 10 matrices. For a pair, steps × r products with A and with B, and dense equations of size steps × r.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        A, B = jnp.array([[3.0, 1.0], [0.0, 2.0]]), jnp.array([[1.0]])
        X = cx.linear.solve_sylvester(A, B, jnp.array([[5.0], [3.0]]))  # [[1], [1]]
        ```

    Source: R. H. Bartels, G. W. Stewart, "Solution of the matrix equation AX + XB = C", 1972. The forms are solved in
        blocks. Pairs: Y. Saad, "Numerical solution of large Lyapunov equations", 1990; V. Simoncini, "A new iterative
        method for solving large-scale Lyapunov matrix equations", 2007.
    """
    name = "solve_sylvester"
    if isinstance(C, tuple):
        left, right = _check_pair(name, "C", C)
        A, B = _as_operator(name, "A", A, left), _as_operator(name, "B", B, right)
        return solve_low_rank(name, A, B, left, right, inverses, rtol, max_steps, throw)
    _check_dense(name, rtol, max_steps, inverses)
    A, symmetric_a = _as_matrix(name, "A", A)
    B, symmetric_b = _as_matrix(name, "B", B)
    C = _as_array(name, "C", C)
    if C.shape != (A.shape[0], B.shape[0]):
        raise ValueError(
            f"`C` of `{name}` must be {A.shape[0]} × {B.shape[0]} for A and B of these sizes, found shape {C.shape}."
        )
    _check_dtypes(name, A=A, B=B, C=C)
    if C.size == 0:
        return C
    a = factorise(stop_gradient(A), symmetric_a)
    b = factorise(stop_gradient(B), symmetric_b)
    value, singular = solve_and_check(a, b, stop_gradient(C))
    return _sound(name, (A, B, C), _implicit(A, B, C, (a, b), value), singular, throw)


@overload
def solve_lyapunov(A: Matrix, Q: Float[Array, "n n"], *, throw: bool = ...) -> Float[Array, "n n"]: ...


@overload
def solve_lyapunov(
    A: Matrix,
    Q: tuple[Float[Array, "n r"]],
    *,
    throw: bool = ...,
    rtol: float | None = ...,
    max_steps: int | None = ...,
    inverse: lx.AbstractLinearOperator | None = ...,
) -> LowRankSolution: ...


def solve_lyapunov(
    A: Matrix,
    Q: Any,
    *,
    throw: bool = True,
    rtol: float | None = None,
    max_steps: int | None = None,
    inverse: lx.AbstractLinearOperator | None = None,
) -> Any:
    r"""The solution X of A X + X Aᵀ = Q; the sign is that of `scipy.linalg.solve_continuous_lyapunov`.

    `solve_sylvester` with B = Aᵀ, from one Schur form instead of two. X is unique if and only if no two eigenvalues of
    A add up to zero. Where Q is exactly symmetric, so is X. For a positive semidefinite Q, X is positive semidefinite
    if all eigenvalues of A have positive real parts, and negative semidefinite if A is stable: pass −Q for the Gramian
    of a stable system.

    Args:
        A: Array (n, n), float32 or float64, or a Lineax operator between vectors of n.
        Q: Array (n, n), or a tuple of one array (U,) of shape (n, r), which stands for U Uᵀ.
        throw: As of `solve_sylvester`.
        rtol: As of `solve_sylvester`.
        max_steps: As of `solve_sylvester`.
        inverse: For Q = U Uᵀ: an operator for A⁻¹.

    Returns:
        X (n, n), or a `LowRankSolution`, whose `left` and `right` are equal but for the signs of columns where Q is
        U Uᵀ.

    Raises:
        ValueError: As of `solve_sylvester`.
        RuntimeError: As of `solve_sylvester`.

    Cost: about 25n³ for the Schur form, 10n³ for a solution and for every tangent and cotangent.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        A = jnp.array([[-1.0, 2.0], [0.0, -3.0]])
        X = cx.linear.solve_lyapunov(A, -jnp.eye(2))  # the Gramian of a stable system
        ```

    Source: as of `solve_sylvester`.
    """
    name = "solve_lyapunov"
    if isinstance(Q, tuple):
        if len(Q) != 1:
            raise ValueError(
                f"`Q` of `{name}` must be an array or a tuple (U,) for U Uᵀ, found a tuple of {len(Q)}."
            )
        left, right = _check_pair(name, "Q", (Q[0], Q[0]))
        A = _as_operator(name, "A", A, left)
        inverses = None if inverse is None else (inverse, inverse.transpose())
        return solve_low_rank(name, A, None, left, right, inverses, rtol, max_steps, throw)
    _check_dense(name, rtol, max_steps, inverse)
    A, symmetric = _as_matrix(name, "A", A)
    Q = _as_array(name, "Q", Q)
    if Q.shape != A.shape:
        raise ValueError(f"`Q` of `{name}` must have the shape {A.shape} of `A`, found {Q.shape}.")
    _check_dtypes(name, A=A, Q=Q)
    if Q.size == 0:
        return Q
    a = factorise(stop_gradient(A), symmetric)
    b, fixed = a.transpose(), stop_gradient(Q)
    value, singular = solve_and_check(a, b, fixed)
    value = jnp.where(jnp.all(fixed == fixed.T), (value + value.T) / 2, value)
    return _sound(name, (A, Q), _implicit(A, A.T, Q, (a, b), value), singular, throw)


@jax.custom_jvp
def _implicit(
    A: Array, B: Array, C: Array, factors: tuple[SchurFactors, SchurFactors], value: Array
) -> Array:
    """`value`, which has no derivative of its own, with those of the solution."""
    del A, B, C, factors
    return value


@_implicit.defjvp
def _implicit_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """A Ẋ + Ẋ B = Ċ − Ȧ X − X Ḃ, from the factors at hand; written so that it has derivatives and a transpose."""
    (A, B, _, (a, b), _), (dA, dB, dC, _, _) = primals, tangents
    X = _implicit(*primals)
    transposed = (a.transpose(), b.transpose())
    tangent = jax.lax.custom_linear_solve(
        lambda Z: product(A, Z) + product(Z, B),
        dC - product(dA, X) - product(X, dB),
        solve=lambda _, rhs: solve(a, b, rhs),
        transpose_solve=lambda _, rhs: solve(*transposed, rhs),
    )
    return X, tangent


def _sound(
    name: str, arguments: tuple[Array, ...], X: Array, singular: Bool[Array, ""], throw: bool
) -> Array:
    """X times one; times NaN, for X and its derivatives, where there is no solution."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arguments]))
    # Finite arguments can have a solution that overflows.
    failed = ~finite | singular | ~jnp.all(jnp.isfinite(X))
    one: Scalar = jnp.where(failed, jnp.nan, 1).astype(X.dtype)
    if throw:
        common, or_b = _COMMON[name]
        messages = [_NONFINITE.format(name=name), _NOT_UNIQUE.format(name=name, common=common, or_b=or_b)]
        one = eqx.branched_error_if(one, failed, finite.astype(int), messages)
    return jax.lax.stop_gradient(one) * X


def _as_array(name: str, label: str, x: Any) -> Array:
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"`{label}` of `{name}` must be an array, found {type(x).__name__}.")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"`{label}` of `{name}` must be float32 or float64, found {x.dtype}. Convert it with "
            "`astype`; write a complex equation as a real one of twice the size."
        )
    if x.ndim != 2:
        raise ValueError(
            f"`{label}` of `{name}` must be a matrix, found shape {x.shape}. For a batch use `jax.vmap`."
        )
    return jnp.asarray(x)


def _as_matrix(name: str, label: str, x: Any) -> tuple[Array, bool]:
    symmetric = False
    if isinstance(x, lx.AbstractLinearOperator):
        symmetric, x = is_symmetric(x), x.as_matrix()
    matrix = _as_array(name, label, x)
    if matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`{label}` of `{name}` must be square, found shape {matrix.shape}.")
    if not symmetric:
        check_schur(name, label, matrix)
    return matrix, symmetric


def _check_dense(name: str, *only_for_pairs: Any) -> None:
    if any(option is not None for option in only_for_pairs):
        raise ValueError(
            f"`rtol`, `max_steps` and inverses of `{name}` are for a right-hand side of low rank, given as a tuple of "
            "its factors. Leave them out, or pass the factors."
        )


def _check_dtypes(name: str, **arrays: Array) -> None:
    if len({x.dtype for x in arrays.values()}) > 1:
        found = ", ".join(f"`{label}` {x.dtype}" for label, x in arrays.items())
        raise ValueError(f"`{name}` needs arguments of one dtype, found {found}. Convert them with `astype`.")


def _check_pair(name: str, label: str, pair: tuple[Any, ...]) -> tuple[Array, Array]:
    if len(pair) != 2:
        raise ValueError(
            f"`{label}` of `{name}` must be an array or a pair (U, V) for U Vᵀ, found a tuple of {len(pair)}."
        )
    left, right = (_as_array(name, f"{label}[{i}]", x) for i, x in enumerate(pair))
    if left.shape[1] != right.shape[1]:
        raise ValueError(
            f"The factors in `{label}` of `{name}` need equally many columns, found shapes {left.shape} and "
            f"{right.shape}."
        )
    _check_dtypes(name, **{f"{label}[0]": left, f"{label}[1]": right})
    return left, right


def _as_operator(name: str, label: str, x: Any, factor: Array) -> lx.AbstractLinearOperator:
    operator = x if isinstance(x, lx.AbstractLinearOperator) else None
    if operator is None:
        matrix = _as_array(name, label, x)
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`{label}` of `{name}` must be square, found shape {matrix.shape}.")
        operator = lx.MatrixLinearOperator(matrix)
    vector = jax.ShapeDtypeStruct(factor.shape[:1], factor.dtype)
    if operator.in_structure() != vector or operator.out_structure() != vector:
        raise ValueError(
            f"`{label}` of `{name}` must map vectors of shape {vector.shape} and dtype {vector.dtype} to such vectors, "
            f"found an operator from {operator.in_structure()} to {operator.out_structure()}."
        )
    return operator
