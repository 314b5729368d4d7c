"""What a product costs and what a factorisation costs, known while tracing: their ratio is what `Auto` goes by."""

import math
from typing import Any, NamedTuple

import jax
import lineax as lx
from jax.extend import core

from curvax.operators._dense import structure_dtype

# Seconds for float64 on one core of a server, and on one of its accelerators. Of their ratios a factor of two matters
# little: it moves the point at which one method gives way to another, near which both take about as long.
# The first were measured (products within 1.5 of it), the second are estimates.
_CPU = {
    "flop": 1 / 25e9,  # of a product of matrices
    "flop together": 1 / 120e9,  # with many vectors at once
    "byte": 1 / 60e9,
    "element": 0.1e-9,  # of a fused elementwise operation
    "irregular": 2e-9,  # an element that is gathered or scattered
    "kernel": 0.3e-6,
    "turn": 2.5e-6,  # of a loop of a Krylov method, besides its product
    "entry": 2e-9,  # of its vectors, for each turn
    "column": 0.0,  # of a factorisation
    "entry of a factor": 1.2e-9,
}
_ACCELERATOR = {
    "flop": 1 / 5e12,
    "flop together": 1 / 20e12,
    "byte": 1 / 1.5e12,
    "element": 0.005e-9,
    "irregular": 0.05e-9,
    "kernel": 4e-6,
    "turn": 60e-6,
    "entry": 0.1e-9,
    "column": 2.5e-6,
    "entry of a factor": 0.0,
}
# Turns of a loop whose number is not known.
_TURNS = 10
_TRANSCENDENTAL = {"exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "pow", "erf"}
_IRREGULAR = ("gather", "scatter", "dynamic_slice", "dynamic_update_slice", "sort", "cumsum")
_FREE = {
    "reshape",
    "squeeze",
    "broadcast_in_dim",
    "convert_element_type",
    "copy",
    "stop_gradient",
    "symbolic_zeros",
}


class Prices(NamedTuple):
    """Estimates in seconds, of which only the ratios matter."""

    product: float
    product_together: float  # one of many that are taken at once
    widest: int  # elements of the largest array inside a product
    turn: float  # of conjugate gradients, without its product
    orthogonalisation: float  # of a vector against 30 others, twice
    cholesky: float
    lu: float

    def exchange(self, size: int, *, definite: bool, has_entries: bool, turn: float) -> float:
        """How many turns of an iterative method, with one product each, a direct solve is worth."""
        written = 0.0 if has_entries else size * self.product_together
        return (written + (self.cholesky if definite else self.lu)) / (self.product + turn)


def prices(operator: lx.AbstractLinearOperator) -> Prices:
    """What products with a linearised operator cost, from their program, and what a factorisation would.

    Nothing is run. Loops with an unknown number of turns count as ten.
    """
    closed = jax.make_jaxpr(operator.mv)(operator.in_structure())
    unit = _CPU if jax.default_backend() == "cpu" else _ACCELERATOR
    product, together, widest = _Walk(unit).of(closed.jaxpr, [True] * len(closed.jaxpr.invars))
    size, width = operator.in_size(), structure_dtype(operator.in_structure()).itemsize / 8
    turn = unit["turn"] + unit["entry"] * size * width
    fixed = unit["column"] * size + unit["entry of a factor"] * size**2 * width
    flops = size**3 / 3 * width
    return Prices(
        product=product + unit["kernel"],
        product_together=together,
        widest=max(widest, size),
        turn=turn,
        orthogonalisation=4 * 30 * size * 8 * width * unit["byte"],
        cholesky=fixed + flops * unit["flop"],
        # Row exchanges take time; the rest of it is faster.
        lu=3 * fixed + 2 * flops * 0.6 * unit["flop"],
    )


class _Walk(NamedTuple):
    """Through a program, over what depends on its input: the rest is done once, outside of the loop."""

    unit: dict[str, float]

    def of(self, jaxpr: Any, depends: list[bool]) -> tuple[float, float, int]:
        """Seconds of one call, of one among many, and the size of the largest array."""
        known = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
        single, together, widest = 0.0, 0.0, 0
        for equation in jaxpr.eqns:
            flags = [not isinstance(v, core.Literal) and v in known for v in equation.invars]
            if not any(flags):
                continue
            known.update(equation.outvars)
            one, many, wide = self._equation(equation, flags)
            single, together, widest = single + one, together + many, max(widest, wide)
        return single, together, widest

    def _equation(self, equation: Any, flags: list[bool]) -> tuple[float, float, int]:
        name, unit = equation.primitive.name, self.unit
        inner = [_program(p) for value in equation.params.values() for p in _listed(value) if _program(p)]
        if inner:
            times = equation.params["length"] if name == "scan" else _TURNS if name == "while" else 1
            if name == "scan":
                first, count = equation.params["num_consts"], equation.params["num_carry"]
                flags = [*flags[:first], *[True] * count, *flags[first + count :]]
            parts = [self._nested(program, flags) for program in inner]
            single, together, widest = (max(column) for column in zip(*parts, strict=True))
            return times * single, times * together, widest
        out = max((math.prod(v.aval.shape) for v in equation.outvars), default=0)
        sizes = [math.prod(v.aval.shape) for v in equation.invars]
        largest = max([out, *sizes])
        if name in ("dot_general", "conv_general_dilated"):
            width = max(v.aval.dtype.itemsize for v in equation.outvars) / 8
            flops = 2 * width * out * _terms(equation)
            moved = 8 * width * (out + sum(sizes)) * unit["byte"]
            return max(flops * unit["flop"], moved) + unit["kernel"], flops * unit["flop together"], out
        if name == "fft":
            work = 40 * out * math.log2(max(out, 2)) * unit["flop"]
            return work + unit["kernel"], work, out
        if name == "triangular_solve":
            columns = max(1, sizes[1] // max(1, equation.invars[0].aval.shape[-1]))
            work = 8 * sizes[0] * columns * unit["flop"]
            return work + unit["kernel"], work, out
        if name.startswith(_IRREGULAR):
            # What is scattered or sliced in place is not the whole array.
            touched = min([s for s in sizes if s] + [out]) if "dynamic" in name or "scatter" in name else out
            return touched * unit["irregular"], touched * unit["irregular"], largest
        if name in _FREE:
            return 0.0, 0.0, out
        work = largest * unit["element"] * (20 if name in _TRANSCENDENTAL else 1)
        return work, 2 * work, largest

    def _nested(self, jaxpr: Any, flags: list[bool]) -> tuple[float, float, int]:
        count = len(jaxpr.invars)
        return self.of(jaxpr, flags if len(flags) == count else [True] * count)


def _listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _program(value: Any) -> Any:
    """The program of a nested call, None for any other parameter."""
    if isinstance(value, core.ClosedJaxpr):
        return value.jaxpr
    return value if isinstance(value, core.Jaxpr) else None


def _terms(equation: Any) -> float:
    """Of how many products an entry of a contraction is the sum."""
    numbers, (left, right) = equation.params["dimension_numbers"], (v.aval.shape for v in equation.invars[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = numbers
        return math.prod(left[i] for i in contracted)
    # Every output sees every weight but those of other output channels.
    return math.prod(right) / right[numbers.rhs_spec[0]]
