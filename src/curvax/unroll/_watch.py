"""Looking at the adjoint of a path while reverse mode computes it, and clipping it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_norm, tree_sub


class Slots(NamedTuple):
    """Zeros, a scalar for each step, whose cotangents are what was seen there; None where nobody looks.

    Attributes:
        adjoint: ‖∂f/∂θ‖ at the point.
        clipped: 1 where clipping changed it.
        share: ‖what the step contributes to df/dφ‖.
    """

    adjoint: Float[Array, "..."]
    clipped: Float[Array, "..."] | None = None
    share: Float[Array, "..."] | None = None


def watch_theta(
    theta: PyTree[Array], slots: Slots, clip: optax.GradientTransformationExtraArgs | None = None
) -> PyTree[Array]:
    """θ; its cotangent is measured and then clipped, as if it were a gradient of the parameters θ.

    A trick of reverse mode alone: the cotangents of the slots are no derivatives of anything.
    """
    seen = (slots.adjoint, slots.clipped)

    @jax.custom_vjp
    def watched(theta: PyTree[Array], seen: Any) -> PyTree[Array]:
        del seen
        return theta

    def forward(theta: PyTree[Array], seen: Any) -> tuple[PyTree[Array], Any]:
        del seen
        return theta, None if clip is None else theta

    def backward(theta: Any, adjoint: PyTree[Array]) -> tuple[PyTree[Array], Any]:
        norm = tree_norm(adjoint)
        if clip is None:
            return adjoint, (norm, None)
        with jax.numpy_dtype_promotion("standard"):  # as for every update of optax
            shorter, _ = clip.update(adjoint, clip.init(theta), theta)
        shorter = jax.tree.map(lambda a, b: a.astype(b.dtype), shorter, adjoint)
        changed = tree_norm(tree_sub(shorter, adjoint)) > 0
        return shorter, (norm, changed.astype(norm.dtype))

    watched.defvjp(forward, backward)
    return watched(theta, seen)


@jax.custom_vjp
def watch_phi(phi: PyTree[Array], share: Float[Array, ""]) -> PyTree[Array]:
    """φ; the norm of its cotangent is measured."""
    del share
    return phi


def _forward(phi: PyTree[Array], share: Float[Array, ""]) -> tuple[PyTree[Array], Array]:
    return phi, share


def _backward(share: Array, cotangent: PyTree[Array]) -> tuple[PyTree[Array], Array]:
    return cotangent, tree_norm(cotangent).astype(share.dtype)


watch_phi.defvjp(_forward, _backward)


def no_slots(shape: tuple[int, ...], dtype: Any, *, clipped: bool, share: bool) -> Slots:
    """Slots of this shape."""
    zeros = jnp.zeros(shape, dtype)
    return Slots(zeros, zeros if clipped else None, zeros if share else None)
