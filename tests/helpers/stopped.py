"""Stacks of quadratics whose inner solution was stopped at many accuracies, with their truth.

Every array has a leading case axis, so that one compiled `vmap` measures hundreds of cases.
`g = ½ wᵀHw + ½ Σ exp(φ_i) w_i² − wᵀ(Bφ + b)` covers a constant and a w-dependent cross derivative
(`exp` is switched by the data `s`: 0 or 1); `f = ½ (w − t)ᵀM(w − t) + cᵀw`.
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from helpers.dense import SPECTRA, refined_solve, rotated, spectrum


class Stack(NamedTuple):
    """N cases: data, hyperparameters, starts, and the exact gradients; labels for the table."""

    inner: Any
    outer: Any
    phi: np.ndarray
    theta0: np.ndarray
    grad: np.ndarray
    condition: np.ndarray
    spectrum: list[str]
    manner: list[str]


def stopped_inner(theta, phi, batch):
    """½ wᵀHw + ½ s Σ exp(φ_i) w_i² − wᵀ(Bφ + b)."""
    penalty = 0.5 * batch["s"] * jnp.sum(jnp.exp(phi) * theta**2)
    return 0.5 * theta @ (batch["H"] @ theta) + penalty - theta @ (batch["B"] @ phi + batch["b"])


def stopped_root(theta, phi, batch):
    """R ∇g with a fixed non-normal R: the same solution and hypergradient, a non-symmetric Jacobian."""
    penalty = batch["s"] * jnp.exp(phi) * theta
    slope = batch["H"] @ theta + penalty - batch["B"] @ phi - batch["b"]
    # A shear and a cyclic shift: condition about 3, far from symmetric.
    return jnp.roll(slope + 0.5 * jnp.roll(slope, 2), 1)


def stopped_outer(theta, phi, batch):
    """½ (w − t)ᵀM(w − t) + cᵀw: no direct term."""
    offset = theta - batch["t"]
    return 0.5 * offset @ (batch["M"] @ offset) + batch["c"] @ theta


def _stop(manner, amount, curvature, solution, rng):
    """A point on the way to `solution`: by gradient steps, by conjugate gradients, or by noise."""
    n = len(solution)
    if manner == "gradient":
        values, basis = np.linalg.eigh(curvature)
        decay = np.clip(1.0 - values / values[-1], 0.0, 1.0) ** amount
        return solution - basis @ (decay * (basis.T @ solution))
    if manner == "cg":
        w = np.zeros(n)
        r = curvature @ solution
        p = r.copy()
        for _ in range(int(amount)):
            step = (r @ r) / max(p @ curvature @ p, 1e-300)
            w, new = w + step * p, r - step * (curvature @ p)
            r, p = new, new + (new @ new) / max(r @ r, 1e-300) * p
        return w
    noise = rng.standard_normal(n)
    return solution + amount * np.linalg.norm(solution) * noise / np.linalg.norm(noise)


AMOUNTS = {
    "gradient": (3, 30, 1000, 30_000, 1_000_000),
    "cg": (2, 5, 10, 20, 40),
    "noise": (1.0, 1e-1, 1e-3, 1e-5, 1e-8, 1e-11, 0.0),
}


def stack(
    seed, *, n=24, conditions=(1e1, 1e2, 1e3, 1e4, 1e5, 1e6), spectra=SPECTRA, dtype=np.float64, every=1
):
    """All combinations of spectrum, condition and stop; `every` keeps one in that many."""
    rng = np.random.default_rng(seed)
    rows = []
    combos = itertools.product(spectra, conditions, (False, True))
    for index, (kind, condition, penalised) in enumerate(combos):
        matrix = rotated(spectrum(kind, n, condition, rng), rng)
        curved = bool(rng.integers(2))
        inner = {
            "H": matrix,
            "B": np.zeros((n, n)) if penalised else rng.standard_normal((n, n)),
            "b": rng.standard_normal(n),
            "s": np.asarray(float(penalised)),
        }
        outer = {
            "M": rotated(rng.uniform(0.5, 2.0, n), rng) if curved else np.zeros((n, n)),
            "t": rng.standard_normal(n),
            "c": rng.standard_normal(n),
        }
        phi = np.log(1.0 / condition) + rng.uniform(-1.0, 1.0, n) if penalised else rng.standard_normal(n)
        inner, outer, phi = jax.tree.map(
            lambda leaf: leaf.astype(dtype).astype(np.float64), (inner, outer, phi)
        )
        curvature = inner["H"] + inner["s"] * np.diag(np.exp(phi))
        solution = refined_solve(curvature, inner["B"] @ phi + inner["b"])
        adjoint = refined_solve(curvature, outer["M"] @ (solution - outer["t"]) + outer["c"])
        grad = inner["B"].T @ adjoint - inner["s"] * np.exp(phi) * solution * adjoint
        stops = [(manner, amount) for manner, amounts in AMOUNTS.items() for amount in amounts]
        for number, (manner, amount) in enumerate(stops):
            if (number + index) % every:
                continue
            theta0 = _stop(manner, amount, curvature, solution, rng)
            rows.append(
                (inner, outer, phi, theta0, grad, np.linalg.cond(curvature), kind, f"{manner} {amount:g}")
            )
    inner, outer, phi, theta0, grad, condition, kinds, manners = zip(*rows, strict=True)

    def stacked(trees):
        return jax.tree.map(lambda *leaves: np.stack(leaves).astype(dtype), *trees)

    return Stack(
        inner=stacked(inner),
        outer=stacked(outer),
        phi=stacked(phi),
        theta0=stacked(theta0),
        grad=np.stack(grad),
        condition=np.asarray(condition),
        spectrum=list(kinds),
        manner=list(manners),
    )
