"""The pictures of a report, as PNG. Text from the user's file is never read as mathematics or markup."""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from curvax.cli._hyperparameters import START_PENALTY
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
_MAX_INPUTS, _MAX_NAME = 24, 34


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
            figure = _figure(8.2, 5.5)
            figure.suptitle(_gallery_title(outcome), fontsize=10.5, fontweight="bold")
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
    left.plot(steps, history["value"], color=BLUE, label="rows that the hypergradient sees")
    left.plot(
        np.arange(len(stopping)),
        stopping,
        color=GREEN,
        linestyle=(0, (4, 1.5)),
        label="rows kept for stopping",
    )
    marker = {"markersize": 7, "markeredgecolor": "white", "clip_on": False, "zorder": 3}
    left.plot(chosen, stopping[chosen], "o", color=GREEN, label=f"chosen: step {chosen:,}", **marker)
    left.set_title("Validation loss")
    is_class = outcome.plan.data.task == "classification"
    left.set_ylabel(
        "mean cross entropy" if is_class else "half mean squared error\n(target scaled to deviation 1)"
    )
    left.set_ylim(bottom=0 if history["value"].min() > 0 else None)
    left.legend(loc="best", fontsize=8.5)
    norm, error = history["grad_norm"], history["error_estimate"]
    # An estimate may say less than rounding, even 0, which a logarithmic axis cannot show.
    error = np.maximum(error, np.finfo(error.dtype).eps * norm)
    right.plot(steps, norm, color=BLUE, label="length of the hypergradient")
    right.plot(steps, error, color=RED, linestyle=(0, (4, 2)), label="its estimated error")
    if np.all(norm > 0):
        right.set_yscale("log")
    right.set_title("Hypergradient")
    right.set_ylabel("Euclidean norm")
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
        axes.legend(loc="best", fontsize=9)
    axes.set_title("Learned weight of each training example")
    axes.set_xlabel("weight (mean 1)")
    axes.set_ylabel("examples")
    axes.set_xlim(0, edges[-1])
    _grid(axes)


def _gallery_title(outcome: Outcome) -> str:
    wrong = "" if outcome.plan.data.corrupted is None else " (red: made wrong)"
    return f"Lowest weights: label given → read{wrong}"


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
    """A map of the pixels, or a line for each input, from where all of them start to its own penalty."""
    data = outcome.plan.data
    label = "penalty, logarithmic"
    if "l2-per-weight" in outcome.phi:
        label = "geometric mean of the penalties, logarithmic"
    # At least a factor of two around the start, so that small changes look small.
    low, high = min(penalties.min(), START_PENALTY / 2), max(penalties.max(), 2 * START_PENALTY)
    if data.image_shape is not None:
        figure = _figure(5.0, 3.5)
        axes = figure.subplots()
        picture = axes.imshow(
            penalties.reshape(data.image_shape),
            cmap="YlGnBu_r",
            norm=LogNorm(low, high),
            interpolation="nearest",
        )
        axes.set_title("L2 penalty of each pixel")
        axes.set(xticks=[], yticks=[])
        axes.spines[["left", "bottom"]].set_visible(False)
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, label=label)
        _log_ticks(bar.ax.yaxis, low, high)
        bar.ax.axhline(START_PENALTY, color=RED, linewidth=2)
        bar.ax.text(-0.4, START_PENALTY, "start", color=RED, ha="right", va="center", fontsize=8.5)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure
    order: list[int | None] = np.argsort(-penalties, kind="stable").tolist()
    if len(order) > _MAX_INPUTS:
        order = [*order[: _MAX_INPUTS // 2], None, *order[-_MAX_INPUTS // 2 :]]
    figure = _figure(7.2, 1.3 + 0.24 * len(order))
    axes = figure.subplots()
    axes.axvline(START_PENALTY, color=MUTED, linewidth=1.2, label=f"start of all: {START_PENALTY:g}")
    places = [place for place, i in enumerate(order) if i is not None]
    shown = penalties[[i for i in order if i is not None]]
    axes.hlines(places, START_PENALTY, shown, color=PALE, linewidth=2.5)
    axes.plot(shown, places, "o", color=BLUE, markersize=6)
    between = f"({len(penalties) - _MAX_INPUTS:,} inputs between)"
    names = [between if i is None else _shortened(data.inputs[i]) for i in order]
    axes.set_yticks(np.arange(len(order)), names, fontsize=8.5)
    axes.set_xscale("log")
    axes.set_xlim(low / 1.4, high * 1.4)
    axes.set_ylim(-0.7, len(order) - 0.3)
    _log_ticks(axes.xaxis, low, high)
    axes.set_title("L2 penalty of each input")
    axes.set_xlabel(f"{label}\n(lower: the input is used more freely)")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, fontsize=8.5)
    _grid(axes, "x")
    return figure


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers (mathematics is switched off here), more of them than powers of ten where these are few."""
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 2000 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _shortened(name: str) -> str:
    """A name that keeps its end: "column = level" differs there."""
    text = printable(name, len(name))
    half = _MAX_NAME // 2
    return text if len(text) <= _MAX_NAME else f"{text[:half]}…{text[1 - half :]}"


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
    bars.set_xlim(0, 1.2 * (max(errors) + max(spread)) or 1.0)
    bars.set_xticks([])
    bars.spines["bottom"].set_visible(False)
    bars.tick_params(length=0)
    bars.set_title("Test error (± one standard error)")
    _histogram(histogram, weights, outcome.plan.data.corrupted)
    right.suptitle(_gallery_title(outcome), fontsize=10.5, fontweight="bold")
    _gallery(right, result["lowest_weights"], outcome, 4, 6)
    return figure
