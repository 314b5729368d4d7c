"""The picture of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curvax.diagnostics._pictures import _COLOURS, _GREY, _figure, _prepare
from curvax.diagnostics._spectral_result import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POSITIVE, _NEGATIVE = _COLOURS[0], _COLOURS[1]
# The vertical axis is logarithmic where this share of the range holds less than a hundredth of the peak.
_MOSTLY_EMPTY = 0.3
# On a logarithmic axis nothing below this fraction of what a single eigenvalue shows is drawn.
_FLOOR = 0.1
# A truncation error above this fraction of the peak is told.
_TOLD = 0.05
_BAND = "± 2 standard errors"
# A logarithmic eigenvalue axis: points, least width of the kernel in decades, decades below the largest at most.
_GRID = 800
_LEAST_DECADES = 0.1
_DEEPEST = 16.0


def plot_spectrum(
    spectrum: Spectrum,
    *,
    eigenvalues: Literal["linear", "log"] = "linear",
    kernel_width: float | None = None,
    log: bool | None = None,
    title: str | None = None,
) -> Figure:
    """Density of the eigenvalues, negative ones in a colour of their own, with two standard errors around it.

    The area under the curve is the number of eigenvalues. On a logarithmic vertical axis a dotted line marks the height
    of a single eigenvalue. `eigenvalues="log"` shows orders of magnitude, negative eigenvalues in a panel of their own
    to the left; those within rounding of zero are counted in the label and not drawn. Lanczos steps find small
    eigenvalues last: where it is shaded grey, the number of eigenvalues is right and their order of magnitude is not.

    Args:
        spectrum: What `spectrum` returned.
        eigenvalues: Scale of the horizontal axis.
        kernel_width: Standard deviation of the Gaussian kernel; in units of the eigenvalues, or in decades for
            `"log"`. By default what the Lanczos steps resolve.
        log: Whether the vertical axis is logarithmic; by default where a third of the range is nearly empty, as with
            a bulk and outliers.
        title: Title of the figure.

    Returns:
        A figure that belongs to no window: `figure.savefig("spectrum.png")`.

    Raises:
        ValueError: `eigenvalues` is neither of the two, `kernel_width` is not positive, or `spectrum` is a batch.

    Example:
        ```python
        eigenvalues = jnp.concatenate([jnp.linspace(-0.5, 1.0, 990), jnp.linspace(3.0, 9.0, 10)])
        found = cx.diagnostics.spectrum(lx.DiagonalLinearOperator(eigenvalues), key=jax.random.key(0))
        cx.diagnostics.plot_spectrum(found).savefig("spectrum.png")
        ```
    """
    if eigenvalues not in ("linear", "log"):
        raise ValueError(f'`eigenvalues` must be "linear" or "log", found {eigenvalues!r}.')
    if kernel_width is not None and not kernel_width > 0:
        raise ValueError(f"`kernel_width` must be positive, found {kernel_width}.")
    if spectrum.nodes.ndim != 2:
        raise ValueError("`spectrum` is a batch: take one out with `jax.tree.map(lambda x: x[i], spectrum)`.")
    figure = _figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    if eigenvalues == "linear":
        _linear(figure.add_subplot(), spectrum, kernel_width, log)
    else:
        _logarithmic(figure, spectrum, kernel_width, log)
    if title:
        figure.suptitle(title)
    return figure


def _linear(axes: Axes, spectrum: Spectrum, kernel_width: float | None, log: bool | None) -> None:
    found = spectrum.density(kernel_width=kernel_width)
    x, width = np.asarray(found.points, np.float64), float(found.kernel_width)
    y, band = (spectrum.size * np.asarray(a, np.float64) for a in (found.values, 2 * found.standard_error))
    single = 1 / (width * np.sqrt(2 * np.pi))
    _prepare(axes, "eigenvalues per unit")
    log = _mostly_empty(x, y, spectrum) if log is None else log
    # Where all eigenvalues have one sign, what the kernel spills over zero is thrown back.
    lowest, highest = float(spectrum.smallest.value), float(spectrum.largest.value)
    rounding = float(np.finfo(spectrum.nodes.dtype).eps) * spectrum.size * max(abs(lowest), abs(highest))
    sides = [(_NEGATIVE, x <= 0, lowest < -rounding), (_POSITIVE, x >= 0, highest > rounding)]
    if sum(has for _, _, has in sides) == 1:
        y, band = (a + np.interp(-x, x, a, left=0.0, right=0.0) for a in (y, band))
        sides = [side for side in sides if side[2]]
    for colour, side, _ in sides:
        _area(axes, x[side], y[side], band[side], colour, single if log else None, spectrum)
    _ends(axes, spectrum)
    told, truncation = f"kernel width {width:.2g}", spectrum.size * float(found.truncation)
    if truncation > _TOLD * y.max():
        told += f", finer than the steps resolve: wrong by up to {truncation:.2g}"
    axes.set_xlabel(f"eigenvalue   ({told})")
    axes.set_xlim(x[0], x[-1])
    _finish(axes, log, single, float(np.max(y + band)), spectrum)


def _mostly_empty(x: np.ndarray, y: np.ndarray, spectrum: Spectrum) -> bool:
    inside = (x >= float(spectrum.smallest.value)) & (x <= float(spectrum.largest.value))
    return bool(np.mean(y[inside] < 0.01 * y.max()) > _MOSTLY_EMPTY) if np.any(inside) else False


def _area(
    axes: Axes,
    x: np.ndarray,
    y: np.ndarray,
    band: np.ndarray,
    colour: str,
    single: float | None,
    spectrum: Spectrum,
) -> None:
    """Curve, what is under it, and its error band."""
    bottom = 0.0 if single is None else _FLOOR * single
    if x.size == 0 or not np.any(y > bottom):
        return
    sign = "negative" if colour == _NEGATIVE else "positive"
    axes.fill_between(x, bottom, np.maximum(y, bottom), color=colour, alpha=0.18, linewidth=0)
    if not spectrum.exact:
        low, high = np.maximum(y - band, bottom), np.maximum(y + band, bottom)
        axes.fill_between(x, low, high, color=colour, alpha=0.35, linewidth=0, label=_BAND)
    dash = "--" if colour == _NEGATIVE else "-"
    axes.plot(
        x,
        np.where(y >= bottom, y, np.nan),
        color=colour,
        linewidth=1.5,
        linestyle=dash,
        label=f"{sign} eigenvalues",
    )


def _ends(axes: Axes, spectrum: Spectrum) -> None:
    """The extreme eigenvalues as ticks on the axis."""
    for item in (spectrum.smallest, spectrum.largest):
        colour = _NEGATIVE if float(item.value) < 0 else _POSITIVE
        place = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot([float(item.value)], [0.0], marker="^", color=colour, markersize=6, **place)


def _finish(axes: Axes, log: bool, single: float, top: float, spectrum: Spectrum) -> None:
    if log:
        axes.set_yscale("log")
        axes.set_ylim(_FLOOR * single, 2 * top)
        if spectrum.size > 1:
            axes.axhline(single, color=_GREY, linewidth=1.0, linestyle=":", label="a single eigenvalue")
    else:
        axes.set_ylim(0, 1.05 * top)
    from matplotlib.lines import Line2D

    ends = " and ".join(f"{float(item.value):.3g}" for item in (spectrum.smallest, spectrum.largest))
    handles = _handles([axes])
    handles["extremes " + ends.replace("-", "−")] = Line2D(
        [], [], marker="^", linestyle="none", color=_GREY, markersize=6
    )
    place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    axes.legend(list(handles.values()), list(handles), frameon=False, fontsize=8, ncols=3, **place)


def _handles(rows: Any) -> dict[str, Any]:
    """What the legend shows, each label once."""
    found: dict[str, Any] = {}
    for axes in rows:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if _BAND in found:
        from matplotlib.patches import Patch

        # It belongs to the curves of both colours.
        found[_BAND] = Patch(facecolor=_GREY, alpha=0.35, linewidth=0)
    return found


def _logarithmic(figure: Figure, spectrum: Spectrum, kernel_width: float | None, log: bool | None) -> None:
    nodes, weights = (np.asarray(a, np.float64) for a in (spectrum.nodes, spectrum.weights))
    size = np.abs(nodes)
    largest = size.max()
    # What rounding alone makes of a zero, as far as it is known.
    rounding = 10 * np.finfo(np.asarray(spectrum.nodes).dtype).eps * largest
    rounding = max(rounding, float(spectrum.asymmetry) * largest, largest * 10**-_DEEPEST)
    seen = (size > rounding) & (weights > 0)
    if not np.any(seen):
        raise ValueError("all eigenvalues are zero to rounding: there is no logarithmic picture of them.")
    logs = np.log10(size[seen])
    width = kernel_width
    if width is None:
        width = max(1.25 * np.ptp(logs) / spectrum.num_steps, _LEAST_DECADES)
    sides = [(sign, nodes * sign > rounding) for sign in (-1, 1)]
    sides = [(sign, side & seen) for sign, side in sides if np.any(side & seen)]
    panels = []
    for sign, side in sides:
        x = np.log10(size[side])
        panels.append((sign, side, x.min() - 4 * width, x.max() + 4 * width))
    rows = figure.subplots(
        1,
        len(panels),
        sharey=True,
        squeeze=False,
        width_ratios=[max(high - low, 1) for *_, low, high in panels],
    )[0]
    drawn = []
    for axes, (sign, side, low, high) in zip(rows, panels, strict=True):
        points = np.linspace(low, high, _GRID)
        samples = np.stack([
            np.exp(-(((points[:, None] - np.log10(np.where(keep, row, 1))) / width) ** 2) / 2) @ np.where(keep, w, 0)
            for row, w, keep in zip(size, weights, side, strict=True)
        ]) * spectrum.size / (width * np.sqrt(2 * np.pi))  # fmt: skip
        count = samples.shape[0]
        error = samples.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(points.size)
        drawn.append((axes, sign, 10.0**points, samples.mean(0), 2 * error))
    single = 1 / (width * np.sqrt(2 * np.pi))
    top = max(float(np.max(y + band)) for *_, y, band in drawn)
    log = top > 300 * single if log is None else log
    for axes, sign, x, y, band in drawn:
        _prepare(axes, "eigenvalues per decade" if axes is rows[0] else "")
        _area(axes, x, y, band, _POSITIVE if sign > 0 else _NEGATIVE, single if log else None, spectrum)
        axes.set_xscale("log")
        axes.set_xlim((x[0], x[-1]) if sign > 0 else (x[-1], x[0]))
        blurred = seen & (nodes * sign > 0) & (np.asarray(spectrum.residuals) > size / 2)
        if np.any(blurred):
            edge = size[blurred].max() * 10 ** (2 * width)
            axes.axvspan(
                x[0], edge, color=_GREY, alpha=0.15, linewidth=0, zorder=0, label="not resolved by the steps"
            )
        if sign < 0:
            axes.xaxis.set_major_formatter(_minus_power)
    _finish_logarithmic(figure, rows, log, single, top)
    zeros = spectrum.size * float(np.mean(np.sum(np.where(seen, 0, weights), axis=1)))
    told = f"eigenvalue   (kernel width {width:.2g} decades"
    told += f"; about {zeros:.0f} within rounding of zero not shown)" if zeros > 0.5 else ")"
    figure.supxlabel(told, fontsize=10)


def _minus_power(value: float, position: Any) -> str:
    del position
    return f"$-10^{{{round(np.log10(value))}}}$"


def _finish_logarithmic(figure: Figure, rows: Any, log: bool, single: float, top: float) -> None:
    for axes in rows:
        if log:
            axes.set_yscale("log")
            axes.set_ylim(_FLOOR * single, 2 * top)
            axes.axhline(single, color=_GREY, linewidth=1.0, linestyle=":", label="a single eigenvalue")
        else:
            axes.set_ylim(0, 1.05 * top)
    handles = _handles(rows)
    figure.legend(
        list(handles.values()), list(handles), frameon=False, fontsize=8, ncols=3, loc="outside upper left"
    )
