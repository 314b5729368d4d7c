"""Where the inner solution and the adjoint are heading, as φ moves along a path."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from curvax._pytree import tree_axpy, tree_dot, tree_sub, tree_where, tree_zeros_like

MAX_STRETCH = 2.0  # how much longer than the step before the next one may be


class Trend(eqx.Module):
    """The last step of φ and what it did to θ and to the adjoint; zero until there was one.

    Attributes:
        phi: Hyperparameters of the last call.
        phi_change: Its step from the call before.
        theta_change: Change of the inner solution in that step.
        adjoint_change: Change of the adjoint.
        trusted: Whether going on in this direction would have come closer, the last time.
    """

    phi: PyTree[Array]
    phi_change: PyTree[Array]
    theta_change: PyTree[Array]
    adjoint_change: PyTree[Array]
    trusted: Bool[Array, ""]


def no_trend(phi: PyTree[Array], theta: PyTree[Array]) -> Trend:
    """The trend of a cold state."""
    zero_phi, zero_theta = tree_zeros_like(phi), tree_zeros_like(theta)
    return Trend(phi, zero_phi, zero_theta, zero_theta, jnp.asarray(True))


def _stretch(trend: Trend, phi: PyTree[Array]) -> Float[Array, ""]:
    """The new step of φ in units of the last one, along it; within [0, MAX_STRETCH]."""
    square = tree_dot(trend.phi_change, trend.phi_change)
    along = tree_dot(tree_sub(phi, trend.phi), trend.phi_change)
    return jnp.clip(along / jnp.where(square > 0, square, 1), 0, MAX_STRETCH)


def extrapolate(
    trend: Trend, phi: PyTree[Array], theta: PyTree[Array], adjoint: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """θ and the adjoint at the new φ, by a straight line; as they are where φ stands still or turns back."""
    stretch = jnp.where(trend.trusted, _stretch(trend, phi), 0)
    return tree_axpy(stretch, trend.theta_change, theta), tree_axpy(stretch, trend.adjoint_change, adjoint)


def follow(
    trend: Trend,
    phi: PyTree[Array],
    before: tuple[PyTree[Array], PyTree[Array]],
    after: tuple[PyTree[Array], PyTree[Array]],
    known: Bool[Array, ""],
) -> Trend:
    """The trend after a call that moved (θ, adjoint) from `before` to `after`; none unless both are `known`."""
    theta_change, adjoint_change = tree_sub(after[0], before[0]), tree_sub(after[1], before[1])
    # ‖Δ − tΔ₋‖ ≤ ‖Δ‖, without the difference. With noisy data the line is worse than standing still.
    stretch = _stretch(trend, phi)
    gain = 2 * tree_dot(theta_change, trend.theta_change)
    loss = stretch.astype(gain.dtype) * tree_dot(trend.theta_change, trend.theta_change)
    zero = no_trend(phi, before[0])
    moved = Trend(phi, tree_sub(phi, trend.phi), theta_change, adjoint_change, gain >= loss)
    return tree_where(known, moved, zero)
