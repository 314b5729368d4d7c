"""Diagonal preconditioners against the diagonals of dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax as cx
from curvax.linear import jacobi
from helpers.dense import rotated

N = 30
PSD = lx.positive_semidefinite_tag


def _tree(vector, dtype=jnp.float64):
    """A vector of N cut into a matrix, a scalar, nothing and an empty leaf."""
    v = jnp.asarray(vector, dtype)
    return {"w": v[1:].reshape(1, N - 1), "b": v[0], "none": None, "empty": jnp.zeros((0, 2), dtype)}


def _flat(tree):
    return jnp.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _operator(matrix, dtype=jnp.float64, tags=PSD):
    """Raveled leaves are in the order of the matrix: b, empty, w."""
    matrix = jnp.asarray(matrix, dtype)
    structure = jax.eval_shape(lambda: _tree(matrix[0], dtype))
    return lx.FunctionLinearOperator(lambda v: _tree(matrix @ _flat(v), dtype), structure, tags)


def _scaled(rng, spread=3.0):
    """A well conditioned matrix in variables of very different scales."""
    scales = 10.0 ** rng.uniform(-spread, spread, N)
    return scales[:, None] * rotated(rng.uniform(0.5, 2.0, N), rng) * scales


def _diagonal(preconditioner):
    """Of the matrix, not of its inverse."""
    return 1 / np.asarray(lx.diagonal(preconditioner), np.float64)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-12), (jnp.float32, 1e-5)])
def test_exact_diagonal_of_products(dtype, tol, rng):
    matrix = _scaled(rng, 1.0)
    P = jacobi(_operator(matrix, dtype), damping=0.3)
    np.testing.assert_allclose(_diagonal(P), np.diag(matrix) + 0.3, rtol=tol)
    vector = rng.standard_normal(N)
    product = P.mv(_tree(vector, dtype))
    np.testing.assert_allclose(_flat(product), vector / (np.diag(matrix) + 0.3), rtol=10 * tol)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
    assert P.in_structure() == P.out_structure() == _operator(matrix, dtype).in_structure()
    assert lx.is_positive_semidefinite(P) and lx.is_symmetric(P) and lx.is_diagonal(P)


def test_structures_are_read_off(rng):
    """No product with what has entries, inside of sums, multiples and dampings; one with what is tagged diagonal."""
    matrix = jnp.asarray(_scaled(rng, 1.0))
    products = []

    def twice(v):
        products.append(None)
        return 2.0 * v

    structure = jax.ShapeDtypeStruct((N,), jnp.float64)
    diagonal = lx.FunctionLinearOperator(twice, structure, lx.diagonal_tag)
    low_rank = cx.operators.LowRankPlusDiagonal(jnp.ones(N), jnp.ones((N, 1)))
    parts = lx.MatrixLinearOperator(matrix, PSD) * 3.0 + lx.DiagonalLinearOperator(jnp.arange(1.0, N + 1))
    parts = parts + -low_rank / 4.0 + lx.IdentityLinearOperator(structure)
    traced = len(products)
    system = lx.TaggedLinearOperator(cx.operators.Damped(parts + diagonal, 0.5), PSD)
    truth = 3 * np.diag(matrix) + np.arange(1, N + 1) - 0.5 + 1 + 2 + 0.5
    np.testing.assert_allclose(_diagonal(jacobi(system, damping=0.1)), truth + 0.1, rtol=1e-12)
    assert len(products) - traced <= 1
    # Whatever the size.
    many = lx.IdentityLinearOperator(jax.ShapeDtypeStruct((10**5,), jnp.float32))
    assert jacobi(cx.operators.Damped(many, 1.0)).in_size() == 10**5


def test_scales_are_undone(rng):
    matrix = _scaled(rng)
    vector = matrix @ rng.standard_normal(N)
    solver = cx.linear.MINRES(1e-10, max_steps=20_000)
    plain, ours = (
        lx.linear_solve(_operator(matrix), _tree(vector), solver, options=options, throw=False)
        for options in ({}, {"preconditioner": jacobi(_operator(matrix))})
    )
    assert ours.result == lx.RESULTS.successful
    assert int(ours.stats["num_steps"]) < 2 * N < int(plain.stats["num_steps"])
    # Within the factor n of the best diagonal, here the one that made the matrix.
    root = np.sqrt(np.diag(matrix))
    assert np.linalg.cond(matrix / np.outer(root, root)) < 4 * N


def test_it_can_be_harmful(rng, key):
    """As its documentation says: nothing where the diagonal is constant, noise where the probes are few."""
    values, vectors = np.geomspace(1.0, 1e-3, N), rotated(np.ones(N), rng)
    hadamard = np.linalg.qr(np.fft.fft(np.eye(N)).real + np.fft.fft(np.eye(N)).imag)[0]
    constant = (hadamard * values) @ hadamard.T
    exact = _diagonal(jacobi(_operator(constant)))
    few = _diagonal(jacobi(_operator(constant), num_probes=2, key=key))
    assert vectors.shape == (N, N)
    cond = lambda d: np.linalg.cond(constant / np.sqrt(np.outer(d, d)))  # noqa: E731
    assert cond(few) > 1.5 * np.linalg.cond(constant)
    assert 0.3 < cond(exact) / np.linalg.cond(constant) < 3


def test_estimate_is_unbiased_and_its_error_as_documented(rng, key):
    matrix, num_probes = rotated(rng.uniform(1.0, 3.0, N), rng), 50
    outside = np.sqrt(np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2)
    keys = jax.random.split(key, 200)
    estimate = jax.jit(
        jax.vmap(lambda k: lx.diagonal(jacobi(_operator(matrix), num_probes=num_probes, key=k)))
    )
    errors = 1 / np.asarray(estimate(keys)) - np.diag(matrix)
    # 200 runs: the mean within 4 standard errors, the deviation within 25 %.
    deviation = outside / np.sqrt(num_probes)
    assert np.all(np.abs(errors.mean(axis=0)) < 4 * deviation / np.sqrt(200))
    np.testing.assert_allclose(errors.std(axis=0), deviation, rtol=0.25)


def test_estimate_stays_positive_definite(rng, key):
    """Where the estimate alone is negative, and where a row is zero."""
    factor = rng.standard_normal((N, 3))
    factor[4] = 0.0
    matrix = factor @ factor.T
    signs = np.where(rng.random((400, N)) < 0.5, 1.0, -1.0)
    assert np.any(signs * (signs @ matrix) < 0)
    for k in jax.random.split(key, 5):
        inverse = np.asarray(lx.diagonal(jacobi(_operator(matrix), num_probes=1, key=k)))
        assert np.all(np.isfinite(inverse)) and np.all(inverse > 0)
        # (A²)_ii / ‖A‖_F is a bound from below of A_ii.
        assert np.all(np.sum(matrix**2, axis=1) / np.linalg.norm(matrix) <= np.diag(matrix) + 1e-12)
    np.testing.assert_allclose(lx.diagonal(jacobi(_operator(matrix)))[4], 1 / np.diag(matrix).max())


def test_indefinite_negative_zero_and_nan(rng):
    signs = np.where(np.arange(N) % 2 == 0, -1.0, 1.0)
    indefinite = np.diag(signs * np.arange(1.0, N + 1)) + 0.1
    found = _diagonal(jacobi(_operator(indefinite, tags=lx.symmetric_tag)))
    np.testing.assert_allclose(found, np.abs(np.diag(indefinite)))
    negative = _operator(-np.eye(N), tags=lx.negative_semidefinite_tag)
    np.testing.assert_allclose(_diagonal(jacobi(negative)), 1.0)
    np.testing.assert_allclose(_diagonal(jacobi(_operator(np.zeros((N, N))))), 1.0)
    tiny = jacobi(_operator(1e-300 * np.eye(N)))
    np.testing.assert_allclose(_diagonal(tiny), 1e-300)
    broken = np.eye(N)
    broken[2, 2] = np.nan
    found = np.asarray(lx.diagonal(jacobi(lx.MatrixLinearOperator(jnp.asarray(broken), PSD))))
    assert np.isnan(found[2]) and np.all(found[[0, 1]] == 1)


def test_gradients_of_a_solve_are_untouched_and_one_compilation(rng, key):
    matrix, b, w = jnp.asarray(_scaled(rng, 0.5)), *(jnp.asarray(rng.standard_normal(N)) for _ in range(2))
    traces = []

    @jax.jit
    def gradient(t):
        traces.append(None)

        def value(t, **options):
            system = _operator(matrix + t * jnp.eye(N))
            P = jacobi(system, **options)
            solution = lx.linear_solve(
                system, _tree(b), cx.linear.CG(1e-11), options={"preconditioner": P}
            ).value
            return w @ _flat(solution)

        return jax.grad(value)(t), jax.grad(lambda t: value(t, num_probes=9, key=key, damping=t))(t)

    for t in (0.1, 0.3):
        inverse = np.linalg.inv(matrix + t * np.eye(N))
        for found in gradient(t):
            np.testing.assert_allclose(found, -w @ inverse @ inverse @ b, rtol=1e-7)
    assert len(traces) == 1


def test_vmap(rng, key):
    matrices = jnp.stack([jnp.asarray(_scaled(rng, 1.0)) for _ in range(3)])
    batch = eqx.filter_vmap(lambda m: jacobi(lx.MatrixLinearOperator(m, PSD)))(matrices)
    products = eqx.filter_vmap(lambda P: P.mv(jnp.ones(N)))(batch)
    np.testing.assert_allclose(products, 1 / np.diagonal(matrices, axis1=1, axis2=2), rtol=1e-12)


SYSTEM = lx.MatrixLinearOperator(jnp.eye(4), PSD)
LARGE = lx.FunctionLinearOperator(lambda v: v, jax.ShapeDtypeStruct((5000,), jnp.float32), PSD)


@pytest.mark.parametrize(
    ("operator", "options", "message"),
    [
        (SYSTEM, {"num_probes": 3}, r"`key` of `jacobi`.*jax.random.key\(0\).*found None"),
        (SYSTEM, {"num_probes": 0, "key": 1}, "`num_probes` of `jacobi` must be at least 1, found 0"),
        (SYSTEM, {"num_probes": 1.5, "key": 1}, "`num_probes`.*Python integer, found float"),
        (SYSTEM, {"damping": -0.1}, "`damping` must not be negative, found -0.1"),
        (LARGE, {}, "`jacobi` would need 5000 products.*`num_probes=100"),
        (lx.MatrixLinearOperator(jnp.ones((3, 4))), {}, "`operator` of `jacobi` must be square"),
        (lx.MatrixLinearOperator(jnp.eye(4)), {}, "`operator`.*must be tagged `lx.symmetric_tag`"),
        (lx.MatrixLinearOperator(jnp.eye(4, dtype=complex), PSD), {}, "`operator`.*real.*found complex128"),
    ],
)
def test_wrong_arguments(operator, options, message):
    with pytest.raises(ValueError, match=message):
        jacobi(operator, **options)
