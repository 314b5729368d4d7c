"""Data of the two levels: pytrees of arrays, or samplers that draw from a key."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, PyTree


class Minibatches(eqx.Module):
    """A sampler: key ↦ a uniformly drawn minibatch, without replacement within the batch.

    Args:
        data: Pytree of arrays that share their first axis, the examples.
        batch_size: Number of examples in a batch, between 1 and the number of examples.

    Any function key -> batch can be used in its place; this one holds its data as arrays, so that they are arguments of
    the compiled program and not constants in it.

    Raises:
        ValueError: The leading axes differ, there is no data, or `batch_size` is out of range.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        sampler = cx.Minibatches((jnp.ones((100, 3)), jnp.ones(100)), batch_size=10)
        inputs, targets = sampler(jax.random.key(0))
        ```
    """

    data: PyTree[Array]
    batch_size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        lengths = {leaf.shape[0] if getattr(leaf, "ndim", 0) else -1 for leaf in jax.tree.leaves(self.data)}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                "`data` of `Minibatches` must be a pytree of arrays with one common first axis, got first axes "
                f"{sorted(lengths)} (-1: no axis)."
            )
        (length,) = lengths
        if (
            isinstance(self.batch_size, bool)
            or not isinstance(self.batch_size, int)
            or not 1 <= self.batch_size <= length
        ):
            raise ValueError(
                f"`batch_size` of `Minibatches` must be an integer from 1 to {length}, got {self.batch_size!r}."
            )

    def __call__(self, key: Array) -> PyTree[Array]:
        """Draw one batch."""
        length = jax.tree.leaves(self.data)[0].shape[0]
        rows = jax.random.choice(key, length, (self.batch_size,), replace=False)
        return jax.tree.map(lambda leaf: leaf[rows], self.data)


def is_sampler(data: Any) -> bool:
    """Whether data is drawn from a key instead of given."""
    return callable(data)


def draw(data: Any, key: Array | None) -> PyTree:
    """One batch: the data themselves, or what the sampler draws."""
    return data(key) if callable(data) else data
