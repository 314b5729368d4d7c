"""Walks through a model's program and finds every use of every parameter, without computing anything."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax.numpy as jnp

from curvax.capture import _jaxprs
from curvax.capture._convolution import convolution
from curvax.capture._dense import dense
from curvax.capture._folding import folded
from curvax.capture._knowledge import Colour, Data, Knowledge, Output, View
from curvax.capture._layout import Layout, merged, rearranged
from curvax.capture._lookup import gathered, sliced
from curvax.capture._scanned import carried_colours, shared_by_scan, sliced_by_scan
from curvax.capture._site import Geometry, Level

UseKind = Literal["site", "bias", "scale", "other", "none"]
MatrixKind = Literal["dense", "convolution", "embedding"]


@dataclass(frozen=True)
class Found:
    """An operation that is linear in a parameter and in data.

    Attributes:
        key: Path in the program.
        kind: Of the site.
        operand: Number of the operand that is the data.
        geometry: How its operands become inputs and cotangents.
        coordinates: Layout of the weight as (stack, rows, columns) in the parameter, None if it has none.
        view: The weight.
        levels: The scans around.
        data: Shape and dtype of the data.
        result: Shape and dtype of what is returned.
        rank: Of what is looked up, for a lookup.
    """

    key: str
    kind: MatrixKind
    operand: int
    geometry: Geometry
    coordinates: Layout | None
    view: View
    levels: tuple[Level, ...]
    data: Any
    result: Any
    rank: int = 0


@dataclass(frozen=True)
class Use:
    """What is done with a view of a parameter.

    Attributes:
        kind: `"site"`; `"bias"`: added to the activations or put beside them; `"scale"`: multiplied with them
            elementwise; `"other"`; `"none"`: something that has no reverse derivative.
        view: Of the parameter.
        source: Line of the model.
        reason: For the kinds `"other"` and `"none"`: what it is.
        site: Key of the site.
        into: For a bias: key of the site whose whole output it reaches, if there is one.
        coordinates: Then: its layout as (stack, rows).
    """

    kind: UseKind
    view: View
    source: str
    reason: str = ""
    site: str = ""
    into: str = ""
    coordinates: Layout | None = None


@dataclass
class Findings:
    """What a walk found.

    Attributes:
        uses: By number of the parameter.
        sites: By key.
        readers: Of the output of every site: the bias that is added, or what else is done with it.
        scalings: By key of an equation: its operands that are a view and the scalar it is multiplied with.
        passing: By key of an equation that a scaled view passes: which operand that is.
        entered: Keys of calls that return scaled views.
        selected: Keys of `cond`s whose branch depends on the example.
    """

    uses: dict[int, list[Use]] = field(default_factory=lambda: defaultdict(list))
    sites: dict[str, Found] = field(default_factory=dict)
    readers: dict[str, list[Use | str]] = field(default_factory=lambda: defaultdict(list))
    scalings: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    passing: dict[str, int] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    selected: set[str] = field(default_factory=set)


def find(program: _jaxprs.Program, known: Sequence[Knowledge]) -> Findings:
    """All uses of the parameters in a program, given what its operands are."""
    walker = _Walker()
    constants = [Data(Colour.FIXED)] * len(program.constants)
    results = walker.walk(program.jaxpr, [*constants, *known], "", ())
    for knowledge in results:
        walker.leave(knowledge, "")
    return walker.findings


@dataclass(frozen=True)
class _Place:
    """An equation, what is known of its operands, and where it stands."""

    equation: Any
    known: Sequence[Knowledge]
    key: str
    nest: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def views(self) -> list[int]:
        return [i for i, k in enumerate(self.known) if isinstance(k, View)]

    @property
    def colour(self) -> Colour:
        return max((k.colour for k in self.known), default=Colour.CONSTANT)

    def shaped(self, operand: int) -> Any:
        return self.equation.invars[operand].aval

    @property
    def result(self) -> Any:
        return self.equation.outvars[0].aval

    @property
    def source(self) -> str:
        return _jaxprs.source(self.equation)


class _Walker:
    """Goes through a program with what is known about every value."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.handlers: dict[str, Callable[[_Place], list[Knowledge] | None]] = {
            "mul": self._product,
            "div": self._product,
            "neg": self._negated,
            "add": self._sum,
            "add_any": self._sum,
            "sub": self._sum,
            "dot_general": self._dense,
            "conv_general_dilated": self._convolution,
            "gather": self._gather,
            "dynamic_slice": self._slice,
            "select_n": self._placed,
            "concatenate": self._placed,
            "dynamic_update_slice": self._placed,
            "pad": self._placed,
            "optimization_barrier": self._barrier,
            "stop_gradient": self._stopped,
            "iota": self._iota,
            "eq": self._equal,
        }

    def walk(
        self, jaxpr: Any, known: Sequence[Knowledge], path: str, nest: tuple[int, ...]
    ) -> list[Knowledge]:
        """What is known about the results of a program, given what is known about its constants and operands."""
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], known, strict=True))

        def read(atom: Any) -> Knowledge:
            return Data(Colour.CONSTANT) if _jaxprs.literal(atom) else values[atom]

        for number, equation in enumerate(jaxpr.eqns):
            key = f"{path}/{number}:{equation.primitive.name}"
            place = _Place(equation, [read(v) for v in equation.invars], key, nest)
            values.update(zip(equation.outvars, self._equation(place), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def leave(self, knowledge: Knowledge, source: str) -> None:
        """A value leaves the program in which it is known."""
        if isinstance(knowledge, View):
            self._use("bias", knowledge, source)
        elif isinstance(knowledge, Output):
            self.findings.readers[knowledge.site].append("left")

    def _equation(self, place: _Place) -> list[Knowledge]:
        kind = _jaxprs.kind(place.equation)
        if kind in ("call", "checkpoint"):
            return self._call(place)
        if kind == "scan" and place.views:
            return self._scan(place)
        if kind == "cond" and place.views:
            return self._cond(place)
        if kind == "other":
            results = self.handlers[place.name](place) if place.name in self.handlers else self._moved(place)
            if results is not None:
                self._follow(place, results)
                return results
        return self._opaque(place, kind)

    def _follow(self, place: _Place, results: list[Knowledge]) -> None:
        """Remember where scaled views pass."""
        if any(isinstance(result, View) and result.scaled for result in results):
            self.findings.passing[place.key] = place.views[0]

    def _opaque(self, place: _Place, kind: str) -> list[Knowledge]:
        """Something with inner workings that are none of ours, or that a parameter enters in a way not known."""
        reason = f"used in `{place.name}`"
        contracts = place.name in ("dot_general", "conv_general_dilated")
        for knowledge in place.known:
            if isinstance(knowledge, View) and kind == "while":
                self._use(
                    "none", knowledge, place.source, "used in a `while` loop, which has no reverse derivative"
                )
            elif isinstance(knowledge, View):
                self._use("other", knowledge, place.source, reason)
            elif isinstance(knowledge, Output):
                self.findings.readers[knowledge.site].append("contracted" if contracts else "read")
        return [Data(place.colour)] * len(place.equation.outvars)

    def _use(self, kind: UseKind, view: View, source: str, reason: str = "", **where: Any) -> Use:
        use = Use(kind, view, source, reason, **where)
        self.findings.uses[view.leaf].append(use)
        return use

    # Views and outputs, moved about.

    def _moved(self, place: _Place) -> list[Knowledge] | None:
        if len(place.known) != 1:
            return None
        (knowledge,) = place.known
        if isinstance(knowledge, Data):
            if place.name == "convert_element_type":
                return [knowledge]
            return None
        if place.name == "convert_element_type" and not jnp.issubdtype(place.result.dtype, jnp.inexact):
            return self._stopped(place)
        if knowledge.layout is None:  # any rearrangement of what is no layout any more
            like = Layout.of(place.shaped(0).shape)
            moved = rearranged(place.name, place.equation.params, like)
            return None if moved is None else [knowledge] * len(moved)
        layouts = rearranged(place.name, place.equation.params, knowledge.layout)
        if layouts is None:
            return None
        if isinstance(knowledge, View):
            return [knowledge.moved(layout) for layout in layouts]
        return [self._output(knowledge, layout) for layout in layouts]

    def _output(self, output: Output, layout: Layout | None) -> Knowledge:
        if layout is None:
            self.findings.readers[output.site].append("read")
            return Data(output.colour)
        return replace(output, layout=layout)

    def _barrier(self, place: _Place) -> list[Knowledge]:
        return list(place.known)

    def _stopped(self, place: _Place) -> list[Knowledge]:
        return [Data(place.colour)]

    def _iota(self, place: _Place) -> list[Knowledge]:
        return [Data(Colour.CONSTANT, iota=place.equation.params["dimension"])]

    def _equal(self, place: _Place) -> list[Knowledge] | None:
        for counter, other in ((0, 1), (1, 0)):
            knowledge = place.known[counter]
            axis = knowledge.iota if isinstance(knowledge, Data) else None
            if axis is None or not isinstance(place.known[other], Data):
                continue
            shape = place.shaped(other).shape
            if (not shape or shape[axis] == 1) and place.shaped(counter).shape[axis] == place.result.shape[
                axis
            ]:
                return [Data(place.colour, one_hot=axis)]
        return None

    # Arithmetic.

    def _scaled(self, place: _Place, operand: int, factor: int | None) -> list[Knowledge]:
        view = place.known[operand]
        assert isinstance(view, View)
        self.findings.scalings[place.key] = (operand, factor)
        layout = view.layout and view.layout.broadcast_to(place.result.shape)
        return [replace(view.moved(layout), scaled=True)]

    def _negated(self, place: _Place) -> list[Knowledge] | None:
        return self._scaled(place, 0, None) if place.views else None

    def _product(self, place: _Place) -> list[Knowledge] | None:
        if len(place.views) != 1 or (place.name == "div" and place.views == [1]):
            return None
        (operand,) = place.views
        view, other = place.known[operand], place.known[1 - operand]
        assert isinstance(view, View)
        if isinstance(other, Output):
            self.findings.readers[other.site].append("read")
        if place.shaped(1 - operand).size == 1 and place.result.size == place.shaped(operand).size:
            return self._scaled(place, operand, 1 - operand)
        if other.colour < Colour.EXAMPLE and not isinstance(other, Output):
            return [view.blurred("multiplied by an array")]
        self._use("scale", view, place.source)
        return [Data(place.colour)]

    def _sum(self, place: _Place) -> list[Knowledge] | None:
        if len(place.views) != 1:
            return None
        (operand,) = place.views
        view, other = place.known[operand], place.known[1 - operand]
        assert isinstance(view, View)
        negative = place.name == "sub" and operand == 1
        if isinstance(other, Output):
            found = self.findings.sites[other.site]
            fits = not negative and not view.scaled and found.kind != "embedding"
            fits = fits and view.levels == found.view.levels
            where = folded(found.geometry.roles, other, view, place.result.shape) if fits else None
            into = other.site if where is not None else ""
            use = self._use("bias", view, place.source, into=into, coordinates=where)
            self.findings.readers[other.site].append(use)
            return [Data(place.colour)]
        if other.colour < Colour.EXAMPLE:
            if negative:
                return self._scaled(place, operand, None)
            return [view.moved(view.layout and view.layout.broadcast_to(place.result.shape))]
        self._use("bias", view, place.source)
        return [Data(place.colour)]

    def _placed(self, place: _Place) -> list[Knowledge] | None:
        """A view beside data, or in some places of them; beside constants it stays linear in the parameter."""
        if len(place.views) != 1:
            return None
        view = place.known[place.views[0]]
        assert isinstance(view, View)
        others = [k for i, k in enumerate(place.known) if i != place.views[0]]
        if all(k.colour < Colour.EXAMPLE for k in others) and not any(isinstance(k, Output) for k in others):
            return [view.blurred(f"put together by `{place.name}`")]
        for knowledge in others:
            if isinstance(knowledge, Output):
                self.findings.readers[knowledge.site].append("read")
        self._use("bias", view, place.source)
        return [Data(place.colour)]

    # Sites.

    def _site(
        self,
        place: _Place,
        operand: int,
        kind: MatrixKind,
        geometry: Geometry,
        layout: Layout | None,
        rank: int = 0,
    ) -> list[Knowledge]:
        view, data = place.known[place.views[0]], place.known[operand]
        assert isinstance(view, View)
        if isinstance(data, Output):
            self.findings.readers[data.site].append("read")
        if layout is not None:
            stack = merged((*view.stack, *layout.axes[0]))
            layout = Layout(layout.offset, (stack, *layout.axes[1:])).merge()
        levels = tuple(Level(n, s) for n, s in zip(place.nest, view.levels, strict=True))
        self.findings.sites[place.key] = Found(
            place.key,
            kind,
            operand,
            geometry,
            layout,
            view,
            levels,
            place.shaped(operand),
            place.result,
            rank,
        )
        reason = "" if layout is not None else view.reason or "repeated along an axis that it is summed over"
        self._use("site", view, place.source, reason, site=place.key)
        return [Output(place.colour, place.key, Layout.of(place.result.shape))]

    def _dense(self, place: _Place) -> list[Knowledge] | None:
        if len(place.views) != 1:
            return None
        weight = place.views[0]
        view, data = place.known[weight], place.known[1 - weight]
        assert isinstance(view, View)
        params = place.equation.params
        geometry, layout = dense(params, [place.shaped(0).shape, place.shaped(1).shape], weight, view.layout)
        contracted = tuple(params["dimension_numbers"][0][1 - weight])
        one_hot = isinstance(data, Data) and contracted == (data.one_hot,)
        return self._site(place, 1 - weight, "embedding" if one_hot else "dense", geometry, layout)

    def _convolution(self, place: _Place) -> list[Knowledge] | None:
        if place.views != [1]:
            return None
        view = place.known[1]
        assert isinstance(view, View)
        shapes = [place.shaped(0).shape, place.shaped(1).shape]
        found = convolution(place.equation.params, shapes, view.layout)
        return None if found is None else self._site(place, 0, "convolution", *found)

    def _gather(self, place: _Place) -> list[Knowledge] | None:
        if place.views != [0]:
            return None
        view = place.known[0]
        assert isinstance(view, View)
        found = gathered(place.equation.params, place.shaped(0), place.shaped(1).shape, view.layout)
        if found is None:
            return None
        geometry, layout, rank = found
        return self._site(place, 1, "embedding", geometry, layout, rank)

    def _slice(self, place: _Place) -> list[Knowledge] | None:
        if place.views != [0]:
            return None
        view, sizes = place.known[0], place.equation.params["slice_sizes"]
        assert isinstance(view, View)
        indices, shape = place.equation.invars[1:], place.shaped(0).shape
        unknown = [not _jaxprs.literal(i) for i in indices]
        if not any(u and size != n for u, size, n in zip(unknown, sizes, shape, strict=True)):
            starts = [
                0 if size == n else min(max(int(i.val), 0), n - size)
                for i, size, n in zip(indices, sizes, shape, strict=True)
            ]
            ends = [start + size for start, size in zip(starts, sizes, strict=True)]
            return [view.moved(view.layout and view.layout.slice(starts, ends, [1] * len(sizes)))]
        found = sliced(sizes, place.shaped(0), unknown, view.layout)
        if found is None:
            return None
        geometry, layout, rank, axis = found
        return self._site(place, 1 + axis, "embedding", geometry, layout, rank)

    # Programs within the program.

    def _call(self, place: _Place) -> list[Knowledge]:
        checkpoint = _jaxprs.kind(place.equation) == "checkpoint"
        body = _jaxprs.checkpoint(place.equation).body if checkpoint else _jaxprs.call(place.equation)
        constants = [Data(Colour.FIXED)] * len(body.constants)
        results = self.walk(body.jaxpr, [*constants, *place.known], place.key, place.nest)
        if any(isinstance(result, View) and result.scaled for result in results):
            self.findings.entered.add(place.key)
        return results

    def _cond(self, place: _Place) -> list[Knowledge]:
        if place.known[0].colour == Colour.EXAMPLE:
            self.findings.selected.add(place.key)
        operands = [self._closed(k) for k in place.known[1:]]
        colour = place.known[0].colour
        results = []
        for number, branch in enumerate(_jaxprs.branches(place.equation)):
            constants = [Data(Colour.FIXED)] * len(branch.constants)
            results.append(
                self.walk(branch.jaxpr, [*constants, *operands], f"{place.key}.{number}", place.nest)
            )
        for knowledge in (k for result in results for k in result):
            self.leave(knowledge, place.source)
        return [Data(max(colour, *(k.colour for k in both))) for both in zip(*results, strict=True)]

    def _closed(self, knowledge: Knowledge) -> Knowledge:
        """What is known inside of a `scan` or `cond`: the output of a site is not followed there."""
        if isinstance(knowledge, Output):
            self.findings.readers[knowledge.site].append("read")
            return Data(knowledge.colour)
        return knowledge

    def _scan(self, place: _Place) -> list[Knowledge]:
        scan = _jaxprs.scan(place.equation)
        first, after = scan.num_constants, scan.num_constants + scan.num_carried
        inside = scan.body.jaxpr
        known = [self._closed(k) for k in place.known]
        kept = [inside.outvars[i] is inside.invars[first + i] for i in range(scan.num_carried)]
        for i in range(first, after):
            knowledge = known[i]
            if isinstance(knowledge, View) and not kept[i - first]:
                self._use("other", knowledge, place.source, "carried from step to step of a `scan`")
                known[i] = Data(knowledge.colour)
        entering: list[Knowledge] = [
            sliced_by_scan(k) if i >= after else shared_by_scan(k) for i, k in enumerate(known)
        ]
        constants = [Data(Colour.FIXED)] * len(scan.body.constants)
        colours = carried_colours(inside, [*constants, *entering], len(constants) + first, scan.num_carried)
        for i, colour in enumerate(colours):
            if isinstance(entering[first + i], Data):
                entering[first + i] = Data(colour)
        results = self.walk(inside, [*constants, *entering], place.key, (*place.nest, scan.length))
        leaving: list[Knowledge] = []
        for i, knowledge in enumerate(results):
            if i < scan.num_carried and kept[i]:
                leaving.append(known[first + i])
                continue
            self.leave(knowledge, place.source)
            leaving.append(Data(colours[i] if i < scan.num_carried else knowledge.colour))
        if any(isinstance(result, View) and result.scaled for result in leaving):
            self.findings.entered.add(place.key)
        return leaving
