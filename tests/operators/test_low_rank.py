"""Low rank plus diagonal against dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.operators import LowRankPlusDiagonal

N, R = 9, 2
PSD = lx.positive_semidefinite_tag


def _tree(vector, dtype=jnp.float64):
    """A vector of N, or N rows, cut into a matrix, a scalar and an empty leaf."""
    rows = jnp.asarray(vector, dtype)
    rest = rows.shape[1:]
    return {"w": rows[:8].reshape(2, 4, *rest), "b": rows[8], "empty": jnp.zeros((0, *rest), dtype)}


def _flat(tree):
    return np.concatenate([np.asarray(tree[k]).reshape(-1) for k in ("b", "empty", "w")])


def _order(matrix):
    """Rows and columns in the order of the raveled tree: b before w."""
    order = np.r_[8, 0:8]
    return matrix[np.ix_(order, order)]


def _cases(rng, dtype=jnp.float64):
    d, u, v = rng.uniform(0.5, 2.0, N), rng.normal(size=(N, R)), rng.normal(size=(N, R))
    t = lambda x: _tree(x, dtype)  # noqa: E731
    yield "symmetric", LowRankPlusDiagonal(t(d), t(u), tags=PSD), np.diag(d) + u @ u.T
    yield "scalar", LowRankPlusDiagonal(jnp.asarray(0.7, dtype), t(u), tags=PSD), 0.7 * np.eye(N) + u @ u.T
    yield "general", LowRankPlusDiagonal(t(d), t(u), t(v)), np.diag(d) + u @ v.T
    yield "downdate", LowRankPlusDiagonal(t(d + 30.0), t(u), t(-u), PSD), np.diag(d + 30.0) - u @ u.T


def _apply(operator, rows, dtype):
    return np.stack([_flat(operator.mv(_tree(row, dtype))) for row in rows])


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-11), (jnp.float32, 2e-5)])
def test_products_inverse_and_what_is_read_off(rng, dtype, tol):
    for name, operator, matrix in _cases(rng, dtype):
        rows, ordered = rng.normal(size=(3, N)), _order(matrix)
        np.testing.assert_allclose(
            _apply(operator, rows, dtype), (rows @ matrix.T)[:, np.r_[8, 0:8]], rtol=tol, atol=10 * tol
        )
        np.testing.assert_allclose(operator.as_matrix(), ordered, atol=10 * tol, err_msg=name)
        np.testing.assert_allclose(operator.transpose().as_matrix(), ordered.T, atol=10 * tol, err_msg=name)
        np.testing.assert_allclose(
            operator.inverse().as_matrix(), np.linalg.inv(ordered), atol=50 * tol, err_msg=name
        )
        np.testing.assert_allclose(operator.trace(), np.trace(matrix), rtol=10 * tol, err_msg=name)
        np.testing.assert_allclose(lx.diagonal(operator), np.diagonal(ordered), rtol=10 * tol, err_msg=name)
        np.testing.assert_allclose(
            operator.logdet(), np.linalg.slogdet(matrix)[1], rtol=20 * tol, atol=20 * tol
        )
        damped = operator.damped(0.4)
        truth = np.linalg.inv(ordered + 0.4 * np.eye(N))
        np.testing.assert_allclose(damped.inverse().as_matrix(), truth, atol=50 * tol, err_msg=name)
        assert all(
            leaf.dtype == dtype for leaf in jax.tree.leaves(operator.inverse().mv(_tree(rows[0], dtype)))
        )


def test_tags_tell_the_truth(rng):
    for name, operator, _ in _cases(rng):
        for what in (operator, operator.inverse(), operator.transpose(), operator.damped(0.1)):
            dense = np.asarray(what.as_matrix())
            assert not lx.is_symmetric(what) or np.allclose(dense, dense.T), name
            assert not lx.is_positive_semidefinite(what) or np.linalg.eigvalsh(dense).min() > 0, name
        assert lx.is_symmetric(operator) == (name != "general")


@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25, 0.5, 2])
def test_powers(rng, exponent):
    u = rng.normal(size=(N, 3))
    u[:, 2] = u[:, 1]  # rank deficient
    operator = LowRankPlusDiagonal(jnp.asarray(0.3), jnp.asarray(u), tags=PSD)
    values, vectors = np.linalg.eigh(0.3 * np.eye(N) + u @ u.T)
    truth = (vectors * values**exponent) @ vectors.T
    np.testing.assert_allclose(operator.power(exponent).as_matrix(), truth, atol=1e-9)
    with pytest.raises(ValueError, match="needs a scalar `diagonal`"):
        LowRankPlusDiagonal(jnp.ones(N), jnp.asarray(u), tags=PSD).power(exponent)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_inverse_far_below_the_low_rank_part(rng, dtype):
    """Backward stable where nothing is left of Woodbury's difference; also with columns that are zero or repeated."""
    eps = float(jnp.finfo(dtype).eps)
    q = np.linalg.qr(rng.normal(size=(40, 5)))[0]
    u = jnp.asarray(np.c_[q * [1.0, 0.1, 1e-2, 1e-3, 1e-4], np.zeros(40), q[:, 0]], dtype)
    b = jnp.asarray(rng.normal(size=40), dtype)
    for damping in (eps * 10, eps / 10):
        operator = LowRankPlusDiagonal(jnp.asarray(damping, dtype), u, tags=PSD)
        for rhs in (b, operator.mv(b)):
            x = operator.inverse().mv(rhs)
            left = jnp.linalg.norm(operator.mv(x) - rhs)
            assert left <= 50 * eps * 2 * jnp.linalg.norm(x) + 50 * eps * jnp.linalg.norm(rhs)
    assert operator.inverse().inverse() is operator


def test_derivatives_of_the_inverse_in_the_eigenbasis(rng):
    """To second order, in both modes, at equal eigenvalues and with a column of zeros."""
    u = np.linalg.qr(rng.normal(size=(N, 3)))[0] * [1.0, 1.0, 0.0]
    u, b, w = jnp.asarray(u), jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=N))
    v = jnp.asarray(rng.normal(size=(N, 3)))

    def ours(t):
        return w @ LowRankPlusDiagonal(0.5 + t[0], u + t[1] * v).inverse().mv(b + t[2] * w)

    def dense(t):
        left = u + t[1] * v
        return w @ jnp.linalg.solve((0.5 + t[0]) * jnp.eye(N) + left @ left.T, b + t[2] * w)

    t = jnp.zeros(3)
    np.testing.assert_allclose(ours(t), dense(t), rtol=1e-12)
    for derivative in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(
            derivative(jax.grad(ours))(t), derivative(jax.grad(dense))(t), rtol=1e-9, atol=1e-10
        )


def test_singular_is_never_plausible():
    """I + VᵀD⁻¹U is singular exactly when the operator is; so is a zero in D."""
    u = jnp.zeros((4, 1)).at[0, 0].set(1.0)
    assert not np.all(np.isfinite(LowRankPlusDiagonal(jnp.ones(4), u, -u).inverse().mv(jnp.ones(4))))
    assert float(LowRankPlusDiagonal(jnp.ones(4), u, -u).logdet()) == -np.inf
    hole = LowRankPlusDiagonal(jnp.array([1.0, 0.0, 1.0, 1.0]), u).inverse().mv(jnp.ones(4))
    assert not np.all(np.isfinite(hole))


def test_derivatives_against_dense(rng):
    d, u, v = (
        jnp.asarray(rng.uniform(1, 2, N)),
        jnp.asarray(rng.normal(size=(N, R))),
        jnp.asarray(rng.normal(size=(N, R))),
    )
    b, w = jnp.asarray(rng.normal(size=N)), jnp.asarray(rng.normal(size=N))

    def ours(d, u, v):
        operator = LowRankPlusDiagonal(d, u, v)
        return w @ operator.inverse().mv(b) + operator.logdet()

    def dense(d, u, v):
        matrix = jnp.diag(d) + u @ v.T
        return w @ jnp.linalg.solve(matrix, b) + jnp.linalg.slogdet(matrix)[1]

    for found, truth in zip(
        jax.grad(ours, (0, 1, 2))(d, u, v), jax.grad(dense, (0, 1, 2))(d, u, v), strict=True
    ):
        np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-9)
    hessian = lambda f: jax.hessian(lambda t: f(d + t[0], t[1] * u, v))(jnp.array([0.1, 1.2]))  # noqa: E731
    np.testing.assert_allclose(hessian(ours), hessian(dense), rtol=1e-6, atol=1e-8)


def test_vmap_and_one_compilation(rng):
    us, d, b = jnp.asarray(rng.normal(size=(3, N, R))), jnp.full(N, 2.0), jnp.asarray(rng.normal(size=N))
    traces = []

    @eqx.filter_jit
    def solve(us, b):
        traces.append(None)
        return jax.vmap(lambda u: LowRankPlusDiagonal(d, u).inverse().mv(b))(us)

    for factor in (1.0, 2.0):
        out = solve(us, factor * b)
        for i in range(3):
            np.testing.assert_allclose(
                out[i], np.linalg.solve(np.diag(d) + us[i] @ us[i].T, factor * b), rtol=1e-9
            )
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((jnp.ones(4), jnp.ones((5, 2))), r"`diagonal`.*shapes \[\(4,\)\].*\[\(5,\)\]"),
        ((jnp.ones(4), jnp.ones((4, 2)), jnp.ones((4, 3))), r"`right`.*like `left`"),
        ((jnp.ones(4), {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 3))}), "last axis of one length"),
        ((jnp.ones(4), jnp.ones((4, 2), jnp.int32)), "`left`.*int32"),
        ((jnp.ones(4, complex), jnp.ones((4, 2))), "`diagonal`.*complex128"),
        ((2.0, jnp.ones((4, 2))), "`diagonal`.*float"),
        ((jnp.ones(4), {}), "`left` of `LowRankPlusDiagonal` has no array"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRankPlusDiagonal(*arguments)
