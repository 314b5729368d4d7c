"""The picture of where a matrix has entries."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import lineax as lx
import numpy as np

from curvax.diagnostics._directions import paths
from curvax.diagnostics._pictures import _COLOURS, _GREY, _figure
from curvax.operators._dense import matrix_by_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A picture has no more cells than this in a direction: beyond, a cell stands for a block of entries.
_CELLS = 600
_MOST_LABELS = 12


class _Pattern(NamedTuple):
    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]
    not_finite: int


def plot_sparsity(
    matrix: Any,
    *,
    threshold: float = 0.0,
    max_size: int = 2048,
    title: str | None = None,
) -> Figure:
    """The pattern of the entries of a matrix, or of an operator that is never formed elsewhere.

    Up to 600 rows each entry is a cell; beyond, a cell is a block of entries and the darker the more of them there
    are. For an operator over a pytree lines separate the leaves, which are named on the axes: blocks that are empty
    are parameters that do not interact. Entries that are not finite count as entries.

    Args:
        matrix: A Lineax operator, an array of two dimensions, or a sparse matrix of SciPy (any size, nothing is
            written out).
        threshold: Entries of absolute value at most `threshold` times the largest one are left out; by default exact
            zeros only. Rounding noise of a Hessian is below about 1e-12 in float64, 1e-5 in float32.
        max_size: Largest number of columns of an operator: it is written out by one product for each.
        title: Title of the figure.

    Returns:
        A figure that belongs to no window: `figure.savefig("sparsity.png")`.

    Raises:
        TypeError: `matrix` is none of these.
        ValueError: It is larger than `max_size`, has no entries, or `threshold` is negative.

    Cost: for an operator one product a column, in batches of 64; rows × columns numbers on the host.

    Example:
        ```python
        loss = lambda theta: jnp.sum(jnp.diff(theta["path"]) ** 4) + jnp.sum(theta["offset"] ** 2)
        theta = {"path": jnp.arange(30.0) ** 2, "offset": jnp.ones(10)}
        figure = cx.diagnostics.plot_sparsity(cx.operators.hessian(loss, theta))
        figure.savefig("sparsity.png")
        ```
    """
    if not threshold >= 0:
        raise ValueError(f"`threshold` must be at least 0, found {threshold}.")
    leaves: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    if isinstance(matrix, lx.AbstractLinearOperator):
        leaves = _leaves(matrix.out_structure()), _leaves(matrix.in_structure())
        pattern = _of_dense(_columns(matrix, max_size), threshold)
    elif _is_sparse(matrix):
        pattern = _of_sparse(matrix, threshold)
    else:
        pattern = _of_dense(_as_array(matrix), threshold)
    if 0 in pattern.shape:
        raise ValueError(f"`matrix` has no entries: its shape is {pattern.shape}.")

    rows, columns = pattern.shape
    height = min(max(5.2 * rows / columns, 1.6), 8.0)
    figure = _figure(figsize=(6.0, height + 0.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _draw_pattern(axes, pattern)
    _name_leaves(axes.yaxis, axes.axhline, leaves[0])
    _name_leaves(axes.xaxis, axes.axvline, leaves[1])
    count = pattern.rows.size
    share = 100 * count / (rows * columns)
    told = f"{rows} × {columns}, {count} entries ({share:.3g} %)"
    if pattern.not_finite:
        told += f", {pattern.not_finite} of them not finite"
    axes.set_title(told, fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


_written_out = eqx.filter_jit(matrix_by_columns)


def _columns(operator: lx.AbstractLinearOperator, max_size: int) -> np.ndarray:
    """The matrix of an operator, from its products."""
    if operator.in_size() > max_size or operator.out_size() > 4 * max_size:
        raise ValueError(
            f"`matrix` has {operator.out_size()} rows and {operator.in_size()} columns, over `max_size` = {max_size}: "
            "writing it out takes a product for each column. Raise `max_size` if that is wanted, or pass a sparse "
            "matrix of SciPy."
        )
    return np.asarray(_written_out(operator), np.float64)


def _is_sparse(matrix: Any) -> bool:
    import scipy.sparse

    return scipy.sparse.issparse(matrix)


def _as_array(matrix: Any) -> np.ndarray:
    if not isinstance(matrix, jax.Array | np.ndarray) or matrix.ndim != 2:
        raise TypeError(
            "`matrix` must be a Lineax operator, an array of two dimensions or a sparse matrix of SciPy, found "
            f"{type(matrix).__name__}{f' of shape {matrix.shape}' if hasattr(matrix, 'shape') else ''}."
        )
    return np.asarray(matrix, np.float64)


def _selected(values: np.ndarray, threshold: float) -> np.ndarray:
    """Which entries count: all that are not finite, and what is above the threshold."""
    size = np.abs(values)
    finite = np.isfinite(size)
    largest = size[finite].max() if np.any(finite) else 0.0
    return ~finite | (size > threshold * largest)


def _of_dense(matrix: np.ndarray, threshold: float) -> _Pattern:
    rows, columns = np.nonzero(_selected(matrix, threshold))
    return _Pattern(rows, columns, matrix.shape, int(np.count_nonzero(~np.isfinite(matrix))))


def _of_sparse(matrix: Any, threshold: float) -> _Pattern:
    entries = matrix.tocoo()
    entries.sum_duplicates()
    keep = _selected(entries.data, threshold)
    not_finite = int(np.count_nonzero(~np.isfinite(entries.data)))
    return _Pattern(entries.row[keep], entries.col[keep], matrix.shape, not_finite)


def _draw_pattern(axes: Axes, pattern: _Pattern) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # Cells of equal widths: where some held one row and some two, a grid would be seen that is not there.
    widths = [-(-size // _CELLS) for size in pattern.shape]
    counts = [-(-size // width) for size, width in zip(pattern.shape, widths, strict=True)]
    found = np.zeros(counts)
    np.add.at(found, (pattern.rows // widths[0], pattern.columns // widths[1]), 1)
    # The square root keeps a single entry of a block visible.
    share = np.where(found > 0, np.maximum(np.sqrt(np.minimum(found / math.prod(widths), 1)), 0.25), 0)
    colours = LinearSegmentedColormap.from_list("entries", ["#ffffff", _COLOURS[0]])
    bottom, right = (count * width - 0.5 for count, width in zip(counts, widths, strict=True))
    extent = (-0.5, right, bottom, -0.5)
    axes.imshow(share, cmap=colours, vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto")
    axes.set(xlim=(-0.5, pattern.shape[1] - 0.5), ylim=(pattern.shape[0] - 0.5, -0.5))
    if max(pattern.shape) < 8 * min(pattern.shape):
        axes.set_aspect("equal")
    axes.tick_params(labelsize=8, color=_GREY)
    for spine in axes.spines.values():
        spine.set_color(_GREY)


def _leaves(structure: Any) -> list[tuple[str, int]]:
    """Name and size of every leaf; names without the brackets of a key."""
    sizes = [leaf.size for leaf in jax.tree.leaves(structure)]
    names = [name.replace("['", ".").replace("']", "").lstrip(".") for name in paths(structure)]
    return [(name, size) for name, size in zip(names, sizes, strict=True) if size]


def _name_leaves(axis: Any, line: Any, leaves: list[tuple[str, int]]) -> None:
    """Lines between the leaves, and their names in place of numbers where they fit."""
    if not 1 < len(leaves) <= _MOST_LABELS:
        return
    ends = np.cumsum([size for _, size in leaves])
    for end in ends[:-1]:
        line(end - 0.5, color=_GREY, linewidth=0.8)
    middles = ends - np.array([size for _, size in leaves]) / 2 - 0.5
    labels = [f"{name}\n({size})" for name, size in leaves]
    # A leaf of less than a twelfth of the axis has no room for its name.
    wide = np.diff(ends, prepend=0) * _MOST_LABELS >= ends[-1]
    axis.set_ticks(middles[wide], [label for label, fits in zip(labels, wide, strict=True) if fits])
    axis.set_tick_params(length=0)
