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
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax.unroll._transposable import transposable

# Functions of arrays alone: what they close over is among their arrays (`eqx.filter_closure_convert`).
Loss = Callable[[PyTree[Array], PyTree[Array], PyTree], Array]


def gradient(loss: Loss, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
    """∇_θ loss, differentiated as JAX does."""
    return with_fast_contractions(lambda t: jax.grad(loss)(t, phi, batch))(theta)


# A derivative of a function (θ, given) ↦ value, along a vector if there is one: what is wanted, and what was computed
# on the way.
Program = Callable[[Callable[[PyTree[Array], Any], Array], Any], tuple[tuple[Array, ...], Any]]
# Runs a program: (given, vector, program) ↦ what is wanted, and an array to be returned beside the gradient, or None.
Attempt = Callable[[Any, Any, Program], tuple[tuple[Array, ...], Array | None]]


def mixed_gradient(loss: Loss, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
    """∇_θ loss, with the derivative above.

    Every derivative of every order exists, forward, reverse and nested, also in the data and in what `loss` closes
    over.
    """

    def attempt(given: Any, vector: Any, program: Program) -> tuple[tuple[Array, ...], None]:
        del given
        return program(lambda theta, given: given[0](theta, *given[1:]), vector)[0], None

    return in_mixed_mode(attempt, theta, (loss, phi, batch))[0]


def in_mixed_mode(
    attempt: Attempt, theta: PyTree[Array], given: PyTree
) -> tuple[PyTree[Array], Array | None]:
    """∇_θ, differentiated by the products above; `attempt` says of what function, and how each program is run.

    Args:
        attempt: Runs the programs for ∇_θ (which compute the value on the way), for L and for Lᵀ (the gradient).
        theta: θ.
        given: All else that the function depends on; functions with what they close over among their leaves.
    """
    leaves, structure = jax.tree.flatten(theta)
    others, rest = eqx.partition(given, eqx.is_array)
    other_leaves, other_structure = jax.tree.flatten(others)
    size = len(leaves)
    positions = tuple(range(size))

    def whole(args: tuple[Array, ...]) -> Any:
        return eqx.combine(jax.tree.unflatten(other_structure, args[size:]), rest)

    def of_arrays(value: Callable[[PyTree[Array], Any], Array]) -> Callable[..., Array]:
        return lambda *args: value(jax.tree.unflatten(structure, args[:size]), whole(args))

    def slope(*args: Array) -> tuple[Array, ...]:
        def program(value: Any, _: None) -> tuple[tuple[Array, ...], Any]:
            return jax.value_and_grad(of_arrays(value), argnums=positions)(*args)[::-1]

        found, beside = attempt(whole(args), None, program)
        return found if beside is None else (*found, beside)

    @jax.custom_jvp
    def of(*args: Array) -> tuple[Array, ...]:
        return with_fast_contractions(slope)(*args)

    def of_jvp(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, SymbolicZero)]

        def along(given: tuple[Array, ...], vector: tuple[Array, ...]) -> tuple[Array, ...]:
            def program(value: Any, vector: tuple[Array, ...]) -> tuple[tuple[Array, ...], Any]:
                def in_moving(*values: Array) -> tuple[Array, ...]:
                    full = list(given)
                    for i, moved in zip(moving, values, strict=True):
                        full[i] = moved
                    return jax.grad(of_arrays(value), argnums=positions)(*full)

                return jax.jvp(in_moving, [given[i] for i in moving], list(vector))[::-1]

            return attempt(whole(given), vector, program)[0]

        def transposed(given: tuple[Array, ...], cotangent: tuple[Array, ...]) -> tuple[Array, ...]:
            def program(value: Any, vector: tuple[Array, ...]) -> tuple[tuple[Array, ...], Any]:
                in_theta = lambda *t: jax.grad(of_arrays(value), argnums=tuple(moving))(*t, *given[size:])
                return jax.jvp(in_theta, given[:size], vector)[::-1]

            return attempt(whole(given), cotangent, program)[0]

        product = transposable(
            lambda given, v: with_fast_contractions(along)(given, v),
            lambda given, c: with_fast_contractions(transposed)(given, c),
            primals,
            tuple(tangents[i] for i in moving),
        )
        found = of(*primals)
        return found, (*product, *map(jnp.zeros_like, found[size:]))

    of.defjvp(of_jvp, symbolic_zeros=True)
    found = of(*leaves, *other_leaves)
    return jax.tree.unflatten(structure, found[:size]), (found[size] if len(found) > size else None)
