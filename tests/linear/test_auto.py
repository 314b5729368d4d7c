"""`Auto`: what it chooses, what it falls back to, and that its status is true."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from curvax.linear import Auto, Method, Reason
from curvax.linear._auto_dense import Written, factors
from helpers.dense import refined_solve
from helpers.matrices import definite, hilbert, indefinite, kkt, rotation_and_decay, singular

N = 24
PSD, SYMMETRIC = lx.positive_semidefinite_tag, lx.symmetric_tag


@functools.cache
def _program(tags, options):
    solver = Auto(**dict(options))

    @jax.jit
    def solve(matrix, vector):
        operator = lx.MatrixLinearOperator(matrix, tags)
        solution = lx.linear_solve(operator, vector, solver, throw=False)
        return solution.value, solution.result, solution.stats

    return solve


def _solve(matrix, vector, tags, **options):
    options = {"rtol": 1e-8} | options
    value, result, stats = _program(tags, tuple(options.items()))(jnp.asarray(matrix), jnp.asarray(vector))
    return value, result, Method(int(stats["method"])), Reason(int(stats["reason"])), stats


SHIFTED = definite(N, 50.0) - 0.3 * np.eye(N)
CHOICES = {
    "definite": (definite(N, 50.0), PSD, Method.cholesky, Method.cg, Reason.first_choice),
    "negative definite": (
        -definite(N, 50.0),
        lx.negative_semidefinite_tag,
        Method.cholesky,
        Method.cg,
        Reason.first_choice,
    ),
    "falsely tagged": (SHIFTED, PSD, Method.lu, Method.minres, Reason.indefinite),
    "indefinite": (indefinite(N, 50.0), SYMMETRIC, Method.lu, Method.minres, Reason.first_choice),
    "kkt": (kkt(18, 6, 100.0), SYMMETRIC, Method.lu, Method.minres, Reason.first_choice),
    "nonsymmetric": (rotation_and_decay(N), (), Method.lu, Method.gmres, Reason.first_choice),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_by_size_and_tags(name, rng):
    matrix, tags, direct, iterative, reason = CHOICES[name]
    vector = rng.standard_normal(N)
    truth = refined_solve(matrix, vector)
    for options, expected in (({}, direct), ({"dense_size": 0, "fallback_size": 0}, iterative)):
        value, result, method, why, stats = _solve(matrix, vector, tags, **options)
        assert (method, why) == (expected, reason)
        assert result == lx.RESULTS.successful
        np.testing.assert_allclose(value, truth, rtol=1e-5, atol=1e-6)
        residual = np.linalg.norm(vector - matrix @ value)
        assert residual <= 1.001e-8 * np.linalg.norm(vector)
        if residual > 1e-12:
            np.testing.assert_allclose(stats["residual_norm"], residual, rtol=1e-3)


def test_fallbacks_after_a_budget_that_is_too_small(rng):
    vector = rng.standard_normal(N)
    matrix = definite(N, 1e6)
    value, result, method, reason, _ = _solve(matrix, vector, PSD, dense_size=0, max_steps=3)
    assert result == lx.RESULTS.successful
    assert (method, reason) == (Method.cholesky_fallback, Reason.budget)
    np.testing.assert_allclose(value, refined_solve(matrix, vector), rtol=1e-6)
    _, result, method, _, _ = _solve(matrix, vector, PSD, dense_size=0, max_steps=3, fallback_size=0)
    assert (result, method) == (lx.RESULTS.max_steps_reached, Method.minres)


def test_stalled_gmres_takes_a_longer_basis(rng):
    """A cyclic shift: GMRES makes no progress at all before the full dimension."""
    matrix = np.roll(np.eye(N), 1, axis=0)
    vector = np.eye(N)[0]
    value, result, method, reason, _ = _solve(matrix, vector, (), dense_size=0, restart=8, fallback_size=0)
    assert result == lx.RESULTS.successful
    assert (method, reason) == (Method.gmres_long, Reason.stalled)
    np.testing.assert_allclose(value, np.linalg.solve(matrix, vector), atol=1e-7)
    _, result, _, _, _ = _solve(matrix, vector, (), dense_size=0, restart=4, fallback_size=0)
    assert result == lx.RESULTS.stagnation
    _, result, method, _, _ = _solve(matrix, vector, (), dense_size=0, restart=4)
    assert (result, method) == (lx.RESULTS.successful, Method.lu_fallback)


@pytest.mark.parametrize("dense_size", [0, 128])
@pytest.mark.parametrize("tags", [PSD, SYMMETRIC, ()], ids=["psd", "symmetric", "general"])
def test_singular_is_said(dense_size, tags, rng):
    matrix, null = singular(N, 1)
    vector = rng.standard_normal(N) + null[:, 0]
    _, result, _, _, _ = _solve(matrix, vector, tags, dense_size=dense_size)
    assert result == lx.RESULTS.singular
    _, result, _, _, _ = _solve(matrix + 0.5 * np.eye(N), vector, tags, dense_size=dense_size)
    assert result == lx.RESULTS.successful


def test_hilbert_matrices():
    """No silent nonsense: the residual of Hilbert 12 is tiny and its solution arbitrary."""
    bad = hilbert(12)
    value, result, _, _, stats = _solve(bad, bad @ np.ones(12), PSD)
    assert np.linalg.norm(bad @ value - bad @ np.ones(12)) < 1e-14  # what a residual test would see
    assert result == lx.RESULTS.singular and stats["condition"] > 1e15
    _, result, _, _, _ = _solve(bad, np.ones(12), PSD, dense_size=0)
    assert result == lx.RESULTS.singular
    good = hilbert(5)
    value, result, method, _, stats = _solve(good, good @ np.ones(5), PSD)
    assert (result, method) == (lx.RESULTS.successful, Method.cholesky)
    np.testing.assert_allclose(value, np.ones(5), rtol=1e-9)
    truth = np.linalg.cond(good, "fro")
    assert truth / 3 <= stats["condition"] <= 3 * truth


@pytest.mark.parametrize("kind", ["random", "graded", "triangular"])
def test_condition_estimate_is_within_a_factor_of_three(kind, rng):
    for _ in range(5):
        matrix = rng.standard_normal((N, N))
        if kind == "graded":
            matrix = matrix * np.geomspace(1e-4, 1.0, N)
        if kind == "triangular":
            matrix = np.triu(matrix) + 2 * np.eye(N)
        truth = np.linalg.cond(matrix, "fro")
        estimate = factors(Written(jnp.asarray(matrix), False), 0).condition
        assert truth / 3 <= estimate <= 3 * truth


def test_fallbacks_run_only_for_the_examples_that_need_them():
    """Under vmap a cond would run every branch for everyone; `run_if` must not run at all when unneeded."""
    calls = []

    @jax.jit
    def solve(matrices, vectors):
        def one(matrix, vector):
            def product(v):
                jax.debug.callback(lambda: calls.append(None))
                return matrix @ v

            structure = jax.eval_shape(lambda: vector)
            operator = lx.FunctionLinearOperator(product, structure, PSD)
            solution = lx.linear_solve(operator, vector, Auto(rtol=1e-6), throw=False)
            return solution.value, solution.stats["method"]

        return jax.vmap(one)(matrices, vectors)

    n = 150
    good = np.stack([definite(n, 4.0), definite(n, 4.0, seed=1)])
    vectors = np.ones((2, n))
    _, methods = jax.block_until_ready(solve(good, vectors))
    jax.effects_barrier()
    assert set(np.asarray(methods).tolist()) == {int(Method.cg)}
    assert len(calls) < n  # to write the matrices out would take 2 n products
    mixed = np.stack([good[0], good[1] - 0.6 * np.eye(n)])
    values, methods = jax.block_until_ready(solve(mixed, vectors))
    jax.effects_barrier()
    assert np.asarray(methods).tolist() == [Method.cg, Method.lu_fallback]
    np.testing.assert_allclose(values[1], np.linalg.solve(mixed[1], vectors[1]), rtol=1e-4)


def test_works_on_derivative_operators_of_any_size(rng):
    """A Hessian over a tree: factorised when small, matrix-free otherwise, the same answer."""
    features = jnp.asarray(rng.standard_normal((30, 5)))
    theta = {"w": jnp.asarray(rng.standard_normal(5)), "b": jnp.asarray(0.3), "n": 3}

    def loss(theta, x):
        return jnp.mean(jnp.logaddexp(0.0, x @ theta["w"] + theta["b"])) + 0.05 * jnp.sum(theta["w"] ** 2)

    def loss_with_bias(theta, x):
        return loss(theta, x) + 0.05 * theta["b"] ** 2

    operator = ops.hessian(loss_with_bias, theta, features, tags=PSD)
    vector = {"w": jnp.asarray(rng.standard_normal(5)), "b": jnp.asarray(1.0), "n": None}
    truth = np.linalg.solve(operator.as_matrix(), np.r_[vector["b"], vector["w"]])
    for options, method in (({}, Method.cholesky), ({"dense_size": 0, "fallback_size": 0}, Method.cg)):
        solution = lx.linear_solve(operator, vector, Auto(rtol=1e-9, **options))
        assert Method(int(solution.stats["method"])) == method
        np.testing.assert_allclose(np.r_[solution.value["b"], solution.value["w"]], truth, rtol=1e-6)
        assert solution.value["n"] is None


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`dense_size` of `Auto` must be at least 0"):
        Auto(rtol=1e-6, dense_size=-1)
    with pytest.raises(ValueError, match="needs `rtol` or `atol` above 0"):
        Auto(rtol=0.0)
    operator = lx.MatrixLinearOperator(jnp.eye(3), PSD)
    options = {"preconditioner": lx.MatrixLinearOperator(jnp.eye(3))}
    with pytest.raises(ValueError, match="preconditioner.*positive_semidefinite_tag"):
        lx.linear_solve(operator, jnp.ones(3), Auto(rtol=1e-6, dense_size=0), options=options)
