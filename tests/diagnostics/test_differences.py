"""Noise estimates and finite differences against functions whose noise and derivative are known."""

import numpy as np
import pytest

from curvax.diagnostics._differences import differentiate
from curvax.diagnostics._noise import estimate_noise, noise_of_values

EPS = np.finfo(np.float64).eps


def noisy(fn, level, seed=0):
    """`fn` plus fresh Gaussian noise of the given level at every call."""
    rng = np.random.default_rng(seed)
    return lambda t: np.atleast_1d(fn(t)) + level * rng.standard_normal(np.atleast_1d(fn(t)).shape)


@pytest.mark.parametrize("level", [1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("seed", range(5))
def test_noise_level_is_found(level, seed):
    estimate = estimate_noise(noisy(np.exp, level, seed), 1e-4, eps=EPS)
    assert 0.3 * level < estimate.level[0] < 3 * level


def test_smooth_function_has_only_rounding_noise():
    level = estimate_noise(lambda t: np.atleast_1d(np.sin(1 + t)), 1e-5, eps=EPS).level[0]
    assert 0.1 * EPS < level < 4 * EPS


def test_components_are_judged_apart():
    fn = noisy(lambda t: np.array([1 + t, 1 + t]), np.array([1e-3, 1e-9]))
    level = estimate_noise(fn, 1e-3, eps=EPS).level
    assert 3e-4 < level[0] < 3e-3 and 3e-10 < level[1] < 3e-9


def test_spacing_is_corrected_both_ways():
    # far too large: exp over 9 steps of 1 has no settled order; far too small: values repeat
    assert estimate_noise(lambda t: np.exp([t]), 1.0, eps=EPS).level[0] < 1e-14
    staircase = estimate_noise(
        lambda t: np.atleast_1d(np.round((1 + t) * 1e6) / 1e6), 1e-9, eps=EPS, scale=1.0
    )
    assert staircase.spacing > 1e-9 and 5e-8 < staircase.level[0] < 1e-5


def test_constant_function_and_nan():
    assert estimate_noise(lambda t: np.array([3.0]), 1e-5, eps=EPS).level[0] == pytest.approx(0.9 * EPS)
    assert np.isnan(estimate_noise(lambda t: np.array([np.nan]), 1e-5, eps=EPS).level[0])


def test_verdicts_of_the_table():
    points = np.linspace(0.0, 1.0, 9)
    assert noise_of_values(np.exp(3 * points))[1] == "too large"
    assert noise_of_values(np.ones(9))[1] == "too small"
    assert noise_of_values(np.random.default_rng(0).standard_normal(9))[1] == "found"


FUNCTIONS = {
    "exp": (lambda t: np.exp(t), 1.0),
    "sharp": (lambda t: np.tanh(50 * (t + 0.01)), 50 / np.cosh(0.5) ** 2),
    "cubic": (lambda t: 2 * t + t**3, 2.0),
    "flat": (lambda t: 1.0 + t**2, 0.0),
    "log": (lambda t: np.log(t + 0.02) if t > -0.02 else np.nan, 50.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("level", [0.0, 1e-12, 1e-8, 1e-5])
def test_true_derivative_is_inside_the_uncertainty(name, level):
    """Over 20 seeds: always within 3 uncertainties, and the uncertainty is no wild exaggeration."""
    fn, truth = FUNCTIONS[name]
    errors, uncertainties = [], []
    for seed in range(20):
        estimate = estimate_noise(noisy(fn, level, seed), 1e-6, eps=EPS, scale=0.02)
        result = differentiate(noisy(fn, level, 100 + seed), 0.1, estimate.level)
        errors.append(abs(result.value[0] - truth))
        uncertainties.append(result.uncertainty[0])
    ratio = np.array(errors) / np.array(uncertainties)
    assert ratio.max() < 3.0, ratio
    # what noise allows: level^(2/3)-ish for a second-order difference, better when extrapolated
    assert np.median(uncertainties) <= 300 * max(level, EPS) ** (2 / 3) * max(1.0, abs(truth)) ** 2


def test_underestimated_noise_is_noticed():
    """Told a noise 1000 times too small, the differences at smaller steps give it away."""
    ratios = []
    for seed in range(20):
        result = differentiate(noisy(np.exp, 1e-6, seed), 0.1, np.array([1e-9]))
        ratios.append(abs(result.value[0] - 1.0) / result.uncertainty[0])
    assert np.max(ratios) < 5.0


def test_evaluations_follow_the_noise():
    few = differentiate(noisy(np.exp, 1e-3), 0.1, np.array([1e-3])).num_evaluations
    many = differentiate(noisy(np.exp, 1e-15), 0.1, np.array([1e-15])).num_evaluations
    assert few <= 8 and few <= many <= 14


def test_never_finite_gives_no_figure():
    result = differentiate(lambda t: np.array([np.nan]), 0.1, np.array([1e-16]))
    assert np.isnan(result.value[0]) and np.isinf(result.uncertainty[0])
