"""How JAX writes programs down. It changes from version to version; nothing else in the room knows.

Written for JAX 0.10, 0.11 (which took `num_consts` and `num_carry` from `scan` and made `Jaxpr` and `ClosedJaxpr` one
class) and 0.12 (which can write `jax.checkpoint` as a primitive that wraps another one).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.extend import core

_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_CHECKPOINTS = {"checkpoint", "remat", "remat2"}
# Whose lines of a model's stack trace are not the model's.
_LIBRARIES = ("jax", "jaxlib", "flax", "equinox", "lineax", "optimistix", "optax", "diffrax", "curvax")


class Program(NamedTuple):
    """A program and the values of its constants."""

    jaxpr: Any
    constants: Sequence[Any]


class Scan(NamedTuple):
    """The parts of a `scan`: its operands are constants, then the carry, then what is scanned over."""

    body: Program
    num_constants: int
    num_carried: int
    length: int
    reverse: bool
    unroll: int | bool


class Checkpoint(NamedTuple):
    """The parts of a `jax.checkpoint`."""

    body: Program
    policy: Any
    prevent_cse: Any


Kind = Literal["call", "checkpoint", "scan", "cond", "while", "other"]


def trace(function: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of a function of pytrees, over the leaves of its arguments, and the structure of what it returns."""
    closed, like = jax.make_jaxpr(function, return_shape=True)(*args)
    return as_program(closed), like


def as_program(jaxpr: Any) -> Program:
    """An open program, and its constants if it has any."""
    if hasattr(jaxpr, "jaxpr") and hasattr(jaxpr, "consts"):
        return Program(jaxpr.jaxpr, jaxpr.consts)
    return Program(jaxpr, ())


def literal(atom: Any) -> bool:
    """Whether an operand is a number that stands in the program."""
    return isinstance(atom, core.Literal)


def kind(equation: Any) -> Kind:
    """What an equation is made of, as far as programs inside of it go."""
    name = equation.primitive.name
    if name in _CALLS:
        return "call"
    if name in _CHECKPOINTS or _wrapped_checkpoint(equation) is not None:
        return "checkpoint"
    return name if name in ("scan", "cond", "while") else "other"


def _wrapped_checkpoint(equation: Any) -> dict[str, Any] | None:
    """The parameters of a checkpoint that is wrapped in another primitive."""
    if equation.primitive.name != "call_hi_primitive":
        return None
    params = getattr(equation.params.get("_prim"), "params", {})
    return params if {"jaxpr", "policy", "prevent_cse"} <= set(params) else None


def call(equation: Any) -> Program:
    """The program that a call runs."""
    params = equation.params
    return as_program(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def checkpoint(equation: Any) -> Checkpoint:
    """The parts of a checkpoint."""
    params = _wrapped_checkpoint(equation) or equation.params
    return Checkpoint(as_program(params["jaxpr"]), params["policy"], params["prevent_cse"])


def scan(equation: Any) -> Scan:
    """The parts of a scan."""
    params = equation.params
    if "num_consts" in params:
        num_constants, num_carried = params["num_consts"], params["num_carry"]
    else:
        constants, carried, _ = params["ft_in"].unpack()
        num_constants, num_carried = len(constants), len(carried)
    body = as_program(params["jaxpr"])
    return Scan(body, num_constants, num_carried, params["length"], params["reverse"], params["unroll"])


def branches(equation: Any) -> list[Program]:
    """The programs that a `cond` chooses from by its first operand."""
    return [as_program(branch) for branch in equation.params["branches"]]


def bind(equation: Any, operands: Sequence[Any]) -> list[Any]:
    """Do what an equation does; custom derivatives and batching rules stay what they are."""
    params = equation.primitive.get_bind_params(equation.params)
    with equation.ctx.manager:
        results = equation.primitive.bind(*operands, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def source(equation: Any) -> str:
    """The file and line of the model that an equation comes from; empty where JAX does not know."""
    traceback = getattr(equation.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        parts = Path(frame.file_name).parts
        if not any(part in _LIBRARIES for part in parts[:-1]):
            return f"{parts[-1]}:{frame.line_num}" if parts else ""
    return ""
