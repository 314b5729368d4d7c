"""Dampings against their definitions, minimised by SciPy over explicit matrices; the Cholesky factor that shifts."""

import math

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import curvax as cx
from curvax.linear import (
    damping_by_cross_validation,
    damping_by_evidence,
    damping_for_condition,
    damping_from_diagonal,
    shifted_cholesky,
)
from helpers.compilations import compilations
from helpers.dense import rotated
from helpers.sweep import sweep

ROWS, COLUMNS = 40, 12
N = 30
PSD = lx.positive_semidefinite_tag


def _tree(v):
    """A vector cut into a matrix, a scalar, nothing and an empty leaf."""
    return {"w": v[1:].reshape(1, -1), "b": v[0], "none": None, "empty": jnp.zeros((0, 2), v.dtype)}


def _flat(tree):
    return jnp.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _operator(matrix, dtype=jnp.float64, tags=()):
    matrix = jnp.asarray(matrix, dtype)
    structure = jax.eval_shape(lambda: _tree(matrix[0]))
    return lx.FunctionLinearOperator(lambda v: _tree(matrix @ _flat(v)), structure, tags)


def _regression(rng, rows=ROWS, columns=COLUMNS, noise=0.5):
    """Draws of the model itself, with columns of many scales."""
    J = rng.standard_normal((rows, columns)) * np.geomspace(3.0, 0.05, columns)
    return J, J @ rng.standard_normal(columns) + noise * rng.standard_normal(rows)


def _kernel(rng, noise=0.3):
    points = np.sort(rng.uniform(0, 4, N))
    K = np.exp(-0.5 * (points[:, None] - points) ** 2)
    b = np.linalg.cholesky(K + 1e-10 * np.eye(N)) @ rng.standard_normal(N) + noise * rng.standard_normal(N)
    return K, b


def _gram(name, rng):
    """K of the model b ~ N(0, σ²(I + K/λ)), the operator that has it, and b."""
    if name == "kernel":
        K, b = _kernel(rng)
        return K, lx.MatrixLinearOperator(jnp.asarray(K), PSD), b
    rows, columns = (COLUMNS, ROWS) if name == "wide" else (ROWS, COLUMNS)
    J, b = _regression(rng, rows, columns)
    return J @ J.T, lx.MatrixLinearOperator(jnp.asarray(J)), b


def _cross_validation(K, b, damping):
    """By the influence matrix."""
    rest = np.eye(len(b)) - K @ np.linalg.inv(K + damping * np.eye(len(b)))
    return np.log(len(b) * np.sum((rest @ b) ** 2) / np.trace(rest) ** 2)


def _evidence(K, b, damping, noise=None):
    """By the density."""
    shape = np.eye(len(b)) + K / damping
    if noise is None:
        noise = b @ np.linalg.solve(shape, b) / len(b)
    return -2 / len(b) * scipy.stats.multivariate_normal(np.zeros(len(b)), noise * shape).logpdf(b)


def _minimum(score, low=1e-5, high=1e4):
    grid = np.linspace(np.log(low), np.log(high), 300)
    best = grid[np.argmin([score(np.exp(t)) for t in grid])]
    found = scipy.optimize.minimize_scalar(
        lambda t: score(np.exp(t)), bounds=(best - 0.2, best + 0.2), method="bounded", options={"xatol": 1e-7}
    )
    return np.exp(found.x)


@pytest.mark.parametrize("name", sweep(["tall", "wide", "kernel"], always=["tall", "kernel"]))
def test_both_criteria_are_minimised(name, rng):
    for _ in range(2):
        K, operator, b = _gram(name, rng)
        found = damping_by_cross_validation(operator, jnp.asarray(b))
        truth = _minimum(lambda t, K=K, b=b: _cross_validation(K, b, t))
        # As good as the best; the same where there is one.
        reached = _cross_validation(K, b, max(float(found.damping), 1e-5))
        assert reached <= _cross_validation(K, b, truth) + 1e-6
        if truth > 1e-4:
            np.testing.assert_allclose(found.damping, truth, rtol=1e-4)
        for noise in (None, 0.2):
            found = damping_by_evidence(operator, jnp.asarray(b), noise_variance=noise)
            truth = _minimum(lambda t, K=K, b=b, noise=noise: _evidence(K, b, t, noise))
            if truth < 1e-4:
                continue
            assert not bool(found.at_end)
            np.testing.assert_allclose(found.damping, truth, rtol=1e-4)
            variance = b @ np.linalg.solve(np.eye(len(b)) + K / truth, b) / len(b) if noise is None else noise
            np.testing.assert_allclose(found.noise_variance, variance, rtol=1e-3)
            np.testing.assert_allclose(found.prior_variance, variance / truth, rtol=1e-3)
        assert found.normal is (name != "kernel") and float(found.error) == 0
    # Over vectors of any structure it is the same.
    tree = _operator(operator.matrix, tags=() if found.normal else PSD)
    again = damping_by_evidence(tree, _tree(jnp.asarray(b)), noise_variance=0.2)
    np.testing.assert_allclose(again.damping, found.damping, rtol=1e-6)


def test_evidence_finds_the_variances(rng):
    """Of a large draw from the model."""
    J, b = _regression(rng, 2000, 60, noise=0.5)
    J = J / np.linalg.norm(J, axis=0)
    b = 10 * J @ rng.standard_normal(60) + 0.5 * rng.standard_normal(2000)
    found = damping_by_evidence(lx.MatrixLinearOperator(jnp.asarray(J)), jnp.asarray(b))
    np.testing.assert_allclose(found.noise_variance, 0.25, rtol=0.1)
    np.testing.assert_allclose(found.prior_variance, 100, rtol=0.5)
    np.testing.assert_allclose(found.damping, found.noise_variance / found.prior_variance)


@pytest.mark.parametrize("choose", [damping_by_cross_validation, damping_by_evidence])
@pytest.mark.parametrize("normal", [True, False])
def test_probes_find_it_within_their_error(choose, normal, rng, key):
    """Large operators: nothing is written out, and the error covers the difference."""
    J, b = _regression(rng, 150, 100)
    operator = lx.MatrixLinearOperator(
        jnp.asarray(J) if normal else jnp.asarray(J @ J.T), () if normal else PSD
    )
    exact = choose(operator, jnp.asarray(b))
    # Three draws: the estimate is a random variable.
    off, errors = [], []
    for k in jax.random.split(key, 3):
        found = choose(operator, jnp.asarray(b), key=k, dense_size=10, num_steps=70)
        off.append(abs(np.log(float(found.damping) / float(exact.damping))))
        errors.append(float(found.error))
    assert np.sqrt(np.mean(np.square(off))) <= 3 * np.sqrt(np.mean(np.square(errors))) + 0.02
    assert max(errors) < 0.7
    # Signs know the trace of a diagonal, and with all the steps that there are nothing is in doubt.
    diagonal = jnp.asarray(np.geomspace(4.0, 1e-3, 20))
    b = jnp.sqrt(1 + diagonal) * jnp.asarray(rng.standard_normal(20))
    sure = lx.DiagonalLinearOperator(diagonal if not normal else jnp.sqrt(diagonal))
    sure = lx.TaggedLinearOperator(sure, PSD)
    found = choose(sure, b, key=key, dense_size=1, num_steps=20)
    np.testing.assert_allclose(found.damping, choose(sure, b).damping, rtol=1e-3)


@pytest.mark.parametrize("rank", [5, 12])
def test_low_rank_is_probed_as_it_is_written_out(rank, rng, key):
    """Lanczos exhausts the space: the zeros of J Jᵀ, up to rounding, must not count beside a small λ."""
    left, right = rng.normal(size=(200, rank)), rng.normal(size=(rank, 90)) / 90**0.5
    b = jnp.asarray(left @ right @ rng.normal(size=90) + rng.normal(size=200))
    J = lx.MatrixLinearOperator(jnp.asarray(left @ right))
    exact = damping_by_cross_validation(J, b)
    probed = damping_by_cross_validation(J, b, key=key, dense_size=0, num_probes=32)
    assert not (exact.at_end or probed.at_end)
    assert abs(jnp.log(probed.damping / exact.damping)) <= max(4 * float(probed.error), 0.1)
    assert probed.error < 0.5


def test_ends_and_numbers_that_are_none(rng):
    J, _ = _regression(rng)
    operator = lx.MatrixLinearOperator(jnp.asarray(J))
    outside = np.linalg.svd(J)[0][:, -1]  # no column comes near
    for choose in (damping_by_cross_validation, damping_by_evidence):
        noise = choose(operator, jnp.asarray(outside))
        assert bool(noise.at_end) and float(noise.damping) > 10 * np.linalg.norm(J, 2) ** 2
        exact = choose(operator, jnp.asarray(J @ np.ones(COLUMNS) * 1e3))
        assert bool(exact.at_end) and float(exact.damping) < 1e-10 * np.linalg.norm(J, 2) ** 2
        for bad in (
            choose(operator, jnp.zeros(ROWS)),
            choose(operator, jnp.ones(ROWS).at[3].set(jnp.nan)),
            choose(lx.MatrixLinearOperator(operator.matrix.at[2, 2].set(jnp.nan)), jnp.ones(ROWS)),
        ):
            assert bool(jnp.isnan(bad.damping)) and bool(bad.at_end)


def test_float32_jit_vmap_and_no_derivative(rng):
    J, b = _regression(rng)
    truth = damping_by_evidence(lx.MatrixLinearOperator(jnp.asarray(J)), jnp.asarray(b))
    traces = []

    @jax.jit
    def choose(J, b):
        traces.append(None)
        return jax.vmap(lambda b: damping_by_evidence(lx.MatrixLinearOperator(J), b).damping)(b)

    pair = jnp.stack([jnp.asarray(b), jnp.ones(ROWS)]).astype(jnp.float32)
    for _ in range(2):
        found = choose(jnp.asarray(J, jnp.float32), pair)
    assert found.dtype == jnp.float32 and len(traces) == 1
    np.testing.assert_allclose(found[0], truth.damping, rtol=1e-2)
    slope = jax.grad(lambda b: damping_by_evidence(lx.MatrixLinearOperator(jnp.asarray(J)), b).damping)
    np.testing.assert_array_equal(slope(jnp.asarray(b)), 0.0)


@pytest.mark.parametrize("dense_size", [512, 0])
def test_condition_is_met(dense_size, rng, key):
    def damping(matrix, target, **options):
        options = {"dense_size": dense_size, "key": key, "num_steps": 30} | options
        return float(
            damping_for_condition(lx.MatrixLinearOperator(jnp.asarray(matrix), PSD), target, **options)
        )

    for spectrum in (
        np.geomspace(1, 1e-9, N),
        np.r_[np.zeros(5), np.linspace(1, 3, N - 5)],
        np.linspace(1, 3, N),
    ):
        matrix = rotated(spectrum, rng)
        for target in (2.0, 1e3):
            found = damping(matrix, target)
            condition = (spectrum.max() + found) / (spectrum.min() + found)
            assert condition <= target * (1 + 1e-9)
            # The least one, or nothing.
            assert condition >= target * (1 - 1e-6) or found == 0
    # Few steps err on the safe side.
    spectrum = np.geomspace(1, 1e-6, N)
    found = damping(rotated(spectrum, rng), 100.0, num_steps=4)
    assert 10 < (spectrum.max() + found) / (spectrum.min() + found) <= 100 * (1 + 1e-9)
    assert damping(np.eye(N), 2.0) == 0
    assert np.isnan(damping(np.full((N, N), np.nan), 2.0))
    traced = jax.jit(
        lambda t: damping_for_condition(_operator(np.eye(N), tags=PSD), t, dense_size=dense_size, key=key)
    )
    assert np.isnan(traced(0.5)) and traced(5.0) == 0


def test_median_of_the_diagonal(rng):
    factor = rng.standard_normal((N, N)) * np.geomspace(1, 1e3, N)[:, None]
    matrix = factor @ factor.T
    truth = 0.01 * np.median(np.diag(matrix))
    operators = [_operator(matrix, tags=PSD), lx.MatrixLinearOperator(jnp.asarray(matrix), PSD)]
    operators.append(lx.DiagonalLinearOperator(jnp.diag(jnp.asarray(matrix))))
    operators[2] = lx.TaggedLinearOperator(operators[2], PSD)
    for operator in operators:
        np.testing.assert_allclose(damping_from_diagonal(operator, 0.01), truth, rtol=1e-12)
    large = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(jnp.full(5000, 2.0)), PSD)
    np.testing.assert_allclose(damping_from_diagonal(large), 2e-3)


# --- shifted Cholesky ---


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-12), (jnp.float32, 1e-4)])
def test_cholesky_shifts_as_little_as_it_must(dtype, tol, rng):
    definite = jnp.asarray(rotated(np.linspace(1, 3, 8), rng), dtype)
    found = shifted_cholesky(definite)
    assert not bool(found.failed) and float(found.shift) == 0 and int(found.num_attempts) == 1
    np.testing.assert_allclose(found.factor @ found.factor.T, definite, atol=tol)
    np.testing.assert_allclose(found.solve(definite @ jnp.ones(8, dtype)), np.ones(8), atol=10 * tol)
    indefinite = rotated(np.r_[-0.5, np.linspace(1, 3, 7)], rng)
    found = shifted_cholesky(jnp.asarray(indefinite, dtype), first_shift=0.01)
    assert float(found.shift) == pytest.approx(1.0) and int(found.num_attempts) == 4
    shifted = indefinite + float(found.shift) * np.eye(8)
    np.testing.assert_allclose(found.factor @ found.factor.T, shifted, atol=tol)
    assert found.factor.dtype == found.shift.dtype == dtype
    # Any finite matrix by default: zero, of rank one, negative, tiny and huge.
    for matrix in (
        np.zeros((8, 8)),
        np.ones((8, 8)),
        -np.eye(8),
        -1e-30 * np.ones((8, 8)),
        -1e30 * np.eye(8),
    ):
        found = shifted_cholesky(jnp.asarray(matrix, dtype))
        assert not bool(found.failed) and np.all(np.isfinite(found.factor))
        shifted = matrix + float(found.shift) * np.eye(8)
        product = np.square(np.asarray(found.factor, np.float64)).sum(axis=1)
        np.testing.assert_allclose(product, np.diag(shifted), rtol=1e-4)
    assert float(shifted_cholesky(jnp.ones((8, 8), dtype)).shift) < 100 * jnp.finfo(dtype).eps


def test_cholesky_outside_of_jit_compiles_once(rng):
    """A loop outside of a compiled function is compiled in every call."""
    matrices = [rotated(np.append(rng.uniform(1.0, 2.0, N - 1), -1e-9), rng) for _ in range(2)]
    with compilations() as seen:
        shifted_cholesky(jnp.asarray(matrices[0]))
        first = len(seen)
        shifted_cholesky(jnp.asarray(matrices[1]))
    assert first > 0 and len(seen) == first


def test_cholesky_fails_out_loud(rng):
    indefinite = jnp.asarray(rotated(np.r_[-0.5, np.ones(7)], rng))
    for matrix, cap in (
        (indefinite, 0.4),
        (indefinite.at[2, 1].set(jnp.nan), None),
        (indefinite * jnp.inf, None),
    ):
        found = shifted_cholesky(matrix, first_shift=0.01, max_shift=cap)
        assert (
            bool(found.failed)
            and np.all(np.isnan(found.factor))
            and np.all(np.isnan(found.solve(jnp.ones(8))))
        )
        assert not float(found.shift) > 0.4
    assert not bool(shifted_cholesky(indefinite, first_shift=0.01, max_shift=1.0).failed)
    # A shift of zero never grows, and here nobody could see it before.
    traced = jax.jit(lambda s: shifted_cholesky(indefinite, first_shift=s).failed)
    assert bool(traced(0.0)) and not bool(traced(1e-3))
    assert shifted_cholesky(jnp.zeros((0, 0))).factor.shape == (0, 0)


def test_cholesky_under_transformations(rng):
    """Derivatives are those of the factor of A plus a constant; under `vmap` each example has its own shift."""
    base = jnp.asarray(rotated(np.r_[-0.5, np.ones(4)], rng))
    direction = jnp.asarray(rng.standard_normal((5, 5)))
    direction = direction + direction.T
    weights = jnp.asarray(rng.standard_normal((5, 5)))
    shift = shifted_cholesky(base, first_shift=0.01).shift

    def ours(t):
        return jnp.sum(weights * shifted_cholesky(base + t * direction, first_shift=0.01).factor ** 2)

    def truth(t):
        return jnp.sum(weights * jnp.linalg.cholesky(base + t * direction + shift * jnp.eye(5)) ** 2)

    for derivative in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.grad(f)), jax.hessian):
        np.testing.assert_allclose(
            jax.jit(derivative(ours))(1e-3), jax.jit(derivative(truth))(1e-3), rtol=1e-8
        )
    batch = jnp.stack([base, jnp.eye(5), 3 * base])
    found = jax.jit(jax.vmap(lambda m: shifted_cholesky(m, first_shift=0.01)))(batch)
    np.testing.assert_allclose(found.shift, [1.0, 0.0, 10.0], rtol=1e-12)
    assert found.num_attempts.tolist() == [4, 1, 5]
    for m, f, s in zip(batch, found.factor, found.shift, strict=True):
        np.testing.assert_allclose(f @ f.T, m + s * jnp.eye(5), atol=1e-12)


DIAGONAL = lx.DiagonalLinearOperator(jnp.ones(4))
DEFINITE = lx.TaggedLinearOperator(DIAGONAL, PSD)
EMPTY = lx.TaggedLinearOperator(lx.DiagonalLinearOperator(jnp.zeros(0)), PSD)
LARGE = lx.FunctionLinearOperator(lambda v: v, jax.ShapeDtypeStruct((5000,), jnp.float64), PSD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: damping_for_condition(lx.MatrixLinearOperator(jnp.eye(2)), 5.0), "must be tagged"),
        (lambda: damping_for_condition(DIAGONAL, 5.0), "tagged `lx.positive_semidefinite_tag`.*singular"),
        (lambda: damping_for_condition(DEFINITE, 1.0), "`target`.*above 1, found 1.0"),
        (lambda: damping_for_condition(DEFINITE, jnp.ones(2)), "`target`.*above 1"),
        (lambda: damping_for_condition(LARGE, 5.0), r"`key` of `damping_for_condition`.*found None"),
        (lambda: damping_for_condition(DEFINITE, math.inf), "`target`.*finite number above 1, found inf"),
        (lambda: damping_for_condition(EMPTY, 2.0), "`operator` of `damping_for_condition` has no rows"),
        (lambda: damping_from_diagonal(EMPTY), "`operator` of `damping_from_diagonal` has no rows"),
        (lambda: damping_from_diagonal(DIAGONAL), "tagged `lx.positive_semidefinite_tag`"),
        (lambda: damping_from_diagonal(DEFINITE, -1.0), "`fraction`.*at least 0, found -1.0"),
        (lambda: damping_from_diagonal(LARGE), "5000 products.*`damping_for_condition`"),
        (
            lambda: damping_by_evidence(DEFINITE, jnp.ones(3)),
            r"`vector`.*space that `operator` maps to.*found",
        ),
        (lambda: damping_by_evidence(-DEFINITE, jnp.ones(4)), "negative semidefinite; pass `-operator`"),
        (lambda: damping_by_evidence(DEFINITE, jnp.ones(4), noise_variance=0.0), "`noise_variance`.*above 0"),
        (lambda: damping_by_cross_validation(LARGE, jnp.ones(5000)), "`key`.*found None"),
        (
            lambda: damping_by_cross_validation(LARGE, jnp.ones(5000), key=jax.random.key(0), num_probes=1),
            "`num_probes`.*at least 2.*found 1",
        ),
        (
            lambda: damping_by_cross_validation(
                lx.MatrixLinearOperator(jnp.eye(2, dtype=complex)), jnp.ones(2)
            ),
            "`operator`.*real",
        ),
        (
            lambda: damping_by_evidence(lx.MatrixLinearOperator(jnp.zeros((3, 0))), jnp.ones(3)),
            "has no elements",
        ),
        (lambda: shifted_cholesky(jnp.ones((2, 3))), "`matrix`.*square array"),
        (lambda: shifted_cholesky(jnp.ones((2, 2), int)), "`matrix`.*float32 or float64, found int"),
        (lambda: shifted_cholesky(jnp.eye(2), first_shift=0.0), "`first_shift`.*above 0.*at 0 never grows"),
        (lambda: shifted_cholesky(jnp.eye(2), max_shift=jnp.inf), "`max_shift`.*finite"),
        (lambda: shifted_cholesky(jnp.eye(2), first_shift=1.0, max_shift=0.5), "`max_shift`.*0.5 < 1.0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_everything_is_exported():
    names = {"damping_for_condition", "damping_from_diagonal", "DampingChoice", "ShiftedCholesky"}
    assert names <= set(vars(cx.linear))
