"""Toeplitz matrices against SciPy and dense NumPy."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

from curvax.operators._toeplitz import Toeplitz, ToeplitzInverse, _fast_length
from helpers.compilations import compilations
from helpers.sweep import sweep

TOLERANCE = {np.float32: 2e-5, np.float64: 1e-12}
every_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def _regular(size, rng, dtype=np.float64):
    """Column and row of a well-conditioned matrix without symmetry; row[0] is not column[0]."""
    column, row = rng.uniform(-1, 1, (2, size))
    column[0] = 1 + np.abs(column).sum() + np.abs(row).sum()
    return column.astype(dtype), row.astype(dtype)


def _gathered(column, row):
    """The dense matrix, for JAX to differentiate."""
    index = jnp.arange(column.size)
    offset = index[:, None] - index
    return jnp.where(offset >= 0, column[jnp.maximum(offset, 0)], row[jnp.maximum(-offset, 0)])


@pytest.mark.parametrize(
    ("size", "symmetric", "dtype"),
    sweep(
        [(n, s, dtype) for n in (1, 2, 21) for s in (True, False) for dtype in (np.float32, np.float64)],
        always=[
            *((n, s, np.float64) for n in (1, 21) for s in (True, False)),
            *((21, s, np.float32) for s in (True, False)),
        ],
    ),
)
def test_everything_against_the_dense_matrix(size, symmetric, dtype, rng):
    column, row = _regular(size, rng, dtype)
    row = None if symmetric else row
    vector = rng.standard_normal(size).astype(dtype)
    matrix = scipy.linalg.toeplitz(column, row).astype(np.float64)

    @jax.jit
    def compute(column, row, vector):
        op = Toeplitz(column, row)
        inverse, damped = op.inverse(), op.damped(0.3)
        products = [op.mv(vector), op.T.mv(vector), op.T.T.mv(vector), damped.mv(vector)]
        products += [inverse.mv(vector), inverse.T.mv(vector), inverse.T.T.mv(vector)]
        products += [op.T.inverse().mv(vector)]
        written = [op.as_matrix(), inverse.as_matrix(), lx.materialise(inverse).as_matrix()]
        scalars = [op.trace(), op.logdet(), op.T.logdet()]
        return products, written, scalars, op.diagonal(), lx.diagonal(inverse), lx.tridiagonal(inverse)

    products, written, scalars, diagonal, inverse_diagonal, bands = compute(column, row, vector)
    inverted = np.linalg.inv(matrix)
    truths = [
        matrix,
        matrix.T,
        matrix,
        matrix + 0.3 * np.eye(size),
        inverted,
        inverted.T,
        inverted,
        inverted.T,
    ]
    scale = 10 * TOLERANCE[dtype] * np.abs(matrix).max()
    for product, truth in zip(products, truths, strict=True):
        assert product.shape == (size,) and product.dtype == dtype
        tolerance = scale * np.abs(truth).max() / np.abs(matrix).max()
        np.testing.assert_allclose(product, truth @ vector, atol=tolerance)
    for ours, truth in zip(written, [matrix, inverted, inverted], strict=True):
        np.testing.assert_allclose(ours, truth, atol=10 * TOLERANCE[dtype] * np.abs(truth).max())
    np.testing.assert_allclose(scalars[0], np.trace(matrix), rtol=TOLERANCE[dtype])
    np.testing.assert_allclose(scalars[1:], np.linalg.slogdet(matrix)[1], rtol=10 * TOLERANCE[dtype])
    np.testing.assert_array_equal(diagonal, np.diag(matrix))
    np.testing.assert_allclose(inverse_diagonal, np.diag(inverted), rtol=TOLERANCE[dtype])
    for band, offset in zip(bands, (0, -1, 1), strict=True):
        np.testing.assert_allclose(band, np.diag(inverted, offset), atol=TOLERANCE[dtype])


def test_solve_is_scipys_also_for_an_indefinite_one(rng):
    column, row = rng.standard_normal((2, 12))
    column[0] = 0.9
    vector = rng.standard_normal(12)
    truth = scipy.linalg.solve_toeplitz((column, row), vector)
    solution = jax.jit(lambda c, r, v: Toeplitz(c, r).inverse().mv(v))(column, row, vector)
    np.testing.assert_allclose(solution, truth, rtol=1e-8)


KERNELS = {
    "autoregressive": lambda t: 0.95**t / (1 - 0.95**2),
    "gaussian": lambda t: np.exp(-0.5 * (t / 5) ** 2) + 1e-2 * (t == 0),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_a_covariance_of_512_points(kind, rng):
    column, vector = KERNELS[kind](np.arange(512)), rng.standard_normal(512)
    operator = Toeplitz(column, tags=lx.positive_semidefinite_tag)
    solution, logdet = jax.jit(lambda v: (operator.inverse().mv(v), operator.logdet()))(jnp.asarray(vector))
    matrix = scipy.linalg.toeplitz(column)
    np.testing.assert_allclose(matrix @ solution, vector, atol=1e-10)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(matrix)[1], rtol=1e-11)


def test_the_refinement_mends_an_inverse_that_is_slightly_wrong(rng):
    column, vector = KERNELS["gaussian"](np.arange(50)), jnp.asarray(rng.standard_normal(50))
    matrix = scipy.linalg.toeplitz(column)

    @jax.jit
    def solutions(column, vector):
        inverse = Toeplitz(column).inverse()
        wrong = ToeplitzInverse(inverse.matrix, inverse.first, inverse.last * (1 + 1e-6), inverse.tags)
        return wrong._once(vector), wrong.mv(vector)

    plain, refined = (np.abs(matrix @ x - vector).max() for x in solutions(column, vector))
    assert plain > 1e-8 and refined < plain / 1e3


def _shifted(size, rng):
    """Indefinite, singular by a shift by one of its eigenvalues."""
    column = rng.standard_normal(size)
    column[0] -= np.linalg.eigvalsh(scipy.linalg.toeplitz(column))[size // 2]
    return column, column


SINGULAR = {
    "zero": lambda n, rng: (np.zeros(n), np.zeros(n)),
    "constant": lambda n, rng: (np.full(n, 0.1), np.full(n, 0.1)),
    "wave": lambda n, rng: (np.cos(0.7 * np.arange(n)),) * 2,
    "geometric": lambda n, rng: (0.7 ** np.arange(n), 0.7 ** -np.arange(n, dtype=float)),
    "shifted": _shifted,
    "nilpotent": lambda n, rng: (np.eye(n)[1], np.zeros(n)),
}


@jax.jit
def _solve_and_logdet(column, row, vector):
    solve = lambda c: Toeplitz(c, row).inverse().mv(vector)
    logdet = lambda c: Toeplitz(c, row).logdet()
    gradients = jax.grad(lambda c: jnp.sum(solve(c)))(column), jax.grad(logdet)(column)
    return (solve(column), Toeplitz(column, row).inverse().T.mv(vector), *gradients), logdet(column)


@every_dtype
@pytest.mark.parametrize("size", sweep([3, 33], always=[3]))
@pytest.mark.parametrize("kind", SINGULAR)
def test_singular_is_never_a_plausible_number(kind, size, dtype, rng):
    column, row = (jnp.asarray(part, dtype) for part in SINGULAR[kind](size, rng))
    vector = jnp.asarray(rng.standard_normal(size), dtype)
    arrays, logdet = _solve_and_logdet(column, row, vector)
    assert not any(np.isfinite(array).any() for array in arrays)
    assert np.isnan(logdet) or logdet == -np.inf
    # The benign control: a diagonal that dominates.
    dominant = column.at[0].add(10 * (jnp.abs(column) + jnp.abs(row)).sum() + 1)
    arrays, logdet = _solve_and_logdet(dominant, row, vector)
    assert all(np.isfinite(array).all() for array in arrays) and np.isfinite(logdet)


def test_a_vanishing_leading_minor_of_a_regular_matrix_is_refused():
    """Minors 0 and a² − a² = 0, with rounding and without."""

    @jax.jit
    def solution_and_logdet(column):
        operator = Toeplitz(column)
        return operator.inverse().mv(jnp.ones(column.size)), operator.logdet()

    for column in ([0.0, 1.0, 0.0, 0.5], [0.3, 0.1 * 3, 1.0, 0.0], [1.0, 1.0, 0.5, 0.2]):
        assert abs(np.linalg.det(scipy.linalg.toeplitz(column))) > 0.03
        solution, logdet = solution_and_logdet(jnp.array(column))
        assert np.isnan(solution).all() and np.isnan(logdet)
    assert solution_and_logdet(jnp.array([1.0, 1.0]))[1] == -np.inf


@pytest.mark.parametrize("size", [1, 6])
def test_derivatives_are_those_of_the_dense_matrix(size, rng):
    column, row = map(jnp.asarray, _regular(size, rng))
    tangents = tuple(jnp.asarray(rng.standard_normal((2, size))))
    vector, weights = jnp.asarray(rng.standard_normal((2, size)))

    def both(solve, logdet):
        """A scalar in which the solve and the determinant meet: its second derivatives mix them."""
        return jnp.sin(weights @ solve) + logdet**2

    def ours(c, r):
        return both(Toeplitz(c, r).inverse().mv(vector), Toeplitz(c, r).logdet())

    def dense(c, r):
        matrix = _gathered(c, r)
        return both(jnp.linalg.solve(matrix, vector), jnp.linalg.slogdet(matrix)[1])

    def derivatives(value):
        def compute(*at):
            tangent = jax.jvp(value, at, tangents)[1]
            return jax.grad(value, (0, 1))(*at), tangent, jax.hessian(value, (0, 1))(*at)

        return jax.tree.leaves(jax.jit(compute)(column, row))

    got, truth = derivatives(ours), derivatives(dense)
    assert np.abs(truth[0]).max() > 1e-4
    for a, b in zip(got, truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_derivative_of_a_likelihood_in_the_length_scale(rng):
    """A symmetric one, in both modes: −½ yᵀK⁻¹y − ½ log det K of a Gaussian process."""
    distance, values = jnp.arange(40.0), jnp.asarray(rng.standard_normal(40))

    def likelihood(length):
        kernel = Toeplitz(jnp.exp(-0.5 * (distance / length) ** 2)).damped(0.1)
        return -0.5 * (values @ kernel.inverse().mv(values) + kernel.logdet())

    def dense(length):
        column = np.exp(-0.5 * (distance / length) ** 2)
        matrix = scipy.linalg.toeplitz(column) + 0.1 * np.eye(40)
        return -0.5 * (values @ np.linalg.solve(matrix, values) + np.linalg.slogdet(matrix)[1])

    difference = (dense(3.0 + 1e-5) - dense(3.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.jit(likelihood)(3.0), dense(3.0), rtol=1e-12)
    derivatives = jax.jit(lambda length: (jax.grad(likelihood)(length), jax.jacfwd(likelihood)(length)))
    np.testing.assert_allclose(derivatives(3.0), [difference, difference], rtol=1e-6)


def test_a_batch_made_inside_vmap_and_one_compilation(rng):
    traces = []

    @jax.jit
    def solve(columns, rows, vectors):
        traces.append(None)
        batch = jax.vmap(lambda c, r: Toeplitz(c, r).damped(0.5).inverse())(columns, rows)
        return jax.vmap(lambda op, v: op.mv(v))(batch, vectors)

    for _ in range(2):
        columns, rows = np.stack([_regular(9, rng) for _ in range(3)], axis=1)
        vectors = rng.standard_normal((3, 9))
        for ours, column, row, vector in zip(
            solve(columns, rows, vectors), columns, rows, vectors, strict=True
        ):
            truth = np.linalg.solve(scipy.linalg.toeplitz(column, row) + 0.5 * np.eye(9), vector)
            np.testing.assert_allclose(ours, truth, atol=1e-13)
    assert len(traces) == 1


def test_calls_outside_of_jit_compile_once(rng):
    """A loop outside of a compiled function is compiled in every call."""

    def use(column):
        operator = Toeplitz(column)
        return operator.inverse().mv(column), operator.logdet()

    columns = [_regular(7, rng)[0] for _ in range(2)]
    with compilations() as seen:
        use(columns[0])
        first = len(seen)
        use(columns[1])
    assert first > 0 and len(seen) == first


def test_lineax_solves_with_it_and_takes_its_inverse_as_preconditioner(rng):
    column, vector = KERNELS["gaussian"](np.arange(60)), jnp.asarray(rng.standard_normal(60))
    operator = Toeplitz(column, tags=lx.positive_semidefinite_tag)
    truth = np.linalg.solve(scipy.linalg.toeplitz(column), vector)
    direct = lx.linear_solve(operator, vector, lx.Cholesky()).value
    np.testing.assert_allclose(direct, truth, rtol=1e-9)
    options = {"preconditioner": operator.inverse()}
    solver = lx.CG(rtol=1e-9, atol=1e-9, max_steps=3)
    preconditioned = lx.linear_solve(operator, vector, solver, options=options).value
    np.testing.assert_allclose(preconditioned, truth, rtol=1e-8)


def test_tags_follow_where_they_hold():
    plain = Toeplitz(jnp.array([3.0, 1.0]), jnp.array([3.0, 0.5]))
    assert not any(lx.is_symmetric(op) for op in (plain, plain.T, plain.inverse(), plain.damped(1.0)))
    tags = (lx.positive_semidefinite_tag, lx.unit_diagonal_tag, lx.tridiagonal_tag)
    definite = Toeplitz(jnp.array([1.0, 0.2, 0.0]), tags=tags)
    for operator in (definite, definite.T, definite.inverse(), definite.inverse().T, definite.damped(1.0)):
        assert lx.is_symmetric(operator) and lx.is_positive_semidefinite(operator)
        assert not lx.is_negative_semidefinite(operator) and not lx.is_diagonal(operator)
    assert not lx.has_unit_diagonal(definite.inverse()) and not lx.has_unit_diagonal(definite.damped(1.0))
    assert lx.is_tridiagonal(definite.damped(1.0)) and not lx.is_tridiagonal(definite.inverse())
    negative = Toeplitz(jnp.array([-1.0, 0.2, 0.0]), tags=lx.negative_semidefinite_tag)
    assert lx.is_negative_semidefinite(negative.inverse())
    assert not lx.is_negative_semidefinite(negative.damped(9.0)) and lx.is_symmetric(negative.damped(9.0))


def test_a_triangular_one_has_a_triangular_inverse():
    lower = Toeplitz(jnp.array([2.0, 1.0, 0.5]), jnp.zeros(3), lx.lower_triangular_tag)
    assert lx.is_lower_triangular(lower.inverse()) and lx.is_upper_triangular(lower.inverse().T)
    assert lx.is_upper_triangular(lower.T.inverse()) and not lx.is_lower_triangular(lower.T)
    written = jax.jit(lambda op: op.inverse().as_matrix())(lower)
    np.testing.assert_allclose(np.triu(written, 1), 0, atol=1e-16)


@pytest.mark.parametrize(
    "column, row, found",
    [
        (np.ones(3, complex), None, "`column`.*complex128"),
        (np.arange(3), None, "`column`.*int64"),
        (np.ones(3), np.arange(3), "`row`.*int64"),
        (np.ones((2, 2)), None, r"`column`.*shape \(2, 2\)"),
        (np.ones(0), None, r"`column`.*shape \(0,\)"),
        (np.ones(3), np.ones(2), r"`row`.*float64\[2\] and float64\[3\]"),
        (np.ones(3), np.ones(3, np.float32), r"`row`.*float32\[3\] and float64\[3\]"),
    ],
)
def test_wrong_input_says_so(column, row, found):
    with pytest.raises(ValueError, match=found):
        Toeplitz(column, row)


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 3), ()])
def test_a_vector_of_another_shape_does_not_broadcast(shape):
    operator = Toeplitz(jnp.array([2.0, 1.0, 0.0]))
    for product in (operator.mv, operator.inverse().mv):
        with pytest.raises(ValueError, match=r"`vector` must have the shape of `column`, \(3,\)"):
            product(jnp.ones(shape))


def test_the_inverse_is_not_written_out_silently():
    column = jnp.zeros(5000).at[0].set(1)
    inverse = ToeplitzInverse(Toeplitz(column), column, column[::-1], frozenset())
    for densify in (inverse.as_matrix, lambda: lx.materialise(inverse)):
        with pytest.raises(ValueError, match="over the limit"):
            densify()


def test_lengths_of_the_transforms_are_the_least_that_are_fast():
    fast = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for minimum in range(1, 1500):
        assert _fast_length(minimum) == next(n for n in fast if n >= minimum)
