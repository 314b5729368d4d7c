"""The blocks that an optimiser keeps a curvature of, and the model as it is in one step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from curvax.capture import Group, Layers, find_layers
from curvax.capture._groups import NOT_USED
from curvax.capture._second_moment import at_least_float32
from curvax.operators._base import as_arrays, split
from curvax.operators._cotangents import Loss
from curvax.operators._gauss_newton import check_examples, num_examples

Matrices = dict[str, Array]


@dataclass(frozen=True)
class BlockInfo:
    """One block, as far as an optimiser cares. Static.

    Attributes:
        name: Of the group.
        shape: (stack, rows, columns).
        dense: Whether the factor of the rows, and that of the columns, is a matrix; else it is a diagonal.
        matrix: Whether it is a Kronecker product; else the diagonal of a bias, a scale or a parameter used otherwise.
        measured: Whether there are statistics; else its steps are those of first order.
        used: Whether the model uses it at all.
        single: Whether it is a Kronecker product of dense factors of ONE operation.
        dtype: Of its numbers.
    """

    name: str
    shape: tuple[int, int, int]
    dense: tuple[bool, bool]
    matrix: bool
    measured: bool
    used: bool
    single: bool
    dtype: Any

    @classmethod
    def of(cls, group: Group) -> "BlockInfo":
        """From what capture found."""
        block = group.block
        matrix = any(site.geometry is not None for site in group.sites)
        dense = (matrix and block.row_factor == "dense", matrix and block.column_factor == "dense")
        with jax.numpy_dtype_promotion("standard"):
            dtype = at_least_float32(jnp.result_type(*(like.dtype for like in block.structures)))
        single = all(dense) and len(group.sites) == 1 and not group.sites[0].transposed
        return cls(
            group.name,
            block.shape,
            dense,
            matrix,
            bool(group.sites),
            group.fallback != NOT_USED,
            single,
            dtype,
        )


class Context(NamedTuple):
    """The model, the parameters and the batch of one step.

    Attributes:
        layers: Of the model.
        model_fn: As the user gave it, of parameters and one example.
        loss: Of one example.
        params: The user's parameters.
        leaves: Their floating-point arrays, in order.
        inputs: All examples.
        targets: Likewise.
        key: For draws, None if there are none.
        count: Number of steps before this one.
    """

    layers: Layers
    model_fn: Callable[[PyTree, PyTree], PyTree]
    loss: Loss
    params: PyTree
    leaves: list[Array]
    inputs: PyTree
    targets: PyTree
    key: PRNGKeyArray | None
    count: Array  # type: ignore[assignment]

    def with_leaves(self, leaves: list[Array]) -> PyTree:
        """The parameters with other floating-point arrays."""
        dynamic, rest = eqx.partition(self.params, eqx.is_inexact_array)
        return eqx.combine(jax.tree.unflatten(jax.tree.structure(dynamic), leaves), rest)

    def outputs(self, leaves: list[Array]) -> tuple[PyTree, PyTree]:
        """Of all examples at other parameters: those that are floating-point, and all others."""
        whole = self.with_leaves(leaves)
        outputs = jax.vmap(lambda x: self.model_fn(whole, x))(self.inputs)
        return eqx.partition(outputs, eqx.is_inexact_array)

    def mean_loss(self, outputs: PyTree, rest: PyTree) -> Array:
        """Of all examples."""
        return jnp.mean(jax.vmap(self.loss)(eqx.combine(outputs, rest), self.targets))

    @property
    def infos(self) -> tuple[BlockInfo, ...]:
        """Of all blocks."""
        return tuple(BlockInfo.of(group) for group in self.layers.groups)

    def pack(self, leaves: list[Array]) -> Matrices:
        """Arrays like the parameters as the matrices of all blocks, in their dtypes."""
        packed = self.layers.pack(list(leaves))
        return {info.name: packed[info.name].astype(info.dtype) for info in self.infos}

    def unpack(self, matrices: Mapping[str, Array]) -> list[Array]:
        """The inverse of `pack`: arrays like the parameters, zero where there is no block."""
        return jax.tree.leaves(self.layers.unpack(matrices))


def example_layers(model_fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, example: PyTree) -> Layers:
    """The layers, from parameters and one example."""
    dynamic, rest = split("params", params)
    return find_layers(model_fn, eqx.combine(dynamic, rest), example)


def context(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss: Loss,
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    key: PRNGKeyArray | None,
    count: Array,
) -> Context:
    """What a step needs, checked.

    Raises:
        ValueError: No floating-point parameter, a complex one, examples that do not fit.
    """
    dynamic, rest = split("params", params)
    inputs, targets = as_arrays((inputs, targets))
    check_examples(inputs, targets)
    params = eqx.combine(dynamic, rest)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    try:
        layers = find_layers(model_fn, params, example)
    except Exception as error:
        shapes = [leaf.shape for leaf in jax.tree.leaves(example)]
        error.add_note(
            f"While looking for layers: `model_fn(params, x)`, x one example of `inputs`, of shapes {shapes}. `inputs` "
            "must hold, along their leading axis, examples like `example`."
        )
        raise
    return Context(layers, model_fn, loss, params, jax.tree.leaves(dynamic), inputs, targets, key, count)


def part_of(inputs: PyTree, targets: PyTree, fraction: float, count: Array) -> tuple[PyTree, PyTree]:
    """A part of a batch, at each step the next one."""
    size = num_examples(inputs)
    kept = max(1, min(size, round(fraction * size)))
    if kept == size:
        return inputs, targets
    start = (count % (size // kept)) * kept
    take = lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, kept)
    return jax.tree.map(take, inputs), jax.tree.map(take, targets)
