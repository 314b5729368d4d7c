"""The outcome of a look at the solutions of an inner problem: rows, what they mean, and how they are printed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed

Kind = Literal[
    "strict minimum",
    "no minimum",
    "regular",
    "attracting",
    "repelling",
    "singular",
    "degenerate",
    "uncertain",
]
_REGULAR = ("strict minimum", "regular", "attracting", "repelling")
_STYLE = {"uncertain": "yellow"} | dict.fromkeys(("no minimum", "singular", "degenerate"), "bold red")


@dataclass(frozen=True)
class InnerSolution:
    """One of the solutions that `check_solution` found.

    Attributes:
        theta: The solution, one Newton step better than what the solver returned where that was an improvement.
        kind: `"strict minimum"`; `"no minimum"` (a direction of negative curvature: a saddle or a maximum); for roots
            `"regular"`; for fixed points `"attracting"` or `"repelling"`, regular both; `"singular"` (∂F/∂θ is, to the
            accuracy of the solution); `"degenerate"` (∂F/∂θ changes by more than a tenth along a last Newton step,
            however short: several solutions meet here); `"uncertain"` (the smallest curvature of a large problem
            cannot be told from 0).
        count: Starts that lead here.
        from_theta0: Whether `theta0` does.
        inner_loss: For minima, else NaN.
        outer_loss: At this solution.
        residual: ‖F‖ where the solver stopped.
        distance: Length of the Newton step that was left there.
        smallest: For minima the smallest eigenvalue of the curvature; else the smallest singular value of ∂F/∂θ, with
            the sign of its determinant: it passes through zero where two solutions meet. Above `dense_size` an upper
            bound, and without the sign.
        largest: The largest one; above `dense_size` a lower bound.
        contraction: The rate at which θ ← T(θ) converges here, the spectral radius of ∂T/∂θ; for minima that of
            gradient descent with its best constant step, (λmax − λmin)/(λmax + λmin), 1 and more where it does not
            converge; NaN for roots.
        followed: Whether the solution moves differentiably with φ, uniquely or by a choice (the one that moves least);
            None above `dense_size`.
    """

    theta: object
    kind: Kind
    count: int
    from_theta0: bool
    inner_loss: float
    outer_loss: float
    residual: float
    distance: float
    smallest: float
    largest: float
    contraction: float
    followed: bool | None


@dataclass(frozen=True, repr=False)
class SolutionCheck(Printed):
    """What `check_solution` found. `print` shows the table.

    Attributes:
        ok: Whether all starts lead to one solution, and θ*(φ) is differentiable there.
        summary: One sentence for each finding.
        rows: One for each distinct solution: minima by inner loss, others by how many starts lead there.
        num_starts: How many starts there were, `theta0` among them.
        num_failed: From how many no solution was reached.
        lipschitz: Largest ‖T(a) − T(b)‖/‖a − b‖ over the starts and the solutions, T being the fixed-point map, or for
            minima the gradient descent of `contraction` at the first solution; below 1 everywhere T would have one
            fixed point. NaN for roots, and for minima that are not strict.
        monotonicity: Smallest (F(a) − F(b))ᵀ(a − b)/‖a − b‖² over the same; above 0 everywhere F would have one zero
            at most. Below 0 it proves an inner loss not convex.
    """

    ok: bool
    summary: tuple[str, ...]
    rows: tuple[InnerSolution, ...]
    num_starts: int
    num_failed: int
    lipschitz: float
    monotonicity: float

    def __rich__(self) -> RenderableType:
        """The table and the summary, for `rich.print`."""
        table = Table(title="Solutions of the inner problem", title_justify="left")
        minima = any(np.isfinite(row.inner_loss) for row in self.rows)
        columns = [
            "starts",
            "kind",
            "outer loss",
            "inner loss",
            "distance",
            "smallest",
            "largest",
            "contraction",
        ]
        for name in columns:
            if name != "inner loss" or minima:
                table.add_column(name, no_wrap=True)
        for row in self.rows:
            cells: list[Any] = [
                f"{row.count}{' with theta0' if row.from_theta0 else ''}",
                Text(row.kind, _STYLE.get(row.kind, "green")),
                f"{row.outer_loss:.6g}",
                *([f"{row.inner_loss:.6g}"] if minima else []),
                *(f"{x:.1e}" for x in (row.distance, row.smallest, row.largest)),
                "" if np.isnan(row.contraction) else f"{row.contraction:.4g}",
            ]
            table.add_row(*cells)
        mark = Text("OK: ", "bold green") if self.ok else Text("NOT OK: ", "bold red")
        lines = [Text.assemble(mark if i == 0 else "", line) for i, line in enumerate(self.summary)]
        return Group(*([table] if self.rows else []), *lines)


_MEANING = {
    "no minimum": (
        "the inner solver stopped where the curvature has a negative eigenvalue, at a saddle or a maximum: "
        "`cx.Implicit` fails there with `indefinite_curvature`. Use another start or another inner solver."
    ),
    "degenerate": (
        "several solutions meet here, to the accuracy of the inner solver (∂F/∂θ is another one after a short Newton "
        "step): do not trust a derivative. Tighten the inner solver, or regularise the inner problem."
    ),
    "uncertain": (
        "the smallest curvature cannot be told from zero by a few products: look at it with "
        "`cx.operators.lowest_curvature` and more steps."
    ),
}
_SINGULAR = (
    "∂F/∂θ is singular, so that the solution is not unique to first order: `cx.Implicit` fails with "
    "`singular_curvature` where the outer loss sees the directions that are free. In a minimum an L2 term binds them."
)
_FOLLOWED = {
    True: " The solution that moves least can be followed: `cx.Implicit(linear_solver=cx.linear.TruncatedSpectrum())`"
    " is the request for its derivative.",
    False: " It cannot be followed when φ changes: there is no derivative, nor one of least norm.",
    None: "",
}


def conclude(
    rows: Sequence[InnerSolution], num_starts: int, num_failed: int, lipschitz: float, monotonicity: float
) -> tuple[bool, tuple[str, ...]]:
    """Whether all is well, and one sentence for each finding."""
    if not rows:
        return False, (
            f"no solution was reached from any of {num_starts} starts: that there is one is not known. Give the inner "
            "solver more steps or a tighter tolerance.",
        )
    said = [_number(rows, num_starts, num_failed)]
    if num_failed and len(rows) > 1:
        said.append(f"from {num_failed} of {num_starts} starts no solution was reached.")
    first = next((row for row in rows if row.from_theta0), rows[0])
    regular = first.kind in _REGULAR
    if regular:
        said.append("θ*(φ) is differentiable at the solution: ∂F/∂θ is regular there.")
    if first.kind == "repelling":
        said.append("the fixed point is repelling: θ ← T(θ) does not converge to it.")
    if not regular:
        said.append(
            _SINGULAR + _FOLLOWED[first.followed] if first.kind == "singular" else _MEANING[first.kind]
        )
    said += _everywhere(lipschitz, monotonicity, np.isfinite(first.inner_loss))
    return len(rows) == 1 and num_failed == 0 and regular, tuple(said)


def _number(rows: Sequence[InnerSolution], num_starts: int, num_failed: int) -> str:
    arrived = num_starts - num_failed
    if len(rows) == 1 and num_failed:
        return f"{arrived} of {num_starts} starts lead to one solution, the others to none."
    if len(rows) == 1:
        return f"{'the start leads' if arrived == 1 else f'all {arrived} starts lead'} to one solution."
    losses = [row.outer_loss for row in rows]
    spread = f"the outer loss goes from {min(losses):.6g} to {max(losses):.6g} over them"
    if len(rows) == arrived and all(row.kind == "singular" for row in rows):
        return f"every start leads to another solution and all are singular: they form a family; {spread}."
    reached = "" if any(row.from_theta0 for row in rows) else ", and none of them is reached from `theta0`"
    return (
        f"{len(rows)} distinct solutions were found; {spread}{reached}. A hypergradient belongs to the one that its "
        "start leads to."
    )


def _everywhere(lipschitz: float, monotonicity: float, minimum: bool) -> list[str]:
    """What the pairs of points say of existence and uniqueness; sampled, so that only the bad news are certain."""
    said = []
    if not minimum and np.isfinite(lipschitz):
        if lipschitz < 1:
            said.append(
                f"between all points that were tried T contracts distances, by {lipschitz:.4g} or less: if it does so "
                "everywhere, there is one fixed point."
            )
        else:
            said.append(
                f"T is no contraction: between points that were tried it expands distances by up to {lipschitz:.4g}, "
                "so that it may have none or several fixed points."
            )
    if minimum and monotonicity < 0:
        said.append("the inner loss is not convex between points that were tried: there may be other minima.")
    elif minimum and monotonicity > 0:
        said.append(
            "the inner loss is strictly convex as far as the points that were tried show: if it is so everywhere, "
            "there is one minimum at most."
        )
    return said
