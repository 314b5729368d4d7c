"""From the verdicts of a gradient check to sentences: what is wrong, and where to look."""

from collections.abc import Sequence

from curvax.diagnostics._report import DirectionRow, Ingredient

_BAD = ("disagrees", "not finite")
_GOOD = ("agrees", "negligible")


def _bad(rows: Sequence[DirectionRow], part: str) -> list[str]:
    return [row.name for row in rows if getattr(row, part).verdict in _BAD]


def summarise(
    rows: Sequence[DirectionRow],
    ingredients: Sequence[Ingredient],
    *,
    message: str,
    resolved: bool,
    theta_error: float,
    follows_path: bool,
    has_estimate: bool,
) -> tuple[bool, tuple[str, ...]]:
    """Whether all is well, and one sentence for each finding.

    Args:
        rows: directions.
        ingredients: partial derivatives.
        message: failure of the hypergradient, or empty.
        resolved: whether the inner problem could be solved tightly at φ.
        theta_error: relative distance between the hypergradient's θ and the tight solution.
        follows_path: whether a path of steps was differentiated.
        has_estimate: whether the hypergradient came with an error estimate.
    """
    said: list[str] = []
    if message:
        said.append(f"the hypergradient failed: {message}")
    if not resolved:
        said.append(
            "the inner problem could not be solved tightly near the point of the hypergradient, so the total "
            "derivative and the implicit part could not be compared."
        )
    wrong = [item.name for item in ingredients if item.comparison.verdict in _BAD]
    direct, implicit, total = (_bad(rows, part) for part in ("direct", "implicit", "total"))
    if direct:
        said.append(
            f"the direct part ∂f/∂φ {_verb(rows, 'direct')} along {_list(direct)}: look at how `outer` depends on φ "
            f"({_suspects(rows, 'direct')})."
        )
    if implicit:
        blame = _blame(rows, wrong, theta_error, follows_path, has_estimate)
        said.append(f"the implicit part {_verb(rows, 'implicit')} along {_list(implicit)}{blame}")
    elif wrong:
        said.append(
            f"{_list(wrong)} disagrees with differences of the function it comes from: look there for a wrong custom "
            "derivative or a `stop_gradient`."
        )
    if total and not (direct or implicit):
        said.append(
            f"the total derivative disagrees along {_list(total)} although both parts agree: their errors add up "
            "to just over the tolerance."
        )
    if said:
        return False, tuple(said)
    names = {"total": "the total derivative", "direct": "the direct part", "implicit": "the implicit part"}
    open_ = [
        name for part, name in names.items() if not any(getattr(row, part).verdict in _GOOD for row in rows)
    ]
    if open_:
        return False, (
            f"nothing disagrees, but {_list(open_)} could not be compared along any direction: the uncertainty of "
            "the differences, or the hypergradient's own error estimate, is as large as what they measure (as at "
            "an outer optimum, where the derivative vanishes). Use float64, a tighter `rule` or another `phi`.",
        )
    doubtful = sum(
        comparison.verdict == "unclear"
        for row in rows
        for comparison in (row.total, row.direct, row.implicit)
    )
    note = f" ({doubtful} of {3 * len(rows)} comparisons were too uncertain to tell)" if doubtful else ""
    return True, (f"the hypergradient and both of its parts agree with finite differences{note}.",)


def _list(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _finite(rows: Sequence[DirectionRow], part: str) -> bool:
    return all(getattr(row, part).verdict != "not finite" for row in rows)


def _verb(rows: Sequence[DirectionRow], part: str) -> str:
    return "disagrees" if _finite(rows, part) else "is not finite"


def _suspects(rows: Sequence[DirectionRow], part: str) -> str:
    if _finite(rows, part):
        return "a wrong custom derivative, a `stop_gradient`"
    return "a logarithm, root or norm at 0, a division by 0"


def _blame(
    rows: Sequence[DirectionRow],
    wrong: Sequence[str],
    theta_error: float,
    follows_path: bool,
    has_estimate: bool,
) -> str:
    if wrong:
        return f", and so does {_list(wrong)}: look there ({_suspects(rows, 'implicit')})."
    if not _finite(rows, "implicit"):
        return "."
    if follows_path:
        return (
            ", while the derivatives of `inner` and `outer` are right at the end of the path: look at the optimiser "
            "(its dependence on φ) and at earlier steps."
        )
    hint = "" if has_estimate else " Give the rule an `rtol` to be told the error."
    return (
        f", while all derivatives that it is made of are right: the inner solution (off by {theta_error:.1e}) or the "
        f"adjoint solve is not accurate enough. Tighten `inner_solver` or `rule`.{hint}"
    )
