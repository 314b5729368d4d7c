"""Sylvester and Lyapunov equations against SciPy, Kronecker products and finite differences."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

from curvax.linear import solve_lyapunov, solve_sylvester
from helpers.sweep import sweep

# Below one block, one block exactly, several blocks, and sizes far apart.
SIZES = [(1, 1), (5, 7), (24, 25), (60, 33)]


def _problem(rng, n, m, dtype=np.float64):
    """Matrices with complex pairs in their spectra, well apart."""
    shifted = lambda k: rng.normal(size=(k, k)) + 2.0 * np.sqrt(k) * np.eye(k)
    return shifted(n).astype(dtype), shifted(m).astype(dtype), rng.normal(size=(n, m)).astype(dtype)


def _kronecker(a, b, c):
    """Column-major vec: (I ⊗ A + Bᵀ ⊗ I) vec X = vec C."""
    matrix = np.kron(np.eye(len(b)), a) + np.kron(b.T, np.eye(len(a)))
    return np.linalg.solve(matrix, c.ravel(order="F")).reshape(c.shape, order="F")


def _laplacian(k, wind=0.0):
    """−u'' + wind u' on (0, 1), central differences."""
    h = 1 / (k + 1)
    up, down = np.diag(np.ones(k - 1), 1), np.diag(np.ones(k - 1), -1)
    return (2 * np.eye(k) - up - down) / h**2 + wind * (up - down) / (2 * h)


def _plane(k, wind=0.0):
    """The same on the unit square."""
    return np.kron(_laplacian(k, wind), np.eye(k)) + np.kron(np.eye(k), _laplacian(k))


def _matrix(a, *tags):
    return lx.MatrixLinearOperator(jnp.asarray(a), tags)


# One program for all matrices of a shape; eager are the tests of failures and of tagged operators.
_sylvester, _lyapunov = eqx.filter_jit(solve_sylvester), eqx.filter_jit(solve_lyapunov)


def _relative(found, truth):
    return np.linalg.norm(np.asarray(found, np.float64) - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize(
    ("n", "m", "dtype"),
    sweep(
        [(*size, dtype) for size in SIZES for dtype in (np.float64, np.float32)],
        always=[(1, 1, np.float64), (5, 7, np.float32), (24, 25, np.float64), (60, 33, np.float64)],
    ),
)
def test_against_scipy(rng, n, m, dtype):
    tol = 1e-13 if dtype == np.float64 else 2e-5
    a, b, c = _problem(rng, n, m, dtype)
    found = _sylvester(a, b, c)
    assert found.dtype == dtype
    wide = [x.astype(np.float64) for x in (a, b, c)]
    assert _relative(found, scipy.linalg.solve_sylvester(*wide)) < tol
    if n * m < 200:
        assert _relative(found, _kronecker(*wide)) < tol
    if n == 24:
        return
    q = wide[0] @ wide[0].T + np.triu(wide[0])
    truth = scipy.linalg.solve_continuous_lyapunov(wide[0], q)
    assert _relative(_lyapunov(a, q.astype(dtype)), truth) < tol


def test_pairs_of_eigenvalues_wherever_they_fall():
    """Rotations of 2 × 2 behind 0 to 3 real eigenvalues: pairs straddle the blocks, or do not."""
    n = 50
    for offset in range(4):
        a = np.diag(np.arange(1.0, n + 1)) + np.triu(np.cos(np.arange(n * n).reshape(n, n)), 1)
        for k in range(offset, n - 1, 2):
            a[k + 1, k + 1], a[k, k + 1], a[k + 1, k] = a[k, k], 3.0, -2.0
        b, c = a[::-1, ::-1].T / 2, np.sin(np.arange(n * n).reshape(n, n))
        found = np.asarray(_sylvester(a, b, c))
        rounding = (np.linalg.norm(a) + np.linalg.norm(b)) * np.linalg.norm(found)
        assert np.linalg.norm(a @ found + found @ b - c) < 1e-14 * rounding


@pytest.mark.parametrize(
    ("tag_a", "tag_b"), [pytest.param(True, True, marks=pytest.mark.thorough), (True, False)]
)
def test_symmetric_operators(rng, tag_a, tag_b):
    a, b, c = _problem(rng, 40, 31)
    a, b = (a + a.T if tag_a else a), (b + b.T if tag_b else b)
    tagged = lambda x, tag: _matrix(x, lx.symmetric_tag) if tag else _matrix(x)
    truth = scipy.linalg.solve_sylvester(a, b, c)
    assert _relative(solve_sylvester(tagged(a, tag_a), tagged(b, tag_b), c), truth) < 1e-13

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(a, b, c):
        return jnp.sum(jnp.sin(solve_sylvester(tagged(a, tag_a), tagged(b, tag_b), c)))

    lam = scipy.linalg.solve_sylvester(a.T, b.T, np.cos(truth))
    for found, bar in zip(gradient(a, b, c), (-lam @ truth.T, -truth.T @ lam, lam), strict=True):
        assert _relative(found, bar) < 1e-11


def test_lyapunov_is_symmetric_where_q_is(rng):
    a, _, c = _problem(rng, 30, 30)
    q = c @ c.T
    found = np.asarray(solve_lyapunov(a, q))
    np.testing.assert_array_equal(found, found.T)
    assert np.linalg.eigvalsh(found).min() > 0
    found = np.asarray(solve_lyapunov(a, c))
    assert _relative(found, scipy.linalg.solve_continuous_lyapunov(a, c)) < 1e-13
    assert not np.allclose(found, found.T)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (27, 26)])
def test_adjoint_in_closed_form(rng, n, m):
    """AᵀΛ + ΛBᵀ = X̄, Ā = −ΛXᵀ, B̄ = −XᵀΛ, C̄ = Λ; the tangent likewise, from SciPy."""
    a, b, c = _problem(rng, n, m)
    bar = rng.normal(size=(n, m))
    da, db, dc = (rng.normal(size=y.shape) for y in (a, b, c))

    @jax.jit
    def both(arguments, bar, tangents):
        x, pullback = jax.vjp(solve_sylvester, *arguments)
        return x, pullback(bar), jax.jvp(solve_sylvester, arguments, tangents)[1]

    x, cotangents, tangent = both((a, b, c), bar, (da, db, dc))
    x, lam = np.asarray(x), scipy.linalg.solve_sylvester(a.T, b.T, bar)
    for found, truth in zip(cotangents, (-lam @ x.T, -x.T @ lam, lam), strict=True):
        assert _relative(found, truth) < 1e-12
    assert _relative(tangent, scipy.linalg.solve_sylvester(a, b, dc - da @ x - x @ db)) < 1e-12


def test_second_derivatives_against_finite_differences(rng):
    """Along a curve on which all arguments move: reverse over reverse, and forward over reverse."""
    a, b, c = map(jnp.asarray, _problem(rng, 4, 3))
    weights, q = jnp.asarray(rng.normal(size=(4, 3))), c @ c.T

    def loss(s):
        x = solve_sylvester(a * s, b + s * s * jnp.eye(3), c * s)
        return jnp.sum(weights * x) ** 2 + jnp.sum(jnp.sin(solve_lyapunov(a + s * a.T, s * q)))

    one, step = jnp.asarray(1.0), 1e-4
    value_and_slope = jax.jit(jax.value_and_grad(loss))
    (above, slope_above), (below, slope_below) = value_and_slope(one + step), value_and_slope(one - step)
    np.testing.assert_allclose(value_and_slope(one)[1], (above - below) / (2 * step), rtol=1e-6)
    second = (slope_above - slope_below) / (2 * step)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(loss)))(one), second, rtol=1e-6)
    forward = jax.jit(lambda s: jax.jvp(jax.grad(loss), (s,), (one,))[1])
    np.testing.assert_allclose(forward(one), second, rtol=1e-6)


def test_one_schur_form_for_value_and_derivatives(rng):
    a, _, c = map(jnp.asarray, _problem(rng, 30, 30))

    def count(fn, *args):
        program = jax.make_jaxpr(jax.value_and_grad(fn, tuple(range(len(args)))))(*args)
        return str(program).count("name=factorise")

    assert count(lambda a, b, c: jnp.sum(solve_sylvester(a, b, c) ** 2), a, a, c) == 2
    assert count(lambda a, q: jnp.sum(solve_lyapunov(a, q) ** 2), a, c) == 1


def test_vmap_and_one_compilation(rng):
    traces = []

    @eqx.filter_jit
    def batched(a, b, c):
        traces.append(None)
        loss = lambda a, b, c: jnp.sum(solve_sylvester(a, b, c) ** 3)
        values = jax.vmap(solve_sylvester, (0, None, 0))(a, b, c)
        return values, jax.vmap(jax.grad(loss), (0, None, 0))(a, b, c)

    for _ in range(2):
        a, c = np.stack([_problem(rng, 26, 26)[0] for _ in range(3)]), rng.normal(size=(3, 26, 5))
        b = _problem(rng, 5, 5)[0]
        values, grads = batched(a, b, c)
        for i in range(3):
            truth = scipy.linalg.solve_sylvester(a[i], b, c[i])
            assert _relative(values[i], truth) < 1e-13
            lam = scipy.linalg.solve_sylvester(a[i].T, b.T, 3 * truth**2)
            assert _relative(grads[i], -lam @ truth.T) < 1e-12
    assert len(traces) == 1


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (2, 0)])
def test_empty(n, m):
    assert solve_sylvester(jnp.eye(n), jnp.eye(m), jnp.zeros((n, m))).shape == (n, m)
    assert solve_lyapunov(jnp.eye(n), jnp.eye(n)).shape == (n, n)


def _singular_problems(rng):
    """(name, A, B, C, a shift of A that makes it regular)."""
    q, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    b, c = np.diag([-3.0, 1.0, 2.0]), rng.normal(size=(6, 3))
    yield "scalar", np.ones((1, 1)), -np.ones((1, 1)), np.ones((1, 1)), 1.0
    yield "normal", q @ np.diag([3.0, 4, 5, 6, 7, 8]) @ q.T, b, c, 0.5
    # The eigenvalues that LAPACK finds are ε^(1/5) away from those of B, and C is in the range.
    jordan = q @ (3.0 * np.eye(6) + np.diag(np.ones(5), 1)) @ q.T
    x = rng.normal(size=(6, 3))
    yield "defective", jordan, b, jordan @ x + x @ b, 2.5
    rotation = np.array([[1.0, 2.0], [-2.0, 1.0]])
    yield "complex", rotation, -rotation.T, np.ones((2, 2)), 0.5
    yield "zero", np.zeros((2, 2)), np.zeros((2, 2)), np.ones((2, 2)), 1.0


def test_no_unique_solution_is_said(rng):
    @jax.jit
    def value_and_pullback(a, b, c):
        found, pullback = jax.vjp(lambda *x: solve_sylvester(*x, throw=False), a, b, c)
        return found, pullback(jnp.ones_like(found))

    for name, a, b, c, shift in _singular_problems(rng):
        found, cotangents = value_and_pullback(a, b, c)
        assert np.all(np.isnan(found)), name
        assert all(np.all(np.isnan(bar)) for bar in cotangents), name
        for call in (solve_sylvester, _sylvester):
            with pytest.raises(
                Exception, match="(?s)no unique solution.*eigenvalue in common.*Shift `A` or `B`"
            ):
                call(a, b, c)
        a = a + shift * np.eye(len(a))
        assert _relative(_sylvester(a, b, c), _kronecker(a, b, c)) < 1e-9, name


def test_no_unique_solution_by_symmetric_and_lyapunov(rng):
    a = np.diag([2.0, -1.0, 1.0])
    for A in (a, _matrix(a, lx.symmetric_tag)):
        assert np.all(np.isnan(solve_lyapunov(A, np.eye(3), throw=False)))
        with pytest.raises(Exception, match="two eigenvalues of `A` add up to zero"):
            solve_lyapunov(A, np.eye(3))
    found = solve_lyapunov(_matrix(a + 3 * np.eye(3), lx.symmetric_tag), np.eye(3))
    np.testing.assert_allclose(found, np.diag([0.1, 0.25, 0.125]), rtol=1e-14)


@pytest.mark.parametrize("distance", [1e-3, 1e-10])
def test_badly_conditioned_is_solved_and_the_error_is_what_it_must_be(rng, distance):
    q, _ = np.linalg.qr(rng.normal(size=(40, 40)))
    a = q @ np.diag(np.r_[1.0 + distance, np.linspace(2, 3, 39)]) @ q.T
    b, x = np.diag(np.r_[-1.0, np.linspace(1, 2, 4)]), rng.normal(size=(40, 5))
    found = _sylvester(a, b, a @ x + x @ b)
    assert _relative(found, x) < 1e-14 / distance


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_said(rng, place, value):
    arguments = [x.copy() for x in _problem(rng, 5, 4)]
    arguments[place][1, 2] = value
    assert np.all(np.isnan(solve_sylvester(*arguments, throw=False)))
    with pytest.raises(Exception, match="an argument holds NaN or infinity"):
        solve_sylvester(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), np.eye(2), np.ones((2, 2))), r"`A`.*square.*\(2, 3\)"),
        ((np.eye(2), np.eye(3), np.ones((3, 2))), r"`C`.*2 × 3.*\(3, 2\)"),
        ((np.eye(2), np.eye(2, dtype=int), np.ones((2, 2))), "`B`.*int64.*astype"),
        ((np.eye(2), np.eye(2), np.ones((2, 2), complex)), "`C`.*complex128.*real one of twice"),
        ((np.eye(2, dtype=np.float32), np.eye(2), np.ones((2, 2))), "one dtype.*`A` float32"),
        ((np.ones((4, 2, 2)), np.eye(2), np.ones((2, 2))), "`A`.*matrix.*jax.vmap"),
        (([[1.0]], np.eye(1), np.eye(1)), "`A`.*array.*list"),
        ((np.eye(2), np.eye(2), (np.ones((2, 1)),)), "`C`.*pair.*tuple of 1"),
        ((np.eye(2), np.eye(2), (np.ones((2, 1)), np.ones((2, 2)))), "equally many columns"),
        ((np.eye(2), np.eye(2), (np.ones((3, 1)), np.ones((2, 1)))), "`A`.*must map vectors"),
        ((np.eye(2), np.eye(2), (np.ones((2, 0)), np.ones((2, 0)))), "no column"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        solve_sylvester(*arguments)


def test_wrong_options():
    eye, pair = np.eye(2), (np.ones((2, 1)), np.ones((2, 1)))
    with pytest.raises(ValueError, match="for a right-hand side of low rank"):
        solve_sylvester(eye, eye, eye, rtol=1e-3)
    with pytest.raises(ValueError, match="`rtol`"):
        solve_sylvester(eye, eye, pair, rtol=0.0)
    with pytest.raises(ValueError, match="`max_steps`"):
        solve_sylvester(eye, eye, pair, max_steps=0)
    with pytest.raises(ValueError, match="`Q`.*shape"):
        solve_lyapunov(eye, np.ones((2, 3)))
    with pytest.raises(ValueError, match="`Q`.*tuple of 2"):
        solve_lyapunov(eye, pair)


@pytest.mark.parametrize(("wind", "rank"), [pytest.param(0.0, 1, marks=pytest.mark.thorough), (30.0, 3)])
def test_low_rank_sylvester(rng, wind, rank):
    """Convection and diffusion; extended Krylov spaces."""
    a, b = _laplacian(120, wind), _laplacian(90, -wind)
    u, v = rng.normal(size=(120, rank)), rng.normal(size=(90, rank))
    inverses = (_matrix(np.linalg.inv(a)), _matrix(np.linalg.inv(b)))
    solution = solve_sylvester(a, b, (u, v), inverses=inverses, rtol=1e-9, max_steps=20)
    x = np.asarray(solution.left @ solution.right.T)
    residual = np.linalg.norm(a @ x + x @ b - u @ v.T) / np.linalg.norm(u @ v.T)
    assert residual <= 1e-9 and int(solution.num_steps) <= 20
    np.testing.assert_allclose(solution.residual_norm, residual, rtol=1e-2)
    error = _relative(x, scipy.linalg.solve_sylvester(a, b, u @ v.T))
    assert error <= float(solution.error_estimate) < 1e-5
    assert 0 < int(solution.rank) < 60
    assert not np.any(solution.left[:, int(solution.rank) :])


@pytest.mark.parametrize(("sign", "wind"), [(1, 20.0), (-1, 0.0)])
def test_low_rank_lyapunov_in_the_plane(rng, sign, wind):
    a, u = sign * _plane(16, wind), rng.normal(size=(256, 2))
    tags = () if wind else (lx.symmetric_tag,)
    inverse = _matrix(np.linalg.inv(a), *tags)
    solution = eqx.filter_jit(solve_lyapunov)(_matrix(a, *tags), (u,), inverse=inverse, max_steps=14)
    truth = scipy.linalg.solve_continuous_lyapunov(a, u @ u.T)
    error = _relative(solution.left @ solution.right.T, truth)
    assert error <= float(solution.error_estimate) and error < 1e-8
    np.testing.assert_array_equal(np.abs(solution.left), np.abs(solution.right))
    rank = int(solution.rank)
    assert np.all(np.sum(solution.left * solution.right, axis=0)[: rank // 2] * sign > 0)


@pytest.mark.thorough
def test_low_rank_from_products_only(rng):
    a, b = 4 * np.eye(80) + _problem(rng, 80, 80)[0] / 10, 2 * np.eye(50) + np.diag(np.ones(49), 1)
    u, v = rng.normal(size=(80, 2)), rng.normal(size=(50, 2))
    for dtype, rtol in ((np.float64, 1e-10), (np.float32, 1e-4)):
        arrays = [x.astype(dtype) for x in (a, b, u, v)]
        solution = solve_sylvester(*arrays[:2], tuple(arrays[2:]), rtol=rtol)
        assert solution.left.dtype == dtype
        x = np.asarray(solution.left @ solution.right.T, np.float64)
        assert _relative(a @ x + x @ b, u @ v.T) < 2 * rtol


def test_low_rank_space_that_is_exhausted(rng):
    """C in an invariant space of one side; repeated columns; a space that becomes the whole one."""
    a, b = np.diag(np.arange(1.0, 13.0)), _problem(rng, 5, 5)[0]
    u, v = np.zeros((12, 2)), rng.normal(size=(5, 2))
    u[3], u[7] = [1.0, 1.0], [2.0, 2.0]
    solution = solve_sylvester(a, b, (u, v), rtol=1e-11)
    truth = scipy.linalg.solve_sylvester(a, b, u @ v.T)
    assert _relative(solution.left @ solution.right.T, truth) < 1e-11


def test_low_rank_failure_is_said(rng):
    a, u = _laplacian(60), rng.normal(size=(60, 1))
    with pytest.raises(Exception, match="did not reach `rtol`.*Allow more `max_steps`"):
        solve_lyapunov(a, (u,), max_steps=3)
    solution = solve_lyapunov(a, (u,), max_steps=3, throw=False)
    assert solution.result == lx.RESULTS.max_steps_reached
    assert float(solution.residual_norm) > 1e-3
    u[0] = np.nan
    solution = solve_lyapunov(a, (u,), max_steps=3, throw=False)
    assert solution.result == lx.RESULTS.nonfinite_input
    # A and −B share an eigenvector that C excites: there is no solution to be found.
    singular = solve_sylvester(
        np.diag([1.0, 2, 3]), -np.eye(2), (np.ones((3, 1)), np.ones((2, 1))), throw=False
    )
    assert singular.result != lx.RESULTS.successful


def test_low_rank_refuses_derivatives(rng):
    a, u = _laplacian(10), jnp.asarray(rng.normal(size=(10, 1)))
    with pytest.raises(TypeError, match="right-hand side as an array"):
        jax.grad(lambda u: jnp.sum(solve_lyapunov(a, (u,)).left ** 2))(u)
