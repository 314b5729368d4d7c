"""What K-FAC and EKFAC take at every layer, and the backward passes in which they do."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from curvax.capture import AbstractInputs, Layers, Moments, SecondMoments, Site, statistics
from curvax.operators._cotangents import Kind, Loss, cotangents
from curvax.operators._gauss_newton import num_examples

EXACT = jax.lax.Precision.HIGHEST


class Pass(NamedTuple):
    """Cotangents for `cx.capture.statistics`.

    Attributes:
        cotangents: Function of one example's outputs and its targets.
        mixed: Likewise, one direction that is zero only where all are.
        targets: Of all examples.
        directions: Whether `cotangents` has several.
        number: How many.
    """

    cotangents: Callable[[PyTree, PyTree], PyTree]
    mixed: Callable[[PyTree, PyTree], PyTree]
    targets: PyTree
    directions: bool
    number: int = 1


def passes(
    layers: Layers, loss: Loss, kind: Kind, inputs: PyTree, targets: PyTree, key: PRNGKeyArray | None
) -> Pass:
    """The cotangents of a kind.

    Args:
        layers: Of the model.
        loss: Of one example.
        kind: Which.
        inputs: All examples.
        targets: Likewise.
        key: For draws.
    """
    directions = cotangents(loss, kind)
    keys = None if key is None else jax.random.split(key, num_examples(inputs))
    given = (targets, keys)
    several = lambda output, given: directions(output, *given)
    first = lambda output, given: jax.tree.map(
        lambda c: c[0], eqx.filter(several(output, given), eqx.is_array)
    )
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), given)
    found = jax.eval_shape(
        lambda output, given: eqx.filter(several(output, given), eqx.is_inexact_array),
        layers.model.outputs,
        one,
    )
    number = jax.tree.leaves(found)[0].shape[0]
    if number == 1:
        return Pass(first, first, given, False)

    def mixed(output: PyTree, given: PyTree) -> PyTree:
        # No inputs count twice: those of all directions are read in one pass of any combination of them.
        def combination(c: Array) -> Array:
            if not jnp.issubdtype(c.dtype, jnp.inexact):
                return c
            weights = 1 + jnp.sqrt(jnp.arange(2, len(c) + 2, dtype=c.dtype)) % 1
            return jnp.tensordot(weights, c, 1, precision=EXACT)

        return jax.tree.map(combination, several(output, given))

    return Pass(several, mixed, given, True, number)


class FactorMoments(eqx.Module):
    """Second moments as K-FAC takes them: of the inputs their MEAN over what counts, of the cotangents Σ g gᵀ / N.

    Divided where they are computed, one multiplication more in a kernel that is there anyway: what a `scan` stacks is
    what is returned, and no second array of the size of all factors is needed. The steps of a `scan` that shares its
    weight have counts of their own, so that of their inputs the SUM is taken.

    Attributes:
        sharing: `"expand"` or `"reduce"`.
        part: Which of both to compute; what is not asked for is a zero, and not computed.
    """

    sharing: Literal["expand", "reduce"] = eqx.field(static=True)
    part: Literal["both", "inputs", "cotangents"] = eqx.field(static=True, default="both")

    def __call__(self, site: Site, inputs: AbstractInputs, cotangents: Array, aux: PyTree) -> Moments:
        """Of one member of the stack."""
        found = SecondMoments(self.sharing)(site, inputs, cotangents, aux)
        nothing = jnp.zeros((), found.count.dtype)
        read, returned = nothing, nothing
        if self.part != "cotangents":
            read = found.inputs
            if site.steps == 1:
                read = jnp.where(found.count > 0, read / jnp.maximum(found.count, 1).astype(read.dtype), 0)
        if self.part != "inputs":
            returned = found.cotangents / len(cotangents)
        return Moments(read, returned, found.count)


def sum_of_inputs(site: Site, moments: Moments) -> Array:
    """Σ x xᵀ over what counts at a site, from `FactorMoments`."""
    if site.steps > 1:
        return moments.inputs
    count = moments.count.reshape(-1, *(1,) * (moments.inputs.ndim - 1))
    return moments.inputs * count.astype(moments.inputs.dtype)


class Squares(eqx.Module):
    """Σ (Uᵀ ḡ V)² over the gradients ḡ = Σ_T g xᵀ of examples: `aux` is (U, V) of the block, None for identities."""

    def __call__(
        self, site: Site, inputs: AbstractInputs, cotangents: Float[Array, "B T out"], aux: PyTree
    ) -> Float[Array, "out in"]:
        """Of one member of the stack."""
        rows, columns = aux
        of_cotangents, of_inputs = (columns, rows) if site.transposed else (rows, columns)
        g = cotangents
        if of_cotangents is not None:
            g = jnp.matmul(g.astype(of_cotangents.dtype), of_cotangents, precision=EXACT)
        # Inputs that count for nothing may be anything, infinities even.
        counts = jnp.any(g != 0, axis=-1, keepdims=True)
        if of_inputs is not None and inputs.shape[1] == 1:
            x = jnp.where(counts, inputs.project(of_inputs), 0).astype(g.dtype)
            return jnp.matmul(jnp.square(g[:, 0]).T, jnp.square(x[:, 0]), precision=EXACT)

        def add(total: Array, one: PyTree) -> tuple[Array, None]:
            inputs, g, counts = one
            alone = jax.tree.map(lambda leaf: leaf[None], inputs)
            if of_inputs is None:
                gradient = alone.outer(g[None])[0]
            else:
                x = jnp.where(counts, alone.project(of_inputs)[0], 0)
                gradient = jnp.matmul(g.T, x.astype(g.dtype), precision=EXACT)
            return total + jnp.square(gradient.astype(total.dtype)), None

        start = jnp.zeros((g.shape[-1], inputs.shape[-1]), g.dtype)
        return jax.lax.scan(add, start, (inputs, g, counts))[0]


def corrected_values(
    layers: Layers, taken: Pass, params: PyTree, inputs: PyTree, bases: dict[str, Any]
) -> dict[str, Array]:
    """S = Σ (UᵀḡV)² / N of every group, in its bases (U, V); uses of a weight by several sites are added.

    Args:
        layers: Of the model.
        taken: Its cotangents.
        params: Where.
        inputs: All examples.
        bases: By name of the group, with the axis of the stack.
    """
    squares = statistics(
        layers, params, inputs, taken.cotangents, Squares(), bases,
        targets=taken.targets, directions=taken.directions,
    )  # fmt: skip
    found = {}
    for group in layers.groups:
        values = jnp.zeros(group.block.shape, group.block.structures[0].dtype)
        sites = zip(group.sites, squares[group.name], strict=True)
        parts = [s.swapaxes(1, 2) if site.transposed else s for site, s in sites]
        if parts:
            values = sum(parts[1:], start=parts[0])
        found[group.name] = values / num_examples(inputs)
    return found


def check_sharing(sharing: Any) -> None:
    """Raise unless a sharing is known."""
    SecondMoments(sharing)
