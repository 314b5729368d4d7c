"""What is known of a value inside a `scan`, by what is known of it outside."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from curvax.capture import _jaxprs
from curvax.capture._knowledge import Colour, Data, Knowledge, View
from curvax.capture._layout import merged, size_of


def shared_by_scan(knowledge: Knowledge) -> Knowledge:
    """What every step of a scan sees alike."""
    if isinstance(knowledge, View):
        return replace(knowledge, levels=(*knowledge.levels, False))
    return knowledge


def sliced_by_scan(knowledge: Knowledge) -> Knowledge:
    """One step's part of what is scanned over."""
    if isinstance(knowledge, Data):
        return Data(knowledge.colour)
    assert isinstance(knowledge, View)
    view = replace(knowledge, levels=(*knowledge.levels, True))
    if view.layout is None:
        return view
    axis, rest = merged(view.layout.axes[0]), view.layout.drop([0])
    if all(stride == 0 for _, stride in axis) and size_of(axis) > 1:
        return replace(view, layout=rest, levels=(*knowledge.levels, False))
    if any(stride == 0 for _, stride in axis):
        return view.blurred("repeated by a `scan`")
    return replace(view, layout=rest, stack=(*view.stack, *axis))


def carried_colours(jaxpr: Any, known: Sequence[Knowledge], first: int, count: int) -> list[Colour]:
    """The colours of a carry after any number of steps; equations are taken whole."""
    colours = [k.colour for k in known]
    while True:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], colours, strict=True))
        read = lambda atom, values=values: Colour.CONSTANT if _jaxprs.literal(atom) else values[atom]
        for equation in jaxpr.eqns:
            colour = max(map(read, equation.invars), default=Colour.CONSTANT)
            values.update(dict.fromkeys(equation.outvars, colour))
        after = [max(colours[first + i], read(jaxpr.outvars[i])) for i in range(count)]
        if after == colours[first : first + count]:
            return after
        colours[first : first + count] = after
