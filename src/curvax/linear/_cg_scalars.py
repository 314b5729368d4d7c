"""The scalar side of conjugate gradients: step lengths, what is known of the spectrum, and when to stop."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Scalar

# How a run stands. Everything above RUNNING stops the loop.
RUNNING, CONVERGED, PRECISION_LIMITED, SINGULAR, INDEFINITE, NONFINITE = range(6)


class Ritz(NamedTuple):
    """Incremental estimates of the extreme eigenvalues of the Lanczos matrix T = LLᵀ.

    L is the bidiagonal Cholesky factor that CG's coefficients spell out: diagonal ν = 1/√α, subdiagonal
    ℓ = √(β/α₋). `low` estimates ‖L⁻¹‖² = 1/λmin: the top eigenvalue of a 2×2 matrix a step (after Meurant & Tichý,
    "Approximating the extreme Ritz values and upper bounds for the A-norm of the error in CG", 2018, derived anew
    for the lower end). `high` is the largest row of T seen, diagonal plus one off-diagonal entry: within
    a factor of 2 of λmax.
    """

    low: Scalar  # ‖uᵀL⁻¹‖² for the current best unit vector u
    overlap: Scalar  # uᵀ L⁻¹ L⁻ᵀ e_k
    last_row: Scalar  # ‖e_kᵀ L⁻¹‖²
    high: Scalar
    inverse_alpha: Scalar  # 1/α of the last step


class StoppingTest(NamedTuple):
    """When a run is to stop: see `conjugate_gradient`. Python numbers are constants of the program."""

    rtol: Scalar | float
    atol: Scalar | float
    known_min: Scalar | None
    amplified: Bool[Array, ""] | bool
    floor_of_singular: float


class Scalars(NamedTuple):
    """What the loop carries besides its vectors."""

    test: StoppingTest
    rhs_norm: Scalar
    gamma: Scalar  # rᵀ M⁻¹ r
    direction: Scalar  # pᵀ M p
    beta: Scalar
    deviation: Scalar  # estimate of ‖(b − Ax) − r‖, the drift of the recursive residual
    ritz: Ritz
    norm: Scalar
    rayleigh: Scalar  # smallest pᵀAp/pᵀp and xᵀAx/xᵀx
    metric: Scalar  # smallest zᵀMz/zᵀz
    x_norm: Scalar
    num_matvecs: Int[Array, ""]
    replace: Bool[Array, ""]
    status: Int[Array, ""]


class Known(NamedTuple):
    """What is known before the first step: see `Scalars`."""

    norm: Scalar
    rayleigh: Scalar
    metric: Scalar


class Step(NamedTuple):
    """What the product Ap of a turn says."""

    alpha: Scalar
    advance: Bool[Array, ""]  # an ordinary step along a direction of positive curvature
    squares: tuple[Scalar, Scalar, Scalar]  # pᵀp, pᵀAp, ‖Ap‖²
    ritz: Ritz
    norm: Scalar


# What is read of the Gram matrix of the iterate, the residual, the right-hand side and, where that is not the iterate,
# the total that the error is relative to.
SQUARES = ((0, 0), (1, 1), (0, 2), (3, 3))


def _top_eigenpair(a: Array, b: Array, d: Array) -> tuple[Array, Array, Array]:
    """Largest eigenvalue of [[a, b], [b, d]] and its unit eigenvector (s, c)."""
    half = 0.5 * (a - d)
    radius = jnp.sqrt(half * half + b * b)
    top = 0.5 * (a + d) + radius
    # Two formulas for the same vector: take the one without cancellation.
    s = jnp.where(a >= d, half + radius, b)
    c = jnp.where(a >= d, b, radius - half)
    length = jnp.sqrt(s * s + c * c)
    safe = jnp.where(length > 0, length, 1)
    return top, jnp.where(length > 0, s / safe, 1.0), c / safe


def _update_ritz(ritz: Ritz, alpha: Scalar, beta: Scalar) -> Ritz:
    ratio_squared = beta * ritz.inverse_alpha * alpha  # (ℓ/ν)²
    tau = -jnp.sqrt(ratio_squared) * ritz.overlap
    omega = ratio_squared * ritz.last_row + alpha
    low, s, c = _top_eigenpair(ritz.low, tau, omega)
    row = 1 / alpha + (beta + jnp.sqrt(beta)) * ritz.inverse_alpha
    return Ritz(low, s * tau + c * omega, omega, jnp.maximum(ritz.high, row), 1 / alpha)


def before_first(test: StoppingTest, rhs_square: Scalar, gamma: Scalar, known: Known) -> Scalars:
    """The scalars of the first turn, from bᵀb and bᵀM⁻¹b."""
    zero = jnp.zeros_like(gamma)
    rhs_norm = jnp.sqrt(rhs_square)
    # A preconditioner that is not positive definite shows as γ ≤ 0 with r ≠ 0.
    status = jnp.where(rhs_norm == 0, CONVERGED, jnp.where(gamma > 0, RUNNING, INDEFINITE))
    return Scalars(
        test=test,
        rhs_norm=rhs_norm,
        gamma=gamma,
        direction=gamma,
        beta=zero,
        deviation=zero,
        ritz=Ritz(zero, zero, zero, zero, zero),
        norm=known.norm,
        rayleigh=known.rayleigh,
        metric=known.metric,
        x_norm=zero,
        num_matvecs=jnp.zeros((), jnp.int32),
        replace=jnp.asarray(False),
        status=jnp.where(jnp.isfinite(rhs_norm + gamma), status, NONFINITE).astype(jnp.int32),
    )


def step_length(s: Scalars, gram: Float[Array, "2 2"]) -> Step:
    """The step along p, from the Gram matrix of p and Ap; 0 along a direction without positive curvature."""
    p_dot_p, curvature, product_squared = squares = gram[0, 0], gram[0, 1], gram[1, 1]
    norm = jnp.where(s.replace, s.norm, jnp.maximum(s.norm, jnp.sqrt(product_squared / p_dot_p)))
    advance = ~s.replace & (curvature > 0)
    alpha = jnp.where(advance, s.gamma / curvature, 0)
    ritz = _update_ritz(s.ritz, alpha, s.beta)
    ritz = jax.tree.map(lambda new, old: jnp.where(advance, new, old), ritz, s.ritz)
    return Step(alpha, advance, squares, ritz, norm)


def after_step(
    s: Scalars,
    step: Step,
    gram: Float[Array, "n n"],
    preconditioned: tuple[Scalar, Scalar | None] | None,
) -> Scalars:
    """The scalars of the next turn.

    Args:
        s: Those of this turn.
        step: The step that was taken.
        gram: Inner products of the vectors after the step, see `SQUARES`.
        preconditioned: rᵀM⁻¹r and zᵀMz/zᵀz, None where there is nothing but the identity; the second is None where
            directions are recycled and nothing else.
    """
    (p_dot_p, curvature, product_squared), advance, norm = step.squares, step.advance, step.norm
    test, dtype = s.test, gram.dtype
    eps = jnp.finfo(dtype).eps
    gamma, metric = gram[1, 1], s.metric
    if preconditioned is not None:
        gamma, seen = preconditioned
        metric = metric if seen is None else jnp.minimum(metric, seen)
    total = 3 if len(gram) > 3 else 0
    x_norm, residual_norm, total_norm = (jnp.sqrt(gram[i, i]) for i in (0, 1, total))
    # xᵀb = xᵀAx, because r ⟂ x.
    own_rayleigh = gram[0, 2] / jnp.where(x_norm > 0, x_norm * x_norm, 1)
    witness = jnp.minimum(curvature / p_dot_p, jnp.where(x_norm > 0, own_rayleigh, jnp.inf))
    rayleigh = s.rayleigh
    if preconditioned is not None:
        rayleigh = jnp.where(advance, jnp.minimum(rayleigh, witness), rayleigh)
    # A direction without positive curvature ends the run: it is what there is to report.
    broken = ~(s.replace | advance)
    rayleigh = jnp.where(broken, jnp.minimum(rayleigh, curvature / p_dot_p), rayleigh)
    rounding = eps * (norm * x_norm + s.rhs_norm)
    deviation = jnp.where(s.replace, rounding, s.deviation + eps * (norm * x_norm + residual_norm))
    smallest = jnp.minimum(rayleigh, metric / step.ritz.low)
    if test.known_min is not None:
        smallest = jnp.minimum(test.known_min, smallest)

    beta = jnp.where(advance, gamma / s.gamma, s.beta)
    direction = jnp.where(s.replace, s.direction, gamma + beta * beta * s.direction)
    shrink = jnp.sqrt(gamma / direction)
    # A direction with a small eigenvalue may not have shown itself in one or two steps.
    wanted = test.rtol * jnp.where(s.num_matvecs < 3, 0.1, 1.0).astype(dtype)
    tighten: Scalar | int = 1
    if test.amplified is not False:
        tighten = jnp.where(test.amplified, jnp.minimum(1, smallest / own_rayleigh), 1)
    measured = residual_norm if preconditioned is None else jnp.sqrt(metric * gamma)
    met = shrink * measured + deviation <= smallest * tighten * jnp.maximum(wanted * total_norm, test.atol)

    # Each line overrides those before it.
    status = jnp.where(met | (gamma == 0), CONVERGED, RUNNING)
    # r at rounding level of Ax: nothing more can be won in this precision.
    status = jnp.where(residual_norm <= rounding, PRECISION_LIMITED, status)
    status = jnp.where(gamma < 0, INDEFINITE, status)
    # In a long run lost orthogonality pushes the Ritz value below the spectrum: a vector must bear it out.
    unseen = 1 / step.ritz.low <= test.floor_of_singular * step.ritz.high
    borne_out = advance & (witness <= 6 * test.floor_of_singular * norm)
    status = jnp.where(unseen & borne_out, SINGULAR, status)
    at_rounding = jnp.abs(curvature) <= test.floor_of_singular * norm * p_dot_p
    status = jnp.where(broken, jnp.where(at_rounding, SINGULAR, INDEFINITE), status)
    status = jnp.where(jnp.isfinite(curvature + product_squared + gamma), status, NONFINITE)
    drifted = (deviation > jnp.sqrt(eps) * residual_norm) & (deviation > 10 * rounding)
    return Scalars(
        test=test,
        rhs_norm=s.rhs_norm,
        gamma=gamma,
        direction=direction,
        beta=beta,
        deviation=deviation,
        ritz=step.ritz,
        norm=norm,
        rayleigh=rayleigh,
        metric=metric,
        x_norm=x_norm,
        num_matvecs=s.num_matvecs + 1,
        replace=~s.replace & drifted,
        status=status.astype(jnp.int32),
    )
