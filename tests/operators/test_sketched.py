"""Sketches and sketched curvature against dense matrices and in distribution."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.linalg

import curvax as cx
from curvax.operators import (
    GaussianSketch,
    HadamardSketch,
    LowRankPlusDiagonal,
    Sketched,
    SparseSketch,
)
from curvax.operators._sketches import hadamard_transform

PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag
KINDS = {
    "gaussian": GaussianSketch,
    "sparse": lambda like, size, *, key: SparseSketch(like, size, key=key, nonzeros=3),
    "hadamard": HadamardSketch,
}
every_kind = pytest.mark.parametrize("kind", KINDS)
N, K = 13, 5


def _tree(dtype):
    return _unflat(np.zeros(N), dtype)


def _flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _unflat(vector, dtype=jnp.float64):
    parts = jnp.split(jnp.asarray(vector, dtype), [1, 5])
    return {"w": parts[2].reshape(2, 4), "b": parts[0][0], "e": jnp.zeros((0, 3), dtype), "c": parts[1]}


def _on_trees(matrix, tags, dtype=jnp.float64):
    """A dense matrix as an operator over the tree."""
    matrix = jnp.asarray(matrix, dtype)

    def product(v):
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(v)])
        return _unflat(jnp.matmul(matrix, flat, precision="highest"), dtype)

    return lx.FunctionLinearOperator(product, jax.eval_shape(lambda: _tree(dtype)), tags)


TAGS = {"definite": PSD, "indefinite": SYMMETRIC, "general": ()}


def _matrices(rng):
    root = rng.standard_normal((N, N))
    return {"definite": root @ root.T / N, "indefinite": root + root.T, "general": root}


@every_kind
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_products_agree_with_the_matrix_and_its_transpose(kind, dtype, rng, key):
    tolerance = 1e-13 if dtype == np.float64 else 3e-6
    weights, vector = rng.standard_normal(K), rng.standard_normal(N)

    @jax.jit
    def compute(key, weights, vector):
        sketch = KINDS[kind](_tree(dtype), K, key=key)
        assert sketch.size == K and sketch.transpose().transpose() is sketch
        matrices = sketch.as_matrix(), sketch.T.as_matrix()
        return *matrices, sketch.mv(weights), sketch.transpose().mv(vector)

    arguments = jnp.asarray(weights, dtype), _unflat(vector, dtype)
    matrix, transposed, out, compressed = compute(key, *arguments)
    assert matrix.shape == (N, K) and matrix.dtype == dtype
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, _tree(dtype))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(out))
    matrix = np.asarray(matrix)
    np.testing.assert_allclose(_flat(out), matrix @ weights, atol=10 * tolerance)
    assert compressed.dtype == dtype
    np.testing.assert_allclose(compressed, matrix.T @ vector, atol=10 * tolerance)
    np.testing.assert_allclose(transposed, matrix.T)
    # The same key gives the same numbers, another one others.
    np.testing.assert_array_equal(compute(key, *arguments)[0], matrix)
    assert not np.array_equal(compute(jax.random.fold_in(key, 1), *arguments)[0], matrix)


@every_kind
def test_the_mean_of_s_st_is_the_identity(kind, key):
    """Over 4000 draws, for n that is no power of two, within six standard errors of every entry."""
    draws = 4000
    make = lambda k: KINDS[kind](jnp.zeros(5), 3, key=k).as_matrix()
    s = np.asarray(jax.jit(jax.vmap(make))(jax.random.split(key, draws)))
    products = s @ s.transpose(0, 2, 1)
    error = products.std(axis=0) / np.sqrt(draws)
    assert error.max() > 1e-3
    np.testing.assert_array_less(np.abs(products.mean(axis=0) - np.eye(5)), 6 * error + 1e-12)


def test_sparse_rows_and_hadamard_rows_have_norm_one_and_few_entries(key):
    for nonzeros in (1, 3):
        make = lambda k, s=nonzeros: SparseSketch(jnp.zeros(40), 7, key=k, nonzeros=s).as_matrix()
        dense = np.asarray(jax.jit(make)(key))
        np.testing.assert_array_equal((dense != 0).sum(axis=1), nonzeros)
        np.testing.assert_allclose(np.abs(dense[dense != 0]), 1 / np.sqrt(nonzeros))
        assert ((dense != 0).sum(axis=0) > 0).all()
    hadamard = jax.jit(
        lambda k, n, size: HadamardSketch(jnp.zeros(n), size, key=k).as_matrix(), static_argnums=(1, 2)
    )
    rows = np.asarray(hadamard(key, 40, 7))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    whole = np.asarray(hadamard(key, 8, 8))
    np.testing.assert_allclose(whole @ whole.T, np.eye(8), atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 32, 64, 2048])
def test_hadamard_transform_is_scipys(n, rng):
    vector = rng.standard_normal(n)
    truth = scipy.linalg.hadamard(n) @ vector / np.sqrt(n)
    np.testing.assert_allclose(hadamard_transform(jnp.asarray(vector)), truth, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gaussian", np.float64), ("sparse", np.float64), ("hadamard", np.float64), ("hadamard", np.float32)],
)
def test_sketched_curvature_is_the_dense_formula(kind, dtype, rng, key):
    tolerance = 1e-11 if dtype == np.float64 else 2e-4
    vector = rng.standard_normal(N)

    @eqx.filter_jit
    def everything(matrices, key):
        sketch, found = KINDS[kind](_tree(dtype), K, key=key), {}
        for name, matrix in matrices.items():
            sketched = Sketched(_on_trees(matrix, TAGS[name], dtype), sketch)
            assert lx.is_symmetric(sketched) == (name != "general")
            assert lx.is_positive_semidefinite(sketched) == (name == "definite")
            damped = sketched.damped(3.0)
            assert isinstance(damped, LowRankPlusDiagonal)
            assert lx.is_positive_semidefinite(damped) == (name == "definite")
            found[name] = {
                "core": sketched.core,
                "matrix": sketched.as_matrix(),
                "transpose": sketched.T.as_matrix().T,
                "trace": sketched.trace(),
                "diagonal": lx.diagonal(sketched),
                "logdet": sketched.logdet(),
                "inverse": damped.inverse().as_matrix(),
                "step": sketched.subspace_step(_unflat(vector, dtype)),
            }
        return sketch.as_matrix(), found

    matrices = _matrices(rng)
    s, found = everything({name: jnp.asarray(m) for name, m in matrices.items()}, key)
    s = np.asarray(s, np.float64)
    for name, matrix in matrices.items():
        got = found[name]
        core = s.T @ matrix @ s
        truth = s @ core @ s.T
        check = lambda name, wanted, tol, got=got: np.testing.assert_allclose(
            got[name], wanted, atol=tol, err_msg=name
        )
        check("core", core, tolerance)
        check("matrix", truth, tolerance)
        check("transpose", truth, tolerance)
        check("trace", np.trace(truth), tolerance)
        check("diagonal", np.diag(truth), tolerance)
        assert float(got["logdet"]) == -np.inf
        inverse = np.linalg.inv(truth + 3 * np.eye(N))
        check("inverse", inverse, 10 * tolerance * np.abs(inverse).max())
        step = s @ np.linalg.pinv(core) @ s.T @ vector
        np.testing.assert_allclose(_flat(got["step"]), step, atol=100 * tolerance * np.abs(step).max())
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got["step"]))


def test_the_products_run_as_one_batch(key):
    traces = []
    like = jax.ShapeDtypeStruct((40,), jnp.float64)
    operator = lx.FunctionLinearOperator(lambda v: (traces.append(None), 2 * v)[1], like, PSD)
    traces.clear()
    sketched = Sketched(operator, HadamardSketch(operator, 16, key=key))
    assert len(traces) <= 2
    np.testing.assert_allclose(
        jnp.diagonal(sketched.core), 2 * np.linalg.norm(sketched.sketch.as_matrix(), axis=0) ** 2
    )


def test_the_step_is_the_best_one_of_the_subspace(rng, key):
    """It minimises ½xᵀHx − bᵀx over the range of S: no other point of it is lower, and scaling S changes nothing."""
    matrix, tags = _matrices(rng)["definite"], PSD
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), tags)
    sketch = GaussianSketch(operator, K, key=key)
    sketched, b = Sketched(operator, sketch), rng.standard_normal(N)
    step = np.asarray(sketched.subspace_step(jnp.asarray(b)))
    model = lambda x: 0.5 * x @ matrix @ x - b @ x
    s = np.asarray(sketch.as_matrix())
    for _ in range(20):
        assert model(step) < model(step + s @ rng.standard_normal(K) * 10.0 ** rng.uniform(-4, 0))
    np.testing.assert_allclose(s.T @ (b - matrix @ step), 0, atol=1e-11)
    assert b @ step > 0
    # Not the Newton step, and it says so.
    truth = np.linalg.norm(b - matrix @ step) / np.linalg.norm(b)
    np.testing.assert_allclose(sketched.residual(jnp.asarray(b), jnp.asarray(step)), truth)
    assert truth > 0.3
    scaled = lx.MatrixLinearOperator(100 * sketch.as_matrix())
    np.testing.assert_allclose(Sketched(operator, scaled).subspace_step(jnp.asarray(b)), step, rtol=1e-8)
    whole = Sketched(operator, GaussianSketch(operator, N, key=key))
    newton = np.linalg.solve(matrix, b)
    np.testing.assert_allclose(whole.subspace_step(jnp.asarray(b), rcond=1e-15), newton, rtol=1e-5)
    s = np.asarray(whole.sketch.as_matrix())
    np.testing.assert_allclose(whole.logdet(), np.linalg.slogdet(s @ s.T @ matrix @ s @ s.T)[1], rtol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rank_deficient_core_is_cut_off(dtype, rng, key):
    root = rng.standard_normal((N, 2))
    operator = lx.MatrixLinearOperator(jnp.asarray(root @ root.T, dtype), PSD)
    sketch = HadamardSketch(operator, K, key=key)
    b = jnp.asarray(root @ rng.standard_normal(2), dtype)
    step = Sketched(operator, sketch).subspace_step(b)
    s = np.asarray(sketch.as_matrix(), np.float64)
    truth = s @ np.linalg.pinv(s.T @ root @ root.T @ s, rcond=1e-8) @ s.T @ np.asarray(b, np.float64)
    np.testing.assert_allclose(step, truth, rtol=1e-9 if dtype == np.float64 else 2e-3)
    # b is in the range of H: then the residual is zero, though H is singular.
    assert Sketched(operator, sketch).residual(b, step) < (1e-12 if dtype == np.float64 else 1e-4)
    # A cutoff above the second singular value leaves one direction.
    values = np.linalg.svd(s.T @ root @ root.T @ s, compute_uv=False)
    coarse = Sketched(operator, sketch).subspace_inverse(rcond=float(1.01 * values[1] / values[0]))
    assert np.linalg.matrix_rank(np.asarray(coarse.as_matrix()), tol=1e-5) == 1
    assert lx.is_positive_semidefinite(coarse) and lx.is_symmetric(coarse)


def test_nan_and_zero_are_never_plausible(key):
    bad = lx.MatrixLinearOperator(jnp.eye(N).at[3, 3].set(jnp.nan), PSD)
    zero = lx.MatrixLinearOperator(jnp.zeros((N, N)), PSD)
    sketch = GaussianSketch(bad, K, key=key)
    assert np.isnan(Sketched(bad, sketch).subspace_step(jnp.ones(N))).all()
    assert np.isnan(Sketched(bad, sketch).damped(1.0).inverse().mv(jnp.ones(N))).all()
    np.testing.assert_array_equal(Sketched(zero, sketch).subspace_step(jnp.ones(N)), 0)
    with pytest.raises(ValueError, match=r"no inverse.*subspace_step"):
        Sketched(zero, sketch).inverse()


def test_the_error_of_a_sketch_is_that_of_the_matrix(rng, key):
    matrix, tags = _matrices(rng)["definite"], PSD
    operator = _on_trees(matrix, tags)
    sketched = Sketched(operator, GaussianSketch(operator, K, key=key))
    truth = np.linalg.norm(np.asarray(sketched.as_matrix()) - matrix)
    found = sketched.error(key=jax.random.fold_in(key, 1), num_probes=300)
    assert abs(found.frobenius - truth) < 4 * found.deviation < 0.4 * truth
    np.testing.assert_allclose(found.relative, truth / np.linalg.norm(matrix), rtol=0.3)
    assert found.spectral_bound > np.linalg.norm(np.asarray(sketched.as_matrix()) - matrix, 2)


def test_gaussian_bias_of_the_sketched_matrix_is_the_stated_one(key):
    """(1 + 1/k) H + (tr H / k) I, over 4000 draws."""
    matrix = jnp.diag(jnp.array([4.0, 1.0, 0.0])) + 0.5 * jnp.ones((3, 3))
    operator = lx.MatrixLinearOperator(matrix, PSD)
    draws = 4000
    make = lambda k: Sketched(operator, GaussianSketch(operator, 2, key=k)).as_matrix()
    found = np.asarray(jax.jit(jax.vmap(make))(jax.random.split(key, draws)))
    truth = 1.5 * matrix + jnp.trace(matrix) / 2 * jnp.eye(3)
    np.testing.assert_array_less(np.abs(found.mean(0) - truth), 6 * found.std(0) / np.sqrt(draws))


def test_jit_vmap_derivatives_and_one_compilation(rng, key):
    root = jnp.asarray(rng.standard_normal((N, N)))
    b, w = jnp.asarray(rng.standard_normal(N)), jnp.asarray(rng.standard_normal(N))
    sketch = HadamardSketch(b, K, key=key)
    s = sketch.as_matrix()
    traces = []

    def value(t):
        traces.append(None)
        operator = lx.MatrixLinearOperator(root @ root.T + t * jnp.diag(jnp.arange(1.0, N + 1)), PSD)
        sketched = Sketched(operator, sketch)
        return w @ sketched.subspace_step(b) + w @ sketched.mv(b) + sketched.trace()

    def dense(t):
        matrix = root @ root.T + t * jnp.diag(jnp.arange(1.0, N + 1))
        core = s.T @ matrix @ s
        return w @ s @ jnp.linalg.solve(core, s.T @ b) + w @ s @ core @ s.T @ b + jnp.trace(s @ core @ s.T)

    def with_derivatives(f):
        return jax.jit(jax.vmap(lambda t: (f(t), jax.grad(f)(t), jax.grad(jax.grad(f))(t))))

    ours, truth = with_derivatives(value), with_derivatives(dense)
    for ts in (jnp.array([0.1, 0.4, 0.9]), jnp.array([0.2, 0.5, 0.7])):
        for found, wanted in zip(ours(ts), truth(ts), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-7)
    assert len(traces) == 3
    keys = jax.random.split(key, 3)
    batch = eqx.filter_vmap(lambda k: SparseSketch(b, K, key=k))(keys)
    many = eqx.filter_vmap(lambda one: one.adjoint(b))(batch)
    np.testing.assert_allclose(many[1], SparseSketch(b, K, key=keys[1]).adjoint(b), atol=1e-14)


def test_solvers_use_the_structure_only_where_there_is_an_inverse(rng, key):
    matrix, tags = _matrices(rng)["definite"], PSD
    operator = lx.MatrixLinearOperator(jnp.asarray(matrix), tags)
    sketched, b = (
        Sketched(operator, GaussianSketch(operator, K, key=key)),
        jnp.asarray(rng.standard_normal(N)),
    )
    damped = cx.operators.Damped(sketched, 0.5)
    truth = np.linalg.solve(np.asarray(sketched.as_matrix()) + 0.5 * np.eye(N), b)
    np.testing.assert_allclose(damped.inverse().mv(b), truth, rtol=1e-9)
    solution = lx.linear_solve(damped, b, cx.linear.Auto(rtol=1e-10))
    np.testing.assert_allclose(solution.value, truth, rtol=1e-8)
    singular = lx.linear_solve(sketched, b, cx.linear.Auto(rtol=1e-10), throw=False)
    assert singular.result != lx.RESULTS.successful


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, k: GaussianSketch(a, 5, key=k), r"`size` of `GaussianSketch`.*from 1 to 4, found 5"),
        (lambda a, k: HadamardSketch(a, 1.5, key=k), "`size` of `HadamardSketch`.*found 1.5"),
        (lambda a, k: SparseSketch(a, 3, key=k, nonzeros=4), "`nonzeros` of `SparseSketch`.*from 1 to 3"),
        (lambda a, k: GaussianSketch({}, 1, key=k), "`like` of `GaussianSketch`.*found 0 elements"),
        (lambda a, k: GaussianSketch(jnp.arange(3), 1, key=k), "`like`.*int"),
        (lambda a, k: Sketched(a, GaussianSketch(jnp.zeros(3), 2, key=k)), "`sketch` of `Sketched` must take vectors"),
        (
            lambda a, k: Sketched(a, lx.MatrixLinearOperator(jnp.ones((4, 5)))),
            "`sketch` of `Sketched` has 5 columns in 4 dimensions",
        ),
        (lambda a, k: Sketched(a, jnp.zeros((4, 2))), "`sketch` of `Sketched` must be a Lineax operator"),
        (lambda a, k: Sketched(lx.MatrixLinearOperator(jnp.zeros((3, 4))), a), "`operator`.*must be square"),
        (lambda a, k: Sketched(a, a).subspace_step(jnp.ones(4), rcond=1.0), "`rcond`.*found 1.0"),
        (lambda a, k: Sketched(a, a).power(0.5), r"Sketched has no power\(0.5\)"),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(lx.MatrixLinearOperator(jnp.eye(4), PSD), key)
