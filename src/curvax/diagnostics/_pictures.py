"""Pictures of runs and errors. Each returns a Matplotlib figure and touches no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float

from curvax.bilevel._history import History

if TYPE_CHECKING:  # Matplotlib is loaded by the first picture, not by `import curvax`
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by the colour-blind; with dashes they survive a grey print too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#595959"
# Past this ratio of largest to smallest a linear axis hides most of a curve.
_LOG_RATIO = 30.0


def _as_curve(name: str, values: Any) -> np.ndarray:
    """One-dimensional float64 array, or a `ValueError` that names the curve."""
    curve = np.asarray(values, np.float64)
    if curve.ndim != 1 or curve.size == 0:
        raise ValueError(f"curve {name!r} must have shape (n,) with n >= 1, found {curve.shape}.")
    return curve


def _figure(**settings: Any) -> Figure:
    """A figure that pyplot knows nothing of."""
    from matplotlib.figure import Figure

    return Figure(**settings)


def _prepare(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(True, which="major", color="#d9d9d9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _needs_log(curves: Sequence[np.ndarray]) -> bool:
    """Whether all finite values are positive and span more than `_LOG_RATIO`."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    return values.size > 0 and values.min() >= 0 and values.max() > _LOG_RATIO * values.min()


def _draw(axes: Axes, x: np.ndarray, curves: Mapping[str, np.ndarray], log: bool, first: int = 0) -> None:
    """Lines with colour, dash and marker of their own; what a log axis cannot show is marked, not dropped."""
    for i, (name, curve) in enumerate(curves.items(), start=first):
        colour, many = _COLOURS[i % len(_COLOURS)], curve.size > 40
        shown = np.isfinite(curve) & ((curve > 0) | (not log))
        axes.plot(
            x,
            np.where(shown, curve, np.nan),
            color=colour,
            linestyle=_DASHES[i % len(_DASHES)],
            linewidth=1.6,
            marker=None if many else _MARKERS[i % len(_MARKERS)],
            markersize=4,
            label=name,
        )
        # At the edge of the axes: top for NaN and infinity, bottom for what is too small for a log axis.
        for bad, height, marker, meaning in (
            (~np.isfinite(curve), 0.98, "x", "not finite"),
            (np.isfinite(curve) & ~shown, 0.02, "v", "zero or negative"),
        ):
            if np.any(bad):
                axes.plot(
                    x[bad],
                    np.full(np.count_nonzero(bad), height),
                    marker,
                    color=colour,
                    markersize=5,
                    transform=axes.get_xaxis_transform(),
                    label=f"{name}: {meaning}",
                )
    if log:
        axes.set_yscale("log")


def _legend(axes: Axes) -> None:
    # Above the axes, so that it never hides a curve.
    count = len(axes.get_legend_handles_labels()[1])
    if count > 1:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        axes.legend(frameon=False, fontsize=8, ncols=min(count, 3), **place)


def _x_axis(axes: Axes, x: np.ndarray, xlabel: str, log: bool) -> None:
    axes.set_xlabel(xlabel)
    if log:
        axes.set_xscale("log")
    elif np.issubdtype(x.dtype, np.integer):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_convergence(
    curves: History | Mapping[str, Any] | Float[Array, " n"],
    *,
    xlabel: str | None = None,
    ylabel: str = "residual norm",
    title: str | None = None,
    log: bool | None = None,
) -> Figure:
    """Convergence curves: the history of `minimise`, or residual norms of any solvers.

    A history becomes three panels: the outer loss; the norm of the hypergradient with its estimated error;
    the work of each step. Other curves share one panel. Values that are not finite are marked by a cross at the
    upper edge, values that a logarithmic axis cannot show by a triangle at the lower edge.

    Args:
        curves: a `History`; or name -> array of shape (n,), each of its own length; or one array.
        xlabel: label of the horizontal axis; by default "outer step" or "iteration".
        ylabel: label of the vertical axis (with the unit, if there is one), without effect for a history.
        title: title of the figure.
        log: whether the vertical axis is logarithmic; by default where all values are at least 0 and span more
            than a factor of 30. Without effect for a history, which always chooses.

    Returns:
        A figure that belongs to no window: `figure.savefig("picture.png")`, or the last line of a
        notebook cell.

    Raises:
        ValueError: no curve, or one that is not of shape (n,).

    Example:
        ```python
        figure = cx.diagnostics.plot_convergence({"CG": 0.5 ** jnp.arange(20.0), "MINRES": 0.4 ** jnp.arange(15.0)})
        figure.savefig("convergence.png")
        ```
    """
    if isinstance(curves, History):
        return _plot_history(curves, xlabel or "outer step", title)
    named = curves if isinstance(curves, Mapping) else {ylabel: curves}
    if not named:
        raise ValueError("`curves` is empty: there is nothing to plot.")
    arrays = {str(name): _as_curve(str(name), values) for name, values in named.items()}
    figure = _figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _prepare(axes, ylabel)
    log = _needs_log(list(arrays.values())) if log is None else log
    for i, (name, curve) in enumerate(arrays.items()):
        _draw(axes, np.arange(curve.size), {name: curve}, log, first=i)
    _x_axis(axes, np.arange(1), xlabel or "iteration", log=False)
    _legend(axes)
    if title:
        figure.suptitle(title)
    return figure


def _plot_history(history: History, xlabel: str, title: str | None) -> Figure:
    if len(history) == 0:
        raise ValueError("the history has no rows: there is nothing to plot.")
    x = np.arange(len(history))
    field = lambda name: np.asarray(getattr(history, name), np.float64)
    gradients = {"norm of the hypergradient": field("grad_norm")}
    error = field("error_estimate")
    if np.any(np.isfinite(error)):  # all NaN: the estimate was switched off
        gradients["estimated error"] = error
    work = {"curvature products": field("num_matvecs"), "inner steps": field("num_inner_steps")}
    panels = ({"outer loss": field("value")}, gradients, work)
    figure = _figure(figsize=(6.4, 7.2), dpi=150, layout="constrained")
    rows = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    first = 0
    for axes, curves, label in zip(rows, panels, ("outer loss", "hypergradient", "count"), strict=True):
        _prepare(axes, label)
        _draw(axes, x, curves, _needs_log(list(curves.values())), first)
        _legend(axes)
        first += len(curves)
    _x_axis(rows[-1], x, xlabel, log=False)
    if title:
        figure.suptitle(title)
    return figure


def plot_hypergradient_error(
    estimate: Float[Array, " n"],
    true_error: Float[Array, " n"] | None = None,
    *,
    x: Float[Array, " n"] | None = None,
    xlabel: str | None = None,
    request: float | None = None,
    title: str | None = None,
) -> Figure:
    """Estimated error of hypergradients, against the true error where that is known.

    With `true_error` a second panel shows the effectivity, estimate ÷ true error: 1 is perfect, below 0.5 the
    estimate would be an understatement.

    Args:
        estimate: relative error estimates, `hg.stats.relative_error` of n hypergradients.
        true_error: relative errors against the truth, of the same shape.
        x: what varied, for instance the tolerance of the inner solver; by default the index. The axis is
            logarithmic if all are positive and span more than a factor of 30.
        xlabel: label of the horizontal axis.
        request: requested relative accuracy, drawn as a line.
        title: title of the figure.

    Returns:
        A figure that belongs to no window.

    Raises:
        ValueError: shapes that do not agree or are not (n,).

    Example:
        ```python
        tolerance = 10.0 ** -jnp.arange(2, 9)
        figure = cx.diagnostics.plot_hypergradient_error(3 * tolerance, 2.8 * tolerance, x=tolerance)
        figure.savefig("error.png")
        ```
    """
    curves = {"estimated": _as_curve("estimate", estimate)}
    if true_error is not None:
        curves["true"] = _as_curve("true_error", true_error)
    points = np.arange(curves["estimated"].size) if x is None else _as_curve("x", x)
    for name, curve in (*curves.items(), ("x", points)):
        if curve.shape != curves["estimated"].shape:
            raise ValueError(
                f"{name!r} has {curve.size} entries but `estimate` has {curves['estimated'].size}."
            )
    order = np.argsort(points, kind="stable")
    points, curves = points[order], {name: curve[order] for name, curve in curves.items()}
    log_x = x is not None and bool(np.min(points) > 0) and _needs_log([points])
    xlabel = xlabel or ("hypergradient" if x is None else "x")

    figure = _figure(figsize=(6.4, 4.0 if true_error is None else 5.6), dpi=150, layout="constrained")
    if true_error is None:
        upper = lower = figure.add_subplot()
    else:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _prepare(upper, "relative error of the hypergradient")
    _draw(upper, points, curves, _needs_log(list(curves.values())))
    if request is not None:
        upper.axhline(request, color=_GREY, linewidth=1.2, linestyle=":", label=f"requested: {request:.1e}")
    _legend(upper)
    if true_error is not None:
        _draw_effectivity(lower, points, curves)
    _x_axis(lower, points, xlabel, log_x)
    if title:
        figure.suptitle(title)
    return figure


def _draw_effectivity(axes: Axes, x: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    """Estimate ÷ true error, with the line of a perfect estimate and that of an understatement."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = curves["estimated"] / curves["true"]
    _prepare(axes, "estimated ÷ true")
    _draw(axes, x, {"effectivity": ratio}, log=True, first=2)
    axes.axhline(1.0, color=_GREY, linewidth=1.2)
    axes.axhline(0.5, color=_GREY, linewidth=1.2, linestyle=":", label="0.5: understated below")
    finite = ratio[np.isfinite(ratio) & (ratio > 0)]
    low, high = (finite.min(), finite.max()) if finite.size else (1.0, 1.0)
    axes.set_ylim(min(0.3, low / 1.5), max(3.0, high * 1.5))
    if high < 100 * low:  # within two decades plain numbers read better than powers of ten
        from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
