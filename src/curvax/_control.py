"""Control flow that stays lazy under `vmap`."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

_T = TypeVar("_T")


def run_if(needed: Bool[Array, ""], compute: Callable[[_T], _T], otherwise: _T) -> _T:
    """`compute(otherwise)` if `needed`, else `otherwise`, at no cost.

    A loop of at most one turn instead of `lax.cond`: under `vmap` a `cond` becomes a select that
    always computes both sides, a loop runs only while some example needs it.
    """
    return jax.lax.while_loop(
        lambda c: c[0], lambda c: (jnp.zeros_like(c[0]), compute(c[1])), (needed, otherwise)
    )[1]
