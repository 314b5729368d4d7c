"""Integrals over the spectrum of a symmetric matrix with their errors, from the Gauss rules of random probes.

For v uniform on the sphere the mean of n vᵀf(A)v is tr f(A).

Source: Golub and Meurant, "Matrices, moments and quadrature with applications" (2010); Ubaru, Chen and Saad, "Fast
estimation of tr f(A) via stochastic Lanczos quadrature", SIAM J. Matrix Anal. Appl. 38 (2017).
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from curvax.linear._quadrature import Rule, gauss, radau

# Trials of the ellipse in the bound of `kernel_truncation`.
_ELLIPSES = 200


class Estimate(eqx.Module):
    """A number with what is known of its error.

    Attributes:
        value: The estimate; NaN where it is not defined.
        standard_error: Of the mean over the random probes, one standard deviation; 0 where nothing is random.
        truncation: Bound on the error of having taken so few Lanczos steps; infinite where none is known. For an
            extreme eigenvalue: some eigenvalue lies within this distance.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    truncation: Float[Array, ""]

    @property
    def error(self) -> Float[Array, ""]:
        """Standard error and truncation together."""
        return self.standard_error + self.truncation


def over_probes(
    rule: Rule,
    fn: Callable[[Array], Array],
    size: Float[Array, ""],
    truncation: Float[Array, ""] | None = None,
) -> Estimate:
    """tr f(A), n times the mean of vᵀ f(A) v over the probes, and its standard error."""
    values = fn(rule.nodes)
    mean, error = _mean_over_probes(values, rule.first**2, size)
    truncation = jnp.zeros_like(error) if truncation is None else truncation
    return Estimate(size * mean, size * error, size * truncation)


def _mean_over_probes(
    values: Float[Array, "p m"], weights: Float[Array, "p m"], size: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean of Σ weights · values over the probes and its standard error.

    For v uniform on the sphere vᵀFv has the variance 2/(n + 2) · (tr F²/n − (tr F/n)²), and the rules know tr F² too.
    Where few eigenvalues dominate, that is far steadier than the spread of a few probes, which then are all small by
    chance too often; the larger one is taken, since a rule sees less of F² than of F.
    """
    samples = jnp.sum(weights * values, axis=1)
    count = samples.size
    mean = jnp.mean(samples)
    if count == 1:
        return mean, jnp.zeros_like(mean)
    variance = 2 / (size + 2) * jnp.mean(jnp.sum(weights * (values - mean) ** 2, axis=1))
    return mean, jnp.sqrt(jnp.maximum(variance, jnp.var(samples, ddof=1)) / count)


def weight_at_zero(rule: Rule, rounding: Float[Array, ""]) -> Float[Array, ""]:
    """Bound on the truncation error of the weight of the eigenvalues below −`rounding`, averaged over the probes.

    With a node at 0, the weights of the nodes left of it sum to at most the measure of (−∞, 0), and together with
    that of the node to at least it (Chebyshev, Markov and Stieltjes): the weight at 0, which falls geometrically with
    the steps where no eigenvalue is near 0, is what m steps cannot tell.
    """
    gaussian = gauss(rule, lambda nodes: (nodes < -rounding).astype(nodes.dtype))
    nodes, weights, _ = radau(rule, jnp.zeros_like(rounding))
    middle = jnp.argmin(jnp.abs(nodes), axis=1, keepdims=True)
    position = jnp.arange(nodes.shape[1])
    least = jnp.sum(jnp.where(position < middle, weights, 0), axis=1)
    most = least + jnp.sum(jnp.where(position == middle, weights, 0), axis=1)
    bound = jnp.maximum(jnp.abs(gaussian - least), jnp.abs(most - gaussian))
    return jnp.mean(jnp.where(_is_exact(rule), 0, bound))


def _is_exact(rule: Rule) -> Bool[Array, " p"]:
    """Whether the Krylov space of the probe was exhausted."""
    return jnp.all(rule.last == 0, axis=1)


def one_signed_truncation(
    rule: Rule, least: Float[Array, ""], functions: Sequence[Callable[[Array], Array]]
) -> list[Float[Array, ""]]:
    """Bounds on the truncation error for functions such as 1/x and log x, averaged over the probes.

    All even derivatives of such a function have one sign and all odd ones the other: on a spectrum above `least` > 0
    the Gauss rule and the Radau rule with a node there err to opposite sides, and their distance bounds either.
    """
    nodes, weights, usable = radau(rule, jnp.maximum(least, jnp.finfo(least.dtype).tiny))
    known = usable & (least > 0)
    bounds = []
    for fn in functions:
        distance = jnp.abs(jnp.sum(weights * fn(nodes), axis=1) - gauss(rule, fn))
        bounds.append(jnp.mean(jnp.where(_is_exact(rule), 0, jnp.where(known, distance, jnp.inf))))
    return bounds


def smooth(
    rule: Rule, points: Float[Array, " g"], width: Float[Array, ""], size: Float[Array, ""]
) -> tuple[Float[Array, " g"], Float[Array, " g"]]:
    """Density of the eigenvalues under a Gaussian kernel of standard deviation `width`, and its standard error."""
    weights = rule.first**2

    def one(point: Array) -> tuple[Array, Array]:
        kernel = jnp.exp(-(((point - rule.nodes) / width) ** 2) / 2)
        return _mean_over_probes(kernel, weights, size)

    scale = width * (2 * jnp.pi) ** 0.5
    density, error = jax.lax.map(one, points)
    return density / scale, error / scale


def kernel_truncation(
    half_range: Float[Array, ""], width: Float[Array, ""], num_steps: int
) -> Float[Array, ""]:
    """Bound on the error of an m-step Gauss rule for a Gaussian kernel, on a spectrum of this half range.

    A Gauss rule errs by at most twice the distance of the kernel to polynomials of degree d = 2m − 1, which is at
    most 2 M ρ^(−d) / (ρ − 1) for M the maximum of the kernel in the ellipse of Bernstein with parameter ρ = e^η:
    exp((half_range · sinh η / width)² / 2) / (width √(2π)), wherever the kernel sits. The least over η is taken.

    Source: Trefethen, "Approximation theory and approximation practice" (2013), theorems 8.2 and 19.3.
    """
    eta = jnp.geomspace(1e-3, 10.0, _ELLIPSES, dtype=width.dtype)
    exponent = (half_range * jnp.sinh(eta) / width) ** 2 / 2 - (2 * num_steps - 1) * eta
    bound = jnp.min(4 * jnp.exp(exponent) / jnp.expm1(eta))
    # Nor can it be wrong by more than its maximum: both the rule and the measure have mass one.
    return jnp.minimum(bound, 1) / (width * (2 * jnp.pi) ** 0.5)
