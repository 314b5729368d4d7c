"""The Neumann series: when it converges, how fast, and that it says so when it does not."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.linear import Neumann
from curvax.linear._neumann_step import growth_rate, series_step
from helpers.matrices import definite, indefinite, rotation, singular

N = 20


@functools.cache
def _program(solver_options):
    solver = Neumann(**dict(solver_options))

    @jax.jit
    def solve(matrix, vector):
        solution = lx.linear_solve(lx.MatrixLinearOperator(matrix), vector, solver, throw=False)
        return solution.value, solution.result, solution.stats

    return solve


def _solve(matrix, vector, **options):
    options = {"rtol": 1e-8, "max_terms": 5000} | options
    return _program(tuple(options.items()))(jnp.asarray(matrix), jnp.asarray(vector))


def test_terms_are_those_of_the_series(rng):
    """K terms with step α are α Σ_{k<K} (I − αA)ᵏ b: the step is inside the sum's factor (E72)."""
    matrix, vector = definite(N, 5.0), rng.standard_normal(N)
    step, terms = 0.7, 6
    power, total = vector, 0.0
    for _ in range(terms):
        total = total + step * power
        power = power - step * matrix @ power
    value, result, stats = _solve(matrix, vector, step=step, max_terms=terms)
    np.testing.assert_allclose(value, total, rtol=1e-12)
    assert result == lx.RESULTS.max_steps_reached  # it was converging: the budget ended it
    assert stats["contraction"] < 1


def test_torchopts_default_is_a_flagged_failure(rng):
    """α = 1 and 10 terms at ‖H‖ = 10: TorchOpt's default is wrong by 5.7e8 there without a word."""
    matrix, vector = 10 * definite(N, 5.0), rng.standard_normal(N)
    value, result, stats = _solve(matrix, vector, step=1.0, max_terms=10)
    assert result == lx.RESULTS.breakdown
    assert stats["contraction"] > 1
    np.testing.assert_array_equal(value, np.zeros(N))  # every term made it worse
    value, result, _ = _solve(matrix, vector)  # the benign control: the estimated step
    assert result == lx.RESULTS.successful
    np.testing.assert_allclose(value, np.linalg.solve(matrix, vector), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4, -1.0])
def test_estimated_step_on_definite_operators(scale, rng):
    matrix, vector = scale * definite(N, 50.0), rng.standard_normal(N)
    value, result, stats = _solve(matrix, vector)
    assert result == lx.RESULTS.successful
    np.testing.assert_allclose(value, np.linalg.solve(matrix, vector), rtol=1e-5, atol=1e-7 / abs(scale))
    radius = np.abs(1 - float(stats["step"]) * np.linalg.eigvalsh(matrix)).max()
    assert radius < 1
    assert int(stats["num_steps"]) < 3 * 50 * np.log(1e8)


@pytest.mark.parametrize("radius", [0.9, 1.2])
def test_complex_pairs(radius, rng):
    """I − T with ρ(T) = 0.9 converges with α = 1 at that rate; with ρ(T) = 1.2 only a damped step does."""
    matrix, vector = np.eye(N) - rotation(N, radius, 1.3), rng.standard_normal(N)
    value, result, stats = _solve(matrix, vector, step=1.0)
    np.testing.assert_allclose(stats["contraction"], radius, rtol=1e-6)
    if radius < 1:
        assert result == lx.RESULTS.successful
    else:
        assert result == lx.RESULTS.breakdown and np.all(np.isfinite(value))
    value, result, _ = _solve(matrix, vector)
    assert result == lx.RESULTS.successful
    np.testing.assert_allclose(value, np.linalg.solve(matrix, vector), rtol=1e-6, atol=1e-7)


def test_spectral_radius_below_one_suffices_although_the_norm_is_above(rng):
    """E2: ‖T‖ = 3 and ρ(T) = 0.5: the residual first grows, then converges."""
    transfer = 0.5 * np.eye(4) + np.diag([3.0, 3.0, 0.0], 1)
    assert np.linalg.norm(transfer, 2) > 3
    matrix, vector = np.eye(4) - transfer, rng.standard_normal(4)
    value, result, _ = _solve(matrix, vector, step=1.0)
    assert result == lx.RESULTS.successful
    np.testing.assert_allclose(value, np.linalg.solve(matrix, vector), rtol=1e-6)


@pytest.mark.parametrize(
    "matrix",
    [indefinite(N, 10.0), singular(N, 1)[0], np.zeros((N, N))],
    ids=["indefinite", "singular", "zero"],
)
def test_operators_without_a_step_are_flagged(matrix, rng):
    value, result, _ = _solve(matrix, rng.standard_normal(N), max_terms=500)
    assert bool(result != lx.RESULTS.successful)
    assert np.all(np.isfinite(value))


def test_rounding_level_is_stagnation(rng):
    _, result, stats = _solve(definite(N, 5.0), rng.standard_normal(N), rtol=1e-18)
    assert result == lx.RESULTS.stagnation
    assert stats["residual_norm"] < 1e-13


def test_growth_rate_is_the_spectral_radius():
    """E18: power iteration oscillates on complex pairs, the growth rate does not."""
    for matrix, radius in (
        (rotation(6, 0.9, 1.3), 0.9),
        (np.diag([0.2, -3.0]), 3.0),
        (np.array([[0.5, 100.0], [0.0, 0.5]]), 0.5),
        (np.zeros((3, 3)), 0.0),
        (np.diag(np.ones(2), 1), 0.0),
    ):
        np.testing.assert_allclose(growth_rate(jnp.asarray(matrix)), radius, rtol=1e-4, atol=1e-12)


def test_step_on_a_large_clustered_spectrum_is_safe():
    """20 products do not see all of 400 eigenvalues; the step must converge all the same."""
    values = np.concatenate([np.full(399, 1e-2), [1.0]])
    step, _ = jax.jit(lambda d: series_step(lambda v: d * v, 400, d.dtype))(jnp.asarray(values))
    assert 0 < float(step) < 2
    values = np.linspace(1e-3, 1.0, 400)
    step, _ = jax.jit(lambda d: series_step(lambda v: d * v, 400, d.dtype))(jnp.asarray(values))
    assert 0.5 < float(step) < 2
