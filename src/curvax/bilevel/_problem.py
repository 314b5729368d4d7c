"""A bilevel problem: what the inner level solves and what the outer level minimises."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array

from curvax.implicit._condition import AbstractCondition, FixedPoint, Minimum, Root


class Bilevel(eqx.Module):
    """min over φ of f(θ*(φ), φ), where θ*(φ) solves the inner problem.

    Args:
        inner: g(theta, phi, batch) -> scalar, minimised over theta; or `cx.FixedPoint(T)`, `cx.Root(F)`.
        outer: f(theta, phi, batch) -> scalar. `batch` is the outer level's own data.

    `batch` is None where no data is given. theta and phi are any pytrees; what is solved for and differentiated are
    their inexact arrays (`equinox.is_inexact_array`), all else passes through. Whether g is a mean or a sum over
    data is the caller's choice: the solution does not depend on it as long as regularisers are scaled alike.

    Raises:
        TypeError: `inner` or `outer` is not callable.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        problem = cx.Bilevel(
            inner=lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
            outer=lambda w, lam, b: jnp.mean((b[0] @ w - b[1]) ** 2),
        )
        ```
    """

    inner: Callable[..., Array] | AbstractCondition
    outer: Callable[..., Array]

    def __check_init__(self) -> None:
        if not isinstance(self.inner, AbstractCondition) and not callable(self.inner):
            raise TypeError(
                "`inner` of `Bilevel` must be a function g(theta, phi, batch) -> scalar, `cx.FixedPoint` or `cx.Root`, "
                f"got {type(self.inner).__name__}."
            )
        if not callable(self.outer):
            raise TypeError(
                "`outer` of `Bilevel` must be a function f(theta, phi, batch) -> scalar, got "
                f"{type(self.outer).__name__}."
            )

        inner: Any = self.inner
        check_arguments(inner.fn if isinstance(inner, FixedPoint | Root) else inner, "inner")
        check_arguments(self.outer, "outer")

    @property
    def condition(self) -> AbstractCondition:
        """The inner level as a condition."""
        inner: Any = self.inner
        return inner if isinstance(inner, AbstractCondition) else Minimum(inner)


def check_arguments(fn: Callable, name: str) -> None:
    """Refuse a function that cannot take (theta, phi, batch); what has no signature passes."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(
            f"`{name}` is called as {name}(theta, phi, batch), also where there is no data (batch is then None); its "
            f"signature is {signature}."
        ) from error
