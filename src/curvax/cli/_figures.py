"""The pictures of a report, as PNG. Text from the user's file is never read as mathematics or markup."""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from curvax.cli._result import Outcome
from curvax.cli._text import printable

INK, MUTED, LINE = "#1f2937", "#6b7280", "#e5e7eb"
# Told apart by the colour-blind and in grey.
BLUE, RED, GREEN, PALE = "#2b6cb0", "#d9480f", "#2f855a", "#bcd3ea"
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.9,
}
_DPI = 160
_MAX_BARS = 24


def draw(outcome: Outcome, result: dict[str, Any]) -> dict[str, bytes]:
    """All pictures that a run calls for.

    Args:
        outcome: The run.
        result: Content of `result.json`.

    Returns:
        Name without suffix to PNG: `curves`, and as it applies `weights`, `lowest_weights`, `penalties`, `overview`.
    """
    pictures = {}
    weights, by_input = outcome.weights(), outcome.input_penalties()
    shape, examples = outcome.plan.data.image_shape, result["lowest_weights"]
    with matplotlib.rc_context(_STYLE):
        pictures["curves"] = _png(_curves(outcome))
        if outcome.step == 0:
            return pictures  # nothing was learned
        if weights is not None:
            figure = _figure(6.6, 2.9)
            _histogram(figure.subplots(), weights, outcome.plan.data.corrupted)
            pictures["weights"] = _png(figure)
        if examples and shape is not None:
            figure = _figure(8.2, 5.2)
            _gallery(figure, examples, outcome, 4, 8)
            pictures["lowest_weights"] = _png(figure)
        if by_input is not None:
            # The only picture with text from a user's file: `$` in a name is no formula.
            with matplotlib.rc_context({"text.parse_math": False}):
                pictures["penalties"] = _png(_penalties(outcome, by_input))
        if weights is not None and shape is not None:
            pictures["overview"] = _png(_overview(outcome, result, weights))
    return pictures


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that Matplotlib's font lacks is drawn as boxes; the HTML shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # No version, no date: the same run gives the same bytes.
        figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def _grid(axes: Axes, axis: Any = "y") -> None:
    axes.grid(True, axis=axis, color=LINE, linewidth=0.8)
    axes.tick_params(length=0)


def _curves(outcome: Outcome) -> Figure:
    history = outcome.history
    steps = np.arange(len(history["value"]))
    figure = _figure(8.2, 2.9)
    left, right = figure.subplots(1, 2)
    stopping, chosen = outcome.stopping, outcome.step
    left.plot(steps, history["value"], color=BLUE, label="seen by the hypergradient")
    left.plot(np.arange(len(stopping)), stopping, color=GREEN, linestyle=(0, (4, 1.5)), label="not seen")
    left.plot(
        chosen, stopping[chosen], "o", color=GREEN, markersize=7, markeredgecolor="white", label="chosen step"
    )
    left.set_title("Validation loss")
    left.set_ylim(bottom=0 if history["value"].min() > 0 else None)
    left.legend(loc="best", fontsize=8.5)
    norm, error = history["grad_norm"], history["error_estimate"]
    right.plot(steps, norm, color=BLUE, label="length of the hypergradient")
    right.plot(steps, error, color=RED, linestyle=(0, (4, 2)), label="its estimated error")
    if np.all(norm > 0):
        right.set_yscale("log")
        shown = error[np.isfinite(error) & (error > 0)]
        if shown.size and shown.min() < 1e-6 * norm.max():
            right.set_ylim(bottom=max(float(shown.min()), 1e-12 * float(norm.max())))
    right.set_title("Hypergradient")
    right.legend(loc="best", fontsize=8.5)
    for axes in (left, right):
        axes.set_xlabel("outer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-0.4, max(1, len(steps) - 1) + 0.4)
        _grid(axes)
    return figure


def _histogram(axes: Axes, weights: np.ndarray, corrupted: np.ndarray | None) -> None:
    edges = np.linspace(0, max(weights.max(), 1e-9) * 1.0001, 41)
    if corrupted is None:
        axes.hist(weights, edges, color=BLUE)
    else:
        parts = [weights[corrupted], weights[~corrupted]]
        axes.hist(parts, edges, stacked=True, color=[RED, BLUE], label=["label wrong", "label right"])
        axes.legend(loc="upper center", fontsize=9)
    axes.set_title("Learned weight of each training example")
    axes.set_xlabel("weight (mean 1)")
    axes.set_ylabel("examples")
    axes.set_xlim(0, edges[-1])
    _grid(axes)


def _gallery(figure: Any, examples: list[dict[str, Any]], outcome: Outcome, rows: int, columns: int) -> None:
    """Images with the lowest weights: label as given, and what the tuned model sees."""
    data = outcome.plan.data
    panels = figure.subplots(rows, columns).ravel()
    for axes in panels:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=LINE)
    for axes in panels[len(examples) :]:
        axes.set_axis_off()
    for axes, example in zip(panels, examples, strict=False):
        image = data.x[data.train[example["index"]]].reshape(data.image_shape)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        agrees = example["given"] == example["predicted"]
        colour = RED if example["wrong"] else INK
        axes.set_title(
            f"{printable(example['given'], 8)} → {printable(example['predicted'], 8)}",
            color=colour,
            fontsize=10,
            fontweight="normal" if agrees else "bold",
            loc="center",
            pad=3,
        )


def _penalties(outcome: Outcome, penalties: np.ndarray) -> Figure:
    data, values = outcome.plan.data, np.log10(penalties)
    if data.image_shape is not None:
        figure = _figure(4.4, 3.3)
        axes = figure.subplots()
        picture = axes.imshow(values.reshape(data.image_shape), cmap="YlGnBu_r", interpolation="nearest")
        axes.set_title("L2 penalty of each pixel")
        axes.set_xticks([])
        axes.set_yticks([])
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, label="log10 of the penalty")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure
    order = np.argsort(values, kind="stable")
    if len(order) > _MAX_BARS:
        order = np.concatenate([order[: _MAX_BARS // 2], order[-_MAX_BARS // 2 :]])
    order = order[::-1]
    figure = _figure(7.2, 1.1 + 0.24 * len(order))
    axes = figure.subplots()
    low = values.min() - 0.25
    axes.barh(np.arange(len(order)), values[order] - low, left=low, color=BLUE, height=0.62)
    axes.set_yticks(np.arange(len(order)), [printable(data.inputs[i], 34) for i in order], fontsize=8.5)
    axes.set_title(
        "L2 penalty of each input" + (" (smallest and largest)" if len(values) > _MAX_BARS else "")
    )
    axes.set_xlabel("log10 of the penalty (short: free to be used)")
    axes.margins(y=0.01)
    _grid(axes, "x")
    return figure


def _overview(outcome: Outcome, result: dict[str, Any], weights: np.ndarray) -> Figure:
    """One picture that tells the story: the errors, the weights, the examples."""
    figure = _figure(10.4, 4.0)
    left, right = figure.subfigures(1, 2, width_ratios=[1.12, 1.0])
    bars, histogram = left.subplots(2, 1, height_ratios=[0.72, 1.0])
    names = {"untuned": "untuned", "grid": "grid search", "tuned": "tuned"}
    rows = {row["key"]: row["test"] for row in result["methods"]}
    errors = [100 * (1 - rows[key]["accuracy"]) for key in names]
    spread = [100 * rows[key]["standard_error"] for key in names]
    places = np.arange(len(names))
    bars.barh(places, errors, color=[PALE, PALE, BLUE], height=0.62)
    bars.errorbar(errors, places, xerr=spread, fmt="none", ecolor=MUTED, elinewidth=1, capsize=2.5)
    for place, error, width in zip(places, errors, spread, strict=True):
        bars.text(error + width + 0.02 * max(errors), place, f"{error:.1f} %", va="center", fontsize=9.5)
    bars.set_yticks(places, list(names.values()))
    bars.invert_yaxis()
    bars.set_xlim(0, 1.2 * (max(errors) + max(spread)))
    bars.set_xticks([])
    bars.spines["bottom"].set_visible(False)
    bars.tick_params(length=0)
    bars.set_title("Test error")
    _histogram(histogram, weights, outcome.plan.data.corrupted)
    right.suptitle("Lowest weights: label given → label read", fontsize=10.5, fontweight="bold")
    _gallery(right, result["lowest_weights"], outcome, 4, 6)
    return figure
