"""The eigenvalues of the blocks of layers, bounded: spectral truncation and damping by condition number."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax.operators._kronecker import EigenKronecker, Kronecker
from curvax.operators._layerwise import Layerwise
from curvax.operators._parts import untagged
from curvax.operators._stacked import Stacked


def truncated(curvature: Layerwise, floor: Scalar | float) -> Layerwise:
    """Eigenvalues below a floor raised to it: the inverse has eigenvalues min(1/max(λ, 0), 1/floor).

    Unlike damping, which adds to all of them, it leaves those above the floor as they are.

    Args:
        curvature: From `kfac` or `ekfac`.
        floor: A scalar > 0, in the units of the eigenvalues. Entries in no block get it too.

    Returns:
        A positive definite operator of the same kind, whose blocks are in their eigenbases.

    Raises:
        ValueError: A block is of another kind, or the floor is known and not positive.

    Cost: an eigendecomposition of each factor; for `ekfac` none.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.eye(4, 2), jnp.ones((4, 3))
        curvature = cx.operators.kfac(lambda w, x: w @ x, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        cx.operators.truncated(curvature, 1e-3).inverse().mv(jnp.ones((3, 2)))
        ```

    Source: spectral truncation of a preconditioner's inverse, with rounding below zero cut off first.
    """
    _check_positive("floor", floor, 0)
    raised = lambda values: jnp.maximum(values, jnp.asarray(floor, values.dtype))
    rest = jnp.maximum(curvature.rest, jnp.asarray(floor, curvature.rest.dtype))
    return _changed(curvature, raised, rest)


def conditioned(curvature: Layerwise, condition: Scalar | float) -> Layerwise:
    """Each layer + its own damping, the least for which its condition number is at most `condition`.

    λ = max(0, (λmax − c·λmin) / (c − 1)) for a block with eigenvalues from λmin to λmax, each member of a stack on its
    own. A layer that is well-conditioned is not damped at all; one that is zero stays so.

    Args:
        curvature: From `kfac` or `ekfac`.
        condition: c, a scalar > 1.

    Returns:
        An operator of the same kind, whose blocks are in their eigenbases. Entries in no block stay as they are: zero,
            unless `curvature` was damped.

    Raises:
        ValueError: A block is of another kind, or the condition is known and not above 1.

    Cost: an eigendecomposition of each factor; for `ekfac` none.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.eye(4, 2), jnp.ones((4, 3))
        curvature = cx.operators.kfac(lambda w, x: w @ x, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        cx.operators.conditioned(curvature, 1e4).inverse().mv(jnp.ones((3, 2)))
        ```

    Source: damping by the condition number of each block; the formula solves (λmax + λ) / (λmin + λ) = c.
    """
    _check_positive("condition", condition, 1)

    def shifted(values: Float[Array, "m n"]) -> Float[Array, "m n"]:
        most = jnp.asarray(condition, values.dtype)
        needed = (jnp.max(values) - most * jnp.min(values)) / (most - 1)
        return values + jnp.maximum(needed, 0)

    return _changed(curvature, shifted, curvature.rest)


def in_eigenbases(curvature: Layerwise, method: str) -> Layerwise:
    """With every block in its eigenbasis.

    Args:
        curvature: Whose blocks are stacks of `Kronecker` or `EigenKronecker`.
        method: Who asks, for the error.
    """

    def turned(name: str, block: lx.AbstractLinearOperator) -> lx.AbstractLinearOperator:
        stack = untagged(block)
        one = untagged(stack.operator) if isinstance(stack, Stacked) else stack
        if isinstance(stack, Stacked) and isinstance(one, EigenKronecker):
            return Stacked(one)
        if isinstance(stack, Stacked) and isinstance(one, Kronecker):
            return Stacked(one).each(lambda one: one.eigen())
        raise ValueError(
            f"{method} needs blocks with known eigenvectors, from `kfac` or `ekfac` (damped or not); that of {name!r} "
            f"is a {type(one).__name__}."
        )

    blocks = {name: turned(name, block) for name, block in curvature.blocks.items()}
    return eqx.tree_at(lambda c: c.blocks, curvature, blocks)


def with_values(block: Stacked, change: Callable[[Array], Array]) -> Stacked:
    """A stack of matrices in their eigenbases with other eigenvalues, none of them negative.

    Args:
        block: Of `EigenKronecker`.
        change: Of the eigenvalues of one of them.
    """
    tags = lx.positive_semidefinite_tag
    return block.each(lambda one: EigenKronecker(one.left, one.right, change(one.values), tags))


def _changed(curvature: Layerwise, change: Callable[[Array], Array], rest: Scalar) -> Layerwise:
    turned = in_eigenbases(curvature, "The spectrum of layers")
    blocks = {name: with_values(block, change) for name, block in turned.blocks.items()}
    return eqx.tree_at(lambda c: (c.blocks, c.rest), turned, (blocks, rest))


def _check_positive(name: str, value: Scalar | float, bound: int) -> None:
    if jnp.shape(value) != ():
        raise ValueError(f"`{name}` must be a scalar, found shape {jnp.shape(value)}.")
    if not isinstance(value, jax.core.Tracer) and not float(value) > bound:
        raise ValueError(f"`{name}` must be above {bound}, found {float(value)}.")
