"""What every way to differentiate a path would cost, before it is tried."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree

from curvax._pytree import promote_half, tree_size
from curvax.implicit._condition import Minimum
from curvax.unroll._measured import seconds_of_path, tried
from curvax.unroll._memory import measure as sizes_of
from curvax.unroll._outcome import in_reverse
from curvax.unroll._plan import (
    Method,
    adjoint_methods,
    automatic,
    contracted_part,
    forward_method,
    has_custom_vjp,
)
from curvax.unroll._rollout import Rollout
from curvax.unroll._schedule import named
from curvax.unroll._steps import Steps


class CostRow(eqx.Module):
    """One way to differentiate a path and what it is predicted to cost.

    Attributes:
        mode: `mode` of `cx.Unrolled`.
        lengths: Lengths of the nested loops over stored states; None for the whole tape, empty in forward mode.
        checkpoint: `checkpoint` of `cx.Unrolled` that asks for it; None where only a memory budget does.
        gradients: Time of the path and its derivative, in inner gradients.
        num_bytes: Memory beside arguments and results.
        measured_gradients: The same time measured, in steps of the path alone; None where it was not measured.
        measured_bytes: The same memory as the compiler plans it; None where it was not measured.
        automatic: Whether `mode="auto"` considers this mode for the loss at hand.
    """

    mode: str = eqx.field(static=True)
    lengths: tuple[int, ...] | None = eqx.field(static=True)
    checkpoint: str | None = eqx.field(static=True)
    gradients: float = eqx.field(static=True)
    num_bytes: int = eqx.field(static=True)
    measured_gradients: float | None = eqx.field(static=True, default=None)
    measured_bytes: int | None = eqx.field(static=True, default=None)
    automatic: bool = eqx.field(static=True, default=True)


class Costs(eqx.Module):
    """What `cx.unroll.cost` returns; prints as a table.

    Attributes:
        rows: All ways, from the fastest on.
        num_steps: Steps of the path.
        num_phi: Numbers in φ that are differentiated.
    """

    rows: tuple[CostRow, ...]
    num_steps: int = eqx.field(static=True)
    num_phi: int = eqx.field(static=True)

    def best(self, num_bytes: int | None = None) -> CostRow:
        """What `auto` takes: of the modes that it considers the fastest that takes at most so much memory."""
        rows = [row for row in self.rows if row.automatic]
        fitting = [row for row in rows if num_bytes is None or row.num_bytes <= num_bytes]
        if not fitting:
            least = min(row.num_bytes for row in rows)
            raise ValueError(f"`num_bytes={num_bytes}` is too little: the least is about {least}.")
        return fitting[0]

    def __str__(self) -> str:
        """One line for each way."""
        measured = all(row.measured_gradients is not None for row in self.rows)
        lines = [["mode", "checkpoint", "stored states", "inner gradients", "memory"]]
        lines[0] += ["measured", "measured"] * measured
        for row in self.rows:
            stored = "tape" if row.lengths is None else " + ".join(map(str, row.lengths)) or "none"
            line = [row.mode, row.checkpoint or "budget", stored]
            line += [f"{row.gradients:.3g}", _in_units(row.num_bytes)]
            if row.measured_gradients is not None and row.measured_bytes is not None:
                line += [f"{row.measured_gradients:.3g}", _in_units(row.measured_bytes)]
            lines.append(line)
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([f"{self.num_steps} steps, {self.num_phi} hyperparameters", *text])


def cost(
    problem: Any,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Steps,
    inner_data: PyTree = None,
    outer_data: PyTree = None,
    key: Array | None = None,
    measure: bool = False,
) -> Costs:
    """Predicted time and memory of every mode and schedule of `cx.Unrolled`, without running the path.

    Time is counted in inner gradients: in a path of T steps every level of loops costs one run of T gradients, and the
    derivative of a step as much as these products were measured to cost; beside them the optimiser is taken to be
    cheap. Memory is the size of the stored states and the measured working set, for which the derivative of one step is
    compiled in each mode.

    Args:
        problem: The bilevel problem, whose inner level is a loss.
        phi: Hyperparameters.
        theta0: Start of the inner solver.
        inner_solver: `cx.Steps`.
        inner_data: As for `cx.hypergradient`.
        outer_data: As for `cx.hypergradient`; without it the outer loss is called with None.
        key: Random key, needed where data is drawn.
        measure: Try every way as well, three times each, and put what it took beside the prediction.

    Returns:
        `Costs`: one `CostRow` for each way.

    Raises:
        ValueError: The inner solver is not `cx.Steps`, or the inner level is no loss.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - lam) ** 2), outer=lambda w, lam, _: jnp.sum(w**2)
        )
        costs = cx.unroll.cost(
            problem, jnp.ones(50), jnp.zeros(50), inner_solver=cx.Steps(optax.sgd(0.1), 100)
        )
        print(costs)
        costs.best().mode  # "mixed"
        ```
    """
    if not isinstance(inner_solver, Steps):
        raise ValueError(f"`inner_solver` of `cost` must be `cx.Steps`, got {type(inner_solver).__name__}.")
    if not isinstance(problem.condition, Minimum):
        raise ValueError(
            "`problem` of `cost` must have a loss as its inner level: roots and fixed points have no steps."
        )
    hyper, phi_static = eqx.partition(phi, eqx.is_inexact_array)
    start, theta_static = eqx.partition(theta0, eqx.is_inexact_array)
    hyper, start = promote_half(hyper), promote_half(start)

    def inner(theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Array:
        value = problem.condition.fn(eqx.combine(theta, theta_static), eqx.combine(phi, phi_static), batch)
        return promote_half(value)

    batch = outer_data(key) if callable(outer_data) else outer_data

    def outer(theta: PyTree[Array], phi: PyTree[Array]) -> Array:
        return promote_half(
            problem.outer(eqx.combine(theta, theta_static), eqx.combine(phi, phi_static), batch)
        )

    rollout = Rollout(inner_solver, inner, start, phi_static, inner_data, key)
    step, walk = rollout.step(hyper)
    num_steps, num_phi = inner_solver.num_steps, tree_size(hyper)
    with in_reverse():
        sizes = sizes_of(step, walk, outer)
    contracted = contracted_part(step, walk)
    methods = [(forward_method(num_phi, contracted), sizes)]
    if walk.scaling is None:
        methods += [(m, sizes) for m in adjoint_methods("reverse", num_steps, contracted, stops=sizes.stops)]
    custom = has_custom_vjp(step, walk)
    if not custom:
        sizes = sizes_of(step.in_mixed_mode(), walk, outer)
        methods += [
            (method, sizes) for method in adjoint_methods("mixed", num_steps, contracted, stops=sizes.stops)
        ]
    unit = seconds_of_path(rollout, hyper) / num_steps if measure else None
    rows = []
    for method, sizes in sorted(methods, key=lambda m: m[0].gradients):
        seconds, taken = (None, None) if unit is None else tried(rollout, hyper, outer, method)
        rows.append(
            CostRow(
                mode=method.mode,
                lengths=method.lengths,
                checkpoint=_name(method, num_steps),
                gradients=method.gradients * num_steps,
                num_bytes=method.num_bytes(sizes, num_steps),
                measured_gradients=None if unit is None or seconds is None else seconds / unit,
                measured_bytes=taken,
                automatic=method.mode in automatic(custom, contracted),
            )
        )
    return Costs(tuple(rows), num_steps, num_phi)


def _name(method: Method, num_steps: int) -> str | None:
    """What to write for `checkpoint`; None where no name asks for this schedule."""
    if method.mode == "forward" or method.lengths is None:
        return "none"
    names = ["sqrt", "binomial"] if method.mode == "reverse" else ["none", "sqrt", "binomial"]
    return next((name for name in names if named(name, num_steps) == method.lengths), None)


def _in_units(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.3g} MB" if num_bytes >= 2**18 else f"{num_bytes / 2**10:.3g} kB"
