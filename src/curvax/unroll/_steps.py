"""Inner solver: a fixed number of steps of an Optax optimiser."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions


class Steps(eqx.Module):
    """`num_steps` steps of an Optax optimiser on the inner loss, from the start that the caller gives.

    Args:
        optimizer: An `optax.GradientTransformation`, or a function phi -> transformation where the optimiser's own
            settings are hyperparameters: `cx.Steps(lambda phi: optax.sgd(phi["lr"]), 100)`. Such settings act
            through the path, so only `cx.Unrolled()` sees them.
        num_steps: Number of steps, at least 1.

    With data given as a sampler every step draws its own batch.

    Raises:
        ValueError: `num_steps` is not a positive integer.
        TypeError: `optimizer` is neither a transformation nor a function.

    Cost: one inner gradient and one optimiser update a step.

    Example:
        ```python
        import optax, curvax as cx

        solver = cx.Steps(optax.adam(1e-2), num_steps=200)
        ```
    """

    optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
    num_steps: int = eqx.field(static=True)

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

        is_function = not isinstance(self.optimizer, optax.GradientTransformation)
        if is_function and (getattr(self.optimizer, "__module__", None) or "").startswith("optax"):
            name = getattr(self.optimizer, "__name__", "adam")
            raise TypeError(
                f"`optimizer` of `Steps` is the function `optax.{name}` itself: call it, `optax.{name}(1e-2)`, or "
                f"write `lambda phi: optax.{name}(phi[...])` where its settings are hyperparameters."
            )

    def transformation(self, phi: PyTree) -> optax.GradientTransformationExtraArgs:
        """The optimiser at these hyperparameters."""
        optimizer: Any = self.optimizer
        if not isinstance(optimizer, optax.GradientTransformation):
            optimizer = optimizer(phi)
            if not isinstance(optimizer, optax.GradientTransformation):
                raise TypeError(
                    "`optimizer` of `Steps` was called with phi and must return an optax.GradientTransformation, got "
                    f"{type(optimizer).__name__}."
                )
        return optax.with_extra_args_support(optimizer)

    def run(
        self,
        loss: Callable[[PyTree[Array], PyTree], Array],
        theta: PyTree[Array],
        transformation: optax.GradientTransformationExtraArgs,
        batch: Callable[[Array | None], PyTree],
        key: Array | None,
    ) -> PyTree[Array]:
        """θ after all steps.

        Args:
            loss: (theta, batch) -> scalar.
            theta: Start; inexact arrays.
            transformation: What `self.transformation(phi)` returned.
            batch: key ↦ the batch of one step.
            key: Random key split over the steps, or None where nothing is drawn.
        """

        def step(
            carry: tuple[PyTree[Array], Any], step_key: Array | None
        ) -> tuple[tuple[PyTree[Array], Any], None]:
            point, state = carry
            data = batch(step_key)
            # The data may hold more than arrays, which a trace would not leave as they are.
            gradient = with_fast_contractions(lambda p: jax.value_and_grad(loss)(p, data))
            value, grad = gradient(point)
            updates, state = transformation.update(
                grad, state, point, value=value, grad=grad, value_fn=lambda p: loss(p, data)
            )
            # Optax promotes scalars of another dtype: keep the carry's.
            moved = jax.tree.map(lambda p, u: p + u.astype(p.dtype), point, updates)
            return (moved, state), None

        init = (theta, jax.tree.map(jnp.asarray, transformation.init(theta)))
        init = _stable_carry(step, init, None if key is None else key)
        keys = None if key is None else jax.random.split(key, self.num_steps)
        (theta, _), _ = jax.lax.scan(step, init, keys, length=self.num_steps)
        return theta


def _stable_carry(step: Callable, init: Any, key: Array | None) -> Any:
    """The start of the scan in the dtypes that a step returns (a schedule may widen an optimiser's state)."""
    after, _ = jax.eval_shape(step, init, key)
    return jax.tree.map(lambda a, b: a.astype(b.dtype) if a.dtype != b.dtype else a, init, after)
