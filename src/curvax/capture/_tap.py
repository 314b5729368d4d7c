"""Taps: a statistic of what flows through a site, computed in the backward pass where it flows."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, PyTree

from curvax.capture._inputs import AbstractInputs
from curvax.capture._site import Site

# statistic(site, inputs, cotangents, aux) of one member of the stack.
Statistic = Callable[[Site, AbstractInputs, Array, PyTree], PyTree]


def measure(
    statistic: Statistic, site: Site, x: Array | None, g: Array, aux: PyTree, scale: Array | None
) -> PyTree:
    """The statistic at a site, every array of it with a leading axis of the stack.

    Args:
        statistic: What to compute, for one member of the stack.
        site: Where.
        x: Operand of the operation, examples along the leading axis.
        g: Cotangents of its result, likewise.
        aux: What the statistic needs, the stack along the leading axis of every array.
        scale: Factor of the weight for each example; the inputs take it, or the cotangents where x are indices.
    """
    if scale is not None and x is not None and jnp.issubdtype(x.dtype, jnp.inexact):
        x = x * scale.reshape(-1, *(1,) * (x.ndim - 1)).astype(x.dtype)
    elif scale is not None:
        g = g * scale.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype)
    inputs, cotangents = site.flow(x, g)
    if cotangents.shape[0] > 1:
        return jax.vmap(lambda i, c, a: statistic(site, i, c, a))(inputs, cotangents, aux)
    one = statistic(site, *jax.tree.map(lambda leaf: leaf[0], (inputs, cotangents, aux)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], one)


def over_examples(function: Callable[..., PyTree], like: PyTree) -> Callable[..., PyTree]:
    """A function of arrays with a leading axis of examples, to be called inside of a `vmap` over examples.

    It sees all of them at once; what it returns is the same for all.

    Args:
        function: Of something that all examples share, and of arrays; the last of these must depend on the example.
        like: Shapes and dtypes of what it returns.
    """

    @custom_vmap
    def call(shared: PyTree, *arrays: PyTree) -> PyTree:
        # Only its shapes are ever used, where a loop is traced before it is mapped over the examples.
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), like)

    @call.def_vmap
    def batched(size: int, which: Any, shared: PyTree, *arrays: PyTree) -> tuple[PyTree, PyTree]:
        assert not any(jax.tree.leaves(which[0]))
        spread = lambda leaf, has: leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape))
        result = function(shared, *jax.tree.map(spread, arrays, tuple(which[1:])))
        return result, jax.tree.map(lambda _: False, result)

    return call


def tap(statistic: Statistic, site: Site, like: PyTree) -> Callable[..., Array]:
    """The identity on the result of a site, whose derivative in a slot is the statistic.

    Args:
        statistic: What to compute.
        site: Where.
        like: Shapes and dtypes of it.

    Returns:
        `tap(y, x, slot, aux, scale, live, token)` → y: its cotangent g flows through, and the cotangent of `slot` is
        `measure(statistic, site, x, g, aux, scale)` over all examples. `live` is whether the branch in which the
        site stands is taken, None if it stands in none; `token` is anything that is there for every example.
    """

    def measured(aux: PyTree, x: Array, g: Array, scale: Array | None, token: Array) -> PyTree:
        del token
        return measure(statistic, site, x, g, aux, scale)

    summed = over_examples(measured, like)

    @jax.custom_vjp
    def through(y: Array, *rest: Any) -> Array:
        return y

    def forward(y: Array, x: Array, slot: PyTree, aux: PyTree, *rest: Any) -> tuple[Array, Any]:
        return y, (x, aux, *rest)

    def backward(residuals: Any, g: Array) -> tuple[Any, ...]:
        x, aux, scale, live, token = residuals
        seen = g if live is None else jnp.where(live, g, 0)
        return g, None, summed(aux, x, seen, scale, token), None, None, None, None

    through.defvjp(forward, backward)
    return through
