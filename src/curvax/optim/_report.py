"""What became of every block in a run, for people."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed
from curvax.optim._quasi_newton import QuasiNewtonState
from curvax.optim._state import OptimiserState


@dataclass(frozen=True)
class BlockRow:
    """One block of the parameters.

    Attributes:
        block: Its name: that of the weight.
        factors: What is kept of its curvature: `"dense ⊗ dense"`, ..., `"diagonal"`, or `"first order"` if nothing is.
        rejected: Batches of which the statistics were not finite, and were left out.
        fallbacks: Times that a factor had no inverse, and was replaced by a multiple of the identity.
    """

    block: str
    factors: str
    rejected: int
    fallbacks: int


@dataclass(frozen=True, repr=False)
class OptimiserReport(Printed):
    """Every block, and what went wrong; `print` shows the table.

    Attributes:
        rows: One for each block; a stack (the layers of a scan) is one.
        steps: So far.
        skipped: Of these, not taken.
        damping: λ of the next step, or its radius.
    """

    rows: tuple[BlockRow, ...]
    steps: int
    skipped: int
    damping: float

    @property
    def healthy(self) -> bool:
        """Whether every block has a curvature and none of it went wrong."""
        return not any(row.rejected or row.fallbacks or row.factors == "first order" for row in self.rows)

    def __rich__(self) -> RenderableType:
        """The table and a summary, for `rich.print`."""
        table = Table(title="Blocks", title_justify="left")
        for name in ("block", "factors", "rejected", "fallbacks"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            style = "yellow" if row.rejected or row.fallbacks or row.factors == "first order" else ""
            table.add_row(
                Text(row.block),
                Text(row.factors, style),
                Text(str(row.rejected), style),
                Text(str(row.fallbacks), style),
            )
        mark = Text("healthy: ", "bold green") if self.healthy else Text("not healthy: ", "bold yellow")
        counted = f"{self.skipped} of {self.steps} steps skipped, damping {self.damping:.3g}"
        return Renderables(table, Text.assemble(mark, counted))


def report(state: OptimiserState) -> OptimiserReport:
    """What an optimiser knows of every block, and what went wrong so far.

    Args:
        state: Of an optimiser of this room, concrete (outside of `jit`).

    Returns:
        A report that prints itself.

    Raises:
        TypeError: The state of something else, such as of `optax.chain`: pass the part that is of this room.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        optimiser = cx.optim.kfac(lambda w, x: w @ x, cx.operators.SquaredError(), example=jnp.ones(2))
        report = cx.optim.report(optimiser.init(jnp.ones((3, 2))))
        print(report)
        assert report.healthy
        ```
    """
    if not isinstance(state, OptimiserState):
        raise TypeError(
            f"`state` must be the state of an optimiser of `cx.optim`, found {type(state).__name__}; of a chain, pass "
            "the member that is."
        )
    known = state.curvature
    # K-BFGS keeps inverses of what it has no factors of.
    kept = known.factors | (known.inverses if isinstance(known, QuasiNewtonState) else {})
    rows = [
        BlockRow(
            name,
            _described(*kept[name]),
            _total(known.rejected[name]),
            _total(known.fallbacks[name]),
        )
        for name in known.rejected
    ]
    return OptimiserReport(tuple(rows), int(state.count), int(state.info.skipped), float(state.damping))


def _described(left: Any, right: Any) -> str:
    if left.shape[1] == 0:
        return "first order"
    if left.ndim == 2 and right.shape[1:] == (1, 1):
        return "diagonal"
    return " ⊗ ".join("dense" if factor.ndim == 3 else "diagonal" for factor in (left, right))


def _total(counts: Any) -> int:
    return int(np.sum(np.asarray(counts)))
