"""Incomplete factorisations against textbook loops on dense matrices; multigrid; both as operators like any other."""

import builtins
import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
import scipy.sparse as sp
from jax.experimental import sparse

import curvax as cx
from curvax.linear import SparsePreconditioner, amg, incomplete_cholesky, incomplete_lu

SIDE = 6
N = SIDE**2
PSD = lx.positive_semidefinite_tag
# Positive definite, and yet its incomplete factorisation has a negative pivot (D. S. Kershaw, 1978).
KERSHAW = np.array([[3.0, -2, 0, 2], [-2, 3, -2, 0], [0, -2, 3, -2], [2, 0, -2, 3]])
MAKERS = {
    "cholesky": incomplete_cholesky,
    "lu": functools.partial(incomplete_lu, drop_tolerance=0.1, fill_factor=2),
    "amg": amg,
}
every_maker = pytest.mark.parametrize("name", MAKERS)


def _laplacian(side=SIDE):
    """Of a square grid, in CSR form."""
    line = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    eye = sp.eye_array(side)
    return sp.csr_array(sp.kron(line, eye) + sp.kron(eye, line))


def _random_definite(rng, n=N, density=0.1):
    half = sp.random_array((n, n), density=density, rng=rng, data_sampler=rng.standard_normal)
    scales = sp.diags_array(10.0 ** rng.uniform(-1, 1, n))
    return sp.csr_array(scales @ (half @ half.T + sp.eye_array(n)) @ scales)


def _matrix(name, rng):
    if name != "lu":
        return _laplacian()
    return _laplacian() + sp.random_array((N, N), density=0.05, rng=rng)


def _tree(vector, dtype=jnp.float64):
    """A vector of N cut into a matrix, a scalar, nothing and an empty leaf."""
    v = jnp.asarray(vector, dtype)
    return {"w": v[1:].reshape(1, N - 1), "b": v[0], "none": None, "empty": jnp.zeros((0, 2), dtype)}


def _flat(tree):
    return np.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _reference(matrix, level=None, tolerance=0.0, shift=0.0):
    """L by the textbook, on the whole matrix: levels row by row, then column by column."""
    n = len(matrix)
    scale = 1 / np.sqrt(np.diag(matrix))
    lower = scale[:, None] * matrix * scale
    np.fill_diagonal(lower, 1 + shift)
    levels = np.where(matrix != 0, 0, np.inf)
    for i in range(n):
        for k in range(i):
            for j in range(k + 1, n):
                levels[i, j] = min(levels[i, j], levels[i, k] + levels[k, j] + 1)
    kept = levels <= (np.inf if level is None else level)
    factor = np.zeros((n, n))
    for j in range(n):
        column = lower[j:, j] - factor[j:, :j] @ factor[j, :j]
        assert column[0] > 0
        new = column / np.sqrt(column[0])
        below = np.where(kept[j + 1 :, j] & (np.abs(new[1:]) >= tolerance), new[1:], 0)
        factor[j:, j] = np.concatenate([new[:1], below])
    return factor / scale[:, None]


@pytest.mark.parametrize(
    ("level", "tolerance"),
    [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (2, 0.05), (None, 0.05), (None, 0.2), (N, 0.05)],
)
def test_incomplete_cholesky_is_that_of_the_textbook(level, tolerance, rng):
    for matrix in (_random_definite(rng), _laplacian()):
        truth = _reference(matrix.toarray(), level, tolerance)
        P = incomplete_cholesky(matrix, fill_level=level, drop_tolerance=tolerance)
        assert P.shift == 0
        inverse = np.linalg.inv(truth @ truth.T)
        np.testing.assert_allclose(P.as_matrix(), inverse, rtol=1e-9, atol=1e-12 * np.abs(inverse).max())
        assert P.fill == np.count_nonzero(truth) / sp.tril(matrix).count_nonzero()


def test_complete_factors_are_exact(rng):
    """Of all levels, and without drops."""
    matrix = _random_definite(rng)
    inverse = np.linalg.inv(matrix.toarray())
    np.testing.assert_allclose(incomplete_cholesky(matrix, fill_level=N).as_matrix(), inverse, atol=1e-9)
    matrix = matrix + sp.random_array((N, N), density=0.1, rng=rng)
    inverse = np.linalg.inv(matrix.toarray())
    P = incomplete_lu(matrix, drop_tolerance=0, fill_factor=N)
    np.testing.assert_allclose(P.as_matrix(), inverse, atol=1e-9)
    np.testing.assert_allclose(P.T.as_matrix(), inverse.T, atol=1e-9)


def test_breakdown_shifts_the_diagonal_and_says_so(rng):
    with pytest.raises(AssertionError):
        _reference(KERSHAW, 0)
    for kwargs in ({}, {"fill_level": None, "drop_tolerance": 0.65}):
        P = incomplete_cholesky(sp.csr_array(KERSHAW), **kwargs)
        assert 0 < P.shift <= 4
        truth = _reference(KERSHAW, kwargs.get("fill_level", 0), kwargs.get("drop_tolerance", 0), P.shift)
        np.testing.assert_allclose(P.as_matrix(), np.linalg.inv(truth @ truth.T), atol=1e-13)
        # The shift before that was not enough.
        with pytest.raises(AssertionError):
            _reference(KERSHAW, kwargs.get("fill_level", 0), kwargs.get("drop_tolerance", 0), P.shift / 4)
    # An indefinite matrix ends as well, far from zero shift, and in something definite.
    indefinite = 0.1 * np.eye(N) + rng.standard_normal((N, N))
    indefinite = sp.csr_array(indefinite + indefinite.T + 9 * np.eye(N))
    assert np.linalg.eigvalsh(indefinite.toarray()).min() < 0
    P = incomplete_cholesky(indefinite)
    assert P.shift > 0.05
    assert np.linalg.eigvalsh(P.as_matrix()).min() > 0


def test_nothing_below_the_diagonal():
    for options in ({}, {"fill_level": 2}, {"fill_level": None, "drop_tolerance": 0.1}):
        for diagonal in ([3.0], [1.0, 4.0, 1e-8]):
            P = incomplete_cholesky(sp.diags_array(diagonal), **options)
            np.testing.assert_allclose(P.as_matrix(), np.diag(1 / np.asarray(diagonal)), rtol=1e-12)


@every_maker
def test_it_is_an_operator_like_any_other(name, rng):
    P = MAKERS[name](_matrix(name, rng), structure=_tree(np.zeros(N)))
    assert isinstance(P, SparsePreconditioner)
    assert P.in_structure() == P.out_structure() == jax.eval_shape(lambda: _tree(np.zeros(N)))
    matrix = P.as_matrix()
    symmetric = name != "lu"
    assert lx.is_symmetric(P) == lx.is_positive_semidefinite(P) == symmetric
    if symmetric:
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-13)
        assert np.linalg.eigvalsh(matrix).min() > 0
    else:
        assert np.abs(matrix - matrix.T).max() > 1e-3
    np.testing.assert_allclose(P.T.as_matrix(), matrix.T, atol=1e-13)
    np.testing.assert_allclose(lx.diagonal(P), np.diag(matrix))
    for same in (lx.linearise(P), lx.conj(P), lx.materialise(P), P.T.T):
        np.testing.assert_allclose(same.as_matrix(), matrix, atol=1e-14)
    assert P.fill >= 0.5


@every_maker
def test_jit_vmap_and_derivatives_of_a_product(name, rng):
    P = MAKERS[name](_matrix(name, rng))
    matrix = np.asarray(P.as_matrix())
    vectors = jnp.asarray(rng.standard_normal((2, 3, N)))
    traces = []

    @jax.jit
    def products(vectors):
        traces.append(None)
        return jax.vmap(jax.vmap(P.mv))(vectors)

    for scale in (1.0, 2.0):
        np.testing.assert_allclose(products(scale * vectors), scale * vectors @ matrix.T, atol=1e-11)
    assert len(traces) == 1
    x, y = vectors[0, :2]
    value = lambda v: jnp.sum(P.mv(v) ** 2 * y)  # noqa: E731
    gradient = 2 * matrix.T @ (y * (matrix @ x))
    np.testing.assert_allclose(jax.jit(jax.grad(value))(x), gradient, atol=1e-10)
    hessian = jax.jit(jax.hessian(value))(x)
    np.testing.assert_allclose(hessian, 2 * matrix.T @ (y[:, None] * matrix), atol=1e-10)


@every_maker
def test_float32_and_trees(name, rng):
    """Computed in float64, whatever the vectors are."""
    matrix = _matrix(name, rng)
    P = MAKERS[name](matrix, structure=_tree(np.zeros(N), jnp.float32))
    vector = rng.standard_normal(N).astype(np.float32)
    product = P.mv(_tree(vector, jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(product))
    truth = np.asarray(MAKERS[name](matrix).as_matrix()) @ vector.astype(np.float64)
    np.testing.assert_allclose(_flat(product), truth, rtol=1e-5, atol=1e-6)
    assert MAKERS[name](matrix.astype(np.float32)).in_structure().dtype == jnp.float32


def test_every_kind_of_matrix_is_read(rng):
    matrix = _random_definite(rng)
    truth = incomplete_cholesky(matrix).as_matrix()
    dense = jnp.asarray(matrix.toarray())
    # With padding, and an entry in two parts.
    bcoo = sparse.BCOO.fromdense(dense, nse=matrix.nnz + 5)
    split = sparse.BCOO(
        (
            jnp.append(bcoo.data.at[3].divide(2), bcoo.data[3] / 2),
            jnp.vstack([bcoo.indices, bcoo.indices[3]]),
        ),
        shape=bcoo.shape,
    )
    flat = jax.ShapeDtypeStruct((N,), jnp.float64)
    kinds = [
        bcoo,
        split,
        sparse.BCSR.fromdense(dense),
        matrix.tocoo(),
        sp.csc_matrix(matrix),
        matrix + sp.csr_array(([0.0], ([0], [N - 1])), shape=(N, N)),
        lx.MatrixLinearOperator(dense),
        lx.FunctionLinearOperator(lambda v: dense @ v, flat, PSD),
    ]
    for kind in kinds:
        P = incomplete_cholesky(kind)
        assert P.in_structure() == flat
        np.testing.assert_allclose(P.as_matrix(), truth, rtol=1e-9, atol=1e-12)
    structure = jax.eval_shape(lambda: _tree(np.zeros(N)))
    tree = lx.FunctionLinearOperator(
        lambda v: _tree(dense @ jnp.concatenate([v["b"][None], v["w"][0]])), structure
    )
    assert incomplete_cholesky(tree).in_structure() == structure


def _steps(name, side):
    """CG steps for the Laplacian of a grid."""
    matrix = _laplacian(side)

    def product(v):
        p = jnp.pad(v.reshape(side, side), 1)
        around = p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2]
        return 4 * v - around.ravel()

    options = {} if name == "none" else {"preconditioner": MAKERS[name](matrix)}
    b = jnp.asarray(np.random.default_rng(0).standard_normal(side**2))
    system = lx.FunctionLinearOperator(product, jax.eval_shape(lambda: b), PSD)
    solution = lx.linear_solve(system, b, cx.linear.CG(1e-8), options=options)
    np.testing.assert_allclose(matrix @ np.asarray(solution.value), b, atol=1e-5)
    return int(solution.stats["num_steps"])


def test_fewer_steps():
    """By a factor for incomplete Cholesky, by more and more for multigrid."""
    assert 2 * _steps("cholesky", 40) < _steps("none", 40)
    few, more = (_steps("amg", side) for side in (15, 60))
    assert few <= 12 and more <= few + 3


def test_solvers_take_what_suits_them(rng):
    matrix = _matrix("lu", rng)
    b = jnp.asarray(rng.standard_normal(N))
    P = incomplete_lu(matrix, drop_tolerance=1e-2)
    A = lx.MatrixLinearOperator(jnp.asarray(matrix.toarray()))
    truth = np.linalg.solve(matrix.toarray(), b)
    for solver in (cx.linear.FGMRES(1e-10), lx.GMRES(1e-10, 1e-10), lx.BiCGStab(1e-10, 1e-10)):
        solution = lx.linear_solve(A, b, solver, options={"preconditioner": P})
        np.testing.assert_allclose(solution.value, truth, atol=1e-7)
    # Symmetric methods refuse what is not tagged symmetric, and say what they want.
    definite = lx.MatrixLinearOperator(jnp.asarray(_laplacian().toarray()), PSD)
    lu = incomplete_lu(_laplacian(), drop_tolerance=0.1)
    for solver in (cx.linear.CG(1e-6), cx.linear.MINRES(1e-6), cx.linear.Auto(1e-6, dense_size=0)):
        with pytest.raises(ValueError, match="preconditioner.*must be tagged `lx.positive_semidefinite_tag`"):
            lx.linear_solve(definite, b, solver, options={"preconditioner": lu})


@every_maker
def test_gradients_of_a_solve(name, rng):
    """The preconditioner changes the time, not the derivatives; one compilation."""
    matrix = jnp.asarray(_matrix(name, rng).toarray())
    b, w = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))
    P = MAKERS[name](sp.csr_array(np.asarray(matrix)))
    solver = cx.linear.FGMRES(1e-12) if name == "lu" else cx.linear.CG(1e-11)
    traces = []

    @jax.jit
    @jax.value_and_grad
    def value(t):
        traces.append(None)
        tags = () if name == "lu" else PSD
        A = lx.MatrixLinearOperator(matrix + t * jnp.eye(N), tags)
        return w @ lx.linear_solve(A, b, solver, options={"preconditioner": P}).value

    for t in (0.1, 0.3):
        inverse = np.linalg.inv(matrix + t * np.eye(N))
        found, slope = value(t)
        np.testing.assert_allclose(found, w @ inverse @ b, rtol=1e-7)
        np.testing.assert_allclose(slope, -w @ inverse @ inverse @ b, rtol=1e-6)
    assert len(traces) == 1


def test_in_the_implicit_rule(rng):
    """Over vectors like theta, as the rule asks for."""
    matrix, target = _laplacian(), jnp.asarray(rng.standard_normal(N))
    dense = jnp.asarray(matrix.toarray())

    def energy(theta, phi, _):
        v = jnp.concatenate([theta["b"][None], theta["w"][0]])
        return 0.5 * v @ dense @ v - phi * v @ target

    start = {"w": jnp.zeros((1, N - 1)), "b": jnp.zeros(())}
    P = incomplete_cholesky(matrix, fill_level=1, structure=start)
    problem = cx.Bilevel(inner=energy, outer=lambda theta, phi, _: jnp.sum(theta["w"] ** 2))
    ours = cx.hypergradient(
        problem,
        jnp.asarray(0.7),
        start,
        rule=cx.Implicit(rtol=1e-8, recycle=0, preconditioner=P),
        inner_solver=optx.LBFGS(1e-10, 1e-10),
    )
    solution = np.linalg.solve(matrix.toarray(), target)
    np.testing.assert_allclose(ours.grad, 2 * 0.7 * np.sum(solution[1:] ** 2), rtol=1e-7)


def test_amg_draws_nothing_from_the_global_generator():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    matrices = [
        np.asarray(amg(_laplacian(14), method=m).mv(jnp.ones(196))) for m in ("smoothed_aggregation",) * 2
    ]
    np.testing.assert_array_equal(*matrices)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_amg_of_an_indefinite_matrix_is_refused(shift):
    """A Helmholtz-like shift of the Laplacian: its diagonal is positive, its smallest eigenvalues are not."""
    matrix = _laplacian(14)
    smallest = np.linalg.eigvalsh(matrix.toarray())[0]
    amg(matrix - 0.9 * smallest * sp.eye_array(196))
    with pytest.raises(ValueError, match="not positive definite"):
        amg(matrix - (smallest + shift) * sp.eye_array(196))


def test_amg_methods_and_null_space():
    """The vectors that A almost takes to zero are what makes it work, here for a Laplacian with signs."""
    side = 20
    scales = np.random.default_rng(0).choice([-1.0, 1.0], side**2)
    rescaled = sp.csr_array(sp.diags_array(scales) @ _laplacian(side) @ sp.diags_array(scales))

    def quality(P):
        inverse = np.asarray(P.as_matrix())
        root = np.linalg.cholesky(inverse)
        return np.linalg.cond(root.T @ rescaled.toarray() @ root)

    informed = quality(amg(rescaled, near_null_space=1 / scales[:, None]))
    assert informed < 3 < quality(amg(rescaled))
    classical = np.asarray(amg(_laplacian(10), method="ruge_stuben").as_matrix())
    np.testing.assert_allclose(classical, classical.T, atol=1e-13)
    assert np.linalg.eigvalsh(classical).min() > 0


def test_amg_without_pyamg(monkeypatch):
    kept = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "pyamg":
            raise ModuleNotFoundError("No module named 'pyamg'")
        return kept(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'curvax\[sparse\]'"):
        amg(_laplacian())
    assert incomplete_cholesky(_laplacian()).fill == 1


LARGE = lx.FunctionLinearOperator(lambda v: v, jax.ShapeDtypeStruct((5000,), jnp.float32), PSD)
GRID = _laplacian(3)
SKEW = sp.csr_array(np.triu(GRID.toarray()))
SINGULAR = sp.csr_array(np.ones((2, 2)))


@pytest.mark.parametrize(
    ("make", "matrix", "options", "message"),
    [
        (incomplete_cholesky, np.eye(3), {}, "`matrix` of `incomplete_cholesky`.*found ndarray.*csr_array"),
        (incomplete_cholesky, SKEW, {}, "must be symmetric.*differ from their mirror images.*incomplete_lu"),
        (amg, SKEW, {}, "`matrix` of `amg` must be symmetric"),
        (incomplete_cholesky, -GRID, {}, "must be positive definite, found -4 on the diagonal, in row 0"),
        (amg, GRID - 4 * sp.eye_array(9), {}, "must be positive definite, found 0 on the diagonal"),
        (incomplete_lu, sp.csr_array(np.ones((3, 4))), {}, "must be square and not empty, found 3 × 4"),
        (incomplete_lu, sp.csr_array((0, 0)), {}, "must be square and not empty"),
        (incomplete_lu, GRID * np.nan, {}, "holds a NaN or an infinity"),
        (incomplete_lu, GRID * 1j, {}, "must be real, found complex128"),
        (incomplete_lu, SINGULAR, {}, "singular to working precision.*Lower `drop_tolerance`"),
        (incomplete_lu, sp.csr_array((3, 3)), {}, "singular to working precision"),
        (incomplete_lu, GRID, {"drop_tolerance": 2.0}, "`drop_tolerance` of `incomplete_lu`.*at most 1"),
        (incomplete_lu, GRID, {"fill_factor": 0.5}, "`fill_factor` of `incomplete_lu` must be at least 1"),
        (incomplete_cholesky, GRID, {"fill_level": -1}, "`fill_level`.*at least 0, or None, found -1"),
        (incomplete_cholesky, GRID, {"fill_level": 1.5}, "`fill_level`.*found 1.5"),
        (
            incomplete_cholesky,
            GRID,
            {"fill_level": None},
            "`drop_tolerance`.*above 0 where `fill_level` is None",
        ),
        (incomplete_cholesky, GRID, {"drop_tolerance": -0.1}, "`drop_tolerance`.*at least 0"),
        (incomplete_cholesky, GRID, {"drop_tolerance": np.nan}, "`drop_tolerance`.*finite, found nan"),
        (incomplete_cholesky, GRID, {"drop_tolerance": "1"}, "`drop_tolerance`.*Python number, found str"),
        (incomplete_cholesky, GRID, {"structure": jnp.ones(8)}, "`structure`.*8 elements.*9 rows"),
        (incomplete_cholesky, GRID, {"structure": jnp.ones(9, int)}, "`structure`.*floating-point"),
        (incomplete_cholesky, LARGE, {}, "size 5000.*limit of 4096.*`scipy.sparse`"),
        (incomplete_cholesky, LARGE, {"structure": 1}, "`structure`.*for matrices"),
        (
            amg,
            GRID,
            {"method": "magic"},
            "`method` of `amg`.*smoothed_aggregation, ruge_stuben, found 'magic'",
        ),
        (
            amg,
            GRID,
            {"near_null_space": np.ones(9)},
            r"`near_null_space`.*shape \(9, k\).*found shape \(9,\)",
        ),
        (
            amg,
            GRID,
            {"near_null_space": np.ones((9, 1)), "method": "ruge_stuben"},
            "`near_null_space`.*smoothed_aggregation",
        ),
    ],
)
def test_wrong_arguments(make, matrix, options, message):
    with pytest.raises(ValueError, match=message):
        make(matrix, **options)


def test_traced_matrices_are_refused():
    @jax.jit
    def inside(matrix):
        return incomplete_cholesky(lx.MatrixLinearOperator(matrix)).mv(jnp.ones(3))

    with pytest.raises(ValueError, match="known numbers, found traced ones.*outside of `jit`"):
        inside(jnp.eye(3))
    with pytest.raises(ValueError, match="known numbers"):
        jax.jit(lambda m: amg(m).mv(jnp.ones(3)))(sparse.BCOO.fromdense(jnp.eye(3)))
