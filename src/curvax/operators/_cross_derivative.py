"""The cross derivative of a scalar function of two arguments."""

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax.operators._base import (
    AbstractDerivativeOperator,
    as_arrays,
    as_tags,
    capture,
    check_scalar,
    linear_map,
    split,
    structure,
)


class _OfTwo(eqx.Module):
    """`(theta, phi) ↦ fn(theta, phi, *args)` over the inexact leaves of both."""

    fn: Callable
    theta_rest: PyTree
    phi_rest: PyTree
    args: tuple[Any, ...]

    def __call__(self, theta: PyTree[Array], phi: PyTree[Array]) -> Array:
        return self.fn(eqx.combine(theta, self.theta_rest), eqx.combine(phi, self.phi_rest), *self.args)


class CrossDerivative(AbstractDerivativeOperator):
    """B = ∂²fn/∂θ∂φ, dim θ × dim φ, or its transpose; made by `cross_derivative`."""

    fn: Callable[[PyTree[Array], PyTree[Array]], Array]
    theta: PyTree[Array]
    phi: PyTree[Array]
    transposed: bool = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)

    def _gradient(self) -> tuple[Callable[[PyTree[Array]], PyTree[Array]], PyTree[Array]]:
        """The gradient in the output argument as a function of the input argument, and its point."""
        if self.transposed:
            return lambda theta: jax.grad(self.fn, argnums=1)(theta, self.phi), self.theta
        return lambda phi: jax.grad(self.fn, argnums=0)(self.theta, phi), self.phi

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """B v = d/dε ∇_θ fn(θ, φ + εv) at ε = 0; transposed, Bᵀ w = d/dε ∇_φ fn(θ + εw, φ)."""
        gradient, point = self._gradient()
        return with_fast_contractions(lambda v: jax.jvp(gradient, (point,), (v,))[1])(vector)

    def linearised(self) -> lx.AbstractLinearOperator:
        """B with its gradient linearised once."""
        gradient, point = self._gradient()
        _, product = jax.linearize(gradient, point)
        return linear_map(product, self)

    def transpose(self) -> "CrossDerivative":
        """Bᵀ = ∂²fn/∂φ∂θ, its products forward-over-reverse too."""
        return CrossDerivative(
            self.fn, self.theta, self.phi, not self.transposed, lx.transpose_tags(self.tags)
        )

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of φ (transposed: of θ)."""
        return structure(self.theta if self.transposed else self.phi)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the inexact leaves of θ (transposed: of φ)."""
        return structure(self.phi if self.transposed else self.theta)


def cross_derivative(
    fn: Callable[..., Array],
    theta: PyTree,
    phi: PyTree,
    *args: Any,
    tags: object | Iterable[object] = (),
) -> CrossDerivative:
    """The cross derivative B = ∂²fn/∂θ∂φ as a dim θ × dim φ operator: Bᵢⱼ = ∂²fn/∂θᵢ∂φⱼ.

    `mv` takes a change of φ to the change of ∇_θ fn; `transpose().mv` takes a vector w like θ to
    Bᵀw = ∇_φ ⟨∇_θ fn, w⟩. The hypergradient of an inner minimum is ∇_φ f − Bᵀ H⁻¹ ∇_θ f with this B; the
    survey formula that prints ∂²g/∂φ∂θ in its place needs the transpose.

    Args:
        fn: `fn(theta, phi, *args)` → real scalar, twice differentiable.
        theta: Any pytree; only its floating-point arrays vary.
        phi: Likewise.
        *args: Anything else that `fn` takes.
        tags: Lineax tags that you know to hold; none by default.

    Returns:
        The operator. Both directions are forward-over-reverse.

    Raises:
        ValueError: θ or φ has no floating-point leaf, or a complex one, or `fn` is not scalar.

    Cost: one product in either direction is about one Hessian product; no matrix is formed.

    Source: Pearlmutter 1994 for the product; Bengio, "Gradient-based optimization of
    hyperparameters", Neural Computation 12, 2000, for its use.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        theta, phi = jnp.array([1.0, 2.0]), jnp.array(3.0)
        B = cx.operators.cross_derivative(lambda t, p: 0.5 * p * jnp.sum(t**2), theta, phi)
        B.mv(jnp.array(1.0))  # [1, 2]
        B.T.mv(theta)  # 5
        ```
    """
    theta_dynamic, theta_rest = split("theta", theta)
    phi_dynamic, phi_rest = split("phi", phi)
    args = as_arrays(args)
    fn = capture(fn, eqx.combine(theta_dynamic, theta_rest), eqx.combine(phi_dynamic, phi_rest), *args)
    of_two = _OfTwo(fn, theta_rest, phi_rest, args)
    check_scalar("fn", of_two, theta_dynamic, phi_dynamic)
    return CrossDerivative(of_two, theta_dynamic, phi_dynamic, False, as_tags(tags))
