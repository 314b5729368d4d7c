"""What `spectrum` returns: estimates with error bars, the density of the eigenvalues, a table."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Scalar

from curvax.diagnostics._quadrature import Estimate, kernel_truncation, smooth
from curvax.linear._quadrature import Rule

_GRID = 512
# Kernel width as a fraction of the range, times the number of steps: their truncation error is then below 0.1 %.
_RESOLVED = 1.25
_TAILS = 4.0


class Density(eqx.Module):
    """Eigenvalue density on a grid, smoothed by a Gaussian kernel; it integrates to 1.

    Attributes:
        points: (g,), where.
        values: (g,), fraction of the eigenvalues per unit of eigenvalue.
        standard_error: (g,), of `values` over the probes.
        truncation: Bound on the error of `values`, at every point, of having taken so few Lanczos steps.
        kernel_width: Standard deviation of the kernel: nothing finer is seen.
    """

    points: Float[Array, " g"]
    values: Float[Array, " g"]
    standard_error: Float[Array, " g"]
    truncation: Float[Array, ""]
    kernel_width: Float[Array, ""]


class Spectrum(eqx.Module):
    """What `spectrum` found of a symmetric operator H of size n; `print` shows it as a table.

    Attributes:
        smallest: Smallest eigenvalue of H, an `Estimate` like the next seven. A Ritz value: the true one is not above
            it, and some eigenvalue lies within its `truncation`.
        largest: Largest eigenvalue of H; the true one is not below it.
        condition: λmax / λmin of H + damping · I; the true one is not below it. Infinite where λmin is at rounding
            level, NaN where it is negative.
        trace: tr H.
        num_negative: Number of eigenvalues below zero by more than rounding. Its `truncation` counts those so close to
            zero that the steps do not tell their sign.
        inverse_trace: tr (H + damping · I)⁻¹; NaN, like the next two, unless H + damping · I is positive definite.
        log_determinant: log det (H + damping · I).
        effective_dimension: tr H (H + damping · I)⁻¹; n without damping.
        damping: The damping.
        nodes: (p, m), Ritz values of each probe, ascending; all eigenvalues, and p = 1, where `exact`.
        residuals: (p, m), some eigenvalue lies within this distance of the node.
        weights: (p, m), the fraction of the eigenvalues that each node stands for. A row sums to 1.
        asymmetry: Of the products, relative to their size; at rounding level, or `spectrum` raises.
        size: n.
        num_steps: Lanczos steps asked for.
        num_matvecs: Products with H.
        exact: Whether the matrix was written out: all is exact to rounding.
    """

    smallest: Estimate
    largest: Estimate
    condition: Estimate
    trace: Estimate
    num_negative: Estimate
    inverse_trace: Estimate
    log_determinant: Estimate
    effective_dimension: Estimate
    damping: Float[Array, ""]
    nodes: Float[Array, "p m"]
    residuals: Float[Array, "p m"]
    weights: Float[Array, "p m"]
    asymmetry: Float[Array, ""]
    size: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    num_matvecs: int = eqx.field(static=True)
    exact: bool = eqx.field(static=True)

    def density(
        self, points: Float[Array, " g"] | None = None, *, kernel_width: Scalar | float | None = None
    ) -> Density:
        """The density of the eigenvalues on any grid and with any Gaussian kernel. No product is made.

        Args:
            points: Grid; by default 512 points that cover the spectrum and four kernel widths more on each side.
            kernel_width: Standard deviation of the kernel, in the unit of the eigenvalues; by default 1.25 / m of the
                range of the spectrum for m Lanczos steps, which they resolve. `truncation` grows fast below it.

        Returns:
            A `Density`.

        Raises:
            ValueError: `points` has not one dimension, or `kernel_width` is not positive.

        Example:
            ```python
            operator = lx.DiagonalLinearOperator(jnp.linspace(1.0, 2.0, 100))
            found = cx.diagnostics.spectrum(operator, key=jax.random.key(0))
            found.density(jnp.array([1.5]), kernel_width=0.1).values  # [1.0]
            ```
        """
        if isinstance(kernel_width, int | float) and not kernel_width > 0:
            raise ValueError(f"`kernel_width` must be positive, found {kernel_width}.")
        if points is not None and jnp.ndim(points) != 1:
            raise ValueError(f"`points` must have shape (g,), found {jnp.shape(points)}.")
        dtype = self.nodes.dtype
        width = None if kernel_width is None else jnp.asarray(kernel_width, dtype)
        return _density(self, None if points is None else jnp.asarray(points, dtype), width)

    def __str__(self) -> str:
        """A table in plain text."""
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(self))
        return repr(self) if traced else _table(self)


@eqx.filter_jit
def _density(found: Spectrum, points: Array | None, width: Array | None) -> Density:
    low = found.smallest.value - found.smallest.truncation
    high = found.largest.value + found.largest.truncation
    if width is None:
        size = jnp.maximum(jnp.abs(high), jnp.abs(low))
        # A single value, however often it occurs, is shown at a scale of its own.
        extent = jnp.where(high - low > 1e-3 * size, high - low, jnp.where(size > 0, size, 1))
        width = _RESOLVED * extent / found.num_steps
    if points is None:
        low, high = low - _TAILS * width, high + _TAILS * width
        points = low + (high - low) * jnp.linspace(0, 1, _GRID, dtype=width.dtype)
    rule = Rule(found.nodes, found.weights**0.5, found.residuals)
    values, error = smooth(rule, points, width, jnp.asarray(found.size, width.dtype))
    half_range = (found.largest.value - found.smallest.value) / 2
    half_range = half_range + found.largest.truncation + found.smallest.truncation
    bound = kernel_truncation(half_range, width, found.nodes.shape[1])
    return Density(points, values, error, jnp.zeros_like(bound) if found.exact else bound, width)


_ROWS = (
    ("smallest eigenvalue", "smallest"),
    ("largest eigenvalue", "largest"),
    ("trace", "trace"),
    ("eigenvalues below zero", "num_negative"),
    ("condition number", "condition"),
    ("trace of the inverse", "inverse_trace"),
    ("log-determinant", "log_determinant"),
    ("effective dimension", "effective_dimension"),
)
_DAMPED = ("condition", "inverse_trace", "log_determinant", "effective_dimension")


def _table(found: Spectrum) -> str:
    if found.nodes.ndim != 2:
        return f"{found.nodes.shape[:-2]} spectra of size {found.size} (a batch: take one out to print it)"
    damping = float(found.damping)
    probes, steps = found.nodes.shape
    how = (
        f"written out by {found.num_matvecs} products: exact to rounding"
        if found.exact
        else f"{probes} probes × {steps} Lanczos steps: {found.num_matvecs} products"
    )
    lines = [
        f"Spectrum of a symmetric operator of size {found.size}",
        f"{how}; damping {damping:.3g}" if damping else how,
        "",
        f"{'':<32}{'estimate':>14}{'standard error':>17}{'truncation':>13}",
    ]
    for label, name in _ROWS:
        item = getattr(found, name)
        value, error, truncation = map(float, (item.value, item.standard_error, item.truncation))
        label += ", damped" if damping and name in _DAMPED else ""
        if value != value:
            lines.append(f"{label:<32}{'not defined':>14}")
        else:
            shown = [f"{x:.1e}" if x else "–" for x in (error, truncation)]
            lines.append(f"{label:<32}{value:>14.6g}{shown[0]:>17}{shown[1]:>13}")
    if float(found.inverse_trace.value) != float(found.inverse_trace.value):
        least = float(found.smallest.value)
        remedy = f"raise `damping` above {-least:.3g}" if least < 0 else "add `damping`"
        lines.append(f"Not defined: the operator is not positive definite to working precision; {remedy}.")
    return "\n".join(lines)
