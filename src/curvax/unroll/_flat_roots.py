"""Square roots whose derivative at zero is zero.

Adam divides by √ν + ε, and ν = 0 where a gradient has been zero all along (a pixel that is black in every image). The
chain rule then multiplies √′(0) = ∞ by zero. The update is m / (|g| c + ε) there, with m = 0 as well, so that the
derivative of the denominator plays no part and any finite √′(0) gives the exact derivative m′ / ε.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array


@jax.custom_jvp
def _root(x: Array) -> Array:
    return jnp.sqrt(x)


@_root.defjvp
def _root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (direction,) = primals, tangents
    root = _root(x)
    # Selected twice, since a derivative of this one must not divide by zero either.
    slope = jnp.where(x == 0, 0, 0.5 / jnp.where(x == 0, 1, root))
    return root, slope * direction


def with_flat_roots(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of arrays, with √′(0) = 0 wherever it takes a square root outside of loops."""

    def call(*args: Any) -> Any:
        closed, like = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = _evaluate(closed, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    return call


def _evaluate(closed: Any, *args: Any) -> list[Any]:
    """The program, equation by equation; nested `jit` and `cond` are entered."""
    values = dict(zip([*closed.jaxpr.constvars, *closed.jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in closed.jaxpr.eqns:
        operands, params = [read(v) for v in equation.invars], equation.params
        match equation.primitive.name:
            case "sqrt":
                results = [_root(*operands)]
            case "pow" if not jnp.issubdtype(operands[1].dtype, jnp.inexact):
                # JAX refuses the derivative of a power with integers under strict promotion of dtypes.
                results = [jax.lax.pow(operands[0], operands[1].astype(operands[0].dtype))]
            case "jit" | "pjit":
                results = _evaluate(params["jaxpr"], *operands)
            case "cond":
                branches = [lambda *args, b=branch: _evaluate(b, *args) for branch in params["branches"]]
                results = jax.lax.switch(operands[0], branches, *operands[1:])
            case _:
                with equation.ctx.manager:
                    results = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
                results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return [read(v) for v in closed.jaxpr.outvars]
