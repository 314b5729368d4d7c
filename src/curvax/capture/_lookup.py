"""Sites of `gather` and of `dynamic_slice` with an index from the data: rows of a table, as of an embedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvax.capture._dense import Roles, coordinates, grouped
from curvax.capture._inputs import AbstractInputs, LookupInputs
from curvax.capture._layout import Layout


@dataclass(frozen=True)
class Lookup:
    """Rows taken out of a table; what is multiplied with the table are rows of zeros with a one.

    Attributes:
        size: Number of rows.
        index_axes: Axes of the indices: of the stack, shared.
        output_axes: Axes of the result: of the stack, shared, of the entries of a row.
        output_shape: Of the result.
        clamped: Whether an index outside of the table means its first or last row (else no row).
        dtype: Of the table.
        column: Which entry along the last axis of the indices says the row; None if there is no such axis.
    """

    size: int
    index_axes: tuple[tuple[int, ...], tuple[int, ...]]
    output_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    output_shape: tuple[int, ...]
    clamped: bool
    dtype: jnp.dtype
    column: int | None = None

    @property
    def roles(self) -> Roles:
        """Sizes and roles of the axes of the result."""
        names = dict(zip(("stack", "shared", "rows"), self.output_axes, strict=True))
        role = {axis: name for name, axes in names.items() for axis in axes}
        return tuple((n, role[i]) for i, n in enumerate(self.output_shape))

    def inputs(self, x: Array, bias: bool, diagonal: bool) -> AbstractInputs:
        """Of indices with the examples along the leading axis; every leaf gets a leading axis, of the stack."""
        del bias, diagonal  # a lookup has none, and is always diagonal
        if self.column is not None:
            x = x[..., self.column : self.column + 1]
        indices = grouped(x, (*self.index_axes, ()))[..., 0]
        if self.clamped:
            indices = jnp.clip(indices, 0, self.size - 1)
        return LookupInputs(indices, self.size, self.dtype)

    def cotangents(self, g: Array) -> Float[Array, "S B T out"]:
        """Of examples along the leading axis."""
        return grouped(g, self.output_axes)


def gathered(
    params: dict[str, Any], table: Any, indices: tuple[int, ...], layout: Layout | None
) -> tuple[Lookup, Layout | None, int] | None:
    """The site of a `gather`, the layout of its table as (stack, rows, columns), and the rank of what is looked up.

    Args:
        params: Of the equation.
        table: Shape and dtype of the table.
        indices: Shape of the indices; their last axis tells the indexed axes apart.
        layout: Of the table in its parameter, None if it is no layout.

    Returns:
        None for any gather that does not look up whole entries along one axis.
    """
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    modes = jax.lax.GatherScatterMode
    clamped = params["mode"] == modes.CLIP
    stacked = tuple(map(int, numbers.operand_batching_dims))
    index_stacked = tuple(map(int, numbers.start_indices_batching_dims))
    collapsed = tuple(map(int, numbers.collapsed_slice_dims))
    axes = tuple(map(int, numbers.start_index_map))
    # Where all of an axis is taken its index is clamped to zero, as in what `vmap` makes of a `dynamic_slice`.
    if len(axes) > 1 and (clamped or params["mode"] == modes.PROMISE_IN_BOUNDS):
        axes = tuple(axis for axis in axes if sizes[axis] != table.shape[axis])
    if len(axes) != 1 or sizes[axes[0]] != 1 or any(axis not in axes for axis in collapsed):
        return None
    kept = [i for i in range(len(table.shape)) if i not in (*axes, *stacked)]
    if any(sizes[i] != table.shape[i] for i in kept):
        return None
    offsets = tuple(map(int, numbers.offset_dims))
    output_rank = len(indices) - 1 + len(offsets)
    # The axes of the result that are not those of a row are those of the indices, in order.
    of_index = [i for i in range(output_rank) if i not in offsets]
    taken = [i for i in range(len(table.shape)) if i not in (*collapsed, *stacked)]
    single = tuple(axis for axis, i in zip(offsets, taken, strict=True) if i in axes)
    of_rows = tuple(axis for axis, i in zip(offsets, taken, strict=True) if i not in axes)
    shared = [i for i in range(len(indices) - 1) if i not in index_stacked]
    shape = [0] * output_rank
    for axis, size in zip(of_index, indices[:-1], strict=True):
        shape[axis] = size
    for axis, i in zip(offsets, taken, strict=True):
        shape[axis] = sizes[i]
    site = Lookup(
        table.shape[axes[0]],
        (index_stacked, (*shared, len(indices) - 1)),
        (tuple(of_index[i] for i in index_stacked), (*(of_index[i] for i in shared), *single), of_rows),
        tuple(shape),
        clamped,
        table.dtype,
        tuple(map(int, numbers.start_index_map)).index(axes[0]),
    )
    return site, layout and coordinates(layout, (stacked, kept, axes)), len(kept)


def sliced(
    sizes: Sequence[int], table: Any, data: Sequence[bool], layout: Layout | None
) -> tuple[Lookup, Layout | None, int, int] | None:
    """The site of a `dynamic_slice` of one entry along one axis, as `gathered`; and that axis.

    Args:
        sizes: Of the slice.
        table: Shape and dtype of the table.
        data: Which indices are not known while tracing.
        layout: Of the table in its parameter, None if it is no layout.

    Returns:
        None for any other slice.
    """
    axes = [i for i in range(len(sizes)) if data[i] and sizes[i] != table.shape[i]]
    if (
        len(axes) != 1
        or sizes[axes[0]] != 1
        or any(sizes[i] != n for i, n in enumerate(table.shape) if i not in axes)
    ):
        return None
    kept = [i for i in range(len(sizes)) if i not in axes]
    site = Lookup(
        table.shape[axes[0]],
        ((), ()),
        ((), tuple(axes), tuple(kept)),
        tuple(sizes),
        True,
        table.dtype,
    )
    return site, layout and coordinates(layout, ((), kept, axes)), len(kept), axes[0]
