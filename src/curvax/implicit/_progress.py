"""What the sweeps carry besides vectors: where they stand, what they have found, and what comes next."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

from curvax._results import RESULTS

WARM_SWEEPS = 4  # sweeps that a warm start may spend before the inner solver is called

# What a turn does. POLISH → POLISH | FIRST, FIRST → SWEEP_THETA, which judges and goes to SWEEP_ADJOINT and back.
# A failure before there was a hypergradient goes through REPORT, where the outer loss is taken for the report.
POLISH, FIRST, SWEEP_THETA, SWEEP_ADJOINT, REPORT, DONE = range(6)
# Where θ comes from.
WARM, INNER_NOW, INNER_DONE = range(3)


class Accuracy(NamedTuple):
    """The accuracy requested: error ≤ atol + rtol·‖grad‖."""

    eps: float  # unit roundoff of the least precise leaf of θ and φ
    rtol: Scalar
    atol: Scalar
    adjoint_rtol: Scalar  # forward error of the first adjoint
    damping: Scalar
    max_sweeps: int


class Kept(NamedTuple):
    """About the hypergradient that would be returned."""

    value: Scalar
    norm: Scalar  # ‖grad‖
    inner_residual: Scalar
    adjoint_residual: Scalar
    estimate: Scalar


class Counts(NamedTuple):
    """What has been spent."""

    matvecs: Int[Array, ""]
    sweeps: Int[Array, ""]
    inner_steps: Int[Array, ""]
    decades: Scalar  # of residual, over all solves


class Curvature(NamedTuple):
    """What the solves so far have seen of A."""

    ritz_min: Scalar
    lowest: Scalar
    highest: Scalar
    condition: Scalar


class Moves(NamedTuple):
    """Which of the vectors a turn has changed."""

    theta: Bool[Array, ""]
    adjoint: Bool[Array, ""]
    retry: Bool[Array, ""]  # back to the inner solver
    forget_adjoint: Bool[Array, ""]
    keep: Bool[Array, ""]  # the hypergradient of this turn
    keep_point: Bool[Array, ""]  # no hypergradient yet: the point itself, which is what a failure is about


class Progress(NamedTuple):
    """Scalars that go from turn to turn."""

    unit: Scalar  # power of two by which the outer loss is multiplied, 0 before its gradient is known
    kept: Kept
    phase: Int[Array, ""]
    moved: Bool[Array, ""]  # θ is another one than the one that is visited
    tried: Bool[Array, ""]  # the recycled directions were tried on the curvature of this visit
    source: Int[Array, ""]
    sweeps: Int[Array, ""]  # since the inner solve or the warm start; −1 before the first judgement
    polished: Int[Array, ""]
    change: Scalar  # ‖h⁺ − h‖ of the sweep before
    residual: Scalar  # ‖F‖ of the turn before
    step: Scalar  # ‖d‖ of the last correction of θ
    linear_residual: Scalar  # ‖F + A d‖ that its solve left
    rtol: Scalar  # forward error of the next correction
    counts: Counts
    curvature: Curvature
    pending: RESULTS  # failure that ends the run at the next judgement
    result: RESULTS
    moves: Moves


class Measured(NamedTuple):
    """One pair (θ, q) as it was measured."""

    value: Scalar
    residuals: Float[Array, "4 4"]  # inner products of F, the adjoint residual, θ and q
    hyper: Float[Array, "3 3"]  # of the change of the hypergradient, Bᵀq and the hypergradient
    products: Int[Array, ""]  # that it took


class Found(NamedTuple):
    """Norms of one pair (θ, q)."""

    value: Scalar
    norm: Scalar  # of the hypergradient
    inner_residual: Scalar
    adjoint_residual: Scalar
    theta_norm: Scalar
    adjoint_norm: Scalar
    change: Scalar
    cross: Scalar  # ‖Bᵀq‖
    finite: Bool[Array, ""]
    products: Int[Array, ""]


def norms_of(measured: Measured) -> Found:
    """Square roots of the diagonals."""
    inner, adjoint_residual, theta, adjoint = (jnp.sqrt(measured.residuals[i, i]) for i in range(4))
    change, cross, norm = (jnp.sqrt(measured.hyper[i, i]) for i in range(3))
    return Found(
        value=measured.value,
        norm=norm,
        inner_residual=inner,
        adjoint_residual=adjoint_residual,
        theta_norm=theta,
        adjoint_norm=adjoint,
        change=change,
        cross=cross,
        finite=jnp.isfinite(measured.value + inner + adjoint_residual + norm),
        products=measured.products,
    )


def integer(value: int) -> Int[Array, ""]:
    """A 32-bit scalar."""
    return jnp.asarray(value, jnp.int32)
