"""Spectral radius of an inner map, condition number before and after preconditioning."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, PyTree

from curvax.diagnostics._krylov import arnoldi, flat_operator, flatten_like, symmetry_tolerance
from curvax.linear._quadrature import gauss_rule
from curvax.operators._lanczos import MatVec, Vector, lanczos

_SQUARINGS = 40


class SpectralRadius(eqx.Module):
    """What `spectral_radius` found.

    `value` is the radius; `change` is how much it moved over the last third of the steps, a measure of
    how settled it is (0 where the Krylov space was exhausted and the value is exact to rounding).
    """

    value: Float[Array, ""]
    change: Float[Array, ""]
    num_matvecs: int = eqx.field(static=True)


def _radius_of(matrix: Float[Array, "m m"]) -> Float[Array, ""]:
    """Growth rate lim ‖Mᵏ‖^(1/k) (Gelfand), by squaring 40 times with the scale kept apart.

    Unlike ratios of power iteration it converges for complex pairs and for several eigenvalues of the same
    modulus, and unlike `eigvals` it runs compiled on every backend. The error is (log ‖·‖ of the
    eigenvectors' conditioning) / 2⁴⁰.
    """

    def square(k, carry):
        matrix, log_radius, weight = carry
        norm = jnp.linalg.norm(matrix)
        # A nilpotent matrix reaches zero: radius 0, log -inf, and nothing to divide by.
        matrix = matrix / jnp.where(norm > 0, norm, 1)
        log_radius = log_radius + weight * jnp.log(norm)
        return jnp.matmul(matrix, matrix, precision=jax.lax.Precision.HIGHEST), log_radius, weight / 2

    zero = jnp.zeros((), matrix.dtype)
    _, log_radius, _ = jax.lax.fori_loop(0, _SQUARINGS, square, (matrix, zero, zero + 1))
    return jnp.exp(log_radius)


@eqx.filter_jit
def _spectral_radius(fn, theta, num_steps, key):
    if theta is None:
        matvec, flat = flat_operator(fn, "operator")
    else:
        flat = flatten_like(theta)
        if flat.size == 0:
            raise ValueError("`theta` has no elements: there is no spectrum.")
        out = jax.eval_shape(fn, theta)
        if jax.tree.structure(out) != jax.tree.structure(theta) or flatten_like(out).size != flat.size:
            raise ValueError(
                f"the map must return something like `theta`: found {out} for {jax.eval_shape(lambda: theta)}."
            )
        _, tangent_map = jax.linearize(fn, theta)
        matvec = lambda v: flat.pack(tangent_map(flat.unpack(v)))
    start = jax.random.normal(key, (flat.size,), flat.dtype)
    decomposition = arnoldi(matvec, start, num_steps)
    matrix = decomposition.matrix
    m = matrix.shape[0]
    inner = jnp.arange(m) < max(1, (2 * m) // 3)
    value = _radius_of(matrix)
    earlier = _radius_of(jnp.where(inner[:, None] & inner[None, :], matrix, 0))
    change = jnp.where(decomposition.next_norm == 0, jnp.zeros_like(value), jnp.abs(value - earlier))
    return value, change, m


def spectral_radius(
    operator: lx.AbstractLinearOperator | Callable[[PyTree], PyTree],
    theta: PyTree[Array] | None = None,
    *,
    num_steps: int = 40,
    key: Array | None = None,
) -> SpectralRadius:
    """Largest modulus of the eigenvalues of a linear operator, or of the Jacobian of a map at a point.

    For an inner map T, ρ(∂T/∂θ) at the solution is the rate at which θ ← T(θ) converges, and at which
    the derivative of the unrolled iteration and the Neumann series do; ρ ≥ 1 means that they do not.

    A Krylov space of `num_steps` products is built (Arnoldi) and the growth rate lim ‖Hᵏ‖^(1/k) of the small
    projected matrix is taken. Ratios of a power iteration would not converge for a complex dominant pair.

    Args:
        operator: a square Lineax operator; or a map of pytrees of arrays, with `theta`.
        theta: point at which the map is linearised; None for an operator.
        num_steps: products with the operator at most (fewer if the size is smaller).
        key: for the random start; `jax.random.key(0)` if None.

    Returns:
        `SpectralRadius`. For an operator far from normal, `value` can stay off until `num_steps` nears the
        size: look at `change`.

    Raises:
        TypeError: `operator` is neither, or `theta` is missing or superfluous.
        ValueError: not square, empty, or `num_steps` < 1.

    Cost: `num_steps` products, num_steps × n memory.

    Example:
        ```python
        rotation = jnp.array([[0.0, -0.9], [0.9, 0.0]])
        cx.diagnostics.spectral_radius(lambda theta: rotation @ theta, jnp.zeros(2)).value  # 0.9
        ```

    Source: Arnoldi (1951); Gelfand (1941).
    """
    linear = isinstance(operator, lx.AbstractLinearOperator)
    if linear == (theta is not None) or not (linear or callable(operator)):
        raise TypeError(
            "pass either a Lineax operator alone, or a map and the point `theta` where it is linearised."
        )
    _check_steps(num_steps)
    key = jax.random.key(0) if key is None else key
    value, change, used = _spectral_radius(operator, theta, num_steps, key)
    return SpectralRadius(value, change, used)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, found {num_steps}.")


class Extremes(eqx.Module):
    """Extreme Ritz values of a symmetric operator.

    The condition number of a positive definite operator is `condition` = largest / smallest. Ritz values lie
    inside the spectrum, so it is never above the true one; `smallest_error` and `largest_error` bound the
    distance to the nearest true eigenvalue. `condition` is infinite where the smallest value is at
    rounding level and NaN where it is negative or the operator is not symmetric.
    """

    smallest: Float[Array, ""]
    largest: Float[Array, ""]
    smallest_error: Float[Array, ""]
    largest_error: Float[Array, ""]
    condition: Float[Array, ""]
    converged: Bool[Array, ""]


class ConditionNumber(eqx.Module):
    """What `condition_number` found: `before` preconditioning, and `after` (None without preconditioner)."""

    before: Extremes
    after: Extremes | None


def _extremes(matvec: MatVec, precondition: MatVec | None, start: Vector, num_steps: int) -> Extremes:
    krylov = lanczos(matvec, start, num_steps, precondition)
    values, _, last = gauss_rule(krylov)
    smallest, largest = values[0], values[-1]
    noise = start.size * jnp.finfo(start.dtype).eps * jnp.abs(largest)
    condition = jnp.where(jnp.abs(smallest) <= noise, jnp.inf, largest / smallest)
    sound = krylov.definite & (krylov.asymmetry <= symmetry_tolerance(float(jnp.finfo(start.dtype).eps)))
    valid = (smallest >= -noise) & (largest > 0) & sound
    return Extremes(
        smallest=smallest,
        largest=largest,
        smallest_error=jnp.abs(last[0]),
        largest_error=jnp.abs(last[-1]),
        condition=jnp.where(valid, condition, jnp.nan),
        converged=(jnp.abs(last[0]) <= 0.1 * jnp.abs(smallest)) & sound,
    )


@eqx.filter_jit
def _condition_number(operator, preconditioner, num_steps, key):
    matvec, flat = flat_operator(operator, "operator")
    start = jax.random.normal(key, (flat.size,), flat.dtype)
    before = _extremes(matvec, None, start, num_steps)
    if preconditioner is None:
        return ConditionNumber(before, None)
    precondition, other = flat_operator(preconditioner, "preconditioner")
    if other.size != flat.size:
        raise ValueError(f"`preconditioner` has size {other.size}, but the operator has size {flat.size}.")
    return ConditionNumber(before, _extremes(matvec, precondition, start, num_steps))


def condition_number(
    operator: lx.AbstractLinearOperator,
    preconditioner: lx.AbstractLinearOperator | None = None,
    *,
    num_steps: int = 40,
    key: Array | None = None,
) -> ConditionNumber:
    """Condition number λmax / λmin of a symmetric positive definite operator, from a few Lanczos steps.

    With a preconditioner M (an approximate *inverse*, as everywhere in Lineax) also that of M A, which is
    what conjugate gradients feel: their error falls by (√κ − 1)/(√κ + 1) a step at least.

    Args:
        operator: A, symmetric positive definite, square.
        preconditioner: M, symmetric positive definite, of the same size.
        num_steps: Lanczos steps for each.
        key: for the random start; `jax.random.key(0)` if None.

    Returns:
        `ConditionNumber` with `.before` and `.after`; each says by `converged` whether its smallest value is
        certain to 10 % (else `condition` is a lower bound and nothing more).

    Raises:
        TypeError: an argument is no Lineax operator.
        ValueError: not square, empty, sizes that do not fit, `num_steps` < 1.

    Cost: 2 `num_steps` products with A, `num_steps` with M; 2 num_steps × n memory.

    Example:
        ```python
        diagonal = jnp.array([1.0, 10.0, 100.0])
        found = cx.diagnostics.condition_number(
            lx.DiagonalLinearOperator(diagonal), lx.DiagonalLinearOperator(1 / diagonal)
        )
        found.before.condition, found.after.condition  # 100.0, 1.0
        ```

    Source: Golub and Van Loan, Matrix Computations, 10.1 and 11.5.
    """
    _check_steps(num_steps)
    key = jax.random.key(0) if key is None else key
    return _condition_number(operator, preconditioner, num_steps, key)
