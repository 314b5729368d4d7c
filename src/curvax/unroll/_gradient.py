"""The inner gradient, differentiated in mixed mode.

For g = ∇_θ ℓ(θ, φ) the tangent along (u, w) is L(u, w) = ∂g/∂θ u + ∂g/∂φ w, and since mixed partial derivatives of ℓ
commute, its transpose is

    Lᵀ c = (∂/∂θ, ∂/∂φ) ⟨g, c⟩ = the derivative of ∇_(θ,φ) ℓ along c in θ:

forward over reverse, like L itself. Reverse over reverse, which stores the whole second-order graph, never occurs.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax.unroll._transposable import transposable

# Functions of arrays alone: what they close over is among their arrays (`eqx.filter_closure_convert`).
Loss = Callable[[PyTree[Array], PyTree[Array], PyTree], Array]


def gradient(loss: Loss, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
    """∇_θ loss, differentiated as JAX does."""
    return with_fast_contractions(lambda t: jax.grad(loss)(t, phi, batch))(theta)


def mixed_gradient(loss: Loss, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
    """∇_θ loss, with the derivative above.

    Every derivative of every order exists, forward, reverse and nested, also in the data and in what `loss` closes
    over.
    """
    leaves, structure = jax.tree.flatten(theta)
    others, rest = eqx.partition((loss, phi, batch), eqx.is_array)
    other_leaves, other_structure = jax.tree.flatten(others)
    size = len(leaves)

    def value(*args: Array) -> Array:
        full_loss, full_phi, full_batch = eqx.combine(jax.tree.unflatten(other_structure, args[size:]), rest)
        return full_loss(jax.tree.unflatten(structure, args[:size]), full_phi, full_batch)

    @jax.custom_jvp
    def of(*args: Array) -> tuple[Array, ...]:
        return with_fast_contractions(jax.grad(value, argnums=tuple(range(size))))(*args)

    def of_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def along(given: tuple[Array, ...], vector: tuple[Array, ...]) -> tuple[Array, ...]:
            def in_moving(*values: Array) -> tuple[Array, ...]:
                full = list(given)
                for i, moved in zip(moving, values, strict=True):
                    full[i] = moved
                return jax.grad(value, argnums=tuple(range(size)))(*full)

            return jax.jvp(in_moving, [given[i] for i in moving], list(vector))[1]

        def transposed(given: tuple[Array, ...], cotangent: tuple[Array, ...]) -> tuple[Array, ...]:
            in_theta = lambda *t: jax.grad(value, argnums=tuple(moving))(*t, *given[size:])
            return jax.jvp(in_theta, given[:size], cotangent)[1]

        vector = tuple(tangents[i] for i in moving)
        product = transposable(
            lambda given, v: with_fast_contractions(along)(given, v),
            lambda given, c: with_fast_contractions(transposed)(given, c),
            primals,
            vector,
        )
        return of(*primals), product

    of.defjvp(of_jvp, symbolic_zeros=True)
    return jax.tree.unflatten(structure, of(*leaves, *other_leaves))
