"""What the picture of a spectrum contains."""

import io

import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import matplotlib
import numpy as np
import pytest

from curvax.diagnostics._spectral_density import spectrum
from curvax.diagnostics._spectrum_picture import plot_spectrum

VALUES = np.concatenate([np.linspace(-0.5, 1.0, 195), [3.0, 4.0, 6.0, 8.0, 9.0]])


@pytest.fixture(scope="module")
def found():
    """A bulk across zero with outliers, by Lanczos steps."""
    return spectrum(lx.DiagonalLinearOperator(jnp.asarray(VALUES)), key=jr.key(0), num_steps=30, dense_size=0)


@pytest.fixture(scope="module")
def exact():
    """The same from all eigenvalues."""
    return spectrum(lx.DiagonalLinearOperator(jnp.asarray(VALUES)), key=jr.key(0))


def png(figure):
    """The figure as bytes, which runs the whole renderer (warnings are errors)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curves(axes):
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def legend(figure):
    boxes = [axes.get_legend() for axes in figure.axes] + figure.legends
    return [text.get_text() for box in boxes if box is not None for text in box.get_texts()]


def test_bulk_and_outliers_on_a_log_axis(found):
    figure = plot_spectrum(found, title="Hessian")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and "kernel width" in axes.get_xlabel()
    drawn = curves(axes)
    assert np.all(drawn["negative eigenvalues"].get_xdata() <= 0)
    assert np.all(drawn["positive eigenvalues"].get_xdata() >= 0)
    assert {"± 2 standard errors", "a single eigenvalue", "extremes −0.5 and 9"} <= set(legend(figure))
    assert png(figure).startswith(b"\x89PNG")


def test_area_is_the_number_of_eigenvalues(exact):
    figure = plot_spectrum(exact, log=False)
    area = sum(
        np.trapezoid(line.get_ydata(), line.get_xdata())
        for name, line in curves(figure.axes[0]).items()
        if "eigenvalues" in name
    )
    assert area == pytest.approx(200, rel=0.02)
    assert "± 2 standard errors" not in legend(figure)  # nothing is random
    png(figure)


def test_one_sided_bulk_stays_linear():
    operator = lx.DiagonalLinearOperator(jnp.linspace(1.0, 5.0, 200))
    figure = plot_spectrum(spectrum(operator, key=jr.key(0)))
    assert figure.axes[0].get_yscale() == "linear" and "negative eigenvalues" not in legend(figure)
    png(figure)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_no_eigenvalues_are_drawn_on_the_side_where_none_are(sign):
    """The kernel is wider than the distance of the spectrum from zero; the area is the number of eigenvalues still."""
    operator = lx.DiagonalLinearOperator(sign * jnp.geomspace(1e-4, 1.0, 60))
    axes = plot_spectrum(spectrum(operator, key=jr.key(0)), kernel_width=0.1, log=False).axes[0]
    (label, curve), *rest = [pair for pair in curves(axes).items() if "eigenvalues" in pair[0]]
    assert label == ("positive eigenvalues" if sign > 0 else "negative eigenvalues") and not rest
    assert np.all(sign * curve.get_xdata() >= 0)
    np.testing.assert_allclose(np.trapezoid(curve.get_ydata(), curve.get_xdata()), 60, rtol=1e-2)


def test_orders_of_magnitude(exact):
    """Two panels, each with its number of eigenvalues; exact zeros are told and not drawn."""
    values = np.concatenate([np.zeros(10), -np.geomspace(1e-4, 1e-2, 30), np.geomspace(1e-3, 10.0, 60)])
    all_known = spectrum(lx.DiagonalLinearOperator(jnp.asarray(values)), key=jr.key(0))
    figure = plot_spectrum(all_known, eigenvalues="log", log=False)
    left, right = figure.axes
    for axes, number in ((left, 30), (right, 60)):
        (line,) = curves(axes).values()
        assert np.trapezoid(line.get_ydata(), np.log10(line.get_xdata())) == pytest.approx(number, rel=0.02)
        assert axes.get_xscale() == "log"
    assert left.xaxis_inverted() and "about 10 within rounding" in figure.get_supxlabel()
    png(figure)
    assert len(plot_spectrum(exact, eigenvalues="log").axes) == 2


def test_unresolved_magnitudes_are_shaded(found):
    figure = plot_spectrum(found, eigenvalues="log")
    assert "not resolved by the steps" in legend(figure)
    png(figure)


def test_too_fine_a_kernel_is_told(found):
    assert "wrong by up to" in plot_spectrum(found, kernel_width=0.02).axes[0].get_xlabel()
    assert "wrong by up to" not in plot_spectrum(found).axes[0].get_xlabel()


def test_degenerate_spectra():
    zero = spectrum(lx.DiagonalLinearOperator(jnp.zeros(3)), key=jr.key(0))
    png(plot_spectrum(zero))
    with pytest.raises(ValueError, match="zero to rounding"):
        plot_spectrum(zero, eigenvalues="log")
    one = spectrum(lx.DiagonalLinearOperator(jnp.full(1, 2.0)), key=jr.key(0))
    png(plot_spectrum(one))
    png(plot_spectrum(one, eigenvalues="log"))


def test_wrong_use_and_no_global_state(exact):
    before = dict(matplotlib.rcParams)
    with pytest.raises(ValueError, match="eigenvalues"):
        plot_spectrum(exact, eigenvalues="cubic")
    for scale in ("linear", "log"):
        with pytest.raises(ValueError, match="kernel_width"):
            plot_spectrum(exact, eigenvalues=scale, kernel_width=0.0)
    with pytest.raises(ValueError, match="batch"):
        plot_spectrum(jax.tree.map(lambda x: jnp.stack([x, x]), exact))
    plot_spectrum(exact)
    assert dict(matplotlib.rcParams) == before
