"""`Auto` solves by the structure of the operator, at sizes where nothing is written out."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

import curvax.operators as ops
from curvax._pytree import tree_dot
from curvax.linear import Auto, Method
from curvax.operators._direct import structured_inverse

PSD = lx.positive_semidefinite_tag


def _definite(rng, n):
    root = rng.standard_normal((n, n))
    return jnp.asarray(root @ root.T / n + np.eye(n))


def _matrix(rng, n):
    return jnp.asarray(rng.standard_normal((n, n)) + 4 * np.sqrt(n) * np.eye(n))


def _tridiagonal(rng, n):
    return lx.TridiagonalLinearOperator(
        jnp.asarray(4 + rng.random(n)), jnp.asarray(rng.random(n - 1)), jnp.asarray(rng.random(n - 1))
    )


OPERATORS = {
    "kronecker": lambda rng: ops.Kronecker(_matrix(rng, 50), _matrix(rng, 60)),
    "damped kronecker": lambda rng: ops.Damped(
        ops.Kronecker(
            lx.MatrixLinearOperator(_definite(rng, 50), PSD), lx.MatrixLinearOperator(_definite(rng, 60), PSD)
        ),
        0.1,
    ),
    "low rank plus diagonal": lambda rng: ops.LowRankPlusDiagonal(
        jnp.asarray(1 + rng.random(4000)), jnp.asarray(rng.standard_normal((4000, 5))), tags=PSD
    ),
    "block diagonal": lambda rng: ops.BlockDiagonal(
        {"a": ops.Kronecker(_matrix(rng, 40), _matrix(rng, 60)), "b": _tridiagonal(rng, 500)}
    ),
    "block tridiagonal": lambda rng: ops.BlockTridiagonal(
        jnp.asarray(rng.standard_normal((800, 3, 3)) + 9 * np.eye(3)),
        jnp.asarray(rng.standard_normal((799, 3, 3))),
        jnp.asarray(rng.standard_normal((799, 3, 3))),
    ),
    "circulant": lambda rng: ops.Circulant(jnp.asarray(rng.random(4000)).at[0].set(4000.0)),
    "toeplitz": lambda rng: ops.Toeplitz(jnp.asarray(0.5 ** np.arange(3000)).at[0].set(3.0)),
    "diagonal": lambda rng: lx.DiagonalLinearOperator({"w": jnp.asarray(1 + rng.random((70, 50)))}),
    "tridiagonal": lambda rng: _tridiagonal(rng, 3000),
    "triangular": lambda rng: lx.MatrixLinearOperator(jnp.tril(_matrix(rng, 300)), lx.lower_triangular_tag),
    "tagged from outside": lambda rng: lx.TaggedLinearOperator(
        ops.Circulant(jnp.asarray(0.1 ** np.arange(3000)).at[0].set(3.0)), lx.symmetric_tag
    ),
}


def _normal(rng, structure):
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), structure)


@pytest.mark.parametrize("name", OPERATORS)
def test_structure_is_seen(name, rng):
    """Without a solver, whose stages take long to compile: the inverse that it would use, both ways."""
    operator = OPERATORS[name](rng)
    inverse = structured_inverse(operator)
    assert inverse is not None
    truth = _normal(rng, operator.in_structure())

    @jax.jit
    def back(vector):
        return inverse.mv(operator.mv(vector)), inverse.transpose().mv(operator.transpose().mv(vector))

    for found in back(truth):
        jax.tree.map(lambda x, t: np.testing.assert_allclose(x, t, rtol=1e-7, atol=1e-8), found, truth)


@pytest.mark.parametrize("name", ["damped kronecker", "block diagonal", "tagged from outside"])
def test_structure_is_used(name, rng):
    operator = OPERATORS[name](rng)
    truth = _normal(rng, operator.in_structure())
    # A fallback size of 0 and one step: nothing but the structure can succeed.
    solver = Auto(rtol=1e-11, max_steps=1, fallback_size=0, dense_size=0)

    def loss(vector):
        solution = lx.linear_solve(operator, vector, solver)
        return tree_dot(solution.value, truth), solution

    # In one program with the transposed solve: d/db ⟨t, A⁻¹b⟩ = A⁻ᵀt.
    (_, solution), pull = jax.jit(jax.value_and_grad(loss, has_aux=True))(operator.mv(truth))
    assert Method(int(solution.stats["method"])) == Method.structured
    assert int(solution.stats["num_steps"]) <= 4
    back = operator.transpose().mv(pull)
    for found in (solution.value, back):
        jax.tree.map(lambda x, t: np.testing.assert_allclose(x, t, rtol=1e-7, atol=1e-8), found, truth)


def test_small_operators_use_their_structure_too(rng):
    operator = ops.Circulant(jnp.array([4.0, 1.0, 0.5]))
    vector = jnp.asarray(rng.standard_normal(3))
    solution = lx.linear_solve(operator, vector, Auto(rtol=1e-12))
    assert Method(int(solution.stats["method"])) == Method.structured
    dense = scipy.linalg.circulant(np.array([4.0, 1.0, 0.5]))
    np.testing.assert_allclose(solution.value, np.linalg.solve(dense, vector), rtol=1e-12)


def test_products_alone_are_no_structure(rng):
    """`Damped` of an operator known through products, and blocks of such: iterative, nothing written out."""
    diagonal = jnp.asarray(1 + rng.random(300))
    hidden = lx.FunctionLinearOperator(
        lambda v: diagonal * v, jax.ShapeDtypeStruct((300,), diagonal.dtype), PSD
    )
    vector = jnp.asarray(rng.standard_normal(300))
    for operator, b in (
        (ops.Damped(hidden, 0.5), vector),
        (ops.BlockDiagonal([ops.Damped(hidden, 0.5)]), [vector]),
        (ops.Damped(ops.BlockDiagonal([hidden]), 0.5), [vector]),
    ):
        solution = lx.linear_solve(operator, b, Auto(rtol=1e-10))
        assert Method(int(solution.stats["method"])) == Method.cg
        value = jax.tree.leaves(solution.value)[0]
        np.testing.assert_allclose(value, vector / (diagonal + 0.5), rtol=1e-9)
    # A damped Kronecker product of factors that are not symmetric has no eigenbasis to damp it in.
    skew = ops.Damped(ops.Kronecker(_matrix(rng, 12), _matrix(rng, 12)), 0.5)
    matrix = skew.as_matrix()
    b = jnp.asarray(rng.standard_normal((12, 12)))
    solution = lx.linear_solve(skew, b, Auto(rtol=1e-10, dense_size=0))
    assert Method(int(solution.stats["method"])) == Method.bicgstab
    np.testing.assert_allclose(solution.value.ravel(), np.linalg.solve(matrix, b.ravel()), rtol=1e-7)


def test_singular_structure_is_singular(rng):
    """Also where the right-hand side lies in its range: derivatives take the operator to be regular."""
    operators = [
        lx.DiagonalLinearOperator(jnp.array([1.0, 0.0])),
        lx.MatrixLinearOperator(jnp.array([[1.0, 1.0], [0.0, 0.0]]), lx.upper_triangular_tag),
        ops.Circulant(jnp.array([1.0, -1.0, 0.0])),
        ops.Kronecker(jnp.diag(jnp.array([1.0, 0.0])), jnp.eye(2)),
    ]
    for operator in operators:
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), operator.in_structure())
        b = operator.mv(jax.tree.map(lambda x: x * jnp.arange(1.0, 1 + x.size).reshape(x.shape), ones))
        solution = lx.linear_solve(operator, b, Auto(rtol=1e-8), throw=False)
        assert solution.result == lx.RESULTS.singular
    # A regular one, and how far from singular it is.
    values = jnp.asarray(np.geomspace(1e-6, 1.0, 500))
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    rotated = ops.Kronecker(jnp.asarray(basis), jnp.asarray(basis[:10, :10] + 3 * np.eye(10)))
    for operator in (lx.DiagonalLinearOperator(values), rotated):
        solution = lx.linear_solve(operator, _normal(rng, operator.in_structure()), Auto(rtol=1e-8))
        truth = np.linalg.cond(operator.as_matrix())
        assert 0.3 * truth <= solution.stats["condition"] <= 1.001 * truth


def test_refined_in_float32(rng):
    """An ill-conditioned structure in low precision: what is called solved is solved."""
    values = np.geomspace(1, 50, 40).astype(np.float32)
    mix = scipy.linalg.qr(rng.standard_normal((40, 40)))[0].astype(np.float32)
    factor = jnp.asarray((mix * values) @ mix.T)
    operator = ops.Kronecker(factor, factor)
    vector = jnp.asarray(rng.standard_normal((40, 40)), jnp.float32)
    solution = lx.linear_solve(operator, vector, Auto(rtol=2e-5))
    matrix = np.asarray(factor, float)
    residual = matrix @ np.asarray(solution.value, float) @ matrix.T - np.asarray(vector, float)
    assert np.linalg.norm(residual) <= 3e-5 * np.linalg.norm(vector)
