"""The scalar side of conjugate gradients: step lengths, what is known of the spectrum, and when to stop."""

import functools as ft
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Scalar

from curvax._control import Packed, pack

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
    overlap_square: Scalar  # of uᵀ L⁻¹ L⁻ᵀ e_k
    last_row: Scalar  # ‖e_kᵀ L⁻¹‖²
    high: Scalar
    inverse_alpha: Scalar  # 1/α of the last step


class StoppingTest(NamedTuple):
    """When a run is to stop: see `conjugate_gradient`. Python numbers are constants of the program."""

    rtol: Scalar | float
    atol: Scalar | float
    known_min: Scalar | None
    amplified: Bool[Array, ""] | bool
    max_steps: Int[Array, ""] | int
    floor_of_singular: float


class Spectrum(NamedTuple):
    """What the coefficients say of A, and the next direction."""

    ritz: Ritz
    beta: Scalar
    direction: Scalar  # pᵀ M p


class Scalars(NamedTuple):
    """What else the loop carries besides its vectors. `x_dot_p` is None with a preconditioner: x is measured then."""

    rhs_norm: Scalar
    deviation: Scalar  # estimate of ‖(b − Ax) − r‖, the drift of the recursive residual
    rayleigh: Scalar  # smallest pᵀAp/pᵀp and xᵀAx/xᵀx
    metric: Scalar  # smallest zᵀMz/zᵀz
    norm: Scalar | None  # largest ‖Ap‖/‖p‖, None where the Ritz values stand for it
    energy: Scalar  # xᵀAx
    x_square: Scalar
    x_dot_p: Scalar | None
    residual_square: Scalar
    num_matvecs: Int[Array, ""]
    status: Int[Array, ""]


class Open(NamedTuple):
    """The scalars that the vectors wait for, each an array of its own."""

    gamma: Scalar  # rᵀ M⁻¹ r
    replace: Bool[Array, ""]
    going: Bool[Array, ""]
    staying: Bool[Array, ""]  # going on in the inner loop


class Known(NamedTuple):
    """What is known before the first step: see `Scalars`."""

    norm: Scalar | float
    rayleigh: Scalar | float
    metric: Scalar | float


Terms = tuple[Scalar, ...]  # of a sum


class Squares(NamedTuple):
    """Inner products of a turn, yet to be added up. What is None follows from the recurrences."""

    curvature: Terms  # pᵀAp
    residual: Terms  # ‖r‖²
    total: Terms | None  # of what the error is relative to
    direction: Terms | None  # pᵀp
    product: Terms | None  # ‖Ap‖²
    solution: Terms | None  # xᵀx


def _update_ritz(ritz: Ritz, alpha: Scalar, beta: Scalar) -> Ritz:
    ratio_squared = beta * ritz.inverse_alpha * alpha  # (ℓ/ν)²
    # The largest eigenvalue μ of [[a, b], [b, d]] with b = −√(ratio²) · overlap, and the last entry c of its unit
    # eigenvector: b s + d c = μ c is the new overlap. Signs do not matter, so that squares will do.
    b_square = ratio_squared * ritz.overlap_square
    d = ratio_squared * ritz.last_row + alpha
    half = 0.5 * (ritz.low - d)
    radius = jnp.sqrt(half * half + b_square)
    top = ritz.low - half + radius
    # Two formulas for c²: the one without cancellation.
    wide = radius + jnp.abs(half)
    c_square = jnp.where(half > 0, b_square, wide * wide) / (2 * radius * wide)
    overlap_square = jnp.where(radius > 0, top * top * c_square, 0)
    inverse_alpha = 1 / alpha
    row = inverse_alpha + (beta + jnp.sqrt(beta)) * ritz.inverse_alpha
    return Ritz(top, overlap_square, d, jnp.maximum(ritz.high, row), inverse_alpha)


def added(terms: Terms) -> Scalar:
    """Their sum."""
    return ft.reduce(operator.add, terms)


def judging_scale(smallest: Scalar, rayleigh: Scalar, known: Scalar | None = None) -> Scalar:
    """√(μν λ) for the stopping test under a preconditioner: λ is a tenth of the smallest Rayleigh quotient, or μν.

    The error obeys ‖e‖² ≤ ‖e‖²_A / λmin(A), and μν is a bound of λmin(A) from below that may be far off: by the
    condition of M⁻¹A. The smallest Rayleigh quotient is one from above. Among 288 systems and preconditioners the
    solves that missed 1e-2 were 2.1 % with μν for λ, 3.1 % with a tenth of the quotient, 11 % with the quotient itself.

    Args:
        smallest: The smaller of μν and of the quotient, and of what is known.
        rayleigh: The smallest Rayleigh quotient of A that was seen.
        known: The smallest eigenvalue that earlier runs have found.
    """
    above = rayleigh if known is None else jnp.minimum(known, rayleigh)
    return jnp.sqrt(smallest) * jnp.sqrt(jnp.maximum(smallest, above / 10))


def before_first(
    max_steps: Int[Array, ""] | int, rhs_square: Terms, gamma: Scalar | None, known: Known
) -> tuple[Packed[Spectrum], Packed[Scalars], Open]:
    """The scalars of the first turn, from bᵀb and bᵀM⁻¹b (None where that is the same)."""
    square = added(rhs_square)
    plain, zero, rhs_norm = gamma is None, jnp.zeros_like(square), jnp.sqrt(square)
    gamma = square if gamma is None else gamma
    # A preconditioner that is not positive definite shows as γ ≤ 0 with r ≠ 0.
    status = jnp.where(rhs_norm == 0, CONVERGED, jnp.where(gamma > 0, RUNNING, INDEFINITE))
    status = jnp.where(jnp.isfinite(rhs_norm + gamma), status, NONFINITE).astype(jnp.int32)
    norm, rayleigh, metric = (jnp.asarray(value, square.dtype) for value in known)
    spectrum = Spectrum(
        ritz=Ritz(zero, zero, zero, zero, zero),
        beta=zero,
        direction=gamma,
    )
    scalars = Scalars(
        rhs_norm=rhs_norm,
        deviation=zero,
        rayleigh=rayleigh,
        metric=metric,
        norm=None if plain else norm,
        energy=zero,
        x_square=zero,
        x_dot_p=zero if plain else None,
        residual_square=square,
        num_matvecs=jnp.zeros((), jnp.int32),
        status=status,
    )
    going = (status == RUNNING) & (max_steps > 0)
    return pack(spectrum), pack(scalars), Open(gamma, jnp.asarray(False), going, going)


def after_product(
    packed: Packed[Spectrum], now: Open, alpha: Scalar, squares: Squares, measured: Scalar | None
) -> tuple[Packed[Spectrum], Scalar, Scalar, Scalar]:
    """The spectrum as the next turn will know it, unchanged where there was no step; ‖r‖²; pᵀAp and pᵀp of this turn.

    Args:
        packed: That of this turn.
        now: Of this turn.
        alpha: The step that was taken, 0 if there was none.
        squares: Inner products.
        measured: rᵀM⁻¹r after the step, None where that is ‖r‖².
    """
    square = added(squares.residual)
    gamma = square if measured is None else measured
    s, beta = packed.tree, gamma / now.gamma
    after = Spectrum(_update_ritz(s.ritz, alpha, s.beta), beta, gamma + beta * beta * s.direction)
    advanced = jax.tree.map(lambda new, old: jnp.where(alpha > 0, new, old), pack(after), packed)
    return advanced, square, added(squares.curvature), s.direction


def after_step(
    test: StoppingTest,
    packed: Packed[Scalars],
    spectrum: Packed[Spectrum],
    now: Open,
    alpha: Scalar,
    curvature: Scalar,
    direction: Scalar,
    residual_square: Scalar,
    squares: Squares,
    preconditioned: tuple[Scalar, Scalar | None] | None,
) -> tuple[Packed[Scalars], Bool[Array, ""], Bool[Array, ""], Bool[Array, ""]]:
    """The scalars of the next turn, and what is in `Open` of it besides γ.

    Without a preconditioner the residuals are orthogonal to x and to each other, so that ‖p‖², ‖x‖² and xᵀp follow
    from the coefficients, in sums of terms that are not negative (T. Steihaug, 1983); xᵀAx = xᵀb = Σ αγ always does.

    Args:
        test: When to stop.
        packed: Those of this turn.
        spectrum: That of the next turn.
        now: Of this turn.
        alpha: The step that was taken, 0 if there was none.
        curvature: pᵀAp.
        direction: pᵀMp.
        residual_square: ‖r‖², after the step.
        squares: Other inner products, after the step.
        preconditioned: rᵀM⁻¹r and zᵀMz/zᵀz, None where there is nothing but the identity; the second is None where
            directions are recycled and nothing else.
    """
    s, seen, replace, advance = packed.tree, spectrum.tree, now.replace, alpha > 0
    dtype, ritz = alpha.dtype, spectrum.tree.ritz
    finite = curvature
    broken = ~(replace | (curvature > 0))
    if squares.direction is None or squares.product is None:
        p_dot_p, norm = direction, ritz.high
    else:
        p_dot_p, stretch = added(squares.direction), added(squares.product)
        finite += stretch
        assert s.norm is not None
        norm = jnp.where(replace, s.norm, jnp.maximum(s.norm, jnp.sqrt(stretch / p_dot_p)))
    energy, x_dot_p = s.energy + alpha * now.gamma, s.x_dot_p
    if x_dot_p is None:
        assert squares.solution is not None
        x_square = added(squares.solution)
    else:
        moved = alpha * p_dot_p
        x_square = s.x_square + alpha * (2 * x_dot_p + moved)
        x_dot_p = jnp.where(advance, seen.beta * (x_dot_p + moved), x_dot_p)
    eps = float(jnp.finfo(dtype).eps)
    residual_norm = jnp.sqrt(residual_square)
    gamma, metric = residual_square, s.metric
    if preconditioned is not None:
        gamma, least = preconditioned
        metric = metric if least is None else jnp.minimum(metric, least)
    x_norm = jnp.sqrt(x_square)
    total_norm = x_norm if squares.total is None else jnp.sqrt(added(squares.total))
    quotient, lowest = curvature / p_dot_p, 1 / ritz.low
    own_rayleigh = jnp.where(x_square > 0, energy / x_square, jnp.inf)
    witness = jnp.minimum(quotient, own_rayleigh)
    rayleigh = s.rayleigh
    if preconditioned is not None:
        rayleigh = jnp.where(replace, rayleigh, jnp.minimum(rayleigh, witness))
    # A direction without positive curvature ends the run: it is what there is to report.
    rayleigh = jnp.where(broken, jnp.minimum(rayleigh, quotient), rayleigh)
    level = norm * x_norm
    rounding = eps * (level + s.rhs_norm)
    deviation = jnp.where(replace, rounding, s.deviation + eps * (level + residual_norm))
    smallest = jnp.minimum(rayleigh, metric * lowest)
    if test.known_min is not None:
        smallest = jnp.minimum(test.known_min, smallest)
    # A direction with a small eigenvalue may not have shown itself in one or two steps.
    wanted = test.rtol * jnp.where(s.num_matvecs < 3, 0.1, 1.0).astype(dtype)
    tighten: Scalar | int = 1
    if test.amplified is not False:
        tighten = jnp.where(test.amplified, jnp.minimum(1, smallest / own_rayleigh), 1)
    measured = residual_norm if preconditioned is None else jnp.sqrt(metric * gamma)
    scale = smallest if preconditioned is None else judging_scale(smallest, rayleigh, test.known_min)
    allowed = scale * tighten * jnp.maximum(wanted * total_norm, test.atol)
    left = jnp.sqrt(gamma / seen.direction) * measured
    met = left + deviation <= allowed
    # r at rounding level of Ax, or b − Ax at what its own rounding leaves: no more can be won in this precision.
    limited = residual_norm <= jnp.where(replace, max(test.floor_of_singular / eps, 1), 1) * rounding
    trusted = deviation <= 10 * rounding
    # An end that a drift within its bound could have feigned: the true residual is to confirm it.
    doubtful = ~replace & ~trusted & ((left <= allowed) | limited)

    # Each line overrides those before it.
    status = jnp.where(met | (gamma == 0), CONVERGED, RUNNING)
    status = jnp.where(limited & trusted, PRECISION_LIMITED, status)
    status = jnp.where(gamma < 0, INDEFINITE, status)
    # In a long run lost orthogonality pushes the Ritz value below the spectrum: a vector must bear it out.
    unseen = lowest <= test.floor_of_singular * ritz.high
    borne_out = ~replace & (witness <= 6 * test.floor_of_singular * norm)
    status = jnp.where(unseen & borne_out, SINGULAR, status)
    at_rounding = jnp.abs(curvature) <= test.floor_of_singular * norm * p_dot_p
    status = jnp.where(broken, jnp.where(at_rounding, SINGULAR, INDEFINITE), status)
    status = jnp.where(jnp.isfinite(finite + gamma), status, NONFINITE).astype(jnp.int32)
    num_matvecs = s.num_matvecs + 1
    scalars = Scalars(
        rhs_norm=s.rhs_norm,
        deviation=deviation,
        rayleigh=rayleigh,
        metric=metric,
        norm=None if s.norm is None else norm,
        energy=energy,
        x_square=x_square,
        x_dot_p=x_dot_p,
        residual_square=residual_square,
        num_matvecs=num_matvecs,
        status=status,
    )
    going = (status == RUNNING) & (num_matvecs < test.max_steps)
    return pack(scalars), doubtful, going, going & ~(replace | doubtful)
