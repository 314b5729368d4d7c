"""Parameters and hyperparameters of every awkward shape.

θ = {w: (n,), b: (), none: None, empty: (0, 3)},
φ = {l2: (n,) logs, shift: (), empty: (0,), steps: an integer, none: None, name: a string}.
`g = ½ (w − u)ᵀA(w − u) + ½ Σ exp(l2_i) w_i² + ½ (b − 2 shift − v·w)²`, `f = ½ ‖w − t‖² + b + ½ shift²`.
"""

import jax.numpy as jnp
import numpy as np

from helpers.dense import refined_solve, rotated
from helpers.problem import Case, Truth, as_jax, rounded


def tree_inner(theta, phi, batch):
    """A coupled quadratic in w and b."""
    offset = theta["w"] - batch["u"]
    fit = 0.5 * offset @ (batch["A"] @ offset) + 0.5 * jnp.sum(jnp.exp(phi["l2"]) * theta["w"] ** 2)
    return fit + 0.5 * (theta["b"] - 2.0 * phi["shift"] - batch["v"] @ theta["w"]) ** 2


def tree_outer(theta, phi, batch):
    """½ ‖w − t‖² + b + ½ shift²."""
    return 0.5 * jnp.sum((theta["w"] - batch["t"]) ** 2) + theta["b"] + 0.5 * phi["shift"] ** 2


def awkward_tree(n=4, seed=0, dtype=np.float64):
    """A case with empty, scalar, integer, string and None leaves in θ and φ."""
    rng = np.random.default_rng(seed + 10_000)
    inner = {"A": rotated(rng.uniform(0.5, 2.0, n), rng)}
    inner |= {"u": rng.standard_normal(n), "v": rng.standard_normal(n)}
    inner, outer = rounded(inner, dtype), rounded({"t": rng.standard_normal(n)}, dtype)
    inexact = rounded({"l2": rng.uniform(-2.0, 0.0, n), "shift": np.asarray(0.7)}, dtype)
    fixed = {"empty": np.zeros(0), "steps": 3, "none": None, "name": "ridge"}

    def solve(phi):
        # b is eliminated: its residual is zero at the minimum.
        matrix = inner["A"] + np.diag(np.exp(phi["l2"]))
        w = refined_solve(matrix, inner["A"] @ inner["u"])
        b = 2.0 * phi["shift"] + inner["v"] @ w
        value = 0.5 * np.sum((w - outer["t"]) ** 2) + b + 0.5 * phi["shift"] ** 2
        adjoint = refined_solve(matrix, w - outer["t"] + inner["v"])
        grad = {
            "l2": -np.exp(phi["l2"]) * w * adjoint,
            "shift": np.asarray(2.0 + phi["shift"]),
            "empty": np.zeros(0),
            "steps": None,
            "none": None,
            "name": None,
        }
        theta = {"w": w, "b": np.asarray(b), "none": None, "empty": np.zeros((0, 3))}
        return Truth(theta, float(value), grad)

    theta0 = {
        "w": jnp.zeros(n, dtype),
        "b": jnp.zeros((), dtype),
        "none": None,
        "empty": jnp.zeros((0, 3), dtype),
    }
    return Case(
        name="awkward tree",
        kind="minimum",
        inner=tree_inner,
        outer=tree_outer,
        phi=as_jax(inexact | fixed, dtype),
        theta0=theta0,
        inner_data=as_jax(inner, dtype),
        outer_data=as_jax(outer, dtype),
        reference=solve,
        condition=20.0,
    )
