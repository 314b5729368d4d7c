"""Effectivity on logistic regressions and small networks, inner solutions stopped on the way.

The truth is polished by dense Newton steps from `hg.theta` itself. Counted is what was not reported
as a failure and where the true relative error is below 0.3.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
from helpers import effectivity, nonlinear
from helpers.polish import polish

TIMES = (20, 60, 150, 400, 1000, 3000)

FAMILIES = {
    "logistic": (nonlinear.logistic_problem, nonlinear.logistic_inner, nonlinear.logistic_outer, 0.02, 12),
    "network": (nonlinear.network_problem, nonlinear.network_inner, nonlinear.network_outer, 0.05, 16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_nonlinear(name, seed):
    draw, inner, outer, rate, number = FAMILIES[name]
    problem = cx.Bilevel(inner=inner, outer=outer)
    theta0, phi, data, validation = nonlinear.stacked([draw(seed + i) for i in range(number)])

    @jax.jit
    @jax.vmap
    def measure(theta0, phi, data, validation):
        starts = nonlinear.snapshots(inner, theta0, phi, data, times=TIMES, rate=rate)

        def one(theta, rtol):
            hg = cx.hypergradient(
                problem,
                phi,
                theta,
                inner_solver=effectivity.STAY,
                rule=cx.Implicit(rtol=rtol),
                inner_data=data,
                outer_data=validation,
                throw=False,
            )
            truth = polish(inner, outer, hg.theta, phi, data, validation, steps=12)
            error = jnp.linalg.norm(ravel_pytree(hg.grad)[0] - truth.grad)
            # Newton may have left for another stationary point: then there is no truth for this one.
            known = (truth.residual < 1e-11) & (truth.smallest_eigenvalue > 0)
            met = hg.result == cx.RESULTS.successful
            return (
                error,
                hg.stats.error_estimate,
                jnp.linalg.norm(truth.grad),
                known,
                effectivity.flags(hg.result),
                met,
            )

        rtols = jnp.asarray([1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8])
        return (*jax.vmap(one)(starts, rtols), rtols)

    out = measure(theta0, phi, data, validation)
    error, estimate, size, known, flagged, met, rtols = (np.asarray(leaf).ravel() for leaf in out)
    ratio = estimate / np.maximum(error, 1e-15 * size)
    close = error < 0.3 * size
    counted = known & ~flagged & close
    print(effectivity.report(name, ratio, counted))
    print(f"flagged {flagged.sum()}, truth unknown {(~known).sum()}, error above 0.3: {(~close).sum()}")
    assert counted.sum() >= 0.4 * len(ratio)
    assert ratio[counted].min() >= 0.5
    assert np.median(ratio[counted]) <= 5.0
    assert ratio[counted].max() <= 100.0
    # Success is never claimed for a wrong number, whatever the true error.
    assert not np.any(known & met & (error > 2.05 * rtols * size))
