"""What became of every block in a run, for people."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed
from curvax.optim._quasi_newton import QuasiNewtonState
from curvax.optim._state import OptimiserState

FIRST_ORDER = "first order"
NOT_USED = "not used"
# Of parameters that are one array, which has no name.
WHOLE = "(the parameter)"
# So many steps are skipped in a row while the damping looks for its place.
FEW = 5


@dataclass(frozen=True)
class BlockRow:
    """One block of the parameters.

    Attributes:
        block: Its name: that of the weight.
        factors: What is kept of its curvature: `"dense ⊗ dense"`, ..., `"diagonal"`, or `"first order"` if nothing is;
            `"not used"` of a parameter that the model does not use, which has none.
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
        nonfinite: Of the steps, those at which the gradient, the direction or the loss was not finite.
        damping: λ of the next step, or its radius.
    """

    rows: tuple[BlockRow, ...]
    steps: int
    skipped: int
    nonfinite: int
    damping: float

    @property
    def problems(self) -> tuple[str, ...]:
        """What went wrong, and what to do about it; empty if nothing did."""
        found = []
        if self.nonfinite:
            found.append(
                f"the gradient, the direction or the loss was not finite in {self.nonfinite} of {self.steps} steps: "
                "look at the data and the targets, and at what the model computes from them"
            )
        if self.skipped > FEW and 2 * self.skipped > self.steps:
            found.append(
                f"{self.skipped} of {self.steps} steps were skipped: a given learning rate is too large (lower it, or "
                "`Damping(kl_clip=...)`), or the gradients are not those of the mean loss on `inputs` and `targets`"
            )
        parts = (
            (
                "statistics that were not finite were left out",
                [row.block for row in self.rows if row.rejected],
            ),
            ("factors had no inverse (raise the damping)", [row.block for row in self.rows if row.fallbacks]),
            ("steps of first order", [row.block for row in self.rows if row.factors == FIRST_ORDER]),
        )
        return tuple(
            found
            + [f"{what}: {', '.join(block or WHOLE for block in blocks)}" for what, blocks in parts if blocks]
        )

    @property
    def healthy(self) -> bool:
        """Whether every block that is used has a curvature, and nothing went wrong with it or with the steps."""
        return not self.problems

    def __rich__(self) -> RenderableType:
        """The table and a summary, for `rich.print`."""
        table = Table(title="Blocks", title_justify="left")
        for name in ("block", "factors", "rejected", "fallbacks"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            style = "yellow" if row.rejected or row.fallbacks or row.factors == FIRST_ORDER else ""
            table.add_row(
                Text(row.block or WHOLE),
                Text(row.factors, style),
                Text(str(row.rejected), style),
                Text(str(row.fallbacks), style),
            )
        mark = Text("healthy: ", "bold green") if self.healthy else Text("not healthy: ", "bold yellow")
        counted = f"{self.skipped} of {self.steps} steps skipped, damping {self.damping:.3g}"
        lines = [Text(f"- {problem}", "yellow") for problem in self.problems]
        return Renderables(table, Text.assemble(mark, counted), *lines)


def report(state: OptimiserState) -> OptimiserReport:
    """What an optimiser knows of every block, and what went wrong so far.

    Args:
        state: Of an optimiser of this room, concrete (outside of `jit`).

    Returns:
        A report that prints itself.

    Raises:
        TypeError: The state of something else, such as of `optax.chain`: pass the part that is of this room. A state
            inside of `jit`, or one for each of several runs.

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
    if isinstance(state.count, jax.core.Tracer):
        raise TypeError("`state` is traced: a report is for people, call it outside of `jit`.")
    if jnp.ndim(state.count):
        raise TypeError(
            f"`state` holds {jnp.shape(state.count)} runs, of `vmap`: pass one of them, such as "
            "`jax.tree.map(lambda leaf: leaf[0], state)`."
        )
    known = state.curvature
    # K-BFGS keeps inverses of what it has no factors of.
    kept = known.factors | (known.inverses if isinstance(known, QuasiNewtonState) else {})
    rows = [
        BlockRow(
            name,
            _described(*kept[name]) if known.rejected[name].size else NOT_USED,
            _total(known.rejected[name]),
            _total(known.fallbacks[name]),
        )
        for name in known.rejected
    ]
    info = state.info
    return OptimiserReport(
        tuple(rows), int(state.count), int(info.skipped), int(info.nonfinite), float(state.damping)
    )


def _described(left: Any, right: Any) -> str:
    if left.shape[1] == 0:
        return FIRST_ORDER
    if left.ndim == 2 and right.shape[1:] == (1, 1):
        return "diagonal"
    return " ⊗ ".join("dense" if factor.ndim == 3 else "diagonal" for factor in (left, right))


def _total(counts: Any) -> int:
    return int(np.sum(np.asarray(counts)))
