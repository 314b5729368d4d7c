"""The picture of linear solvers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lineax as lx
import numpy as np
from jaxtyping import Array, PyTree

from curvax.diagnostics._pictures import _COLOURS, _DASHES, _GREY, _MARKERS, _figure, _prepare, _x_axis
from curvax.diagnostics._solver_histories import SolverHistory, solver_histories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# With more points than this, markers hide the curve.
_MOST_MARKERS = 40


def plot_solvers(
    operator: lx.AbstractLinearOperator | Mapping[str, SolverHistory],
    vector: PyTree[Array] | None = None,
    solvers: Mapping[str, Any] | None = None,
    *,
    max_products: int = 200,
    tolerance: float | None = None,
    title: str | None = None,
) -> Figure:
    """True relative residual ‖b − Ax‖ / ‖b‖ against products with A, by solver.

    A filled marker ends the curve of a solver that reported success, a cross that of one that did not. Residuals
    that are not finite stand as crosses at the upper edge, exact zeros as triangles at the lower one.

    Args:
        operator: A, to be solved with here (`solver_histories`: at its cost); or what `solver_histories` returned.
        vector: b, with an operator.
        solvers: name -> Lineax solver, or -> (solver, options), with an operator.
        max_products: As of `solver_histories`.
        tolerance: Relative residual that was wanted, drawn as a line.
        title: Title of the figure.

    Returns:
        A figure that belongs to no window: `figure.savefig("solvers.png")`.

    Raises:
        TypeError: `vector` or `solvers` is missing or superfluous.
        ValueError: There is no history, or as of `solver_histories`.

    Example:
        ```python
        matrix = jnp.diag(jnp.linspace(1.0, 100.0, 50))
        operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
        solvers = {"CG": lx.CG(rtol=1e-5, atol=0.0), "MINRES": cx.linear.MINRES(rtol=1e-5)}
        figure = cx.diagnostics.plot_solvers(operator, jnp.ones(50), solvers, tolerance=1e-5)
        figure.savefig("solvers.png")
        ```
    """
    if isinstance(operator, Mapping) and vector is None and solvers is None:
        histories = dict(operator)
    elif not isinstance(operator, Mapping) and vector is not None and solvers is not None:
        histories = solver_histories(operator, vector, solvers, max_products=max_products)
    else:
        raise TypeError(
            "pass either an operator, a `vector` and `solvers`, or the histories that `solver_histories` returned."
        )
    if not histories:
        raise ValueError("there is no history: nothing to plot.")

    figure = _figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _prepare(axes, "relative residual ‖b − Ax‖ / ‖b‖")
    axes.set_yscale("log")
    for index, (name, history) in enumerate(histories.items()):
        _draw_history(axes, index, name, history)
    if tolerance is not None:
        axes.axhline(tolerance, color=_GREY, linewidth=1.2, linestyle=":", label=f"tolerance {tolerance:.0e}")
    _x_axis(axes, np.arange(1), "products with A", log=False)
    axes.set_xlim(left=0)
    handles = axes.get_legend_handles_labels()[0]
    columns = 2 if len(handles) > 3 else 1
    axes.legend(
        frameon=False,
        fontsize=8,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.2,
    )
    if title:
        figure.suptitle(title)
    return figure


def _draw_history(axes: Axes, index: int, name: str, history: SolverHistory) -> None:
    x, y = np.asarray(history.products, float), np.asarray(history.residuals, float)
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    shown = np.isfinite(y) & (y > 0)
    end = f"{int(x[-1])} products" if history.converged else f"gave up after {int(x[-1])} products"
    axes.plot(
        x,
        np.where(shown, y, np.nan),
        color=colour,
        linestyle=_DASHES[index % len(_DASHES)],
        linewidth=1.6,
        marker=marker if x.size <= _MOST_MARKERS else None,
        markersize=3.5,
        label=f"{name}: {end}",
    )
    if shown[-1]:
        last = {"marker": marker, "markersize": 8} if history.converged else {"marker": "X", "markersize": 9}
        axes.plot(x[-1:], y[-1:], color=colour, linestyle="none", clip_on=False, zorder=4, **last)
    for bad, height, sign in ((~np.isfinite(y), 0.98, "x"), (np.isfinite(y) & (y <= 0), 0.02, "v")):
        if np.any(bad):
            at = np.full(np.count_nonzero(bad), height)
            axes.plot(
                x[bad],
                at,
                sign,
                color=colour,
                markersize=6,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
