"""Derivatives of noisy functions from central differences, with an uncertainty."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_RATIO = 4.0
_MAX_LEVELS = 14
_MIN_LEVELS = 3


class FiniteDifference(NamedTuple):
    """Derivatives at 0 of the components of a function, from central differences."""

    value: np.ndarray
    uncertainty: np.ndarray
    step: np.ndarray
    num_evaluations: int


class _Entry(NamedTuple):
    value: float
    truncation: float
    noise: float  # standard deviation for noise 1
    level: int
    order: int
    step: float


def _tableau(steps: list[float], slopes: list[float]) -> list[_Entry]:
    """Richardson's table over the steps: order k cancels the terms h², …, h^(2k) of the error.

    An entry is judged by its distance from its two neighbours of one order less; the first column, which
    has none, by its distance from the level before. Noise is carried through with its weights.
    """
    entries: list[_Entry] = []
    previous: list[tuple[float, np.ndarray]] = []
    for level, (step, slope) in enumerate(zip(steps, slopes, strict=True)):
        if not np.isfinite(slope):
            previous = []  # a hole in the ladder: extrapolate only from what follows
            continue
        # A central difference of values with noise s has noise s / (sqrt(2) h).
        weights = np.zeros(len(steps))
        weights[level] = 1.0 / (np.sqrt(2.0) * step)
        row = [(slope, weights)]
        if previous:
            entries.append(
                _Entry(slope, abs(slope - previous[0][0]), float(np.linalg.norm(weights)), level, 0, step)
            )
        for order in range(1, len(previous) + 1):
            power = _RATIO ** (2 * order)
            (fine, fine_w), (coarse, coarse_w) = row[-1], previous[order - 1]
            value = fine + (fine - coarse) / (power - 1.0)
            w = (power * fine_w - coarse_w) / (power - 1.0)
            truncation = max(abs(value - fine), abs(value - coarse))
            entries.append(_Entry(value, truncation, float(np.linalg.norm(w)), level, order, step))
            row.append((value, w))
        previous = row
    return entries


def _select(entries: list[_Entry], noise: float) -> tuple[_Entry, float]:
    """The entry of least uncertainty, the noise being raised if smaller steps contradict it."""
    for _ in range(8):
        # Two standard deviations: the differences that judge truncation contain the noise too.
        total = [entry.truncation + 2.0 * noise * entry.noise for entry in entries]
        best = int(np.argmin(total))
        chosen, uncertainty = entries[best], total[best]
        # At smaller steps and no lower an order the truncation is smaller still: what differs is noise.
        finer = [e for e in entries if e.level > chosen.level and e.order >= chosen.order]
        excess = max(
            (
                (abs(entry.value - chosen.value) - uncertainty) / (4.0 * noise * entry.noise + 1e-300)
                for entry in finer
            ),
            default=0.0,
        )
        if not excess > 1.0:
            break
        noise = noise * excess
    return chosen, uncertainty


def differentiate(fn: Callable[[float], np.ndarray], step: float, noise: np.ndarray) -> FiniteDifference:
    """Derivative at 0 of each component of `fn`, by extrapolated central differences.

    Steps go down by a factor of four from `step`. Each level adds a row to Richardson's table; the entry
    with the least truncation + noise wins, where truncation is the distance to the entries it was made
    from, and noise is 2·s·‖weights‖ (s: standard deviation of the values). The ladder ends when the noise
    of the newest level alone is more than the best uncertainty of every component, so the number of
    evaluations follows the noise. Levels where `fn` is not finite are left out.

    Args:
        fn: maps a float to a vector of values; called in pairs, at +h and -h.
        step: largest step.
        noise: standard deviation of each component, from `estimate_noise`.

    Returns:
        Values, uncertainties (about two standard deviations plus truncation) and the steps used; NaN with
        uncertainty infinity where fewer than two levels gave finite values.

    Source: Richardson (1911); the choice of the entry is Ridders' (Adv. Eng. Software 4, 1982), with the noise
    added in the manner of Moré and Wild, "Estimating derivatives of noisy simulations", ACM TOMS 38 (2012).
    """
    noise = np.atleast_1d(np.asarray(noise, np.float64))
    steps: list[float] = []
    slopes: list[np.ndarray] = []
    value = np.full(noise.shape, np.nan)
    uncertainty = np.full(noise.shape, np.inf)
    used = np.full(noise.shape, np.nan)
    for level in range(_MAX_LEVELS):
        h = step / _RATIO**level
        above, below = np.atleast_1d(fn(h)), np.atleast_1d(fn(-h))
        steps.append(h)
        with np.errstate(
            invalid="ignore"
        ):  # ∞ − ∞ where the re-solve diverges: a NaN, which no entry is made of
            slopes.append((np.asarray(above, np.float64) - np.asarray(below, np.float64)) / (2.0 * h))
        finished = level + 1 >= _MIN_LEVELS
        for i in range(noise.size):
            entries = _tableau(steps, [float(slope[i]) for slope in slopes])
            if not entries or not np.isfinite(noise[i]):
                finished = finished and not np.isfinite(noise[i])
                continue
            chosen, uncertainty[i] = _select(entries, float(noise[i]))
            value[i], used[i] = chosen.value, chosen.step
            finished = finished and (noise[i] / h > uncertainty[i] or uncertainty[i] <= 4e-16 * abs(value[i]))
        if finished:
            break
    return FiniteDifference(value, uncertainty, used, 2 * len(steps))
