"""Is a point a minimum, and is a step a good Newton step?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, PyTree

from curvax._pytree import tree_norm, tree_sub
from curvax.diagnostics._krylov import flatten_like
from curvax.diagnostics._spectrum import _check_steps
from curvax.operators._lanczos import lanczos, ritz


class Stationarity(eqx.Module):
    """What `second_order_stationarity` found.

    - `gradient_norm`: ‖∇f‖.
    - `curvature_min`, `curvature_max`: extreme Ritz values of the Hessian; the true smallest eigenvalue is at
      most `curvature_min`.
    - `curvature_min_error`: some eigenvalue lies within this distance of `curvature_min`.
    - `negative_curvature`: whether a direction with dᵀHd < 0 (beyond rounding) was found. True is a
      proof that the point is no minimum; False is a proof of nothing unless the steps exhausted the space.
    - `direction`: the unit Ritz vector of `curvature_min`, like θ: a way down from a saddle.
    """

    gradient_norm: Float[Array, ""]
    curvature_min: Float[Array, ""]
    curvature_max: Float[Array, ""]
    curvature_min_error: Float[Array, ""]
    negative_curvature: Bool[Array, ""]
    direction: PyTree[Array]


@eqx.filter_jit
def _stationarity(fn, theta, args, num_steps, key):
    dynamic, static = eqx.partition(theta, eqx.is_inexact_array)
    flat = flatten_like(dynamic)
    if flat.size == 0:
        raise ValueError("`theta` has no arrays of floating point: there is nothing to be stationary in.")
    gradient_fn = jax.grad(lambda th: fn(eqx.combine(th, static), *args))
    gradient, hvp = jax.linearize(gradient_fn, dynamic)
    start = jax.random.normal(key, (flat.size,), flat.dtype)
    krylov = lanczos(lambda v: flat.pack(hvp(flat.unpack(v))), start, num_steps)
    values, vectors = ritz(krylov)
    smallest, largest = values[0], values[-1]
    noise = 10 * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
    direction = jnp.matmul(vectors[:, 0], krylov.basis, precision=jax.lax.Precision.HIGHEST)
    return Stationarity(
        gradient_norm=tree_norm(gradient),
        curvature_min=smallest,
        curvature_max=largest,
        curvature_min_error=jnp.abs(krylov.off_diagonal[-1] * vectors[-1, 0]),
        negative_curvature=smallest < -noise,
        direction=flat.unpack(direction / jnp.linalg.norm(direction)),
    )


def second_order_stationarity(
    fn: Callable[..., Float[Array, ""]],
    theta: PyTree,
    *args: Any,
    num_steps: int = 40,
    key: Array | None = None,
) -> Stationarity:
    """Gradient norm and smallest curvature of `fn(theta, *args)`: a minimum, or only a stationary point?

    The smallest eigenvalue of the Hessian H is approached by Lanczos steps. A small gradient does not tell
    a saddle from a minimum, and neither does gᵀH⁻¹g > 0: diag(1, −1) with g = e₁ gives 1.

    Args:
        fn: scalar function, twice differentiable.
        theta: the point, any pytree; only its arrays of floating point vary.
        *args: passed on to `fn`.
        num_steps: Lanczos steps.
        key: for the random start; `jax.random.key(0)` if None.

    Returns:
        `Stationarity`. No threshold on `gradient_norm` is applied: its unit is that of the loss.

    Raises:
        ValueError: `theta` has no floating-point array, or `num_steps` < 1.

    Cost: `num_steps` Hessian–vector products, 2 num_steps × n memory.

    Example:
        ```python
        saddle = lambda theta: theta[0] ** 2 - theta[1] ** 2
        found = cx.diagnostics.second_order_stationarity(saddle, jnp.zeros(2))
        found.gradient_norm, found.curvature_min  # 0.0, -2.0
        ```

    Source: Golub and Van Loan, Matrix Computations, 10.1.
    """
    _check_steps(num_steps)
    return _stationarity(fn, theta, args, num_steps, jax.random.key(0) if key is None else key)


def direction_quality(
    operator: lx.AbstractLinearOperator, direction: PyTree[Array], gradient: PyTree[Array]
) -> Float[Array, ""]:
    """How well `direction` solves the Newton equation: ‖H p − g‖ / ‖g‖.

    0 for the exact Newton direction p = H⁻¹ g, 1 for p = 0; above 1 the step is worse than none. (The
    sign is that of p = H⁻¹ g: a step to be *subtracted*.) A residual, not an error: with condition number κ
    the error of p may be κ times as large.

    Args:
        operator: H.
        direction: p, like the input of H.
        gradient: g, like the output of H.

    Returns:
        The quotient; NaN for g = 0.

    Example:
        ```python
        curvature = lx.DiagonalLinearOperator(jnp.array([1.0, 4.0]))
        cx.diagnostics.direction_quality(curvature, jnp.array([1.0, 1.0]), jnp.array([1.0, 4.0]))  # 0.0
        ```
    """
    return tree_norm(tree_sub(operator.mv(direction), gradient)) / tree_norm(gradient)
