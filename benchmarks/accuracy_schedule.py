"""Claim: to ask for little accuracy at first, and for more as the run goes on, saves products and costs nothing.

Softmax regression on digits, one log penalty a weight, held near its start by an outer penalty (else the validation
images are learnt by heart and there is no optimum), 200 steps of Adam. A fixed tight accuracy of every hypergradient
(1e-6) against a schedule from 0.3 down to it and against a fixed loose one (1e-2); all from the state of the step
before. What is compared is the outer loss at the end, at an inner solution by dense Newton.

The peer is our own fixed accuracy: no other library has an accuracy to ask for.
"""

from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import problems

import curvax as cx

STEPS, TIGHT, LOOSE = 200, 1e-6, 1e-2
SCHEDULE = optax.exponential_decay(0.3, 1, 0.95, end_value=TIGHT)


def outer(weights: jax.Array, log_penalties: jax.Array, batch: problems.Batch) -> jax.Array:
    """Validation loss, and a penalty on penalties far from where they started."""
    away = jnp.mean((log_penalties - problems.LOG_PENALTY) ** 2)
    return problems.outer(weights, log_penalties, batch) + 0.02 * away


PROBLEM = cx.Bilevel(inner=problems.inner, outer=outer)
SOLVER = optx.LBFGS(1e-2, 1e-2)
ADAM = optax.adam(optax.cosine_decay_schedule(0.1, STEPS))
RUNS: dict[str, dict[str, Any]] = {
    f"fixed, {TIGHT:g}": {"rule": cx.Implicit(rtol=TIGHT, max_sweeps=8)},
    f"schedule, 0.3 to {TIGHT:g}": {
        "rule": cx.Implicit(rtol=TIGHT, max_sweeps=8),
        "rtol_schedule": SCHEDULE,
    },
    f"fixed, {LOOSE:g}": {"rule": cx.Implicit(rtol=LOOSE, max_sweeps=8)},
}


def outer_loss(log_penalties: jax.Array, training: problems.Batch, validation: problems.Batch) -> float:
    """At an inner solution by dense Newton."""
    weights = problems.exact(log_penalties, training, validation).weights
    return float(outer(jnp.asarray(weights), log_penalties, validation))


def measure() -> harness.Report:
    training, validation = problems.digits()
    phi, weights = problems.start()
    rows, products, losses = [], {}, {}
    for name, settings in RUNS.items():
        solution = cx.minimise(
            PROBLEM,
            phi,
            weights,
            inner_solver=SOLVER,
            optimizer=ADAM,
            num_steps=STEPS,
            inner_data=training,
            outer_data=validation,
            progress=False,
            **settings,
        )
        products[name] = int(np.sum(solution.history.num_matvecs))
        losses[name] = outer_loss(solution.phi, training, validation)
        rows.append(
            {
                "accuracy of the hypergradients": name,
                "products": products[name],
                "outer loss": f"{losses[name]:.8f}",
                "largest relative error (estimate)": float(np.max(solution.history.relative_error)),
            }
        )
    tight, followed, loose = RUNS
    start = outer_loss(phi, training, validation)
    return harness.Report(
        "Products of a run by the accuracy that is asked for",
        f"Softmax regression, digits, one L2 penalty a weight (640), {STEPS} steps of Adam; outer loss {start:.4f} at "
        "the start.",
        rows,
        [
            harness.Claim(
                "products, fixed and tight ÷ schedule", products[tight] / products[followed], at_least=1.3
            ),
            harness.Claim(
                "products, fixed and tight ÷ fixed and loose", products[tight] / products[loose], at_least=1.3
            ),
            harness.Claim(
                "outer loss of the schedule ÷ of the tight run, difference to 1",
                abs(losses[followed] / losses[tight] - 1),
                at_most=2e-4,
            ),
            harness.Claim(
                "outer loss of the loose run ÷ of the tight run, difference to 1",
                abs(losses[loose] / losses[tight] - 1),
                at_most=1e-3,
            ),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
