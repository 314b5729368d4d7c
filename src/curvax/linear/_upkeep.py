"""A preconditioner that is kept while the curvature moves, and built anew when it has aged."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import stop_gradient, tree_zeros_like
from curvax.linear._recycle import FEWEST_DECADES


class Upkeep(eqx.Module):
    """A preconditioner for many solves with a curvature that moves: built once, used again, renewed when due.

    For `cx.Implicit(preconditioner=...)`: the operator travels in the `state` of `cx.hypergradient` (and in that of
    `cx.minimise`), and is built anew at the first inner solution that a call works with when

    - there is none yet, or the call before failed,
    - it has served `every` calls, or
    - a call has spent more than `growth` times as many products per decade of residual as the best one since it was
      built.

    Without a state, under Optimistix's `adjoint=` and in `cx.solution_map`, it is built for every derivative.

    Args:
        build: (theta, args) -> a positive definite Lineax operator ≈ A⁻¹ whose arrays have fixed shapes, args being
            (phi, batch): `cx.linear.nystrom`, `cx.linear.jacobi` of the curvature at theta, or your own.
        every: Calls after which it is renewed, at least 1; None for never.
        growth: Factor by which the effort may grow, above 1; None for any. The effort is known only where
            conjugate gradients of this library solve.

    Raises:
        ValueError: `every` or `growth` is out of range, or both are None.

    Cost: what `build` costs, whenever it is due (its products are not counted in the statistics); the arrays of the
        operator in the state.

    Example:
        ```python
        import jax, jax.numpy as jnp, curvax as cx

        def loss(w, lam, _):
            return jnp.sum(jnp.logspace(0, -4, 50) * (w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2)

        def build(w, args):
            curvature = cx.operators.hessian(loss, w, *args)
            return cx.linear.nystrom(curvature, 15, damping=0.0, key=jax.random.key(0))

        rule = cx.Implicit(preconditioner=cx.linear.Upkeep(build, every=20))
        ```

    Source: J. L. Morales, J. Nocedal, "Automatic preconditioning by limited memory quasi-Newton updating", 2000, for
        preconditioners that outlive their matrix; the test of age is ours.
    """

    build: Callable[[PyTree, Any], lx.AbstractLinearOperator]
    every: int | None = None
    growth: float | None = 1.5

    def __check_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(
                "`build` of `Upkeep` must be a function (theta, args) -> operator, got "
                f"{type(self.build).__name__}. An operator that never changes is a `preconditioner` by itself."
            )
        if self.every is not None and (
            isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1
        ):
            raise ValueError(
                f"`every` of `Upkeep` must be None or an integer of at least 1, got {self.every!r}."
            )
        if self.growth is not None and not self.growth > 1:
            raise ValueError(f"`growth` of `Upkeep` must be None or above 1, got {self.growth!r}.")
        if self.every is None and self.growth is None:
            raise ValueError(
                "`Upkeep` needs `every` or `growth`: with neither the operator would never be renewed."
            )

    def __call__(self, theta: PyTree, args: Any) -> lx.AbstractLinearOperator:
        """The operator, built now."""
        return self.build(theta, args)


class KeptPreconditioner(eqx.Module):
    """The operator of an `Upkeep` between two calls.

    Attributes:
        arrays: The arrays of the operator; meaningless before it was built.
        due: Whether it is built anew at the next use.
        age: Calls that it has served.
        least_effort: Fewest products per decade of residual of one of them; infinite before the first.
        num_built: How often it was built in all.
    """

    arrays: list[Array]
    due: Bool[Array, ""]
    age: Int[Array, ""]
    least_effort: Float[Array, ""]
    num_built: Int[Array, ""]


def _shapes(upkeep: Upkeep, theta: PyTree, args: Any) -> lx.AbstractLinearOperator:
    operator = eqx.filter_eval_shape(upkeep.build, theta, args)
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise TypeError(f"`build` of `Upkeep` must return a Lineax operator, got {type(operator).__name__}.")
    return operator


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def nothing_kept(upkeep: Upkeep, theta: PyTree, args: Any) -> KeptPreconditioner:
    """Of the right structure, and due; `args` may hold `ShapeDtypeStruct`s."""
    shapes = [leaf for leaf in jax.tree.leaves(_shapes(upkeep, theta, args)) if _is_shape(leaf)]
    zero = jnp.zeros((), jnp.int32)
    infinite = jnp.asarray(jnp.inf, float)
    return KeptPreconditioner(tree_zeros_like(shapes), jnp.asarray(True), zero, infinite, zero)


def renewed_if_due(
    upkeep: Upkeep, kept: KeptPreconditioner, theta: PyTree, args: Any
) -> tuple[lx.AbstractLinearOperator, KeptPreconditioner]:
    """The operator that serves at `theta`, as a constant."""
    shapes, static = eqx.partition(_shapes(upkeep, theta, args), _is_shape)
    leaves, structure = jax.tree.flatten(shapes)
    if [(a.shape, a.dtype) for a in leaves] != [(a.shape, a.dtype) for a in kept.arrays]:
        raise ValueError(
            "`state` keeps a preconditioner of other shapes than the `build` of this `Upkeep` returns. Start with "
            "`state=None`; the shapes must depend on those of theta, phi and the data alone."
        )

    def build(_: list[Array]) -> list[Array]:
        return jax.tree.leaves(eqx.filter(upkeep.build(theta, args), eqx.is_array))

    arrays = run_if(kept.due, build, kept.arrays)
    after = KeptPreconditioner(
        arrays,
        jnp.zeros_like(kept.due),
        jnp.where(kept.due, 0, kept.age),
        jnp.where(kept.due, jnp.inf, kept.least_effort),
        kept.num_built + kept.due.astype(jnp.int32),
    )
    return eqx.combine(jax.tree.unflatten(structure, stop_gradient(arrays)), static), after


def after_call(
    upkeep: Upkeep,
    kept: KeptPreconditioner,
    products: Int[Array, ""],
    decades: Scalar,
    usable: Bool[Array, ""],
) -> KeptPreconditioner:
    """A call older; due if that is too old, or if the call needed too many products."""
    telling = decades >= FEWEST_DECADES
    effort = jnp.where(telling, products.astype(decades.dtype) / jnp.where(telling, decades, 1), jnp.inf)
    effort = effort.astype(kept.least_effort.dtype)
    due = ~usable
    if upkeep.growth is not None:
        due |= telling & (effort > upkeep.growth * kept.least_effort)
    if upkeep.every is not None:
        due |= kept.age + 1 >= upkeep.every
    least = jnp.minimum(kept.least_effort, effort)
    return KeptPreconditioner(kept.arrays, due, kept.age + 1, least, kept.num_built)


def due_if(stale: Bool[Array, ""], kept: KeptPreconditioner) -> KeptPreconditioner:
    """To be built anew if `stale`."""
    return eqx.tree_at(lambda k: k.due, kept, kept.due | stale)
