"""Truncated spectra against NumPy's SVD, eigenvectors and pseudo-inverses."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.linear import TruncatedSpectrum
from helpers.dense import rotated

N = 10
PSD = lx.positive_semidefinite_tag
NSD = lx.negative_semidefinite_tag
KEY = jax.random.key(0)


def _tree(v):
    """A vector cut into a matrix, a scalar, nothing and an empty leaf."""
    return {"w": v[1:].reshape(1, -1), "b": v[0], "none": None, "empty": jnp.zeros((0, 2), v.dtype)}


def _flat(tree):
    return jnp.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _operator(matrix, tags=()):
    structure = jax.eval_shape(lambda: _tree(matrix[0]))
    return lx.FunctionLinearOperator(lambda v: _tree(matrix @ _flat(v)), structure, tags)


def _general(values, rng, rows=N, columns=N):
    left, _ = np.linalg.qr(rng.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(rng.standard_normal((columns, len(values))))
    return (left * values) @ right.T


def _truth(matrix, keep):
    """A_k⁺ and the projector on what is kept."""
    left, values, right = np.linalg.svd(matrix)
    inverse = (right[:keep].T / values[:keep]) @ left[:, :keep].T
    return inverse, left[:, :keep] @ left[:, :keep].T


def _solve(operator, b, solver):
    return lx.linear_solve(operator, b, solver, throw=False)


VALUES = np.array([8.0, 4.0, 2.0, 1.0, 0.5, 1e-3, 1e-4, 1e-9, 1e-14, 0.0])
SHAPES = {"square": (N, N), "tall": (14, N), "wide": (N, 14)}


KINDS = [(kind, True) for kind in (*SHAPES, "symmetric", "definite", "negative")]


@pytest.mark.parametrize(
    ("kind", "dense"), [*KINDS, *((kind, False) for kind in ("tall", "wide", "symmetric", "negative"))]
)
def test_value_and_statistics(kind, dense, rng):
    """By rank, by cutoff, and by both, for every kind of matrix; the iteration as the decomposition."""
    tags: object = ()
    if kind in SHAPES:
        matrix = _general(VALUES, rng, *SHAPES[kind])
    else:
        signs = np.where(np.arange(N) % 2, -1, 1) if kind == "symmetric" else 1
        matrix = rotated(VALUES * signs * (-1 if kind == "negative" else 1), rng)
        tags = {"symmetric": lx.symmetric_tag, "definite": PSD, "negative": NSD}[kind]
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), tags)
    b = rng.standard_normal(len(matrix))
    by_rank = [(None, 3, 3)] if kind in ("tall", "symmetric") else []
    for cutoff, rank, keep in [(1e-2, 7, 5), (5e-5, 7, 6), *by_rank]:
        size = 100 if dense else 0
        cutoff = None if cutoff is None else jnp.asarray(cutoff)  # an array: one program for all
        solver = TruncatedSpectrum(cutoff, rank, dense_size=size, key=KEY)
        solution = _solve(operator, jnp.asarray(b), solver)
        inverse, projector = _truth(matrix, keep)
        assert solution.result == lx.RESULTS.successful
        np.testing.assert_allclose(solution.value, inverse @ b, atol=1e-7 * np.linalg.norm(inverse, 2))
        assert int(solution.stats["rank"]) == keep
        np.testing.assert_allclose(solution.stats["largest"], 8.0)
        np.testing.assert_allclose(solution.stats["smallest_kept"], VALUES[keep - 1], rtol=1e-9)
        np.testing.assert_allclose(
            solution.stats["discarded_norm"], np.linalg.norm(b - projector @ b), rtol=1e-6
        )
        assert (int(solution.stats["num_steps"]) == 0) is dense
    if dense and kind in ("wide", "definite"):  # by the cutoff alone
        matrix = matrix if kind not in SHAPES else _general(VALUES[:7], rng, *matrix.shape)
        found = _solve(
            lx.MatrixLinearOperator(jnp.asarray(matrix), tags), jnp.asarray(b), TruncatedSpectrum(1e-12)
        )
        np.testing.assert_allclose(found.value, np.linalg.pinv(matrix, rcond=1e-12) @ b, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-12), (jnp.float32, 1e-5)])
def test_trees_precision_jit_vmap_and_one_compilation(dtype, tol, rng):
    matrix = rotated(np.linspace(1, 3, N) * (np.arange(N) < 6), rng)
    b = rng.standard_normal((3, N))
    traces = []

    @jax.jit
    def solve(scales, vectors):
        traces.append(None)

        def each(scale, vector):
            operator = _operator(scale * jnp.asarray(matrix, dtype), PSD)
            solution = lx.linear_solve(operator, _tree(vector), TruncatedSpectrum(1e-3))
            return solution.value, solution.stats["rank"]

        return jax.vmap(each)(scales, vectors)

    for factor in (1.0, 2.0):
        value, ranks = solve(factor * jnp.arange(1.0, 4.0, dtype=dtype), jnp.asarray(b, dtype))
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(value)) and value["empty"].shape == (
            3,
            0,
            2,
        )
        for i in range(3):
            truth = np.linalg.pinv(matrix, rcond=1e-3) @ b[i] / ((i + 1) * factor)
            np.testing.assert_allclose(_flat(jax.tree.map(lambda a, i=i: a[i], value)), truth, atol=10 * tol)
        assert ranks.tolist() == [6, 6, 6]
    assert len(traces) == 1


def test_rounding_below_zero_is_never_inverted(rng):
    """A round-off eigenvalue −1e-9 of a semidefinite matrix would give −1e9."""
    matrix = jnp.asarray(rotated(np.r_[np.linspace(1, 3, N - 1), -1e-9], rng))
    b = jnp.asarray(rng.standard_normal(N))
    truth = _truth(np.asarray(matrix), N - 1)[0] @ b
    for solver in (
        TruncatedSpectrum(),
        TruncatedSpectrum(None, N, dense_size=0, key=KEY),
    ):
        solution = _solve(lx.MatrixLinearOperator(matrix, PSD), b, solver)
        assert solution.result == lx.RESULTS.successful and int(solution.stats["rank"]) == N - 1
        np.testing.assert_allclose(solution.value, truth, rtol=1e-7)
    # Of a symmetric one it is an eigenvalue like any other.
    solution = _solve(lx.MatrixLinearOperator(matrix, lx.symmetric_tag), b, TruncatedSpectrum())
    assert int(solution.stats["rank"]) == N
    # More than rounding makes the tag a lie.
    for dense_size in (100, 0):
        solver = TruncatedSpectrum(1e-3, N, dense_size=dense_size, key=KEY)
        lie = lx.MatrixLinearOperator(matrix - 2 * jnp.eye(N), PSD)
        assert _solve(lie, b, solver).result == lx.RESULTS.breakdown
        truthful = lx.MatrixLinearOperator(matrix - 2 * jnp.eye(N), lx.symmetric_tag)
        assert _solve(truthful, b, solver).result == lx.RESULTS.successful


def test_pairs_of_eigenvalues_of_both_signs(rng):
    """Singular vectors of λ and −λ mix: the solution must not."""
    matrix = rotated(np.r_[3.0, -3.0, 2.0, -2.0, np.zeros(N - 4)], rng)
    b = rng.standard_normal(N)
    for dense_size in (100, 0):
        solver = TruncatedSpectrum(1e-6, 6, dense_size=dense_size, key=KEY)
        solution = _solve(
            lx.MatrixLinearOperator(jnp.asarray(matrix), lx.symmetric_tag), jnp.asarray(b), solver
        )
        np.testing.assert_allclose(solution.value, np.linalg.pinv(matrix, rcond=1e-6) @ b, atol=1e-10)
        assert int(solution.stats["rank"]) == 4


def test_the_iteration_converges_or_says_so(rng):
    """Multiple values are found as often as they occur; one cycle is not enough for a slow spectrum."""
    values = np.r_[np.full(4, 2.0), np.geomspace(1, 0.2, 196)]
    basis, _ = np.linalg.qr(rng.standard_normal((200, 200)))
    matrix = jnp.asarray((basis * values) @ basis.T)
    b = rng.standard_normal(200)
    operator = lx.MatrixLinearOperator(matrix)
    good = _solve(operator, jnp.asarray(b), TruncatedSpectrum(rank=6, dense_size=0, key=KEY, max_steps=200))
    assert good.result == lx.RESULTS.successful and int(good.stats["num_steps"]) > 1
    np.testing.assert_allclose(good.value, _truth(np.asarray(matrix), 6)[0] @ b, atol=1e-5)
    few = _solve(operator, jnp.asarray(b), TruncatedSpectrum(rank=6, dense_size=0, key=KEY, max_steps=1))
    assert few.result == lx.RESULTS.max_steps_reached
    with pytest.raises(Exception, match="maximum number of solver steps"):
        lx.linear_solve(
            operator, jnp.asarray(b), TruncatedSpectrum(rank=6, dense_size=0, key=KEY, max_steps=1)
        )


def test_a_false_tag_of_symmetry_is_told(rng):
    matrix = rng.standard_normal((N, N))
    for operator, success in ((matrix + matrix.T, True), (matrix, False)):
        found = _solve(
            lx.MatrixLinearOperator(jnp.asarray(operator), lx.symmetric_tag), jnp.ones(N), TruncatedSpectrum()
        )
        assert bool(found.result == lx.RESULTS.successful) is success


def test_not_a_number_zero_and_empty(rng):
    bad = lx.MatrixLinearOperator(jnp.eye(N).at[1, 2].set(jnp.nan))
    for solver in (TruncatedSpectrum(), TruncatedSpectrum(rank=2, dense_size=0, key=KEY)):
        assert _solve(bad, jnp.ones(N), solver).result != lx.RESULTS.successful
        assert (
            _solve(lx.MatrixLinearOperator(jnp.eye(N)), jnp.full(N, jnp.nan), solver).result
            != lx.RESULTS.successful
        )
        zero = _solve(lx.MatrixLinearOperator(jnp.zeros((N, N))), jnp.ones(N), solver)
        assert zero.result == lx.RESULTS.successful and int(zero.stats["rank"]) == 0
        np.testing.assert_array_equal(zero.value, 0.0)
        np.testing.assert_allclose(zero.stats["discarded_norm"], np.sqrt(N))
    empty = _solve(lx.MatrixLinearOperator(jnp.zeros((3, 0))), jnp.ones(3), TruncatedSpectrum())
    assert empty.value.shape == (0,)


def test_derivative_in_the_vector(rng):
    """x' = A_k⁺ b', whatever is dropped."""
    matrix = jnp.asarray(_general(VALUES, rng, 14, N))
    b, direction = (jnp.asarray(rng.standard_normal(14)) for _ in range(2))
    w = jnp.asarray(rng.standard_normal(N))
    inverse, _ = _truth(np.asarray(matrix), 5)

    @jax.jit
    def both(matrix, b):
        solve = lambda b: lx.linear_solve(lx.MatrixLinearOperator(matrix), b, TruncatedSpectrum(1e-2)).value  # noqa: E731
        return jax.jvp(solve, (b,), (direction,))[1], jax.grad(lambda b: jnp.sum(w * solve(b) ** 2))(b)

    tangent, gradient = both(matrix, b)
    np.testing.assert_allclose(tangent, inverse @ direction, atol=1e-10)
    np.testing.assert_allclose(gradient, 2 * inverse.T @ (w * (inverse @ b)), atol=1e-10)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(N, N, 6), (14, N, N), (14, N, 6), (N, 14, 6)])
def test_derivative_in_the_operator_at_a_constant_rank(rows, columns, rank, rng):
    """The pseudo-inverse along a curve of matrices of one rank, against differences of NumPy's."""
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    turn = rng.standard_normal((rows, rank))
    b, w = rng.standard_normal(rows), rng.standard_normal(columns)

    def ours(t):
        operator = lx.MatrixLinearOperator((left + t * turn) @ jnp.asarray(right))
        return w @ lx.linear_solve(operator, jnp.asarray(b), TruncatedSpectrum()).value

    def truth(t):
        return w @ np.linalg.pinv((left + t * turn) @ right, rcond=1e-10) @ b

    h, t = 1e-4, 0.1
    slope = (8 * (truth(t + h) - truth(t - h)) - truth(t + 2 * h) + truth(t - 2 * h)) / (12 * h)
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(jax.jit(derivative(ours))(t), slope, rtol=1e-6)


@pytest.mark.parametrize("options", [{"cutoff": 1e-2}, {"rank": 3}, {"rank": 3, "dense_size": 0, "key": KEY}])
def test_derivative_in_the_operator_is_refused_where_it_would_be_wrong(options, rng):
    matrix = jnp.asarray(rotated(np.geomspace(1, 1e-4, N), rng))
    solve = lambda t, m: jnp.sum(  # noqa: E731
        lx.linear_solve(
            lx.MatrixLinearOperator(m + t * m @ m), jnp.ones(N), TruncatedSpectrum(**options)
        ).value
    )
    assert np.isfinite(jax.jit(solve)(0.0, matrix))
    cases = [jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f)), lambda f: jax.jit(jax.grad(f))]
    for derivative in cases:
        with pytest.raises(ValueError, match="no derivative in the operator.*stop_gradient"):
            derivative(solve)(0.0, matrix)
    with pytest.raises(ValueError, match="no derivative in the operator"):
        jax.vmap(jax.grad(solve), (0, None))(jnp.zeros(2), matrix)
    # What is no function of t passes.
    constant = jax.grad(lambda t: t * solve(jax.lax.stop_gradient(t), matrix))(0.5)
    np.testing.assert_allclose(constant, solve(0.5, matrix))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TruncatedSpectrum(1.0), r"`cutoff` of `TruncatedSpectrum` must lie in \[0, 1\), got 1.0"),
        (lambda: TruncatedSpectrum(rank=0), "`rank` of `TruncatedSpectrum` must be at least 1, found 0"),
        (lambda: TruncatedSpectrum(rank=1.5), "`rank`.*Python integer"),
        (lambda: TruncatedSpectrum(max_steps=0), "`max_steps`.*at least 1"),
        (
            lambda: _solve(LARGE, jnp.ones(2000), TruncatedSpectrum(1e-3)),
            "`rank`.*2000 × 2000.*`dense_size=1024`",
        ),
        (lambda: _solve(LARGE, jnp.ones(2000), TruncatedSpectrum(rank=3)), r"`key`.*jax.random.key\(0\)"),
        (
            lambda: _solve(
                lx.MatrixLinearOperator(jnp.eye(2, dtype=complex)), jnp.ones(2, complex), TruncatedSpectrum()
            ),
            "`operator`.*real",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LARGE = lx.FunctionLinearOperator(lambda v: v, jax.ShapeDtypeStruct((2000,), jnp.float64))
