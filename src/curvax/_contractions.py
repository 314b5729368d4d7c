"""The matrix products inside a program, put in the order in which the CPU does them fast.

Reverse mode turns `x @ w` into a contraction over the rows of both x and the cotangent. XLA has no kernel for it on
CPU that keeps up with the one for `x @ w`: inside a loop the pair takes 1.4 to 3 times as long as with the cotangent,
if that is the narrow one, transposed first, which costs next to nothing (measured for 5 to 60 000 rows).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# At most so many columns, and at most half of those of the other factor: with more of them the transposed copy costs
# what the better kernel saves.
MOST_COLUMNS = 64


def with_fast_contractions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, with its narrow contractions over rows transposed; `fn` itself where that does not pay.

    For functions of arrays that are called in loops: `fn` is traced once more to look for them. Functions inside loops
    of `fn`, and inside of a `jit` with options, are left as they are; names of scopes are lost.
    """

    def call(*args: Any) -> Any:
        if jax.default_backend() != "cpu":
            return fn(*args)
        closed, like = jax.make_jaxpr(fn, return_shape=True)(*args)
        if not _any_narrow(closed.jaxpr):
            results = core.jaxpr_as_fun(closed)(*jax.tree.leaves(args))
        else:
            results = _evaluate(closed, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(like), results)

    return call


def _is_narrow(equation: Any) -> bool:
    """Whether this is a contraction of a narrow first factor with another one, both matrices, over the rows."""
    if equation.primitive.name != "dot_general" or equation.params.get("out_sharding") is not None:
        return False
    left, right = (v.aval.shape for v in equation.invars)
    (over_left, over_right), (batched, _) = equation.params["dimension_numbers"]
    if batched or len(left) != 2 or len(right) != 2 or tuple(over_left) != (0,) or len(over_right) != 1:
        return False
    return left[1] <= MOST_COLUMNS and 2 * left[1] <= right[1 - over_right[0]]


def _inlined(equation: Any) -> Any:
    """The program of a nested `jit` without options, None for anything else."""
    if equation.primitive.name not in ("jit", "pjit"):
        return None
    shardings = [*equation.params["in_shardings"], *equation.params["out_shardings"]]
    plain = all(type(sharding).__name__ == "UnspecifiedValue" for sharding in shardings)
    return equation.params["jaxpr"] if plain and not equation.params["compiler_options_kvs"] else None


def _any_narrow(jaxpr: Any) -> bool:
    nested = [inner for inner in map(_inlined, jaxpr.eqns) if inner is not None]
    return any(map(_is_narrow, jaxpr.eqns)) or any(_any_narrow(inner.jaxpr) for inner in nested)


def _evaluate(closed: Any, args: list[Any]) -> list[Any]:
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    last_use = {v: i for i, e in enumerate(jaxpr.eqns) for v in e.invars if not isinstance(v, core.Literal)}
    last_use |= dict.fromkeys((v for v in jaxpr.outvars if not isinstance(v, core.Literal)), len(jaxpr.eqns))
    for i, equation in enumerate(jaxpr.eqns):
        operands, inner = [read(v) for v in equation.invars], _inlined(equation)
        if inner is not None and _any_narrow(inner.jaxpr):
            results = _evaluate(inner, operands)
        elif _is_narrow(equation):
            results = [_contract(*operands, **equation.params)]
        else:
            with equation.ctx.manager:
                results = equation.primitive.bind(
                    *operands, **equation.primitive.get_bind_params(equation.params)
                )
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
        for v in {v for v in equation.invars if not isinstance(v, core.Literal)}:
            if last_use[v] == i:  # what is not needed any more takes no memory where nothing is compiled
                del values[v]
    return [read(v) for v in jaxpr.outvars]


def _contract(left: Any, right: Any, *, dimension_numbers: Any, **options: Any) -> Any:
    (_, over_right), _ = dimension_numbers
    # The barriers keep XLA from folding the transposition back into the product, and the one after it.
    first = jax.lax.optimization_barrier(left.T)
    options.pop("out_sharding", None)
    return jax.lax.optimization_barrier(
        jax.lax.dot_general(first, right, (((1,), over_right), ((), ())), **options)
    )
