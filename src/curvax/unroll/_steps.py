"""Inner solver: steps of an Optax optimiser."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from curvax.unroll._half import HalfPrecision
from curvax.unroll._schedule import plain_integer


class Steps(eqx.Module):
    """`num_steps` steps of an Optax optimiser on the inner loss, from the start that the caller gives.

    Args:
        optimizer: An `optax.GradientTransformation`, with whatever state. Or a function phi -> transformation where
            the optimiser's own settings are hyperparameters, `cx.Steps(lambda phi: optax.adam(phi["lr"]), 100)`; or a
            function (phi, step) -> transformation where they differ from step to step,
            `cx.Steps(lambda phi, step: optax.sgd(phi["lr"][step], phi["momentum"][step]), 100)`, with the number of
            the step, from 0, as an integer array. Such settings act through the path: only rules that follow it see
            them (`cx.Unrolled()`).
        num_steps: Number of steps, at least 1; at most so many where there is a `tolerance`.
        tolerance: Stop after the first step that starts from an inner gradient of at most this norm. None: never.
            It asks for nothing: a path that does not get there ends after `num_steps`.
        half: How the inner gradients are computed in half precision; None: not at all.
        start: A function phi -> θ at the start, where that is a hyperparameter as well, `lambda phi: phi["start"]`;
            `theta0` then gives its structure and shapes alone. None: `theta0`.

    With data given as a sampler every step draws its own batch. `value=`, `grad=` and `value_fn=` are handed to the
    optimiser. Its square roots have the derivative 0 at 0, so that parameters whose gradient is always zero leave
    the hypergradients of Adam finite, and exact.

    Raises:
        ValueError: `num_steps` is not a positive integer, or `tolerance` is negative.
        TypeError: `optimizer` is neither a transformation nor a function, `half` no `cx.HalfPrecision`, `start` no
            function.

    Cost: one inner gradient and one optimiser update a step, and the value of the loss where the optimiser uses it.

    Example:
        ```python
        import optax, curvax as cx

        solver = cx.Steps(optax.adam(1e-2), num_steps=200)
        ```
    """

    optimizer: optax.GradientTransformation | Callable[..., optax.GradientTransformation]
    num_steps: int = eqx.field(static=True, converter=plain_integer)
    tolerance: Float[Array, ""] | float | None = None
    half: HalfPrecision | None = eqx.field(default=None, kw_only=True)
    start: Callable[[PyTree], PyTree] | None = eqx.field(default=None, kw_only=True)

    def __check_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            swapped = callable(self.num_steps) or isinstance(self.num_steps, optax.GradientTransformation)
            found = "an optimiser: are the arguments swapped?" if swapped else f"{self.num_steps!r}."
            raise ValueError(f"`num_steps` of `Steps` must be an integer of at least 1, got {found}")
        if not isinstance(self.optimizer, optax.GradientTransformation) and not callable(self.optimizer):
            raise TypeError(
                "`optimizer` of `Steps` must be an optax.GradientTransformation or a function phi -> transformation, "
                f"got {type(self.optimizer).__name__}."
            )

        if self.tolerance is not None and (
            isinstance(self.tolerance, bool | str)
            or jnp.ndim(self.tolerance)
            or not _nonnegative(self.tolerance)
        ):
            raise ValueError(
                f"`tolerance` of `Steps` must be None or a number of at least 0, got {self.tolerance!r}."
            )

        if self.half is not None and not isinstance(self.half, HalfPrecision):
            raise TypeError(
                "`half` of `Steps` must be `cx.HalfPrecision(jnp.bfloat16)` or None, got "
                f"{getattr(self.half, '__name__', type(self.half).__name__)}."
            )

        if self.start is not None and not callable(self.start):
            raise TypeError(
                "`start` of `Steps` must be a function phi -> θ or None, got "
                f"{type(self.start).__name__}. A start that is no hyperparameter is `theta0`."
            )

        is_function = not isinstance(self.optimizer, optax.GradientTransformation)
        if is_function and (getattr(self.optimizer, "__module__", None) or "").startswith("optax"):
            name = getattr(self.optimizer, "__name__", "adam")
            raise TypeError(
                f"`optimizer` of `Steps` is the function `optax.{name}` itself: call it, `optax.{name}(1e-2)`, or "
                f"write `lambda phi: optax.{name}(phi[...])` where its settings are hyperparameters."
            )
        if is_function and not any(_takes(self.optimizer, count) for count in (1, 2)):
            raise TypeError(
                "`optimizer` of `Steps` must be a function of phi, or of phi and the number of the step; this takes "
                f"{inspect.signature(self.optimizer)}."
            )

    def transformation(self, phi: PyTree, count: Int[Array, ""]) -> optax.GradientTransformationExtraArgs:
        """The optimiser at these hyperparameters, in the step of this number."""
        optimizer: Any = self.optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(phi, count) if _takes_two(optimizer) else optimizer(phi)
            if not isinstance(optimizer, optax.GradientTransformation):
                raise TypeError(
                    "`optimizer` of `Steps` was called with phi and must return an optax.GradientTransformation, got "
                    f"{type(optimizer).__name__}."
                )
        return optax.with_extra_args_support(optimizer)


def _nonnegative(value: Any) -> bool:
    known = isinstance(value, int | float | np.ndarray | np.generic)
    return not known or float(value) >= 0


def _takes(fn: Callable, count: int) -> bool:
    """Whether a function can be called with so many arguments, as far as that is known."""
    try:
        inspect.signature(fn).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _takes_two(fn: Callable) -> bool:
    """Whether a function has two positional arguments without a default."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) == 2
