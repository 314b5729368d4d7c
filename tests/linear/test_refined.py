"""Iterative refinement: low precision inside, the answer in high precision, or better than that."""

import math
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from curvax.linear import CG, Auto, Refined
from curvax.linear._doubled import doubled_residual
from helpers.dense import refined_solve
from helpers.matrices import definite, rotation_and_decay

N = 40
PSD = lx.positive_semidefinite_tag


def _solve(operator, vector, solver, throw=False):
    return lx.linear_solve(operator, jnp.asarray(vector), solver, throw=throw)


def _integer_hilbert(n):
    """The Hilbert matrix times the least common multiple of its denominators: exact in floating point."""
    scale = math.lcm(*range(1, 2 * n))
    return np.array([[scale // (i + j + 1) for j in range(n)] for i in range(n)], float)


@pytest.mark.parametrize(
    ("inner", "solver", "condition"),
    [
        ("float32", lx.LU(), 1e4),
        ("float32", CG(rtol=1e-2), 1e3),
        ("bfloat16", CG(rtol=1e-1), 10.0),
        (None, Auto(rtol=0.1, dense_size=0, fallback_size=0), 1e3),
    ],
)
def test_float64_answer(inner, solver, condition, rng):
    matrix, vector = definite(N, condition), rng.standard_normal(N)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), PSD)
    rtol = max(1e-13, 3e-15 * condition)  # above what rounding of the residual allows
    solution = _solve(operator, vector, Refined(solver, rtol=rtol, inner_dtype=inner))
    assert solution.result == lx.RESULTS.successful
    assert solution.value.dtype == jnp.float64
    assert np.linalg.norm(matrix @ solution.value - vector) <= 1.1 * rtol * np.linalg.norm(vector)
    np.testing.assert_allclose(
        solution.value, refined_solve(matrix, vector), rtol=1e-12 * condition, atol=1e-12 * condition
    )
    assert 2 <= solution.stats["num_steps"] <= 45


def test_low_precision_is_really_used(rng):
    """Without refinement the answer has float32's error."""
    matrix, vector = definite(N, 1e4), rng.standard_normal(N)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), PSD)
    truth = refined_solve(matrix, vector)
    once = _solve(operator, vector, Refined(lx.LU(), rtol=1e-13, inner_dtype="float32", max_steps=1))
    assert once.result == lx.RESULTS.max_steps_reached
    error = np.linalg.norm(once.value - truth) / np.linalg.norm(truth)
    assert 1e-7 < error < 1e-2


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_doubled_residuals_give_the_last_digits(dtype):
    """Condition 1.5e10 in float64, 5e5 in float32; the answer is right to rounding of the working precision."""
    n = 8 if dtype == np.float64 else 5
    matrix = _integer_hilbert(n).astype(dtype)
    truth = np.array([1.0, 0.5, -3.0, 0.25, 2.0, -1.0, 4.0, 8.0])[:n]
    vector = np.array([float(sum(map(Fraction, row * truth))) for row in matrix.astype(float)], dtype)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix))
    eps = np.finfo(dtype).eps
    solution = _solve(operator, vector, Refined(lx.LU(), rtol=2 * eps, doubled=True))
    assert solution.result == lx.RESULTS.successful
    assert np.linalg.norm(np.asarray(solution.value, float) - truth) <= 2 * eps * np.linalg.norm(truth)
    plain = lx.linear_solve(operator, jnp.asarray(vector), lx.LU()).value
    assert np.linalg.norm(np.asarray(plain, float) - truth) >= 50 * eps * np.linalg.norm(truth)


@pytest.mark.parametrize(("dtype", "compiled"), [(np.float64, True), (np.float64, False), (np.float32, True)])
def test_doubled_residual_against_exact_arithmetic(dtype, compiled, rng):
    """Residuals that cancel to a part in 1e14 (1e6): all digits but the last are right."""
    matrix = (rng.standard_normal((7, 13)) * 10.0 ** rng.integers(-3, 4, (7, 13))).astype(dtype)
    x, rest = rng.standard_normal(13).astype(dtype), np.zeros(13, dtype)
    vector = (matrix.astype(float) @ x.astype(float)).astype(dtype)
    residual = (jax.jit if compiled else lambda f: f)(doubled_residual)(
        *map(jnp.asarray, (matrix, x, rest, vector))
    )
    exact = [
        float(
            Fraction(float(b))
            - sum(Fraction(float(a)) * Fraction(float(v)) for a, v in zip(row, x, strict=True))
        )
        for row, b in zip(matrix, vector, strict=True)
    ]
    size = np.abs(matrix).astype(float) @ np.abs(x).astype(float)
    eps, error = np.finfo(dtype).eps, np.abs(np.asarray(residual, float) - exact)
    assert np.all(error <= 50 * eps**2 * size + 2 * eps * np.abs(exact))


def test_too_ill_conditioned_is_said(rng):
    matrix = definite(N, 1e12)
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), PSD)
    solution = _solve(operator, rng.standard_normal(N), Refined(lx.LU(), rtol=1e-13, inner_dtype="float32"))
    assert solution.result != lx.RESULTS.successful
    nan = _solve(lx.MatrixLinearOperator(jnp.full((3, 3), jnp.nan)), np.ones(3), Refined(lx.LU(), rtol=1e-8))
    assert nan.result != lx.RESULTS.successful
    zero = _solve(operator, np.zeros(N), Refined(lx.LU(), rtol=1e-13, inner_dtype="float32"))
    assert zero.result == lx.RESULTS.successful and np.all(zero.value == 0)
    # A right-hand side far below the range of float32 is scaled before it is cast.
    small = _solve(
        lx.MatrixLinearOperator(jnp.eye(3) * 2),
        np.full(3, 1e-60),
        Refined(lx.LU(), rtol=1e-13, inner_dtype="float32"),
    )
    np.testing.assert_allclose(small.value, 5e-61, rtol=1e-12)


def test_derivatives_and_transforms(rng):
    matrix, vector = jnp.asarray(rotation_and_decay(N)), jnp.asarray(rng.standard_normal(N))
    solver = Refined(lx.LU(), rtol=1e-13, inner_dtype="float32")

    def loss(matrix, vector):
        return jnp.sum(lx.linear_solve(lx.MatrixLinearOperator(matrix), vector, solver).value ** 2)

    def truth(matrix, vector):
        return jnp.sum(jnp.linalg.solve(matrix, vector) ** 2)

    for found, wanted in zip(
        jax.jit(jax.grad(loss, (0, 1)))(matrix, vector), jax.grad(truth, (0, 1))(matrix, vector), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    many = jnp.stack([vector, 2 * vector, 0 * vector])
    np.testing.assert_allclose(
        jax.vmap(loss, (None, 0))(matrix, many), jax.vmap(truth, (None, 0))(matrix, many), rtol=1e-11
    )


def test_curvature_operator_in_low_precision(rng):
    """A Hessian whose data are arguments is cast with them; one that hides its data is refused."""
    x = jnp.asarray(rng.standard_normal((100, 5)))

    def loss(w, x):
        return jnp.mean(jnp.log1p(jnp.exp(x @ w))) + 0.05 * jnp.sum(w**2)

    theta, vector = jnp.zeros(5), jnp.ones(5)
    hessian = ops.hessian(loss, theta, x, tags=PSD)
    solver = Refined(CG(rtol=1e-2), rtol=1e-13, inner_dtype="float32")
    solution = _solve(hessian, vector, solver, throw=True)
    np.testing.assert_allclose(solution.value, np.linalg.solve(hessian.as_matrix(), vector), rtol=1e-10)
    hidden = ops.hessian(lambda w: loss(w, x), theta, tags=PSD)
    with pytest.raises(ValueError, match="`inner_dtype='float32'` of `Refined` cannot cast.*arguments"):
        _solve(hidden, vector, solver)


def test_errors():
    operator = lx.FunctionLinearOperator(lambda v: v, jax.ShapeDtypeStruct((3,), jnp.float64))
    with pytest.raises(ValueError, match="`doubled` of `Refined` needs the entries"):
        _solve(operator, jnp.ones(3), Refined(lx.LU(), rtol=1e-8, doubled=True))
    with pytest.raises(ValueError, match="bfloat16.*entries"):
        _solve(operator, jnp.ones(3), Refined(lx.LU(), rtol=1e-8, inner_dtype="bfloat16"))
    with pytest.raises(ValueError, match="`inner_dtype` of `Refined` must be one of"):
        Refined(lx.LU(), rtol=1e-8, inner_dtype="float8")
    with pytest.raises(ValueError, match="`solver` of `Refined`"):
        Refined(1e-8, 1e-8)
    assert eqx.tree_equal(Refined(lx.LU(), 1e-8), Refined(lx.LU(), rtol=1e-8))
