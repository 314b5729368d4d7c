"""Many small problems at once: the quadratic tasks of iMAML.

Task i: `g = ½ wᵀA w − bᵀw + (λ/2) ‖w − φ‖²`, `f = ½ wᵀC w − dᵀw`, φ the shared initialisation.
`w* = (A + λI)⁻¹(b + λφ)`, `df/dφ = λ (A + λI)⁻¹ (C w* − d)`.
Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", 2019, arXiv:1909.04630.
"""

import jax.numpy as jnp
import numpy as np

from helpers.dense import refined_solve, rotated
from helpers.problem import Case, Truth, as_jax, rounded


def task_inner(theta, phi, batch):
    """½ wᵀA w − bᵀw + (λ/2) ‖w − φ‖²."""
    fit = 0.5 * theta @ (batch["A"] @ theta) - batch["b"] @ theta
    return fit + 0.5 * batch["penalty"] * jnp.sum((theta - phi) ** 2)


def task_outer(theta, phi, batch):
    """½ wᵀC w − dᵀw."""
    return 0.5 * theta @ (batch["C"] @ theta) - batch["d"] @ theta


def quadratic_tasks(number=6, n=5, penalty=0.5, seed=0, dtype=np.float64):
    """A case whose data carry a leading task axis; truth per task (theta and grad stacked)."""
    rng = np.random.default_rng(seed + 8000)

    def stack(draw):
        return np.stack([draw() for _ in range(number)])

    inner = {
        "A": stack(lambda: rotated(rng.uniform(0.1, 3.0, n), rng)),
        "b": rng.standard_normal((number, n)),
        "penalty": np.full(number, penalty),
    }
    outer = {
        "C": stack(lambda: rotated(rng.uniform(0.1, 3.0, n), rng)),
        "d": rng.standard_normal((number, n)),
    }
    inner, outer = rounded(inner, dtype), rounded(outer, dtype)
    phi = rounded(rng.standard_normal(n), dtype)

    def solve(phi):
        thetas, grads, value = [], [], 0.0
        for a, b, lam, c, d in zip(
            inner["A"], inner["b"], inner["penalty"], outer["C"], outer["d"], strict=True
        ):
            matrix = a + lam * np.eye(n)
            theta = refined_solve(matrix, b + lam * phi)
            thetas.append(theta)
            grads.append(lam * refined_solve(matrix, c @ theta - d))
            value += 0.5 * theta @ c @ theta - d @ theta
        return Truth(np.stack(thetas), float(value), np.stack(grads))

    return Case(
        name="iMAML tasks",
        kind="minimum",
        inner=task_inner,
        outer=task_outer,
        phi=as_jax(phi, dtype),
        theta0=jnp.zeros(n, dtype),
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=35.0,
    )
