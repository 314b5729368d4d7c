"""Low-rank approximations from sketches, and estimates of their error, against dense matrices."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.operators import (
    GaussianSketch,
    HadamardSketch,
    LowRankPlusDiagonal,
    SparseSketch,
    approximation_error,
    nystrom_approximation,
    randomised_svd,
)

PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag
KINDS = {"gaussian": GaussianSketch, "sparse": SparseSketch, "hadamard": HadamardSketch}
N, K = 13, 5


def _tree(vector, dtype):
    parts = jnp.split(jnp.asarray(vector, dtype), [1, 5])
    return {"w": parts[2].reshape(2, 4), "b": parts[0][0], "e": jnp.zeros((0, 3), dtype), "c": parts[1]}


def _on_trees(matrix, tags, dtype=jnp.float64):
    """A dense matrix as an operator over a tree."""
    matrix = jnp.asarray(matrix, dtype)

    def product(v):
        flat = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(v)])
        return _tree(jnp.matmul(matrix, flat, precision="highest"), dtype)

    return lx.FunctionLinearOperator(product, jax.eval_shape(lambda: _tree(np.zeros(N), dtype)), tags)


def test_the_error_estimate_in_distribution(rng, key):
    """Its square is unbiased, its deviation is the scatter, and the bound fails as often as it says."""
    matrix = rng.standard_normal((N, N)) * np.geomspace(1, 1e-3, N)
    operator, zero = lx.MatrixLinearOperator(jnp.asarray(matrix)), lx.MatrixLinearOperator(jnp.zeros((N, N)))
    draws = 2000
    estimate = lambda k: approximation_error(operator, zero, key=k, num_probes=4, confidence=0.8)
    found = jax.jit(jax.vmap(estimate))(jax.random.split(key, draws))
    squares, truth = np.asarray(found.frobenius) ** 2, np.linalg.norm(matrix) ** 2
    assert abs(squares.mean() - truth) < 5 * squares.std() / np.sqrt(draws)
    spread = np.std(found.frobenius)
    assert 0.5 * spread < np.mean(found.deviation) < 1.2 * spread
    misses = np.mean(np.asarray(found.spectral_bound) < np.linalg.norm(matrix, 2))
    assert 0 < misses < 0.2
    np.testing.assert_allclose(found.relative, 1)
    same = approximation_error(operator, operator, key=key)
    assert float(same.frobenius) == 0 and float(same.spectral_bound) == 0 and float(same.deviation) == 0


@pytest.mark.parametrize(
    ("kind", "dtype"), [("gaussian", np.float64), ("sparse", np.float32), ("hadamard", np.float64)]
)
def test_nystrom_is_exact_for_low_rank_and_below_the_matrix_otherwise(kind, dtype, rng, key):
    eps = np.finfo(dtype).eps
    root = rng.standard_normal((N, 3))
    low = _on_trees(root @ root.T, PSD, dtype)
    sketch = KINDS[kind](low, 6, key=key)
    found = nystrom_approximation(low, sketch)
    assert isinstance(found, LowRankPlusDiagonal) and lx.is_positive_semidefinite(found) and found.rank == 6
    scale = np.linalg.norm(root @ root.T, 2)
    np.testing.assert_allclose(found.as_matrix(), root @ root.T, atol=300 * eps * scale)
    root = rng.standard_normal((N, N))
    full = root @ root.T / N
    operator = _on_trees(full, PSD, dtype)
    s = np.asarray(sketch.as_matrix(), np.float64)
    truth = full @ s @ np.linalg.solve(s.T @ full @ s, s.T @ full)
    found = np.asarray(nystrom_approximation(operator, sketch).as_matrix())
    np.testing.assert_allclose(found, truth, atol=3e4 * eps)
    assert np.linalg.eigvalsh(full - found).min() > -1e4 * eps
    fixed = nystrom_approximation(operator, sketch, rank=2)
    values, vectors = np.linalg.eigh(truth)
    best = (vectors[:, -2:] * values[-2:]) @ vectors[:, -2:].T
    assert fixed.rank == 2
    np.testing.assert_allclose(fixed.as_matrix(), best, atol=1e5 * eps)
    np.testing.assert_allclose(np.linalg.norm(_columns(fixed), axis=0) ** 2, values[:-3:-1], rtol=1e5 * eps)


def _columns(low_rank):
    return np.concatenate([np.reshape(leaf, (-1, low_rank.rank)) for leaf in jax.tree.leaves(low_rank.left)])


def test_nystrom_sees_an_indefinite_matrix(key):
    values = jnp.where(jnp.arange(N) % 4 == 0, -1.0, 1.0)
    sketch = GaussianSketch(values, 8, key=key)
    for diagonal, bad in ((values, True), (jnp.abs(values), False)):
        found = nystrom_approximation(lx.MatrixLinearOperator(jnp.diag(diagonal), SYMMETRIC), sketch)
        assert np.isnan(found.mv(jnp.ones(N))).all() == bad


def test_randomised_svd(rng, key):
    left, right = rng.standard_normal((N, 3)), rng.standard_normal((N, 3))
    cases = {
        "general": (left @ right.T, ()),
        "indefinite": (left * [3.0, -2.0, 1.0] @ left.T, SYMMETRIC),
        "definite": (left @ left.T, PSD),
        "negative": (-left @ left.T, lx.negative_semidefinite_tag),
    }

    @jax.jit
    def everything(matrices, key):
        found = {}
        for name, matrix in matrices.items():
            operator = _on_trees(matrix, cases[name][1])
            sketch = SparseSketch(operator, K, key=key, nonzeros=4)
            low_rank = randomised_svd(operator, sketch, power_steps=0)
            assert lx.is_symmetric(low_rank) == (name != "general") and low_rank.rank == K
            assert lx.is_positive_semidefinite(low_rank) == (name == "definite")
            found[name] = low_rank.as_matrix(), randomised_svd(operator, sketch, rank=1).as_matrix()
        return found

    found = everything({name: jnp.asarray(matrix) for name, (matrix, _) in cases.items()}, key)
    for name, (matrix, _) in cases.items():
        np.testing.assert_allclose(found[name][0], matrix, atol=1e-11, err_msg=name)
        u, s, vt = np.linalg.svd(matrix)
        np.testing.assert_allclose(found[name][1], s[0] * np.outer(u[:, 0], vt[0]), atol=1e-10)
    # Slowly falling singular values: power steps come close to the best error of any rank K.
    u, v = (np.linalg.qr(rng.standard_normal((60, 60)))[0] for _ in range(2))
    singular = 1 / np.sqrt(np.arange(1, 61))
    operator = lx.MatrixLinearOperator(jnp.asarray(u * singular @ v.T))
    sketch = GaussianSketch(operator, K, key=key)
    errors = [
        np.linalg.norm(
            np.asarray(operator.matrix - randomised_svd(operator, sketch, power_steps=q).as_matrix()), 2
        )
        for q in (0, 3)
    ]
    assert singular[K] <= errors[1] < 1.3 * singular[K] and errors[1] < errors[0]


def test_nan_and_zero_are_never_plausible(key):
    bad = lx.MatrixLinearOperator(jnp.eye(N).at[3, 3].set(jnp.nan), PSD)
    zero = lx.MatrixLinearOperator(jnp.zeros((N, N)), PSD)
    sketch = GaussianSketch(bad, K, key=key)
    assert np.isnan(nystrom_approximation(bad, sketch).mv(jnp.ones(N))).all()
    for tags in (PSD, SYMMETRIC, ()):
        worse = lx.MatrixLinearOperator(jnp.eye(N).at[3, 3].set(jnp.nan), tags)
        assert np.isnan(randomised_svd(worse, sketch).mv(jnp.ones(N))).all()
    error = approximation_error(bad, zero, key=key)
    assert np.isnan(error.frobenius) and np.isnan(error.spectral_bound) and np.isnan(error.deviation)
    np.testing.assert_array_equal(nystrom_approximation(zero, sketch).mv(jnp.ones(N)), 0)
    np.testing.assert_array_equal(randomised_svd(zero, sketch).mv(jnp.ones(N)), 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, k: approximation_error(a, a, key=k, num_probes=1), "`num_probes`.*at least 2"),
        (lambda a, k: approximation_error(a, a, key=k, confidence=1.0), "`confidence`.*found 1.0"),
        (lambda a, k: approximation_error(a, lx.MatrixLinearOperator(jnp.eye(3)), key=k), "`approximation`.*must act"),
        (lambda a, k: nystrom_approximation(lx.MatrixLinearOperator(jnp.eye(4)), a), "must be positive semidefinite"),
        (lambda a, k: nystrom_approximation(a, a, rank=5), "`rank` of `nystrom_approximation`.*from 1 to 4"),
        (lambda a, k: randomised_svd(a, a, power_steps=-1), "`power_steps` of `randomised_svd`.*found -1"),
        (
            lambda a, k: randomised_svd(a, lx.MatrixLinearOperator(jnp.ones((4, 6)))),
            "`sketch` of `randomised_svd` has 6 columns in 4 dimensions",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments(call, message, key):
    with pytest.raises(ValueError, match=message):
        call(lx.MatrixLinearOperator(jnp.eye(4), PSD), key)
