"""Part of a parameter, taken out of it and put back by reshapes, slices and one transposition."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvax.capture._layout import Layout


@dataclass(frozen=True)
class Piece:
    """How to cut an array in the coordinates of a layout out of a parameter, and how to put it back.

    A window of the parameter's buffer is read as an array with an axis for every stride of the layout, in which the
    piece is a box.

    Attributes:
        shape: Of the piece.
        window: Where the window begins in the buffer.
        grid: Shape in which the window is read.
        starts: Where the box begins along each axis of the grid.
        sizes: How long it is there.
        order: Axes of the box, the slowest of the piece first.
        turned: Axes of the box, in this order, along which the piece runs backwards.
    """

    shape: tuple[int, ...]
    window: int
    grid: tuple[int, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    turned: tuple[int, ...]

    def take(self, array: Array) -> Array:
        """The piece."""
        ends = [start + size for start, size in zip(self.starts, self.sizes, strict=True)]
        length = math.prod(self.grid)
        if length != array.size:
            array = jax.lax.slice(array.reshape(-1), (self.window,), (self.window + length,))
        box = jax.lax.slice(array.reshape(self.grid), self.starts, ends)
        return jax.lax.rev(box.transpose(self.order), self.turned).reshape(self.shape)

    def put(self, part: Array, like: jax.ShapeDtypeStruct) -> Array:
        """An array like the parameter with this piece, and zero elsewhere."""
        sorted_sizes = [self.sizes[i] for i in self.order]
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        box = jax.lax.rev(part.astype(like.dtype).reshape(sorted_sizes), self.turned).transpose(back)
        margins = [
            (start, whole - start - size, 0)
            for start, whole, size in zip(self.starts, self.grid, self.sizes, strict=True)
        ]
        nothing, length = jnp.zeros((), like.dtype), math.prod(self.grid)
        grid = jax.lax.pad(box, nothing, margins)
        if length != like.size:
            margin = (self.window, like.size - self.window - length, 0)
            grid = jax.lax.pad(grid.reshape(-1), nothing, [margin])
        return grid.reshape(like.shape)


def piece(layout: Layout, size: int) -> Piece | None:
    """The piece of an array of this size with the coordinates of a layout; None if it is no box of any grid."""
    atoms = layout.atoms
    by_stride = sorted(range(len(atoms)), key=lambda i: -abs(atoms[i][1]))
    offset = layout.offset + sum((n - 1) * s for n, s in atoms if s < 0)
    if any(stride == 0 for _, stride in atoms):
        return None
    count, stride = atoms[by_stride[0]] if atoms else (1, 1)
    length = count * abs(stride)
    window = min(offset, size - length)
    if window < 0:
        return None
    grid, starts, sizes, whole, offset = [], [], [], length, offset - window
    for i in by_stride:
        count, stride = atoms[i][0], abs(atoms[i][1])
        if whole % stride or offset // stride + count > whole // stride:
            return None
        grid.append(whole // stride)
        starts.append(offset // stride)
        sizes.append(count)
        offset, whole = offset % stride, stride
    # What one step of the smallest stride leaves out.
    grid.append(whole)
    starts.append(offset)
    sizes.append(1)
    order = (*sorted(range(len(atoms)), key=by_stride.__getitem__), len(atoms))
    turned = tuple(i for i, (_, stride) in enumerate(atoms) if stride < 0)
    assert math.prod(grid) == length
    return Piece(layout.shape, window, tuple(grid), tuple(starts), tuple(sizes), order, turned)
