"""Runs a model's program with taps at its sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax.capture import _jaxprs
from curvax.capture._finder import Findings
from curvax.capture._site import Site


@dataclass(frozen=True)
class Plan:
    """What is done where: equations by their path in the program.

    Attributes:
        sites: At which taps are, and the number of the operand that is the data.
        scalings: Operands that are a view and the scalar that it is multiplied with.
        passing: Operand from which the scalar factor of a view passes on.
        entered: Calls with something of this in them.
        selected: `cond`s of which all branches are computed, because their choice depends on the example.
    """

    sites: Mapping[str, tuple[Site, int]]
    scalings: Mapping[str, tuple[int, int | None]]
    passing: Mapping[str, int]
    entered: frozenset[str]
    selected: frozenset[str]

    @classmethod
    def of(cls, findings: Findings, sites: Sequence[Site]) -> "Plan":
        """The plan for these matrix sites."""
        tapped = {site.key: (site, findings.sites[site.key].operand) for site in sites}
        scaled = any(findings.sites[site.key].view.scaled for site in sites)
        entered = set(findings.entered) if scaled else set()
        for key in tapped:
            parts = key.split("/")[1:-1]
            path = ""
            for part in parts:
                path += "/" + part
                entered |= {path, path.rsplit(".", 1)[0]}
        return cls(
            tapped,
            findings.scalings if scaled else {},
            findings.passing if scaled else {},
            frozenset(entered),
            frozenset(findings.selected),
        )


@dataclass(frozen=True)
class Taps:
    """What taps need.

    Attributes:
        slots: For each site, zeros like its statistic; a leading axis for every scan around that stacks it.
        aux: For each site, what the statistic needs, likewise.
        live: Whether the branch that is being run is taken; None outside of any.
        token: Anything that is there for every example.
    """

    slots: Mapping[str, PyTree]
    aux: Mapping[str, PyTree]
    live: Array | None
    token: Array


jax.tree_util.register_dataclass(Taps, ["slots", "aux", "live", "token"], [])

Tap = Callable[[Site], Callable[..., Array]]
# The scalar factors of the views among some values.
_Scales = Sequence[Array | None]


def run(plan: Plan, program: _jaxprs.Program, values: Sequence[Array], taps: Taps, tap: Tap) -> list[Array]:
    """The results of a program, its operands given, with taps at the sites of the plan."""
    results, _ = _Runner(plan, tap).run(program, values, [None] * len(values), taps, "", 0)
    return results


def _inside(by_key: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {key: value for key, value in by_key.items() if key.startswith((path + "/", path + "."))}


@dataclass(frozen=True)
class _Runner:
    plan: Plan
    tap: Tap

    def run(
        self,
        program: _jaxprs.Program,
        values: Sequence[Array],
        scales: _Scales,
        taps: Taps,
        path: str,
        depth: int,
    ) -> tuple[list[Array], list[Array | None]]:
        """Results, and the scalar factors of those that are views."""
        jaxpr = program.jaxpr
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*program.constants, *values], strict=True))
        factors = {v: s for v, s in zip(jaxpr.invars, scales, strict=True) if s is not None}
        read = lambda atom: atom.val if _jaxprs.literal(atom) else known[atom]
        factor = lambda atom: None if _jaxprs.literal(atom) else factors.get(atom)
        for number, equation in enumerate(jaxpr.eqns):
            key = f"{path}/{number}:{equation.primitive.name}"
            operands, factored = [read(v) for v in equation.invars], [factor(v) for v in equation.invars]
            if key in self.plan.entered:
                results, after = self._enter(equation, operands, factored, taps, key, depth)
            else:
                results = _jaxprs.bind(equation, operands)
                after = self._scales(key, operands, factored, len(results))
            if key in self.plan.sites:
                results = [self._tapped(key, results[0], operands, factored, taps)]
            known.update(zip(equation.outvars, results, strict=True))
            factors.update({v: s for v, s in zip(equation.outvars, after, strict=True) if s is not None})
        return [read(v) for v in jaxpr.outvars], [factor(v) for v in jaxpr.outvars]

    def _tapped(
        self, key: str, result: Array, operands: Sequence[Array], factored: _Scales, taps: Taps
    ) -> Array:
        site, data = self.plan.sites[key]
        scale = next((f for f in factored if f is not None), None)
        x = jnp.asarray(operands[data])
        return self.tap(site)(result, x, taps.slots[key], taps.aux.get(key), scale, taps.live, taps.token)

    def _scales(
        self, key: str, operands: Sequence[Array], factored: _Scales, count: int
    ) -> list[Array | None]:
        """The factors of the views among the results of an equation."""
        if key in self.plan.scalings:
            view, scalar = self.plan.scalings[key]
            before = factored[view]
            if scalar is None:
                step = -jnp.ones((), operands[view].dtype)
            else:
                step = jnp.reshape(operands[scalar], ()).astype(operands[view].dtype)
                step = 1 / step if ":div" in key.rsplit("/", 1)[1] else step
            return [step if before is None else before.astype(step.dtype) * step] * count
        if key in self.plan.passing:
            return (
                list(factored) if len(factored) == count > 1 else [factored[self.plan.passing[key]]] * count
            )
        return [None] * count

    def _enter(
        self, equation: Any, operands: list[Array], factored: _Scales, taps: Taps, key: str, depth: int
    ) -> tuple[list[Array], list[Array | None]]:
        kind = _jaxprs.kind(equation)
        taps = replace(taps, slots=_inside(taps.slots, key), aux=_inside(taps.aux, key))
        if kind == "call":
            return self.run(_jaxprs.call(equation), operands, factored, taps, key, depth)
        if kind == "checkpoint":
            return self._checkpoint(equation, operands, factored, taps, key, depth)
        if kind == "scan":
            return self._scan(equation, operands, factored, taps, key, depth)
        return self._cond(equation, operands, factored, taps, key, depth)

    def _checkpoint(
        self, equation: Any, operands: list[Array], factored: _Scales, taps: Taps, key: str, depth: int
    ) -> tuple[list[Array], list[Array | None]]:
        parts = _jaxprs.checkpoint(equation)
        body = lambda operands, factored, taps: self.run(parts.body, operands, factored, taps, key, depth)
        again = jax.checkpoint(body, policy=parts.policy, prevent_cse=parts.prevent_cse)
        return again(operands, list(factored), taps)

    def _scan(
        self, equation: Any, operands: list[Array], factored: _Scales, taps: Taps, key: str, depth: int
    ) -> tuple[list[Array], list[Array | None]]:
        scan = _jaxprs.scan(equation)
        first, after = scan.num_constants, scan.num_constants + scan.num_carried
        stacked = {k for k in taps.slots if self.plan.sites[k][0].levels[depth].stacked}
        part = lambda by_key, which: {k: v for k, v in by_key.items() if (k in stacked) == which}
        scanned = part(taps.slots, True), part(taps.aux, True)
        shared = part(taps.slots, False), part(taps.aux, False)

        def step(carry: list[Array], xs: Any) -> tuple[list[Array], list[Array]]:
            slices, (slots, aux) = xs
            inner = replace(taps, slots=shared[0] | slots, aux=shared[1] | aux)
            values = [*operands[:first], *carry, *slices]
            results, _ = self.run(scan.body, values, factored, inner, key, depth + 1)
            return results[: scan.num_carried], results[scan.num_carried :]

        carry, stacks = jax.lax.scan(
            step,
            operands[first:after],
            (operands[after:], scanned),
            length=scan.length,
            reverse=scan.reverse,
            unroll=scan.unroll,
        )
        # A scaled view that is carried around unchanged is a view still.
        kept = [*factored[first:after], *[None] * len(stacks)]
        return [*carry, *stacks], kept

    def _cond(
        self, equation: Any, operands: list[Array], factored: _Scales, taps: Taps, key: str, depth: int
    ) -> tuple[list[Array], list[Array | None]]:
        index, *rest = operands
        programs = _jaxprs.branches(equation)

        def branch(number: int, live: Array | None) -> Callable[[list[Array], Taps], list[Array]]:
            path = f"{key}.{number}"

            def body(rest: list[Array], taps: Taps) -> list[Array]:
                return self.run(programs[number], rest, factored[1:], replace(taps, live=live), path, depth)[
                    0
                ]

            return body

        if key not in self.plan.selected:
            results = jax.lax.switch(index, [branch(i, taps.live) for i in range(len(programs))], rest, taps)
        else:
            # What `vmap` makes of it, but with slots that are not repeated for every example.
            which = jnp.clip(index.astype(jnp.int32), 0, len(programs) - 1)
            candidates = []
            for number in range(len(programs)):
                taken = which == number
                live = taken if taps.live is None else taps.live & taken
                safe = [_only_if(taken, operand) for operand in rest]
                candidates.append(branch(number, live)(safe, taps))
            results = [jax.lax.select_n(which, *both) for both in zip(*candidates, strict=True)]
        return list(results), [None] * len(results)


def _only_if(taken: Array, operand: Array) -> Array:
    """A value through which no derivative flows back from a branch that is not taken, not even a NaN."""
    if not jnp.issubdtype(operand.dtype, jnp.inexact):
        return operand
    return jnp.where(taken, operand, jax.lax.stop_gradient(operand))
