"""What a state is before the first batch, made without a compiler where that can be."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def full(shape: tuple[int, ...], value: float, dtype: Any) -> Array:
    """An array of equal entries.

    Outside of `jit` NumPy fills it: JAX compiles a program for every shape, and the many of a state take longer than a
    step does.
    """
    if _is_traced():
        return jnp.full(shape, value, dtype)
    return jnp.array(np.full(shape, value, jax.dtypes.canonicalize_dtype(dtype)))


def identities(stack: int, size: int, dtype: Any) -> Float[Array, "stack size size"]:
    """The identity, for each member of a stack."""
    if _is_traced():
        return jnp.broadcast_to(jnp.eye(size, dtype=dtype), (stack, size, size))
    eye = np.eye(size, dtype=jax.dtypes.canonicalize_dtype(dtype))
    return jnp.array(np.broadcast_to(eye, (stack, size, size)))


def _is_traced() -> bool:
    """Whether arrays that are made now are part of a program."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
