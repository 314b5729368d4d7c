"""Kronecker products against `np.kron`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.operators import EigenKronecker, Kronecker
from helpers.dense import rotated

M, N = 3, 4
PSD = lx.positive_semidefinite_tag


def _definite(size, rng):
    return rotated(rng.uniform(0.5, 3.0, size), rng)


def _symmetric(size, rng):
    return rotated(rng.uniform(-2.0, 2.0, size), rng)


def _tagged(matrix, tag, dtype=jnp.float64):
    return lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), tag)


def _cases(rng, dtype=jnp.float64):
    a, b = _definite(M, rng), _definite(N, rng)
    s = _symmetric(M, rng)
    general = rng.normal(size=(M, M)) + 3 * np.eye(M), rng.normal(size=(N, N)) + 3 * np.eye(N)
    values = rng.uniform(0.5, 2.0, N)
    diagonal = lx.DiagonalLinearOperator(jnp.asarray(values, dtype))
    yield "definite", Kronecker(_tagged(a, PSD, dtype), _tagged(b, PSD, dtype)), np.kron(a, b)
    symmetric = Kronecker(_tagged(s, lx.symmetric_tag, dtype), _tagged(b, PSD, dtype))
    yield "symmetric", symmetric, np.kron(s, b)
    negative = Kronecker(_tagged(-a, lx.negative_semidefinite_tag, dtype), _tagged(b, PSD, dtype))
    yield "negative", negative, np.kron(-a, b)
    yield "general", Kronecker(*(jnp.asarray(x, dtype) for x in general)), np.kron(*general)
    yield "diagonal", Kronecker(_tagged(a, PSD, dtype), diagonal), np.kron(a, np.diag(values))
    inner = Kronecker(_tagged(a, PSD, dtype), _tagged(b, PSD, dtype)).eigen()
    yield "eigen", inner, np.kron(a, b)


def _flat_products(operator, vectors):
    return jax.vmap(lambda v: operator.mv(v.reshape(operator.in_structure().shape)).ravel())(vectors)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-12), (jnp.float32, 2e-5)])
def test_products_and_what_is_read_off(rng, dtype, tol):
    for name, operator, matrix in _cases(rng, dtype):
        vectors = jnp.asarray(rng.normal(size=(5, M * N)), dtype)
        out = _flat_products(operator, vectors)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, np.asarray(vectors, float) @ matrix.T, atol=tol * 50, err_msg=name)
        np.testing.assert_allclose(
            _flat_products(operator.transpose(), vectors),
            np.asarray(vectors, float) @ matrix,
            atol=tol * 50,
            err_msg=name,
        )
        np.testing.assert_allclose(operator.as_matrix(), matrix, atol=tol * 10, err_msg=name)
        np.testing.assert_allclose(operator.trace(), np.trace(matrix), rtol=tol * 100, err_msg=name)
        np.testing.assert_allclose(
            operator.logdet(), np.linalg.slogdet(matrix)[1], rtol=tol * 100, atol=tol * 100, err_msg=name
        )
        np.testing.assert_allclose(lx.diagonal(operator), np.diagonal(matrix), atol=tol * 10, err_msg=name)
        inverse = operator.inverse()
        np.testing.assert_allclose(
            _flat_products(inverse, vectors),
            np.linalg.solve(matrix, np.asarray(vectors).T).T,
            rtol=tol * 1e3,
            atol=tol * 1e2,
            err_msg=name,
        )
        np.testing.assert_allclose(
            _flat_products(inverse.transpose(), vectors),
            np.linalg.solve(matrix.T, np.asarray(vectors).T).T,
            rtol=tol * 1e3,
            atol=tol * 1e2,
            err_msg=name,
        )


def test_tags_tell_the_truth(rng):
    for name, operator, _ in _cases(rng):
        for what in (operator, operator.inverse(), operator.transpose()):
            dense = np.asarray(what.as_matrix())
            symmetric = np.allclose(dense, dense.T)
            if lx.is_symmetric(what):
                assert symmetric, name
            if lx.is_positive_semidefinite(what):
                assert np.linalg.eigvalsh(dense).min() > 0, name
            if lx.is_negative_semidefinite(what):
                assert np.linalg.eigvalsh(dense).max() < 0, name
    tags = {name: operator for name, operator, _ in _cases(rng)}
    assert lx.is_positive_semidefinite(tags["definite"]) and lx.is_positive_semidefinite(
        tags["definite"].inverse()
    )
    assert lx.is_symmetric(tags["symmetric"]) and not lx.is_positive_semidefinite(tags["symmetric"])
    assert lx.is_negative_semidefinite(tags["negative"])
    assert not lx.is_symmetric(tags["general"])


@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25, 0.5])
def test_powers(rng, exponent):
    for name, operator, matrix in _cases(rng):
        if name not in ("definite", "diagonal", "eigen"):
            continue
        values, vectors = np.linalg.eigh(matrix)
        truth = (vectors * values**exponent) @ vectors.T
        np.testing.assert_allclose(operator.power(exponent).as_matrix(), truth, atol=1e-10, err_msg=name)


def test_damping_is_exact_in_the_joint_eigenbasis(rng):
    """Not the product of separately damped factors."""
    vector = rng.normal(size=(M, N))
    for name, operator, matrix in _cases(rng):
        if name in ("general",):
            with pytest.raises(ValueError, match="needs symmetric parts"):
                operator.damped(0.3)
            continue
        damped = operator.damped(0.3)
        truth = matrix + 0.3 * np.eye(M * N)
        np.testing.assert_allclose(damped.as_matrix(), truth, atol=1e-11, err_msg=name)
        np.testing.assert_allclose(
            damped.inverse().mv(jnp.asarray(vector)).ravel(),
            np.linalg.solve(truth, vector.ravel()),
            rtol=1e-8,
        )
        np.testing.assert_allclose(damped.logdet(), np.linalg.slogdet(truth)[1], rtol=1e-9, atol=1e-9)


def test_rectangular_factors_multiply_and_refuse_the_rest(rng):
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(5, 4))
    operator = Kronecker(a, b)
    v = rng.normal(size=(3, 4))
    np.testing.assert_allclose(operator.mv(jnp.asarray(v)), a @ v @ b.T, atol=1e-12)
    np.testing.assert_allclose(operator.as_matrix(), np.kron(a, b), atol=1e-12)
    for call in (operator.inverse, operator.trace, operator.logdet, operator.diagonal):
        with pytest.raises(ValueError, match="`left` of `Kronecker` is 2 × 3"):
            call()


def test_singular_is_never_plausible(rng):
    a = np.diag([1.0, 0.0, 2.0])
    out = (
        Kronecker(_tagged(a, lx.symmetric_tag), _tagged(_definite(N, rng), PSD))
        .inverse()
        .mv(jnp.ones((M, N)))
    )
    assert not np.all(np.isfinite(out))
    eigen = Kronecker(_tagged(a, lx.symmetric_tag), _tagged(np.eye(N), PSD)).eigen()
    assert not np.all(np.isfinite(eigen.inverse().mv(jnp.ones((M, N)))))
    assert float(eigen.logdet()) == -np.inf


@pytest.mark.parametrize("route", ["inverse", "damped", "power"])
def test_derivatives_against_dense(rng, route):
    a, b = jnp.asarray(_definite(M, rng)), jnp.asarray(_definite(N, rng))
    v, w = jnp.asarray(rng.normal(size=(M, N))), jnp.asarray(rng.normal(size=(M, N)))

    def ours(a, b):
        a, b = 0.5 * (a + a.T), 0.5 * (b + b.T)
        operator = Kronecker(_tagged(a, PSD), _tagged(b, PSD))
        inverse = {
            "inverse": lambda: operator.inverse(),
            "damped": lambda: operator.damped(0.2).inverse(),
            "power": lambda: operator.power(-1),
        }[route]()
        return jnp.sum(w * inverse.mv(v))

    def dense(a, b):
        a, b = 0.5 * (a + a.T), 0.5 * (b + b.T)
        matrix = jnp.kron(a, b) + (0.2 if route == "damped" else 0.0) * jnp.eye(M * N)
        return w.ravel() @ jnp.linalg.solve(matrix, v.ravel())

    for found, truth in zip(jax.grad(ours, (0, 1))(a, b), jax.grad(dense, (0, 1))(a, b), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-8, atol=1e-10)
    direction = (jnp.asarray(rng.normal(size=(M, M))), jnp.asarray(rng.normal(size=(N, N))))
    np.testing.assert_allclose(
        jax.jvp(ours, (a, b), direction)[1], jax.jvp(dense, (a, b), direction)[1], rtol=1e-8, atol=1e-10
    )


def test_vmap_and_one_compilation(rng):
    lefts = jnp.stack([jnp.asarray(_definite(M, rng)) for _ in range(3)])
    right, v = jnp.asarray(_definite(N, rng)), jnp.asarray(rng.normal(size=(M, N)))
    traces = []

    @eqx.filter_jit
    def solve(lefts, v):
        traces.append(None)
        return jax.vmap(
            lambda a: Kronecker(_tagged(a, PSD), _tagged(right, PSD)).damped(0.1).inverse().mv(v)
        )(lefts)

    for factor in (1.0, 2.0):
        out = solve(lefts, factor * v)
        for i in range(3):
            matrix = np.kron(lefts[i], right) + 0.1 * np.eye(M * N)
            np.testing.assert_allclose(out[i].ravel(), np.linalg.solve(matrix, factor * v.ravel()), rtol=1e-9)
    assert len(traces) == 1


def test_lineax_takes_it(rng):
    """As an operator of a Lineax solve, summed, scaled, and nested in another product."""
    a, b = _definite(M, rng), _definite(N, rng)
    operator = Kronecker(_tagged(a, PSD), _tagged(b, PSD))
    v = jnp.asarray(rng.normal(size=(M, N)))
    x = lx.linear_solve(operator, v, lx.CG(rtol=1e-12, atol=1e-12)).value
    np.testing.assert_allclose(np.kron(a, b) @ x.ravel(), v.ravel(), atol=1e-9)
    np.testing.assert_allclose((2.0 * operator + operator).mv(v), 3 * operator.mv(v), atol=1e-12)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (jnp.ones(3), "`left` must be a real floating-point matrix.*shape \\(3,\\)"),
        (jnp.ones((2, 2), jnp.int32), "`left` must be a real floating-point matrix.*int32"),
        (jnp.ones((2, 2), jnp.complex128), "`left` must be a real"),
        (lx.IdentityLinearOperator(jax.ShapeDtypeStruct((2, 2), jnp.float64)), "`left` must act on vectors"),
        (jnp.ones((2, 2), jnp.float32), "`left` and `right` of `Kronecker` must have one dtype"),
    ],
)
def test_wrong_factors(left, message):
    with pytest.raises(ValueError, match=message):
        Kronecker(left, jnp.eye(2))


def test_wrong_eigenbasis():
    with pytest.raises(ValueError, match=r"found the shapes \(2, 2\), \(2, 2\) and \(2, 3\)"):
        EigenKronecker(jnp.eye(2), jnp.eye(2), jnp.ones((2, 3)))
