"""Functions of a few numbers, compiled as a whole, and differentiable all the same."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from curvax._control import one_kernel

_T = TypeVar("_T")


def scalars(fn: Callable[..., _T]) -> Callable[..., _T]:
    """`one_kernel(fn)`; its derivative is that of `fn`, which the loop in there does not have in reverse.

    Args:
        fn: A function of scalars and tiny arrays.
    """
    call = jax.custom_jvp(one_kernel(fn))

    @call.defjvp
    def derivative(primals: Any, tangents: Any) -> Any:
        return jax.jvp(fn, primals, tangents)

    return call
