"""Where the entries of an array lie in the buffer of another one, after transpositions, reshapes and slices.

The strides of NumPy, but every axis may be made of several, so that any transposition followed by any reshape that
keeps rows of the original together is one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Size and stride; the axes of a layout are sequences of them, the slowest first.
Atom = tuple[int, int]
Axis = tuple[Atom, ...]


def merged(atoms: Iterable[Atom]) -> Axis:
    """The same entries in the same order, with as few atoms as possible."""
    found: list[Atom] = []
    for size, stride in atoms:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def size_of(axis: Iterable[Atom]) -> int:
    """Number of entries along an axis."""
    return math.prod(size for size, _ in axis)


def divided(atoms: Iterable[Atom], sizes: Sequence[int]) -> list[Axis] | None:
    """Atoms cut into consecutive axes of these sizes, None if one of them would have to break up an atom unevenly."""
    rest, axes = list(merged(atoms)), []
    for size in sizes:
        axis: list[Atom] = []
        while size > 1:
            count, stride = rest.pop(0)
            if size % count == 0:
                axis.append((count, stride))
                size //= count
            elif count % size == 0:
                axis.append((size, stride * (count // size)))
                rest.insert(0, (count // size, stride))
                size = 1
            else:
                return None
        axes.append(tuple(axis))
    return axes


@dataclass(frozen=True)
class Layout:
    """Entry (i, j, …) lies at `offset` plus the strides of the atoms of its axes; stride 0 is a broadcast."""

    offset: int
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, shape: Sequence[int]) -> "Layout":
        """An array as it stands."""
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return cls(0, tuple(merged([(n, s)]) for n, s in zip(shape, strides, strict=True)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that is laid out."""
        return tuple(map(size_of, self.axes))

    @property
    def atoms(self) -> Axis:
        """Those of all axes."""
        return tuple(atom for axis in self.axes for atom in axis)

    def transpose(self, permutation: Sequence[int]) -> "Layout":
        """With the axes in another order."""
        return Layout(self.offset, tuple(self.axes[i] for i in permutation))

    def drop(self, axes: Sequence[int]) -> "Layout":
        """Without these axes, of size 1."""
        return Layout(self.offset, tuple(a for i, a in enumerate(self.axes) if i not in axes))

    def broadcast(self, shape: Sequence[int], dimensions: Sequence[int]) -> "Layout":
        """As `lax.broadcast_in_dim`."""
        axes = [merged([(n, 0)]) for n in shape]
        for old, new in enumerate(dimensions):
            if size_of(self.axes[old]) == shape[new]:
                axes[new] = self.axes[old]
        return Layout(self.offset, tuple(axes))

    def broadcast_to(self, shape: Sequence[int]) -> "Layout":
        """As an operand of a product or a sum is: a scalar, or axes of size 1."""
        return self.broadcast(shape, range(len(self.axes)))

    def reshape(self, shape: Sequence[int]) -> "Layout | None":
        """With other axes; None if no strides say that."""
        axes = divided(self.atoms, shape)
        return None if axes is None else Layout(self.offset, tuple(axes))

    def slice(self, starts: Sequence[int], limits: Sequence[int], steps: Sequence[int]) -> "Layout | None":
        """As `lax.slice`; None if no strides say that."""
        offset, axes = self.offset, []
        for axis, start, limit, step in zip(self.axes, starts, limits, steps, strict=True):
            size = size_of(axis)
            if (start, limit, step) == (0, size, 1):
                axes.append(axis)
                continue
            axis = merged(axis)
            inner = size_of(axis[1:])
            if len(axis) == 1:
                count, unit = len(range(start, limit, step)), step
            elif step == 1 and start % inner == 0 and limit % inner == 0:
                start, count, unit = start // inner, (limit - start) // inner, 1
            else:
                return None
            stride = axis[0][1]
            offset += start * stride
            axes.append(merged([(count, unit * stride), *axis[1:]]))
        return Layout(offset, tuple(axes))

    def reverse(self, axes: Sequence[int]) -> "Layout":
        """With these axes turned around."""
        turned = tuple(
            tuple((n, -s) for n, s in axis) if i in axes else axis for i, axis in enumerate(self.axes)
        )
        shift = sum((n - 1) * s for i in axes for n, s in self.axes[i])
        return Layout(self.offset + shift, turned)

    def merge(self) -> "Layout":
        """The same with as few atoms as possible, so that equal layouts compare equal."""
        return Layout(self.offset, tuple(map(merged, self.axes)))

    def without_broadcasts(self) -> "Layout":
        """Each entry of the buffer once."""
        return Layout(self.offset, tuple(tuple((n, s) for n, s in axis if s != 0) for axis in self.axes))

    def mark(self, buffer: np.ndarray) -> bool:
        """Set what is laid out in a flat buffer of booleans; whether nothing of it had been set before."""
        atoms = self.atoms
        part = np.lib.stride_tricks.as_strided(
            buffer[self.offset :], [n for n, _ in atoms], [s for _, s in atoms]
        )
        free = not part.any()
        part[...] = True
        return free


def rearranged(name: str, params: dict[str, Any], layout: Layout) -> list[Layout | None] | None:
    """The layouts of what an operation returns that only moves entries about.

    Args:
        name: of the primitive.
        params: of the equation.
        layout: of its operand.

    Returns:
        One for each result, None for a result that is no layout; None for any other operation.
    """
    if name in _KEEPING:
        return [layout]
    if name == "transpose":
        return [layout.transpose(params["permutation"])]
    if name == "reshape" and params.get("dimensions") is None:
        return [layout.reshape(params["new_sizes"])]
    if name == "squeeze":
        return [layout.drop([d % len(layout.axes) for d in params["dimensions"]])]
    if name == "broadcast_in_dim":
        return [layout.broadcast(params["shape"], params["broadcast_dimensions"])]
    if name == "slice":
        steps = params["strides"] or (1,) * len(layout.axes)
        return [layout.slice(params["start_indices"], params["limit_indices"], steps)]
    if name == "rev":
        return [layout.reverse(params["dimensions"])]
    if name == "split":
        return _cut(layout, params["axis"], [int(size) for size in params["sizes"]])
    if name == "unstack":
        axis = params["axis"]
        parts = _cut(layout, axis, [1] * layout.shape[axis])
        return [part and part.drop([axis]) for part in parts]
    return None


_KEEPING = {
    "convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint", "pvary", "mesh_cast",
    "reshard",
}  # fmt: skip


def _cut(layout: Layout, axis: int, sizes: Sequence[int]) -> list[Layout | None]:
    parts, start = [], 0
    for size in sizes:
        starts, limits = [0] * len(layout.axes), list(layout.shape)
        starts[axis], limits[axis] = start, start + size
        parts.append(layout.slice(starts, limits, [1] * len(layout.axes)))
        start += size
    return parts
