"""Sums of Kronecker products against dense matrices."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.linear import CG, Auto, Method
from curvax.operators import Kronecker, KroneckerSum, nearest_kronecker
from helpers.dense import rotated

M, N = 3, 4
PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag


def _tagged(matrix, tag=(), dtype=jnp.float64):
    return lx.MatrixLinearOperator(jnp.asarray(matrix, dtype), tag)


def _parts(rng):
    definite = [rotated(rng.uniform(0.5, 3.0, size), rng) for size in (M, N)]
    symmetric = [rotated(rng.uniform(-0.4, 0.4, size), rng) for size in (M, N)]
    return definite, symmetric


def _cases(rng, dtype=jnp.float64):
    (a, b), (c, d) = _parts(rng)
    one = _tagged(np.eye(M), PSD, dtype), _tagged(np.eye(N), PSD, dtype)
    yield "one term", KroneckerSum((_tagged(a, PSD, dtype), _tagged(b, PSD, dtype))), np.kron(a, b)
    pair = KroneckerSum(
        (_tagged(c, SYMMETRIC, dtype), _tagged(d, SYMMETRIC, dtype)),
        (_tagged(a, PSD, dtype), _tagged(b, PSD, dtype)),
    )
    yield "indefinite and definite", pair, np.kron(c, d) + np.kron(a, b)
    sylvester = KroneckerSum((_tagged(a, PSD, dtype), one[1]), (one[0], _tagged(b, PSD, dtype)))
    yield "Sylvester", sylvester, np.kron(a, np.eye(N)) + np.kron(np.eye(M), b)
    m, n = (lx.IdentityLinearOperator(jax.ShapeDtypeStruct((size,), dtype)) for size in (M, N))
    shifted = c - 2 * np.eye(M)
    both = (m, _tagged(d, SYMMETRIC, dtype)), (_tagged(shifted, SYMMETRIC, dtype), n)
    yield "indefinite Sylvester", KroneckerSum(*both), np.kron(np.eye(M), d) + np.kron(shifted, np.eye(N))
    identities = KroneckerSum((m, n), (m, _tagged(b, PSD, dtype)))
    yield "identities", identities, np.eye(M * N) + np.kron(np.eye(M), b)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-10), (jnp.float32, 2e-4)])
def test_against_the_dense_matrix(rng, dtype, tol):
    for name, operator, matrix in _cases(rng, dtype):
        close = {"rtol": tol, "atol": tol, "err_msg": name}
        np.testing.assert_allclose(operator.as_matrix(), matrix, **close)
        np.testing.assert_allclose(operator.transpose().as_matrix(), matrix.T, **close)
        np.testing.assert_allclose(operator.trace(), np.trace(matrix), **close)
        np.testing.assert_allclose(operator.logdet(), np.linalg.slogdet(matrix)[1], **close)
        np.testing.assert_allclose(operator.diagonal(), np.diag(matrix), **close)
        inverse = operator.inverse()
        np.testing.assert_allclose(inverse.as_matrix(), np.linalg.inv(matrix), **close)
        assert inverse.mv(jnp.ones((M, N), dtype)).dtype == dtype
        damped = operator.damped(0.3)
        np.testing.assert_allclose(damped.as_matrix(), matrix + 0.3 * np.eye(M * N), **close)
        assert lx.is_positive_semidefinite(damped) == lx.is_positive_semidefinite(operator)
        if name in ("identities", "indefinite Sylvester"):
            turned = np.linalg.inv(matrix + 0.3 * np.eye(M * N))
            np.testing.assert_allclose(damped.power(-1).as_matrix(), turned, **close)
            np.testing.assert_allclose(damped.logdet(), -np.linalg.slogdet(turned)[1], **close)


def test_transforms(rng):
    """Under `jit` and `vmap`, and the derivative of the inverse and of the determinant."""
    (a, b), (c, d) = _parts(rng)
    vector = jnp.asarray(rng.normal(size=(M, N)))

    def make(scale):
        return KroneckerSum(
            (_tagged(a, PSD), _tagged(b, PSD)), (_tagged(scale * c, SYMMETRIC), _tagged(d, SYMMETRIC))
        )

    def value(scale):
        return jnp.sum(make(scale).inverse().mv(vector) ** 2) + make(scale).logdet()

    def dense(scale):
        matrix = jnp.asarray(np.kron(a, b)) + scale * jnp.asarray(np.kron(c, d))
        return jnp.sum(jnp.linalg.solve(matrix, vector.ravel()) ** 2) + jnp.linalg.slogdet(matrix)[1]

    scales = jnp.array([0.5, 1.0])
    np.testing.assert_allclose(jax.jit(jax.vmap(value))(scales), jax.vmap(dense)(scales), rtol=1e-10)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(value))(scales), jax.vmap(jax.grad(dense))(scales), rtol=1e-8
    )


def test_no_structure_is_said_and_auto_goes_on(rng):
    (a, b), (c, d) = _parts(rng)
    terms = [(_tagged(a, PSD), _tagged(b, PSD))] * 2 + [(_tagged(c @ c, PSD), _tagged(d @ d, PSD))]
    operator = KroneckerSum(*terms)
    for method in ("inverse", "logdet"):
        with pytest.raises(ValueError, match=rf"{method}\(\).*3 terms.*nearest\(\)"):
            getattr(operator, method)()
    vector = jnp.asarray(rng.normal(size=(M, N)))
    truth = np.linalg.solve(2 * np.kron(a, b) + np.kron(c @ c, d @ d), vector.ravel())
    solution = lx.linear_solve(operator, vector, Auto(rtol=1e-10, dense_size=0, fallback_size=0))
    assert Method(int(solution.stats["method"])) == Method.cg
    np.testing.assert_allclose(solution.value.ravel(), truth, rtol=1e-8)
    # The nearest product as a preconditioner.
    options = {"preconditioner": operator.nearest().inverse()}
    solution = lx.linear_solve(operator, vector, CG(rtol=1e-10), options=options)
    assert int(solution.stats["num_steps"]) <= 8
    np.testing.assert_allclose(solution.value.ravel(), truth, rtol=1e-8)
    pair = KroneckerSum(*terms[1:])
    solution = lx.linear_solve(pair, vector, Auto(rtol=1e-10))
    assert Method(int(solution.stats["method"])) == Method.structured


def test_singular_base_gives_nan(rng):
    zero = np.diag([1.0, 0.0, 1.0])
    operator = KroneckerSum(
        (_tagged(zero, PSD), _tagged(np.eye(N), PSD)),
        (_tagged(zero, SYMMETRIC), _tagged(np.eye(N), SYMMETRIC)),
    )
    assert not np.any(np.isfinite(operator.inverse().mv(jnp.ones((M, N)))))


def test_nearest(rng):
    """Exact where the matrix is one; else no worse than the best of SciPy's rearranged singular values."""
    a, b = rng.normal(size=(2, 3)), rng.normal(size=(4, 5))
    found = nearest_kronecker(jnp.asarray(np.kron(a, b)), (2, 3))
    np.testing.assert_allclose(found.as_matrix(), np.kron(a, b), atol=1e-12)
    matrix = rng.normal(size=(8, 15))
    for rank in (1, 2, 6):
        found = nearest_kronecker(jnp.asarray(matrix), (2, 3), rank=rank)
        blocks = [matrix[4 * i : 4 * i + 4, 5 * j : 5 * j + 5].ravel() for i in range(2) for j in range(3)]
        s = np.linalg.svd(np.stack(blocks), compute_uv=False)
        error = np.linalg.norm(found.as_matrix() - matrix)
        np.testing.assert_allclose(error, np.sqrt(np.sum(s[rank:] ** 2)), atol=1e-10)
    whole = rotated(rng.uniform(0.1, 2.0, M * N), rng)
    found = nearest_kronecker(_tagged(whole, PSD), (M, M))
    assert lx.is_positive_semidefinite(found.left)
    assert lx.is_positive_semidefinite(found.right)
    for factor in (found.left, found.right):
        assert np.linalg.eigvalsh(factor.as_matrix()).min() >= -1e-12
    terms = [(rng.normal(size=(M, M)), rng.normal(size=(N, N))) for _ in range(3)]
    total = KroneckerSum(*((jnp.asarray(x), jnp.asarray(y)) for x, y in terms))
    direct = nearest_kronecker(total.as_matrix(), (M, M))
    np.testing.assert_allclose(total.nearest().as_matrix(), direct.as_matrix(), atol=1e-10)


def test_errors(rng):
    a, b = jnp.eye(2), jnp.eye(3)
    with pytest.raises(ValueError, match="at least one term"):
        KroneckerSum()
    with pytest.raises(ValueError, match="pair"):
        KroneckerSum(a)
    with pytest.raises(ValueError, match="one shape"):
        KroneckerSum((a, b), (b, a))
    with pytest.raises(ValueError, match="one dtype"):
        KroneckerSum((a, b), (a.astype(jnp.float32), b.astype(jnp.float32)))
    for shape in ((4, 2), (2, 4), (0, 2), (2,)):
        with pytest.raises(ValueError, match="left_shape"):
            nearest_kronecker(jnp.eye(6), shape)
    with pytest.raises(ValueError, match="`rank`.*from 1 to 4"):
        nearest_kronecker(jnp.eye(6), (2, 2), rank=5)
    with pytest.raises(ValueError, match="real floating-point"):
        nearest_kronecker(jnp.eye(6, dtype=int), (2, 2))
    assert isinstance(KroneckerSum(Kronecker(a, b)).terms[0], Kronecker)
