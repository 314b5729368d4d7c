"""Effectivity of an error estimate: estimate ÷ true error, over a stack of cases at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax as cx
from helpers.stay import Stay
from helpers.stopped import Stack, stopped_inner, stopped_outer, stopped_root

# One gradient step of length zero: the inner "solution" is the start that the case prescribes.
STAY = cx.Steps(optax.sgd(0.0), 1)
PROBLEM = cx.Bilevel(inner=stopped_inner, outer=stopped_outer)
ROOT = {"problem": cx.Bilevel(inner=cx.Root(stopped_root), outer=stopped_outer), "solver": Stay()}

FAILURES = {
    "singular": cx.RESULTS.singular_curvature,
    "indefinite": cx.RESULTS.indefinite_curvature,
    "no influence": cx.RESULTS.no_influence,
    "adjoint budget": cx.RESULTS.adjoint_not_converged,
    "non-finite": cx.RESULTS.nonfinite,
}


class Row(NamedTuple):
    """What is kept of each case, as arrays over the cases."""

    estimate: np.ndarray
    error: np.ndarray
    size: np.ndarray
    met: np.ndarray
    flagged: np.ndarray
    matvecs: np.ndarray
    result: np.ndarray


def flags(result):
    """Whether the result is a failure that says that the estimate means nothing."""
    return jnp.any(jnp.stack([result == failure for failure in FAILURES.values()]), axis=0)


def measure(stack: Stack, rtols, *, rule=cx.Implicit, solver=STAY, problem=PROBLEM, **options) -> Row:
    """One `vmap` over the cases; `rtols` has one accuracy request a case."""

    @jax.jit
    @jax.vmap
    def run(inner, outer, phi, theta0, rtol):
        hg = cx.hypergradient(
            problem,
            phi,
            theta0,
            inner_solver=solver,
            rule=rule(rtol=rtol, **options),
            inner_data=inner,
            outer_data=outer,
            throw=False,
        )
        met = hg.result == cx.RESULTS.successful
        return hg.grad, hg.stats.error_estimate, met, flags(hg.result), hg.stats.num_matvecs, hg.result._value

    dtype = stack.theta0.dtype
    out = run(stack.inner, stack.outer, stack.phi, stack.theta0, jnp.asarray(rtols, dtype))
    grad, estimate, met, flagged, matvecs, result = jax.tree.map(np.asarray, out)
    error = np.linalg.norm(grad.astype(np.float64) - stack.grad, axis=1)
    size = np.linalg.norm(stack.grad, axis=1)
    return Row(estimate.astype(np.float64), error, size, met, flagged, matvecs, result)


def effectivity(row: Row, eps: float):
    """Estimate ÷ true error; differences below `eps * ‖grad‖` are no error, but its representation."""
    resolution = eps * row.size
    return row.estimate / np.maximum(row.error, resolution)


def report(title, ratio, counted, labels=None):
    """One line of statistics, printed so that a failing run shows what it saw."""
    if not np.any(counted):
        return f"{title}: nothing counted of {len(ratio)}"
    kept = ratio[counted]
    line = (
        f"{title}: {counted.sum()} of {len(ratio)} counted, below 0.5: {(kept < 0.5).sum()}, "
        f"min {kept.min():.3g}, median {np.median(kept):.3g}, max {kept.max():.3g}"
    )
    if labels is not None:
        worst = np.flatnonzero(counted)[np.argsort(kept)[:3]]
        line += "; lowest: " + "; ".join(f"{ratio[i]:.2g} at {labels[i]}" for i in worst)
    return line
