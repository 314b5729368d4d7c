"""Sites of `dot_general`: weights of any dimension numbers, experts as batch dimensions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax.capture._inputs import AbstractInputs, DenseInputs
from curvax.capture._layout import Axis, Layout, merged

# Of an axis of a site's output: does it tell members of the stack, shared positions, or rows of the weight apart?
Role = str
Roles = tuple[tuple[int, Role], ...]


@dataclass(frozen=True)
class Dense:
    """A product of a weight with data.

    Attributes:
        inputs_axes: Axes of the data: of the stack, shared, contracted.
        output_axes: Axes of the result: of the stack, shared, of the rows of the weight.
        output_shape: Of the result.
        dtype: Of the result where that is not the dtype of both operands.
    """

    inputs_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    output_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    output_shape: tuple[int, ...]
    dtype: Any = None

    @property
    def roles(self) -> Roles:
        """Sizes and roles of the axes of the result."""
        names = dict(zip(("stack", "shared", "rows"), self.output_axes, strict=True))
        role = {axis: name for name, axes in names.items() for axis in axes}
        return tuple((n, role[i]) for i, n in enumerate(self.output_shape))

    def inputs(self, x: Array, bias: bool, diagonal: bool) -> AbstractInputs:
        """Of examples along the leading axis; every leaf gets a leading axis, of the stack."""
        if not jnp.issubdtype(x.dtype, jnp.inexact):  # a product takes integers and floats together
            x = x.astype(self.dtype)
        return DenseInputs(grouped(x, self.inputs_axes), bias, diagonal)

    def cotangents(self, g: Array) -> Float[Array, "S B T out"]:
        """Of examples along the leading axis."""
        return grouped(g, self.output_axes)


def grouped(array: Array, axes: Sequence[Sequence[int]]) -> Float[Array, "S B T n"]:
    """Axes (after the leading one, of the examples) brought together in three."""
    stack, shared, last = axes
    shape = array.shape[1:]
    order = (*(1 + i for i in stack), 0, *(1 + i for i in (*shared, *last)))
    sizes = [math.prod(shape[i] for i in part) for part in axes]
    return array.transpose(order).reshape(sizes[0], array.shape[0], *sizes[1:])


def dense(
    params: dict[str, Any], shapes: Sequence[tuple[int, ...]], weight: int, layout: Layout | None
) -> tuple[Dense, Layout | None]:
    """The site of a `dot_general`, and the layout of its weight as (stack, rows, columns).

    Args:
        params: Of the equation.
        shapes: Of its operands.
        weight: Which operand that is.
        layout: Of the weight in its parameter, None if it is no layout.
    """
    contracted, batched = params["dimension_numbers"]
    contracted, batched = [tuple(map(int, d)) for d in contracted], [tuple(map(int, d)) for d in batched]
    data = 1 - weight
    free = [[i for i in range(len(shapes[k])) if i not in (*contracted[k], *batched[k])] for k in (0, 1)]
    pairs = sorted(zip(contracted[weight], contracted[data], strict=True))
    count = len(batched[0])
    where = {0: count, 1: count + len(free[0])}  # of the free axes of either operand in the result
    rows = tuple(where[weight] + i for i in range(len(free[weight])))
    shared = tuple(where[data] + i for i in range(len(free[data])))
    result = tuple(shapes[0][i] for i in (*batched[0], *free[0])) + tuple(shapes[1][i] for i in free[1])
    # A batch axis along which the weight is only repeated is shared.
    axes = None if layout is None else [merged(layout.axes[i]) for i in batched[weight]]
    repeated = [axes is not None and all(stride == 0 for _, stride in axis) for axis in axes or [()] * count]
    stack = tuple(i for i in range(count) if not repeated[i])
    again = tuple(i for i in range(count) if repeated[i])
    site = Dense(
        (
            tuple(batched[data][i] for i in stack),
            (*(batched[data][i] for i in again), *free[data]),
            tuple(b for _, b in pairs),
        ),
        (stack, again + shared, rows),
        result,
        params["preferred_element_type"],
    )
    if layout is None:
        return site, None
    parts = [[batched[weight][i] for i in stack], free[weight], [a for a, _ in pairs]]
    return site, coordinates(layout, parts)


def coordinates(layout: Layout, parts: Sequence[Sequence[int]]) -> Layout | None:
    """A layout with axes brought together as stack, rows and columns; None if one of them repeats entries."""
    axes: list[Axis] = [merged(atom for i in part for atom in layout.axes[i]) for part in parts]
    if any(stride == 0 for axis in axes for _, stride in axis):
        return None
    return Layout(layout.offset, tuple(axes))
