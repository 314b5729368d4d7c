"""The outcome of a gradient check: rows, verdicts, and how they are printed."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed

Verdict = Literal["agrees", "negligible", "disagrees", "unclear", "not finite"]
_STYLE = {
    "agrees": "green",
    "negligible": "green",
    "disagrees": "bold red",
    "unclear": "yellow",
    "not finite": "bold red",
}


@dataclass(frozen=True)
class Comparison:
    """One derivative against its finite difference.

    Attributes:
        claimed: The derivative that the library or autodiff gives.
        difference: The finite difference.
        uncertainty: Of the finite difference: truncation plus two standard deviations of the noise.
        tolerance: Distance up to which the two count as equal.
        step: Step of the finite difference.
        verdict: `"agrees"`; `"disagrees"`; `"negligible"` (the difference cannot be told from zero, and neither
            can the claim, at a size that does not matter beside the other derivatives); `"unclear"` (equal, but
            only because the tolerance is as large as what is compared); `"not finite"` (the claim is not).
    """

    claimed: float
    difference: float
    uncertainty: float
    tolerance: float
    step: float
    verdict: Verdict

    @property
    def relative_error(self) -> float:
        """|claimed − difference| over the larger of the two; 0 where both are 0."""
        scale = max(abs(self.claimed), abs(self.difference))
        return abs(self.claimed - self.difference) / scale if scale > 0 else 0.0


def judge(
    claimed: float,
    difference: float,
    uncertainty: float,
    step: float,
    *,
    rtol: float,
    scale: float,
    allowance: float = 0.0,
) -> Comparison:
    """Compare with tolerance 3·uncertainty + rtol·magnitude + allowance.

    Args:
        claimed: the derivative to be checked.
        difference: its finite difference.
        uncertainty: of the difference.
        step: of the difference.
        rtol: relative tolerance.
        scale: typical size of the derivatives along other directions; what is known to be below a twentieth of it
            is negligible.
        allowance: error that the claimed value says of itself.
    """
    magnitude = max(abs(claimed), abs(difference))
    tolerance = 3.0 * uncertainty + rtol * max(magnitude, 1e-3 * scale) + allowance
    verdict: Verdict
    if not np.isfinite(claimed):
        verdict = "not finite"
    elif not (np.isfinite(difference) and np.isfinite(tolerance)):
        verdict = "unclear"
    elif not abs(claimed - difference) <= tolerance:
        verdict = "disagrees"
    elif tolerance <= 0.25 * magnitude or claimed == difference:
        verdict = "agrees"
    else:
        verdict = "negligible" if max(magnitude, tolerance) <= 0.05 * scale else "unclear"
    return Comparison(claimed, difference, uncertainty, tolerance, step, verdict)


@dataclass(frozen=True)
class DirectionRow:
    """The derivative along one direction of φ: in total, and its direct and implicit part apart.

    `direct` is ∂f/∂φ at fixed θ; `implicit` is what φ does to the outer loss through θ*(φ).
    """

    name: str
    total: Comparison
    direct: Comparison
    implicit: Comparison


@dataclass(frozen=True)
class Ingredient:
    """A derivative of a user's function that the hypergradient is made of, along random directions."""

    name: str
    comparison: Comparison


@dataclass(frozen=True, repr=False)
class HypergradientCheck(Printed):
    """What `check_hypergradient` found. `print` shows the table.

    Attributes:
        ok: Whether the hypergradient succeeded, nothing disagrees, and every part was compared conclusively
            along some direction.
        summary: One sentence for each finding: which part disagrees, and why as far as can be told.
        rows: One for each direction or coordinate.
        ingredients: Partial derivatives of the inner and outer function.
        value: Outer loss.
        cosine: Between the derivatives of all rows and their differences.
        relative_error: ‖derivatives − differences‖ / ‖differences‖ over all rows.
        error_estimate: The hypergradient's own estimate of the norm of its error (NaN if it has none).
        noise: Standard deviation of the outer loss over re-solves: what the differences had to live with.
        theta_error: Relative distance of `hg.theta` from the re-solved inner solution (0 for an unrolled path).
        num_solves: How often the inner problem was solved.
        message: The failure that the hypergradient reported; empty if it was successful.
    """

    ok: bool
    summary: tuple[str, ...]
    rows: tuple[DirectionRow, ...]
    ingredients: tuple[Ingredient, ...]
    value: float
    cosine: float
    relative_error: float
    error_estimate: float
    noise: float
    theta_error: float
    num_solves: int
    message: str = field(default="")

    def __rich__(self) -> RenderableType:
        """The tables and the summary, for `rich.print`."""
        parts: list[RenderableType] = [_direction_table(self.rows), _ingredient_table(self.ingredients)]
        parts.append(
            Text(
                f"outer loss {self.value:.6g} (noise of re-solves {self.noise:.1e}), "
                f"{self.num_solves} inner solves\n"
                f"cosine {self.cosine:.8f}, relative error {self.relative_error:.1e}, "
                f"error estimate {self.error_estimate:.1e}, inner solution off by {self.theta_error:.1e}"
            )
        )
        mark = Text("OK: ", "bold green") if self.ok else Text("NOT OK: ", "bold red")
        parts += [Text.assemble(mark if i == 0 else "", line) for i, line in enumerate(self.summary)]
        return Group(*parts)


def _short(comparison: Comparison) -> Text:
    text = comparison.verdict
    if np.isfinite(comparison.relative_error) and text in ("agrees", "disagrees", "unclear"):
        text = f"{text} {comparison.relative_error:.0e}"  # type: ignore[assignment]
    return Text(text, _STYLE[comparison.verdict])


def _figures(comparison: Comparison) -> tuple[str, str]:
    return (
        f"{comparison.claimed: .6e}",
        f"{comparison.difference: .6e} ± {comparison.uncertainty:.0e}",
    )


def _direction_table(rows: tuple[DirectionRow, ...]) -> Table:
    table = Table(title="Hypergradient against finite differences", title_justify="left")
    for name in (
        "direction",
        "hypergradient",
        "finite difference",
        "in total",
        "direct part",
        "implicit part",
    ):
        table.add_column(name, no_wrap=name != "direction", min_width=13 if name == "direction" else None)
    for row in rows:
        parts = (row.total, row.direct, row.implicit)
        table.add_row(Text(row.name), *_figures(row.total), *(_short(part) for part in parts))
    return table


def _ingredient_table(ingredients: tuple[Ingredient, ...]) -> Table:
    table = Table(title="What it is made of, along random directions", title_justify="left")
    for name in ("derivative", "autodiff", "finite difference", "verdict"):
        table.add_column(name, no_wrap=name != "derivative")
    for item in ingredients:
        table.add_row(Text(item.name), *_figures(item.comparison), _short(item.comparison))
    return table
