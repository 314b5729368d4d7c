"""Jacobians of residuals and of fixed-point maps."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax._pytree import tree_sub
from curvax.operators._base import (
    AbstractDerivativeOperator,
    as_tags,
    capture_args,
    linear_map,
    strip_weak,
    structure,
)


class _InexactOutput(eqx.Module):
    """A function with the leaves of its output that carry no derivative left out."""

    fn: Callable

    def __call__(self, theta: PyTree[Array]) -> PyTree[Array]:
        return eqx.filter(self.fn(theta), eqx.is_inexact_array)


class _Displacement(eqx.Module):
    """`theta ↦ theta − T(theta)`."""

    fixed_point_map: Callable[[PyTree[Array]], PyTree[Array]]

    def __call__(self, theta: PyTree[Array]) -> PyTree[Array]:
        return tree_sub(theta, self.fixed_point_map(theta))


class Jacobian(AbstractDerivativeOperator):
    """∂fn/∂θ or its transpose; made by `residual_jacobian` and `fixed_point_jacobian`."""

    fn: Callable[[PyTree[Array]], PyTree[Array]]
    theta: PyTree[Array]
    transposed: bool = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """J v by forward mode; transposed, Jᵀ w by reverse mode."""

        def product(vector: PyTree[Array]) -> PyTree[Array]:
            if self.transposed:
                return jax.vjp(self.fn, self.theta)[1](vector)[0]
            return jax.jvp(self.fn, (self.theta,), (vector,))[1]

        return with_fast_contractions(product)(vector)

    def linearised(self) -> lx.AbstractLinearOperator:
        """The operator with the function evaluated once."""
        if self.transposed:
            _, pullback = jax.vjp(self.fn, self.theta)
            return linear_map(lambda w: pullback(w)[0], self)
        _, push = jax.linearize(self.fn, self.theta)
        return linear_map(push, self)

    def transpose(self) -> "Jacobian":
        """The transpose; the operator itself where it is tagged symmetric."""
        if lx.is_symmetric(self):
            return self
        return Jacobian(self.fn, self.theta, not self.transposed, lx.transpose_tags(self.tags))

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of θ's inexact leaves (transposed: of the function's output)."""
        return self._of_output() if self.transposed else structure(self.theta)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the function's output (transposed: of θ's inexact leaves)."""
        return structure(self.theta) if self.transposed else self._of_output()

    def _of_output(self) -> PyTree[jax.ShapeDtypeStruct]:
        return strip_weak(jax.eval_shape(self.fn, self.theta))


def residual_jacobian(
    fn: Callable[..., PyTree],
    theta: PyTree,
    *args: Any,
    tags: object | Iterable[object] = (),
) -> Jacobian:
    """The Jacobian ∂F/∂θ of a residual F(θ, *args), as an operator.

    Where θ*(φ) solves F(θ, φ) = 0, dθ*/dφ = −(∂F/∂θ)⁻¹ ∂F/∂φ. For the gradient of one scalar solve the
    transposed system once, (∂F/∂θ)ᵀλ = ∇_θ f, never one system per column of ∂F/∂φ.

    Args:
        fn: F, from θ (and `args`) to a pytree; leaves of the output that are not floating point count as
            constants. It need not be square.
        theta: The point; only its floating-point arrays vary.
        *args: Anything else that F takes.
        tags: Lineax tags that you know to hold (`lx.symmetric_tag` where F is a gradient).

    Returns:
        The operator: `mv` by forward mode, `transpose().mv` by reverse mode.

    Raises:
        ValueError: θ has no floating-point leaf, or a complex one, or F has no floating-point output.

    Cost: a product is about 2 evaluations of F (forward) or 3 (transposed), and the memory of reverse
    mode for the latter; linearised once, about 1 and 2.

    Source: Griewank & Walther, "Evaluating derivatives", 2nd edition, SIAM 2008, chapters 3 and 15.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        J = cx.operators.residual_jacobian(lambda t: t**2 - 2.0, jnp.array([1.0, 3.0]))
        J.mv(jnp.array([1.0, 1.0]))  # [2, 6]
        ```
    """
    captured, dynamic = capture_args(fn, theta, args)
    residual = _InexactOutput(captured)
    if not jax.tree.leaves(jax.eval_shape(residual, dynamic)):
        raise ValueError(
            "`fn` returns no floating-point array leaf, so it has no Jacobian. Return JAX arrays."
        )
    return Jacobian(residual, dynamic, False, as_tags(tags))


def fixed_point_jacobian(
    fn: Callable[..., PyTree],
    theta: PyTree,
    *args: Any,
    tags: object | Iterable[object] = (),
) -> Jacobian:
    """I − ∂T/∂θ of a fixed-point map T(θ, *args), as an operator.

    Where θ*(φ) = T(θ*, φ), dθ*/dφ = (I − ∂T/∂θ)⁻¹ ∂T/∂φ. The system is not symmetric unless ∂T/∂θ is: conjugate
    gradients fail on it in general, GMRES does not. Its Neumann series Σ (∂T/∂θ)ᵏ converges if and only if
    the spectral radius of ∂T/∂θ is below one.

    Args:
        fn: T, from θ (and `args`) to a tree like θ.
        theta: The point; only its floating-point arrays vary.
        *args: Anything else that T takes.
        tags: Lineax tags of I − ∂T/∂θ that you know to hold (positive definite where T is a gradient
            step on a strongly convex function).

    Returns:
        The operator: `mv` by forward mode, `transpose().mv` by reverse mode.

    Raises:
        ValueError: θ has no floating-point leaf, or a complex one, or `fn(theta)` is not like θ.

    Cost: as `residual_jacobian`.

    Source: Griewank & Walther, as above; Christianson, "Reverse accumulation and attractive fixed
    points", Optimization Methods and Software 3, 1994.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        A = cx.operators.fixed_point_jacobian(lambda t: 0.5 * jnp.tanh(t), jnp.zeros(2))
        A.mv(jnp.ones(2))  # [0.5, 0.5]
        ```
    """
    captured, dynamic = capture_args(fn, theta, args)
    fixed_point_map = _InexactOutput(captured)
    found, wanted = strip_weak(jax.eval_shape(fixed_point_map, dynamic)), structure(dynamic)
    same = jax.tree.structure(found) == jax.tree.structure(wanted) and all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    )
    if not same:
        raise ValueError(f"`fn` must return a tree like `theta` ({wanted}), found {found}.")
    return Jacobian(_Displacement(fixed_point_map), dynamic, False, as_tags(tags))
