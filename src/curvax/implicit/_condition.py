"""What defines the inner solution: a minimum, a fixed point or a root, and its linearisation."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._contractions import with_fast_contractions
from curvax._pytree import HALF, tree_sub


class Linearised(NamedTuple):
    """F = 0 linearised at one point: F itself, v ↦ A v and q ↦ (Aᵀ q, Bᵀ q), A = ∂F/∂θ, B = ∂F/∂φ."""

    residual: PyTree[Array]
    apply: Callable[[PyTree[Array]], PyTree[Array]]
    transposed: Callable[[PyTree[Array]], tuple[PyTree[Array], PyTree[Array]]]


class AbstractCondition(eqx.Module):
    """F(θ, φ, batch) = 0, the condition that the inner solution fulfils."""

    @property
    @abc.abstractmethod
    def symmetric(self) -> bool:
        """Whether ∂F/∂θ is symmetric, and positive definite at a solution."""

    @abc.abstractmethod
    def residual(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
        """F(θ, φ, batch), of the structure of θ."""

    @abc.abstractmethod
    def linearise(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Linearised:
        """F and its derivatives at (θ, φ)."""

    @abc.abstractmethod
    def cross(
        self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree, vector: PyTree[Array]
    ) -> PyTree[Array]:
        """Bᵀ q alone, for a caller who needs it once: nothing that it needs is kept while A is solved with."""

    @abc.abstractmethod
    def with_function(self, transform: Callable[[Callable], Callable]) -> "AbstractCondition":
        """The same kind of condition of `transform(function)`."""


class Minimum(AbstractCondition):
    """θ minimises g(·, φ, batch): F = ∇_θ g, A the Hessian, B = ∂²g/∂θ∂φ.

    The Hessian product is forward over reverse. Differentiating ∇_(θ,φ) g along a direction of θ gives the Hessian
    product and the transposed cross product in one sweep, since mixed partial derivatives commute.
    """

    fn: Callable[..., Array]

    @property
    def symmetric(self) -> bool:
        """True: a Hessian is."""
        return True

    def residual(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
        """∇_θ g."""
        return jax.grad(self.fn)(theta, phi, batch)

    def linearise(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Linearised:
        """One `jax.linearize` of ∇_(θ,φ) g along θ serves all products."""

        def gradients(point: PyTree[Array]) -> tuple[PyTree[Array], PyTree[Array]]:
            return jax.grad(self.fn, argnums=(0, 1))(point, phi, batch)

        (residual, _), products = jax.linearize(gradients, theta)
        # H is symmetric: the transposed program computes the same product, and on CPU it is the faster one for
        # wide layers (its last contraction needs no transposed copy of the data).
        hessian = jax.linear_transpose(lambda v: products(v)[0], theta)
        return Linearised(
            residual, with_fast_contractions(lambda v: hessian(v)[0]), with_fast_contractions(products)
        )

    def cross(
        self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree, vector: PyTree[Array]
    ) -> PyTree[Array]:
        """∇_φ g differentiated along a direction of θ."""
        return jax.jvp(lambda point: jax.grad(self.fn, 1)(point, phi, batch), (theta,), (vector,))[1]

    def with_function(self, transform: Callable[[Callable], Callable]) -> "Minimum":
        """A minimum of the transformed function."""
        return Minimum(transform(self.fn))


class _Equation(AbstractCondition):
    """What roots and fixed points share: F with a Jacobian that need not be symmetric."""

    @property
    def symmetric(self) -> bool:
        """False: nothing is known about the Jacobian."""
        return False

    def linearise(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Linearised:
        """Forward products by `jax.linearize`, transposed ones by `jax.vjp` in both arguments."""
        residual, apply = jax.linearize(lambda point: self.residual(point, phi, batch), theta)
        _, transposed = jax.vjp(lambda point, hyper: self.residual(point, hyper, batch), theta, phi)
        return Linearised(residual, with_fast_contractions(apply), with_fast_contractions(transposed))

    def cross(
        self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree, vector: PyTree[Array]
    ) -> PyTree[Array]:
        """One reverse sweep in φ."""
        return jax.vjp(lambda hyper: self.residual(theta, hyper, batch), phi)[1](vector)[0]


class Root(_Equation):
    """An inner level θ*(φ) defined by F(θ, φ, batch) = 0.

    Args:
        fn: F(theta, phi, batch), returning a pytree with the structure, shapes and dtypes of theta.

    Example:
        ```python
        import curvax as cx

        problem = cx.Bilevel(inner=cx.Root(lambda x, c, _: x**3 - c), outer=lambda x, c, _: x**2)
        ```
    """

    fn: Callable[..., PyTree]

    def residual(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
        """F(θ, φ, batch)."""
        return self.fn(theta, phi, batch)

    def with_function(self, transform: Callable[[Callable], Callable]) -> "Root":
        """A root of the transformed function."""
        return Root(transform(self.fn))


class FixedPoint(_Equation):
    """An inner level θ*(φ) defined by θ = T(θ, φ, batch). The adjoint solves (I − ∂T/∂θ)ᵀ q = ∇_θ f.

    Args:
        fn: T(theta, phi, batch), returning a pytree with the structure, shapes and dtypes of theta.

    Example:
        ```python
        import jax.numpy as jnp
        import curvax as cx

        problem = cx.Bilevel(
            inner=cx.FixedPoint(lambda x, w, _: jnp.tanh(w @ x + 1.0)), outer=lambda x, w, _: jnp.sum(x)
        )
        ```
    """

    fn: Callable[..., PyTree]

    def residual(self, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> PyTree[Array]:
        """θ − T(θ, φ, batch)."""
        return tree_sub(theta, self.fn(theta, phi, batch))

    def with_function(self, transform: Callable[[Callable], Callable]) -> "FixedPoint":
        """A fixed point of the transformed map."""
        return FixedPoint(transform(self.fn))


def check_scalar(value: Any, name: str) -> None:
    """Refuse a loss that is not one real floating-point number, while tracing."""
    if isinstance(value, tuple | list | dict) or value is None:
        raise TypeError(
            f"`{name}` must return one real floating-point scalar, got a {type(value).__name__}. Return the loss alone."
        )
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    if shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{name}` must return one real floating-point scalar, got shape {shape} and dtype {dtype}. "
            "Take a mean or a sum over what it returns."
        )


def check_like(value: PyTree, theta: PyTree, name: str) -> None:
    """Refuse a root function or a fixed-point map whose output is not shaped like theta."""
    found, wanted = jax.tree.structure(value), jax.tree.structure(theta)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]
    wanted_shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(theta)]
    if found != wanted or shapes != wanted_shapes:
        raise ValueError(
            f"`{name}` must return a pytree shaped like theta: expected {wanted} with shapes {wanted_shapes}, "
            f"got {found} with shapes {shapes}."
        )
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(value)]
    # Of half precision there is a master copy, whose dtype the function meets later.
    wanted_dtypes = [
        dtype if theta_leaf.dtype in HALF else theta_leaf.dtype
        for dtype, theta_leaf in zip(dtypes, jax.tree.leaves(theta), strict=True)
    ]
    if dtypes != wanted_dtypes:
        raise ValueError(
            f"`{name}` must return the dtypes of theta, {[str(d) for d in wanted_dtypes]}, got "
            f"{[str(d) for d in dtypes]}. Cast in `{name}`, or give theta0, phi and the data one precision."
        )
