"""What the pictures contain, and that they leave Matplotlib as it was."""

import io

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

from curvax.bilevel._history import History
from curvax.diagnostics._pictures import plot_convergence, plot_hypergradient_error


def history(rows=30, error=True):
    """A plausible run."""
    i = np.arange(rows)
    norm = 2.0 * 0.8**i
    return History(
        value=0.3 + np.exp(-0.2 * i),
        grad_norm=norm,
        error_estimate=1e-3 * norm if error else np.full(rows, np.nan),
        relative_error=np.full(rows, 1e-3 if error else np.nan),
        num_matvecs=20 + i % 7,
        num_inner_steps=12 + i % 3,
        step_scale=np.ones(rows),
        num_retries=np.zeros(rows, int),
    )


def png(figure):
    """The figure as bytes, which runs the whole renderer (warnings are errors)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def labels(axes):
    return [line.get_label() for line in axes.lines]


def test_curves_of_different_lengths_share_a_log_axis():
    figure = plot_convergence(
        {"CG": 0.5 ** jnp.arange(30.0), "MINRES": 0.3 ** jnp.arange(12.0)}, title="Residuals"
    )
    (axes,) = figure.axes
    assert (
        axes.get_yscale() == "log"
        and axes.get_ylabel() == "residual norm"
        and axes.get_xlabel() == "iteration"
    )
    assert labels(axes) == ["CG", "MINRES"] and len(axes.lines[1].get_ydata()) == 12
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 2
    assert png(figure).startswith(b"\x89PNG")


def test_narrow_or_negative_curves_stay_linear():
    assert plot_convergence(jnp.array([1.0, 2.0, 3.0])).axes[0].get_yscale() == "linear"
    assert plot_convergence(jnp.array([-1.0, 200.0])).axes[0].get_yscale() == "linear"
    assert plot_convergence(jnp.array([1.0, 2.0]), log=True).axes[0].get_yscale() == "log"


def test_what_cannot_be_shown_is_marked():
    figure = plot_convergence({"r": np.array([1.0, np.nan, 1e-8, 0.0])}, log=True)
    assert labels(figure.axes[0]) == ["r", "r: not finite", "r: zero or negative"]
    png(figure)


def test_history_has_three_panels():
    figure = plot_convergence(history())
    loss, gradient, work = figure.axes
    assert gradient.get_yscale() == "log" and labels(gradient)[1] == "estimated error"
    assert labels(work) == ["curvature products", "inner steps"] and work.get_xlabel() == "outer step"
    assert np.array_equal(loss.lines[0].get_ydata(), history().value)
    assert len(plot_convergence(history(error=False)).axes[1].lines) == 1
    png(figure)


def test_error_picture():
    tolerance = 10.0 ** -np.arange(2.0, 9.0)
    figure = plot_hypergradient_error(
        3 * tolerance, 2 * tolerance, x=tolerance, xlabel="tolerance", request=1e-4
    )
    upper, lower = figure.axes
    assert upper.get_xscale() == "log" and lower.get_xlabel() == "tolerance"
    assert np.all(np.diff(upper.lines[0].get_xdata()) > 0)
    np.testing.assert_allclose(lower.lines[0].get_ydata(), 1.5)
    assert "requested: 1.0e-04" in labels(upper)
    png(figure)
    assert len(plot_hypergradient_error(tolerance).axes) == 1


def test_wrong_input():
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_convergence({})
    with pytest.raises(ValueError, match=r"'r' must have shape"):
        plot_convergence({"r": np.ones((2, 2))})
    with pytest.raises(ValueError, match="no rows"):
        plot_convergence(history(0))
    with pytest.raises(ValueError, match="3 entries"):
        plot_hypergradient_error(np.ones(2), np.ones(3))


def test_no_global_state():
    before = dict(matplotlib.rcParams)
    plot_convergence(history())
    assert dict(matplotlib.rcParams) == before
