"""Wide sweeps: a few of their cases always run, all of them with `--thorough`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sweep(cases: Iterable[Any], *, always: Collection[Any]) -> list[Any]:
    """The cases, those that are not among `always` marked `thorough`."""
    cases = list(cases)
    missing = [case for case in always if case not in cases]
    assert not missing, f"not among the cases: {missing}"

    def only(case: Any) -> Any:
        values = case if isinstance(case, tuple) else (case,)
        return pytest.param(*values, marks=pytest.mark.thorough)

    return [case if case in always else only(case) for case in cases]
