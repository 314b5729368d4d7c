"""What was found in a model, for people."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
from jaxtyping import PRNGKeyArray, PyTree
from rich.console import Group as Renderables
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed
from curvax.capture._groups import Group
from curvax.capture._layers import Layers, find_layers


@dataclass(frozen=True)
class ReportRow:
    """A parameter, or the part of one that is in one block.

    Attributes:
        parameter: Its name.
        shape: Its shape.
        group: Name of the group in whose block it is; empty for a parameter without entries.
        uses: What the model does with it, one for each use.
        block: (stack, rows, columns) of the block.
        factors: `"dense"` or `"diagonal"`, of the rows and of the columns.
        fallback: What is done instead of a known site, and why; empty if there is no need.
    """

    parameter: str
    shape: tuple[int, ...]
    group: str
    uses: tuple[str, ...]
    block: tuple[int, int, int]
    factors: tuple[str, str]
    fallback: str


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """Every parameter of a model, its uses, its block and its fallback. `print` shows the table.

    Attributes:
        rows: One for each parameter, or for each part of one that has a block of its own.
        num_entries: Number of floating-point parameters, each entry counted.
        num_fallback: How many of them are in a block with a fallback.
        layers: What statistics are taken with.
    """

    rows: tuple[ReportRow, ...]
    num_entries: int
    num_fallback: int
    layers: Layers = field(repr=False)

    @property
    def covered(self) -> bool:
        """Whether every use of every parameter is a known site."""
        return self.num_fallback == 0

    def __rich__(self) -> RenderableType:
        """The table and a summary, for `rich.print`."""
        table = Table(title="Layers", title_justify="left")
        for name in ("parameter", "uses", "block", "factors", "fallback"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(
                Text(f"{row.parameter} {list(row.shape)}"),
                Text("\n".join(row.uses)),
                Text(" × ".join(map(str, row.block))),
                Text(" ⊗ ".join(row.factors)),
                Text(row.fallback, "yellow"),
            )
        mark = Text("covered: ", "bold green") if self.covered else Text("not covered: ", "bold yellow")
        counted = f"{self.num_entries - self.num_fallback} of {self.num_entries} entries are in blocks of known sites"
        return Renderables(table, Text.assemble(mark, counted))


def report(
    model_fn: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    strict: bool = False,
    *,
    key: PRNGKeyArray | None = None,
) -> Report:
    """What becomes of every parameter of a model: its uses, its block (stack × rows × columns), its fallback.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example; with `key`, `model_fn(params, x, key)`.
        params: Any pytree; its floating-point arrays are the parameters.
        x: One example, any pytree.
        strict: Raise if any use of a parameter is not a known site.
        key: A key as for one example, if the model takes one.

    Returns:
        A report that prints itself.

    Raises:
        ValueError: There is no floating-point parameter, or one is complex; with `strict`, parameters have a fallback.

    Cost: traces the model once; nothing is computed.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        params = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(3), "temperature": jnp.ones(())}

        def model_fn(params, x):
            return jnp.tanh(params["weight"] @ x + params["bias"]) / params["temperature"]

        report = cx.capture.report(model_fn, params, jnp.ones(2))
        print(report)
        assert not report.covered  # division by a parameter is no known site
        ```
    """
    layers = find_layers(model_fn, params, x, key=key, strict=strict)
    rows: list[ReportRow] = []
    likes = jax.tree.leaves(layers.model.params)
    for name, like in zip(layers.names, likes, strict=True):
        found = [group for group in layers.groups if name in group.block.parameters]
        rows += [_row(name, like.shape, group) for group in found]
        if not found:
            rows.append(ReportRow(name, like.shape, "", ("no entries",), (0, 0, 0), ("dense", "dense"), ""))
    fallback = sum(group.block.size for group in layers.groups if group.fallback)
    return Report(tuple(rows), sum(like.size for like in likes), fallback, layers)


def _row(name: str, shape: tuple[int, ...], group: Group) -> ReportRow:
    block = group.block
    owner, *others = block.parameters
    uses = (f"bias of {group.name}",) if name in others and name != owner else group.uses
    factors = (str(block.row_factor), str(block.column_factor))
    return ReportRow(name, shape, group.name, uses, block.shape, factors, group.fallback)
