"""Nothing in a picture is cut off, and no axis hides a curve."""

import types

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from curvax.cli import _figures


def outcome(group="l2-per-feature", **fields):
    """As much of a run as a picture needs."""
    data = types.SimpleNamespace(
        task="regression", image_shape=None, inputs=[f"name {i} " + "x" * 40 + "$_{" for i in range(60)]
    )
    return types.SimpleNamespace(plan=types.SimpleNamespace(data=data), phi={group: 0}, **fields)


def drawn(figure):
    """The figure after its layout; everything visible lies on the page."""
    FigureCanvasAgg(figure).draw()
    page, tight = figure.bbox, figure.get_tightbbox()
    assert tight.x0 >= -0.02
    assert tight.y0 >= -0.02
    assert figure.dpi * tight.x1 <= page.x1 + 2
    assert figure.dpi * tight.y1 <= page.y1 + 2
    return figure


@pytest.mark.parametrize("errors", [[1e-3, 0.0, 1e-30], [1e-3, 1e-9, 1e-5]])
def test_the_error_of_a_hypergradient_stays_on_its_axis(errors):
    history = {"value": np.ones(3), "grad_norm": np.full(3, 0.1), "error_estimate": np.array(errors)}
    figure = drawn(_figures._curves(outcome(history=history, stopping=np.ones(3), step=2)))
    axes = figure.axes[1]
    for line in axes.get_lines():
        values = line.get_ydata()
        assert np.all(values >= axes.get_ylim()[0])
        assert np.all(values <= axes.get_ylim()[1])


@pytest.mark.parametrize(
    "penalties",
    [np.geomspace(1e-5, 50, 60), np.geomspace(0.0199, 0.0201, 60), np.geomspace(0.02, 0.5, 3)],
)
@pytest.mark.parametrize("group", ["l2-per-feature", "l2-per-weight"])
def test_every_penalty_is_on_the_axis_and_named(group, penalties):
    with matplotlib.rc_context({**_figures._STYLE, "text.parse_math": False}):
        axes = drawn(_figures._penalties(outcome(group), penalties)).axes[0]
        title, legend = axes._left_title.get_window_extent(), axes.get_legend().get_window_extent()
    assert title.x1 < legend.x0
    low, high = axes.get_xlim()
    assert low < penalties.min() < penalties.max() < high
    assert np.sum((axes.get_xticks() > low) & (axes.get_xticks() < high)) >= 2
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(names)) == len(names) == min(len(penalties), 25)
    assert len(penalties) == 3 or "(36 inputs between)" in names
