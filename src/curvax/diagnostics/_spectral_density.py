"""The spectrum of a symmetric operator from products alone: density, traces and counts with error bars."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import tree_dtype
from curvax.diagnostics._krylov import coarsest_eps, flat_operator, symmetry_tolerance
from curvax.diagnostics._quadrature import Estimate, one_signed_truncation, over_probes, weight_at_zero
from curvax.diagnostics._spectral_result import Spectrum
from curvax.linear._quadrature import Rule, gauss, gauss_rule
from curvax.operators._dense import matrix_by_columns
from curvax.operators._lanczos import MatVec, lanczos

# Numbers in the Lanczos vectors of the probes that run side by side.
_SIDE_BY_SIDE = 2**24

_WRONG = (
    "the products with `operator`, or `damping`, are not finite: look for a NaN or an infinity in what they are made "
    "of.",
    "`operator` is not symmetric: uᵀAv and vᵀAu differ by far more than rounding, so that its eigenvalues may be "
    "complex. Look at `cx.diagnostics.spectral_radius`, or pass its symmetric part or AᵀA.",
    "`operator` is tagged positive semidefinite but has a negative eigenvalue. Take the tag away, or pass a "
    "Gauss–Newton matrix in place of the Hessian.",
)


class _Measured(NamedTuple):
    rule: Rule
    asymmetry: Float[Array, ""]  # relative
    perturbation: Float[Array, ""]  # bound on what the asymmetry does to an eigenvalue


def _exactly(operator: lx.AbstractLinearOperator) -> _Measured:
    # Half precision has no eigenvalues.
    rows = matrix_by_columns(operator).astype(tree_dtype(operator.in_structure()))
    size = rows.shape[0]
    finite = jnp.all(jnp.isfinite(rows))
    # A NaN could make `eigvalsh` hang: it is put back afterwards.
    rows = jnp.where(finite, rows, 0)
    nodes = jnp.where(finite, jnp.linalg.eigvalsh((rows + rows.T) / 2), jnp.nan)
    skew, norm = jnp.linalg.norm(rows - rows.T), jnp.linalg.norm(rows)
    ones = jnp.full((1, size), size**-0.5, rows.dtype)
    return _Measured(
        Rule(nodes[None], ones, jnp.zeros_like(ones)), skew / jnp.where(norm > 0, norm, 1), skew / 2
    )


def _by_lanczos(matvec: MatVec, starts: Float[Array, "p n"], num_steps: int) -> _Measured:
    def one(start: Array) -> tuple[Rule, Array]:
        krylov = lanczos(matvec, start, num_steps)
        return gauss_rule(krylov), krylov.asymmetry

    size = starts.shape[1]
    side_by_side = max(1, _SIDE_BY_SIDE // (num_steps * size))
    rule, asymmetry = map_in_chunks(one, starts, side_by_side)
    asymmetry = jnp.max(asymmetry)
    return _Measured(rule, asymmetry, asymmetry * jnp.max(jnp.abs(rule.nodes)))


class _Definite(NamedTuple):
    """What is defined for positive definite H + damping · I alone."""

    condition: Estimate
    inverse_trace: Estimate
    log_determinant: Estimate
    effective_dimension: Estimate


def _of_definite(
    rule: Rule,
    damping: Scalar,
    ends: tuple[Estimate, Estimate],
    rounding: Scalar,
    size: Scalar,
    *,
    semidefinite: bool,
    exact: bool,
) -> _Definite:
    smallest, largest = ends
    shifted = Rule(rule.nodes + damping, rule.first, rule.last)
    # Without the tag it is taken for granted that no eigenvalue is further below the smallest Ritz value.
    least = smallest.value - smallest.truncation
    least = damping + (jnp.maximum(least, 0) if semidefinite else least)
    lowest, highest = smallest.value + damping, largest.value + damping
    definite = lowest > rounding
    safe = lambda x: jnp.where(definite, x, 1)  # what is not defined is not computed either

    inverse, log = (lambda x: 1 / safe(x)), (lambda x: jnp.log(safe(x)))
    zero = jnp.zeros_like(damping)
    bounds = [zero, zero] if exact else one_signed_truncation(shifted, least, (inverse, log))
    # Rounding moves every eigenvalue a little: to first order by |f′| times that.
    slope = jnp.mean(gauss(shifted, inverse))
    bounds[0] = bounds[0] + rounding * jnp.mean(gauss(shifted, lambda x: inverse(x) ** 2))
    bounds[1] = bounds[1] + rounding * slope
    counted = lambda x: jnp.where(damping == 0, 1, x / safe(x + damping))
    condition = jnp.where(
        jnp.abs(lowest) <= rounding, jnp.inf, jnp.where(definite, highest / lowest, jnp.nan)
    )
    most = jnp.where(least > 0, (highest + largest.truncation) / jnp.where(least > 0, least, 1), jnp.inf)
    within = jnp.where(jnp.isfinite(condition), most - condition, condition)
    only = lambda found: jax.tree.map(lambda x: jnp.where(definite, x, jnp.nan), found)
    return _Definite(
        Estimate(condition, jnp.zeros_like(condition), within),
        only(over_probes(shifted, inverse, size, bounds[0])),
        only(over_probes(shifted, log, size, bounds[1])),
        only(over_probes(rule, counted, size, jnp.where(damping == 0, 0, damping * bounds[0]))),
    )


@eqx.filter_jit
def _measure(operator, starts, num_steps):
    if starts is None:
        return _exactly(operator)
    return _by_lanczos(flat_operator(operator, "operator")[0], starts, num_steps)


class _Estimates(NamedTuple):
    smallest: Estimate
    largest: Estimate
    trace: Estimate
    num_negative: Estimate


@eqx.filter_jit
def _estimate(measured, damping, size, *, eps, semidefinite, exact):
    """All that needs no product: one program for every operator, whatever its size."""
    rule = measured.rule
    nodes, residuals = rule.nodes, jnp.abs(rule.last)
    scale = jnp.max(jnp.abs(nodes))
    rounding = 10 * eps * scale + measured.perturbation
    first, last = jnp.argmin(nodes[:, 0]), jnp.argmax(nodes[:, -1])
    certain = lambda value, within: Estimate(value, jnp.zeros_like(value), within + rounding)
    ends = certain(nodes[first, 0], residuals[first, 0]), certain(nodes[last, -1], residuals[last, -1])
    known = exact or semidefinite
    unresolved = jnp.zeros_like(scale) if known else weight_at_zero(rule, rounding)
    negative = lambda x: (x < -rounding).astype(x.dtype)
    of_all = _Estimates(
        *ends, over_probes(rule, lambda x: x, size), over_probes(rule, negative, size, unresolved)
    )
    of_definite = _of_definite(rule, damping, ends, rounding, size, semidefinite=semidefinite, exact=exact)
    tolerance = symmetry_tolerance(eps)
    wrong = jnp.stack([
        ~(jnp.all(jnp.isfinite(nodes)) & jnp.isfinite(damping)),
        ~(measured.asymmetry <= tolerance),
        semidefinite & ~(ends[0].value >= -tolerance * scale),
    ])  # fmt: skip
    return of_all, of_definite, wrong


def _refuse(found: Spectrum, wrong: Bool[Array, " k"]) -> Spectrum:
    """Raise what is wrong: at once where it is known, when the program runs where it is traced."""
    if isinstance(wrong, jax.core.Tracer):
        return eqx.branched_error_if(found, jnp.any(wrong), jnp.argmax(wrong), _WRONG)
    for flag, message in zip(wrong.tolist(), _WRONG, strict=True):
        if flag:
            raise ValueError(message)
    return found


def spectrum(
    operator: lx.AbstractLinearOperator,
    *,
    key: Array,
    num_probes: int = 8,
    num_steps: int = 64,
    damping: Scalar | float = 0.0,
    dense_size: int = 512,
) -> Spectrum:
    """Density, extremes, traces and counts of the eigenvalues of a symmetric operator, from products alone.

    Stochastic Lanczos quadrature: for a random unit vector v, m Lanczos steps give the Gauss rule of the measure
    Σ (q_iᵀv)² δ(λ − λ_i), and its mean over random v is the density of the eigenvalues, so that

        tr f(H) ≈ (n/p) Σ_probes Σ_k w_k f(θ_k)      (θ_k, w_k: nodes and weights of a probe)

    Two errors are reported apart. The standard error over the probes falls as 1/√p, whatever the steps; it is the
    larger one of their spread and of what the variance of random unit vectors makes of tr f(H)². The truncation error
    falls geometrically with the steps and is bounded by a Gauss–Radau rule, which errs to the other side. Both vanish
    up to `dense_size`, where the matrix is written out, which takes no more products.

    Args:
        operator: H, a symmetric Lineax operator over any pytree of real arrays. The bounds with `damping` take for
            granted that no eigenvalue lies below the smallest Ritz value by more than its residual, and below zero
            where H is tagged `lx.positive_semidefinite_tag`.
        key: For the probes.
        num_probes: p, at least 2.
        num_steps: m, Lanczos steps of each probe, at least 2 (no more than n are taken).
        damping: λ in `condition`, `inverse_trace`, `log_determinant` and `effective_dimension` of H + λI.
        dense_size: Largest n for which the matrix is written out, by n products; 0 for never.

    Returns:
        A `Spectrum`.

    Raises:
        TypeError: `operator` is no Lineax operator, or not over real floating-point arrays.
        ValueError: It is not square, empty, not symmetric, not finite, or not what its tag says; or too few probes or
            steps. What is seen in numbers alone is raised by `eqx.error_if` when traced: no result comes out.

    Cost: p·m products (n up to `dense_size`), 2p·m²n for orthogonalisation, m·n memory for each probe that runs beside
    others: as many as fit into 2²⁴ numbers, at least one.

    Example:
        ```python
        eigenvalues = jnp.linspace(-1.0, 9.0, 1000)
        found = cx.diagnostics.spectrum(lx.DiagonalLinearOperator(eigenvalues), key=jax.random.key(0))
        print(found)
        found.trace.value, found.trace.error  # 4000 within a few times the second number
        ```

    Source: Ubaru, Chen and Saad, "Fast estimation of tr f(A) via stochastic Lanczos quadrature", SIAM J. Matrix Anal.
    Appl. 38 (2017); Golub and Meurant, "Matrices, moments and quadrature with applications" (2010). Probes are
    uniform on the sphere instead of random signs: those can be orthogonal to eigenvectors of simple matrices.
    """
    for name, value in (("num_probes", num_probes), ("num_steps", num_steps)):
        if value < 2:
            raise ValueError(
                f"`{name}` must be at least 2, found {value}: fewer give no error bar, or no test."
            )
    if not isinstance(damping, jax.core.Tracer) and not float(damping) >= 0:
        raise ValueError(f"`damping` of `spectrum` must be at least 0, found {damping}.")
    _, flat = flat_operator(operator, "operator")
    leaves = jax.tree.leaves(operator.in_structure())
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves):
        raise TypeError(
            f"`operator` must map real floating-point arrays, found {sorted({str(leaf.dtype) for leaf in leaves})}."
        )
    exact = flat.size <= dense_size
    damping = jnp.asarray(damping, flat.dtype)
    steps = min(num_steps, flat.size)
    starts = None if exact else jax.random.normal(key, (num_probes, flat.size), flat.dtype)
    measured = _measure(operator, starts, steps)
    of_all, of_definite, wrong = _estimate(
        measured,
        damping,
        jnp.asarray(flat.size, flat.dtype),
        eps=coarsest_eps(operator.in_structure()),
        semidefinite=lx.is_positive_semidefinite(operator),
        exact=exact,
    )
    found = Spectrum(
        **of_all._asdict(),
        **of_definite._asdict(),
        damping=damping,
        nodes=measured.rule.nodes,
        residuals=jnp.abs(measured.rule.last),
        weights=measured.rule.first**2,
        asymmetry=measured.asymmetry,
        size=flat.size,
        num_steps=steps,
        num_matvecs=flat.size if exact else num_probes * steps,
        exact=exact,
    )
    return _refuse(found, wrong)
