"""How noisy a computed function is, from a table of differences."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_NUM_VALUES = 9
_ATTEMPTS = 5
_RESPACE = 30.0


class NoiseEstimate(NamedTuple):
    """Standard deviation of the noise in each component of a function, and the spacing that showed it."""

    level: np.ndarray
    spacing: float
    num_evaluations: int


def noise_of_values(values: np.ndarray) -> tuple[float, str]:
    """Noise level of equally spaced values of a function that is smooth but for the noise.

    With independent noise of variance s², the k-th differences have variance s² (2k)!/(k!)², while
    those of the smooth part fall with the k-th power of the spacing. So the levels

        s_k² = (k!)²/(2k)! · mean (Δᵏf)²

    settle at s once the smooth part is gone; the first three in a row that agree within a factor of
    four, where the k-th differences change sign, are taken.

    Args:
        values: function values at 6 or more equally spaced points.

    Returns:
        The level and a verdict: `"found"`, `"too small"` (spacing: at least half of the neighbours are
        equal, the level is 0) or `"too large"` (spacing: no order settles; the level is the highest order's,
        an upper bound).

    Source: Moré and Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33 (2011); the table is
    Hamming's (1971).
    """
    differences = np.asarray(values, np.float64)
    if not np.all(np.isfinite(differences)):
        return float("nan"), "not finite"
    gamma, levels, changes_sign = 1.0, [], []
    for order in range(1, differences.size):
        differences = np.diff(differences)
        if order == 1 and 2 * np.count_nonzero(differences == 0.0) >= differences.size:
            return 0.0, "too small"
        gamma *= 0.5 * order / (2 * order - 1)
        levels.append(np.sqrt(gamma * np.mean(differences**2)))
        changes_sign.append(differences.min() < 0.0 < differences.max())
    for k in range(len(levels) - 2):
        window = levels[k : k + 3]
        if changes_sign[k] and max(window) <= 4.0 * min(window):
            return float(levels[k]), "found"
    return float(levels[-1]), "too large"


def estimate_noise(
    fn: Callable[[float], np.ndarray], spacing: float, *, eps: float, scale: float = 1.0
) -> NoiseEstimate:
    """Noise of `fn` (a scalar argument, a vector of values) around 0.

    The spacing is moved up while values repeat, and down while no order of the table settles or values
    are not finite. The noise is never put below a third of a unit in the last place of the values.

    Args:
        fn: the function; called at `_NUM_VALUES` points around 0, at most `_ATTEMPTS` times.
        spacing: first distance between the points.
        eps: machine precision of the values.
        scale: the largest distance that may be used is `scale`.

    Returns:
        The noise of every component (NaN where no attempt gave finite values).
    """
    # Off-centre by an irrational fraction: many functions are computed exactly at round arguments.
    offsets = np.arange(_NUM_VALUES) - (_NUM_VALUES - 1) / 2 + 0.1 * np.sqrt(2.0)
    level, settled, count, used = np.full(1, np.nan), np.full(1, False), 0, spacing
    for _ in range(_ATTEMPTS):
        values = np.stack([np.atleast_1d(fn(float(spacing * offset))) for offset in offsets])
        count += _NUM_VALUES
        found = [noise_of_values(column) for column in values.T]
        floor = 0.3 * eps * np.max(np.abs(values), axis=0)
        new = np.maximum([item[0] for item in found], floor)
        verdicts = np.array([item[1] for item in found])
        level, settled = np.broadcast_to(level, new.shape), np.broadcast_to(settled, new.shape)
        # An unsettled level is an upper bound; the smallest seen so far is the best.
        better = ~settled & ((verdicts == "found") | np.isnan(level) | (new < level))
        level = np.where(better & np.isfinite(new), new, level)
        settled = settled | (verdicts == "found")
        used = spacing
        repeats = verdicts == "too small"
        if np.all(settled | repeats) and np.any(settled):
            break  # a component that repeats beside one that does not is constant
        spacing = spacing * _RESPACE if np.all(settled | repeats) else spacing / _RESPACE
        if spacing * _NUM_VALUES > scale:
            break
    return NoiseEstimate(level, used, count)
