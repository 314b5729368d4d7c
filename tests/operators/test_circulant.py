"""Circulant matrices against SciPy and dense NumPy."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

from curvax.operators._circulant import Circulant

SHAPES = [(1,), (2,), (8,), (9,), (4, 3), (2, 3, 4)]
TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def _dense(column):
    """C written out entry by entry, by the definition."""
    column = np.asarray(column)
    indices = list(np.ndindex(column.shape))
    return np.array(
        [
            [column[tuple((a - b) % n for a, b, n in zip(i, j, column.shape, strict=True))] for j in indices]
            for i in indices
        ]
    )


def _regular(shape, rng, dtype=np.float64):
    """A column of a well-conditioned matrix without symmetry."""
    column = rng.uniform(-1, 1, shape)
    column.flat[0] = 0
    column.flat[0] = 1.5 * np.abs(column).sum() + 1
    return column.astype(dtype)


def _reflected(column):
    return np.roll(np.flip(column), (1,) * column.ndim, range(column.ndim))


def _definite(shape, rng):
    column = _regular(shape, rng)
    return (column + _reflected(column)) / 2


def _gathered(column):
    index = np.arange(column.size)
    return column[(index[:, None] - index) % column.size]


def test_the_dense_helper_is_scipys_matrix(rng):
    column = rng.standard_normal(5)
    np.testing.assert_array_equal(_dense(column), scipy.linalg.circulant(column))
    np.testing.assert_array_equal(_gathered(column), scipy.linalg.circulant(column))


@every_dtype
@every_shape
def test_everything_against_the_dense_matrix(shape, dtype, rng):
    column = _regular(shape, rng, dtype)
    vector = rng.standard_normal(shape).astype(dtype)
    matrix = _dense(column).astype(np.float64)
    size = column.size

    @jax.jit
    def compute(column, vector):
        op = Circulant(column)
        inverse, damped = op.inverse(), op.damped(0.3)
        products = [op.mv(vector), op.T.mv(vector), inverse.mv(vector), inverse.T.mv(vector)]
        products += [op.T.inverse().mv(vector), damped.mv(vector)]
        return products, op.as_matrix(), op.trace(), op.logdet(), op.diagonal(), lx.diagonal(op)

    products, written, trace, logdet, *diagonals = compute(column, vector)
    inverted = np.linalg.inv(matrix)
    truths = [matrix, matrix.T, inverted, inverted.T, inverted.T, matrix + 0.3 * np.eye(size)]
    scale = 10 * TOLERANCE[dtype] * np.abs(matrix).max()
    for product, truth in zip(products, truths, strict=True):
        assert product.shape == shape and product.dtype == dtype
        np.testing.assert_allclose(product.ravel(), truth @ vector.ravel(), atol=scale)
    np.testing.assert_allclose(written, matrix, atol=scale)
    np.testing.assert_allclose(trace, np.trace(matrix), rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrix)[1], rtol=10 * TOLERANCE[dtype])
    for diagonal in diagonals:
        np.testing.assert_array_equal(diagonal, np.diag(matrix))


def test_solve_is_scipys(rng):
    column, vector = _regular((12,), rng), rng.standard_normal(12)
    ours = Circulant(column).inverse().mv(jnp.asarray(vector))
    np.testing.assert_allclose(ours, scipy.linalg.solve_circulant(column, vector), rtol=1e-11)


@every_shape
def test_powers_and_eigenvalues_of_a_definite_one(shape, rng):
    column = _definite(shape, rng)
    operator = Circulant(column, lx.positive_semidefinite_tag)
    values, vectors = np.linalg.eigh(_dense(column))
    assert operator.eigenvalues().dtype == np.float64 and operator.eigenvalues().shape == shape
    np.testing.assert_allclose(np.sort(operator.eigenvalues().ravel()), values, rtol=1e-11)
    for exponent in (0.5, -0.5, -1, 2, 0):
        power = operator.power(exponent)
        assert lx.is_positive_semidefinite(power)
        truth = (vectors * values**exponent) @ vectors.T
        np.testing.assert_allclose(power.as_matrix(), truth, atol=1e-11 * max(1, np.abs(truth).max()))


def test_eigenvalues_of_one_without_symmetry_diagonalise_it(rng):
    column = rng.standard_normal(7)
    fourier = np.fft.fft(np.eye(7))
    truth = fourier @ scipy.linalg.circulant(column) @ np.linalg.inv(fourier)
    np.testing.assert_allclose(Circulant(column).eigenvalues(), np.diag(truth), atol=1e-12)


def test_power_cuts_rounding_below_zero_off_and_has_no_inverse_root_there():
    """A Laplacian: one eigenvalue is zero, and comes out of the transform as ± 1e−17."""
    column = np.array([2.0, -1.0, 0, 0, 0, 0, -1.0]) / 3
    operator = Circulant(column, lx.positive_semidefinite_tag)
    root = operator.power(0.5).as_matrix()
    np.testing.assert_allclose(root @ root, scipy.linalg.circulant(column), atol=1e-14)
    assert not np.isfinite(operator.power(-0.5).mv(jnp.ones(7))).any()
    with pytest.raises(ValueError, match="positive semidefinite"):
        Circulant(column).power(0.5)


SINGULAR = {
    "zero": lambda n: np.zeros(n),
    "ones": lambda n: np.full(n, 0.1),
    "laplacian": lambda n: np.eye(n)[0] * 0.6 - 0.3 * (np.eye(n)[1] + np.eye(n)[-1]),
    "centred": lambda n: (lambda c: c - c.mean())(np.exp(-np.arange(n) / 3)),
    "wave": lambda n: np.cos(2 * np.pi * np.arange(n) / n),
}


@jax.jit
def _solve_and_logdet(column):
    vector = jnp.ones_like(column)
    solve = lambda c: Circulant(c).inverse().mv(vector)
    logdet = lambda c: Circulant(c).logdet()
    gradients = jax.grad(lambda c: jnp.sum(solve(c)))(column), jax.grad(logdet)(column)
    return (solve(column), *gradients), logdet(column)


@every_dtype
@pytest.mark.parametrize("size", [3, 8, 127, 4096])
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_is_never_a_plausible_number(kind, size, dtype):
    column = jnp.asarray(SINGULAR[kind](size), dtype)
    arrays, logdet = _solve_and_logdet(column)
    assert not any(np.isfinite(array).any() for array in arrays)
    assert logdet == -np.inf
    # The benign control: every eigenvalue moved away from zero.
    arrays, logdet = _solve_and_logdet(column.at[0].add(1.1 * jnp.sum(jnp.abs(column)) + 1))
    assert all(np.isfinite(array).all() for array in arrays) and np.isfinite(logdet)


def test_one_zero_eigenvalue_among_several_axes(rng):
    column = rng.standard_normal((4, 5))
    operator = Circulant(column - column.mean())
    assert not np.isfinite(operator.inverse().mv(jnp.ones((4, 5)))).any()
    assert operator.logdet() == -np.inf and np.isfinite(Circulant(column).logdet())


def test_derivatives_of_a_solve_and_of_logdet_are_those_of_the_dense_matrix(rng):
    column, tangent = jnp.asarray(_regular((6,), rng)), jnp.asarray(rng.standard_normal(6))
    vector, weights = jnp.asarray(rng.standard_normal(6)), jnp.asarray(rng.standard_normal(6))
    pairs = [
        (
            lambda c: weights @ Circulant(c).inverse().mv(vector),
            lambda c: weights @ jnp.linalg.solve(_gathered(c), vector),
        ),
        (lambda c: Circulant(c).logdet(), lambda c: jnp.linalg.slogdet(_gathered(c))[1]),
    ]
    for ours, dense in pairs:
        got, truth = (
            jax.jit(lambda c, f=f: (jax.grad(f)(c), jax.jvp(f, (c,), (tangent,))[1], jax.hessian(f)(c)))(
                column
            )
            for f in (ours, dense)
        )
        assert np.abs(truth[0]).max() > 1e-4
        for a, b in zip(got, truth, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13)


def test_derivative_of_a_root_in_the_length_scale_of_a_kernel():
    distance = np.minimum(np.arange(9), 9 - np.arange(9))
    vector = jnp.linspace(-1.0, 1.0, 9)

    def root(length):
        column = jnp.exp(-jnp.asarray(distance, float) / length)
        return Circulant(column, lx.positive_semidefinite_tag).power(0.5).mv(vector)

    def dense(length):
        values, vectors = np.linalg.eigh(scipy.linalg.circulant(np.exp(-distance / length)))
        return vectors @ (np.sqrt(values) * (vectors.T @ vector))

    np.testing.assert_allclose(root(2.0), dense(2.0), atol=1e-13)
    difference = (dense(2.0 + 1e-5) - dense(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jacrev(root)(2.0), difference, atol=1e-9)


def test_a_batch_made_inside_vmap_and_one_compilation(rng):
    traces = []

    @jax.jit
    def solve(columns, vectors):
        traces.append(None)
        batch = jax.vmap(lambda c: Circulant(c).damped(0.5).inverse())(columns)
        return jax.vmap(lambda op, v: op.mv(v))(batch, vectors)

    for _ in range(2):
        columns = np.stack([_regular((4, 3), rng) for _ in range(3)])
        vectors = rng.standard_normal((3, 4, 3))
        for ours, column, vector in zip(solve(columns, vectors), columns, vectors, strict=True):
            truth = np.linalg.solve(_dense(column) + 0.5 * np.eye(12), vector.ravel())
            np.testing.assert_allclose(ours.ravel(), truth, atol=1e-13)
    assert len(traces) == 1


def test_lineax_solves_with_it(rng):
    column, vector = _definite((4, 3), rng), jnp.asarray(rng.standard_normal((4, 3)))
    operator = Circulant(column, lx.positive_semidefinite_tag)
    truth = np.linalg.solve(_dense(column), vector.ravel())
    for solver in (lx.CG(rtol=1e-12, atol=1e-12), lx.Cholesky()):
        solution = lx.linear_solve(operator, vector, solver).value
        np.testing.assert_allclose(solution.ravel(), truth, atol=1e-11)


def test_tags_follow_where_they_hold():
    plain = Circulant(jnp.array([3.0, 1.0, 0.5]))
    assert not lx.is_symmetric(plain) and plain.eigenvalues().dtype == np.complex128
    assert not lx.is_symmetric(plain.inverse()) and not lx.is_symmetric(plain.damped(1.0))
    tags = (lx.positive_semidefinite_tag, lx.unit_diagonal_tag, lx.tridiagonal_tag)
    definite = Circulant(jnp.array([1.0, 0.2, 0.2]), tags)
    for operator in (definite.T, definite.inverse(), definite.damped(1.0), definite.power(0.5)):
        assert lx.is_symmetric(operator) and lx.is_positive_semidefinite(operator)
    for operator in (definite.inverse(), definite.damped(1.0), definite.power(0.5)):
        assert not lx.has_unit_diagonal(operator)
    assert lx.is_tridiagonal(definite.damped(1.0)) and not lx.is_tridiagonal(definite.inverse())
    negative = Circulant(jnp.array([-1.0, 0.2, 0.2]), lx.negative_semidefinite_tag)
    assert lx.is_negative_semidefinite(negative.inverse())
    assert not lx.is_negative_semidefinite(negative.damped(9.0)) and lx.is_symmetric(negative.damped(9.0))


@pytest.mark.parametrize(
    "column, found",
    [
        (np.ones(3, complex), "complex128"),
        (np.arange(3), "int64"),
        (np.ones(3, np.float16), "float16"),
        (np.float64(1.0), r"shape \(\)"),
        (np.ones(0), r"shape \(0,\)"),
        (np.ones((2, 0)), r"shape \(2, 0\)"),
    ],
)
def test_wrong_columns_say_so(column, found):
    with pytest.raises(ValueError, match=f"`column`.*{found}"):
        Circulant(column)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), ()])
def test_a_vector_of_another_shape_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"`vector` must have the shape of `column`, \(3,\)"):
        Circulant(jnp.ones(3)).mv(jnp.ones(shape))


def test_a_large_one_is_quick_and_exact(rng):
    """2¹⁷ entries: the matrix would take 137 GB."""
    size = 2**17
    distance = np.minimum(np.arange(size), size - np.arange(size))
    column = np.exp(-0.5 * (distance / 3.0) ** 2)
    operator = Circulant(column, lx.positive_semidefinite_tag).damped(1e-2)
    vector = rng.standard_normal(size)
    # The kernel ends after 40 neighbours: a sum over them is the truth.
    truth = sum(np.exp(-0.5 * (k / 3.0) ** 2) * np.roll(vector, k) for k in range(-40, 41)) + 1e-2 * vector
    np.testing.assert_allclose(operator.mv(jnp.asarray(vector)), truth, atol=1e-12)
    solution = jax.jit(lambda v: operator.inverse().mv(v))(jnp.asarray(vector))
    np.testing.assert_allclose(operator.mv(solution), vector, atol=1e-11)
