"""Directions kept from runs of conjugate gradients, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax._pytree import tree_norm, tree_sub
from curvax.linear._cg_core import CONVERGED, conjugate_gradient
from curvax.linear._recycle import deflated, forget_if, nothing_recycled, still_fits, trial
from helpers.dense import rotated

N, CAPACITY = 60, 18
LIKE = {"a": jnp.zeros((4, 5)), "b": [jnp.zeros(()), jnp.zeros((13, 3))]}


def _tree(vector, dtype=jnp.float64):
    vector = jnp.asarray(vector, dtype)
    return {"a": vector[:20].reshape(4, 5), "b": [vector[20], vector[21:].reshape(13, 3)]}


def _flat(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in (tree["a"], *tree["b"])])


def _rows(slots):
    leaves = (slots["a"], *slots["b"])
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def _matrix(rng, condition=1e3):
    # A few large eigenvalues over a spread bulk: what deflation is good at.
    bulk = np.geomspace(1.0, 10.0, N - 6)
    return rotated(np.concatenate([bulk, np.geomspace(0.1 * condition, condition, 6)]), rng)


@jax.jit
def _solve(matrix, vector, kept, rtol):
    def matvec(v):
        flat = jnp.concatenate([v["a"].ravel(), v["b"][0][None], v["b"][1].ravel()])
        return _tree(matrix @ flat, matrix.dtype)

    return conjugate_gradient(matvec, _tree(vector, matrix.dtype), rtol=rtol, max_steps=500, recycled=kept)


def _filled(matrix, rng, dtype=jnp.float64, runs=4):
    like = jax.tree.map(lambda x: x.astype(dtype), LIKE)
    kept = nothing_recycled(like, CAPACITY)
    for _ in range(runs):
        kept = _solve(jnp.asarray(matrix, dtype), jnp.asarray(rng.normal(size=N), dtype), kept, 1e-3)[
            1
        ].recycled
    return kept


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-9), (jnp.float32, 2e-3)])
def test_directions_are_conjugate_and_products_are_theirs(rng, dtype, tol):
    matrix = _matrix(rng)
    kept = _filled(matrix, rng, dtype)
    count = int(kept.count)
    assert CAPACITY - CAPACITY // 3 < count <= CAPACITY
    u, w = _rows(kept.directions)[:count], _rows(kept.products)[:count]
    np.testing.assert_allclose(u @ matrix @ u.T, np.eye(count), atol=tol)
    np.testing.assert_allclose(w, u @ matrix, atol=tol * np.max(np.abs(w)))
    assert np.all(_rows(kept.directions)[count:] == 0)


def test_preconditioner_is_the_formula_and_deflates(rng):
    matrix = _matrix(rng)
    kept = _filled(matrix, rng)
    count = int(kept.count)
    u, w = _rows(kept.directions)[:count].T, _rows(kept.products)[:count].T
    middle = np.eye(N) - u @ w.T
    expected = float(kept.scale) * middle @ middle.T + u @ u.T
    columns = jax.vmap(lambda e: deflated(kept, None, _tree(e))[0])(jnp.eye(N))
    found = _rows(columns)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # The span of U has the eigenvalue 1, the rest those of scale · A, which the large ones have left.
    values = np.linalg.eigvals(expected @ matrix).real
    assert np.sum(np.abs(values - 1) < 1e-6) >= count
    plain = np.linalg.eigvalsh(matrix)
    assert np.max(values) / np.min(values) < 0.05 * plain[-1] / plain[0]


def test_any_content_leaves_it_definite(rng):
    """Directions of quite another matrix: still symmetric positive definite, still the right solution."""
    matrix, other = _matrix(rng), _matrix(rng, 1e2)
    kept = _filled(other, rng)
    inverse = _rows(jax.vmap(lambda e: deflated(kept, None, _tree(e))[0])(jnp.eye(N)))
    np.testing.assert_allclose(inverse, inverse.T, atol=1e-12)
    assert np.min(np.linalg.eigvalsh(inverse)) > 0
    vector = rng.normal(size=N)
    x, info = _solve(matrix, vector, kept, 1e-6)
    truth = np.linalg.solve(matrix, vector)
    assert int(info.status) == CONVERGED
    assert np.linalg.norm(_flat(x) - truth) <= 1e-6 * np.linalg.norm(truth)


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_forward_error_and_fewer_products(rng, rtol):
    """The promise of CG, the error of x in the 2-norm, is kept under recycled directions, with fewer products."""
    ratios = []
    for _ in range(6):
        matrix = _matrix(rng)
        kept, vector = _filled(matrix, rng), rng.normal(size=N)
        truth = np.linalg.solve(matrix, vector)
        plain = _solve(matrix, vector, forget_if(jnp.asarray(True), kept), rtol)[1]
        x, info = _solve(matrix, vector, kept, rtol)
        assert np.linalg.norm(_flat(x) - truth) <= 1.5 * rtol * np.linalg.norm(truth)
        ratios.append(int(info.num_matvecs) / int(plain.num_matvecs))
        # What it says of A itself, not of the preconditioned operator.
        assert 0.5 < float(info.lowest) / np.linalg.eigvalsh(matrix)[0] < 3
    assert np.median(ratios) < 0.7


def test_a_user_preconditioner_and_directions_work_together(rng):
    """Directions of A in the metric of a Jacobi preconditioner."""
    scales = np.geomspace(1.0, 1e3, N)
    matrix = np.sqrt(scales)[:, None] * _matrix(rng) * np.sqrt(scales)
    diagonal, steps = _tree(1 / np.diagonal(matrix)), {}

    @jax.jit
    def solve(vector, kept):
        return conjugate_gradient(
            lambda v: _tree(jnp.asarray(matrix) @ _flat_traced(v)),
            _tree(vector),
            rtol=1e-4,
            max_steps=2000,
            preconditioner=lambda r: jax.tree.map(jnp.multiply, diagonal, r),
            recycled=kept,
        )

    for name, recycles in (("alone", False), ("together", True)):
        kept = nothing_recycled(LIKE, CAPACITY) if recycles else None
        for _ in range(5):
            vector = rng.normal(size=N)
            x, info = solve(vector, kept)
            kept = info.recycled
        truth = np.linalg.solve(matrix, vector)
        assert np.linalg.norm(_flat(x) - truth) <= 1.5e-4 * np.linalg.norm(truth)
        steps[name] = int(info.num_matvecs)
    assert steps["together"] < 0.8 * steps["alone"]


def _flat_traced(tree):
    return jnp.concatenate([leaf.ravel() for leaf in (tree["a"], *tree["b"])])


def test_a_run_that_breaks_down_leaves_nothing_harmful(rng):
    """An infinite right-hand side, an indefinite matrix: the directions stay finite and usable."""
    matrix = _matrix(rng)
    kept = _filled(matrix, rng, runs=1)
    bad = rng.normal(size=N)
    bad[3] = np.inf
    indefinite = matrix - 20 * np.eye(N)
    for operator, vector in ((matrix, bad), (indefinite, rng.normal(size=N)), (matrix * np.nan, np.ones(N))):
        kept = _solve(operator, vector, kept, 1e-6)[1].recycled
    assert np.all(np.isfinite(_rows(kept.directions))) and np.all(np.isfinite(_rows(kept.products)))
    vector = rng.normal(size=N)
    x, _ = _solve(matrix, vector, kept, 1e-6)
    truth = _tree(np.linalg.solve(matrix, vector))
    assert float(tree_norm(tree_sub(x, truth))) <= 1e-6 * float(tree_norm(truth))


def test_vmap_is_a_loop(rng):
    matrices = np.stack([_matrix(rng) for _ in range(3)])
    vectors = rng.normal(size=(3, N))
    keeps = [_filled(m, rng, runs=1) for m in matrices]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *keeps)
    x, info = jax.vmap(_solve, in_axes=(0, 0, 0, None))(matrices, vectors, stacked, 1e-5)
    for i in range(3):
        alone, one = _solve(matrices[i], vectors[i], keeps[i], 1e-5)
        found, expected = _flat(jax.tree.map(lambda leaf, i=i: leaf[i], x)), _flat(alone)
        # Both are within 1e-5 of the truth; rounding may make one of them stop a step later.
        assert np.linalg.norm(found - expected) <= 2e-5 * np.linalg.norm(expected)
        assert int(info.recycled.count[i]) == int(one.recycled.count)


def _spread(condition, rng):
    return rotated(np.geomspace(1.0, condition, N), rng)


def test_leaves_of_two_precisions_never_overflow():
    """Energies that float64 holds and weights that float32 does not: nothing of it is kept."""
    like = {"a": jnp.zeros(3, jnp.float32), "b": jnp.zeros(4, jnp.float64)}
    kept = nothing_recycled(like, 6)

    def matvec(v):
        return {"a": 2 * v["a"], "b": jnp.arange(1.0, 5.0) * v["b"]}

    solve = jax.jit(lambda b, kept: conjugate_gradient(matvec, b, rtol=1e-6, max_steps=50, recycled=kept))
    for size in (1e-42, 1e-60, 1e-160, 1.0):
        rhs = jax.tree.map(lambda x, s=size: jnp.full_like(x, s), like)
        x, info = solve(rhs, kept)
        kept = forget_if(jnp.asarray(size < 1), info.recycled)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(kept.directions))
    assert int(info.status) == CONVERGED
    np.testing.assert_allclose(x["b"], 1 / np.arange(1.0, 5.0), rtol=1e-5)


def test_isolated_low_eigenvalue_is_remembered(rng):
    """Once deflated it is not seen any more, and still counts in the stopping test."""
    matrix = rotated(np.concatenate([[1e-2], np.geomspace(1.0, 50.0, N - 1)]), rng)
    kept = _filled(matrix, rng, runs=2)
    for _ in range(4):
        vector = rng.normal(size=N)
        x, info = _solve(matrix, vector, kept, 1e-4)
        kept = info.recycled
        truth = np.linalg.solve(matrix, vector)
        assert np.linalg.norm(_flat(x) - truth) <= 1.5e-4 * np.linalg.norm(truth)
    assert 0.5 < float(info.lowest) / 1e-2 < 1.5
    assert 0.4 < float(info.norm) / 50.0 < 2.5


@jax.jit
def _tried(kept, matrix):
    def matvec(v):
        return _tree(matrix @ _flat_traced(v), matrix.dtype)

    _, info = conjugate_gradient(
        matvec, trial(kept), rtol=0.1, max_steps=1, recycled=kept, keeps=jnp.asarray(False)
    )
    return info.recycled.count, still_fits(info.decades, info.curvature_min)


def _outlived(kept, matrix):
    count, fits = _tried(kept, matrix)
    assert int(count) == int(kept.count)
    return not bool(fits)


@pytest.mark.parametrize(("change", "expected"), [(0.0, False), (1e-3, False), (0.3, True), (10.0, True)])
def test_directions_are_outlived_when_the_matrix_has_moved(rng, change, expected):
    """Relative to A itself, not to its largest eigenvalue: the perturbation is A^(1/2) E A^(1/2)."""
    matrix = _matrix(rng)
    values, vectors = np.linalg.eigh(matrix)
    root = (vectors * np.sqrt(values)) @ vectors.T
    noise = rng.normal(size=(N, N)) / np.sqrt(N)
    other = jnp.asarray(matrix + change * root @ (noise + noise.T) @ root)
    assert _outlived(_filled(matrix, rng), other) is expected


@pytest.mark.parametrize("scale", [1e-6, 0.4, 2.5, 1e6])
def test_directions_of_a_rescaled_matrix_are_outlived(rng, scale):
    matrix = _spread(1e2, rng)
    kept = _filled(matrix, rng, jnp.float32)
    assert _outlived(kept, jnp.asarray(scale * matrix, jnp.float32))
    assert _outlived(kept, jnp.full((N, N), jnp.nan, jnp.float32))
