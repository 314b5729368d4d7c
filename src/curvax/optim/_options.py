"""What a second-order optimiser can be told, in groups of options that belong together."""

import math
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from curvax.operators._cotangents import Kind
from curvax.operators._kfac_statistics import check_sharing

# κ beside a given learning rate.
AUTO_CLIP = 1e-2
# The part of λ that is in the preconditioner, where the exact quadratic model has all of it.
AUTO_SHARE = 0.1


class Damping(eqx.Module):
    """What is added to the curvature, how that is adapted, and how long a step may be at most.

    The model of the objective at a step δ is M(δ) = gᵀδ + ½ δᵀ(F + (λ + η) I) δ, g the gradient and F the curvature.
    Every `every` steps, and in each of the first `every`, ρ = (f(θ + δ) − f(θ)) / M(δ) is measured on the batch of that
    step, and λ multiplied by `factor`^`every` if ρ > ¾ and divided by it unless ρ ≥ ¼ (Levenberg and Marquardt's rule).
    Where the model has far too much curvature, as where a loss tends to zero and its curvature with it but λ does not,
    that is too slow: with c = (f(θ + δ) − f(θ) − gᵀδ) / (M(δ) − gᵀδ), the curvature of the objective along δ ÷ the
    model's (2 − ρ for a step that minimises M), λ is multiplied by c if that is less, but not by less than
    `factor`^(5 `every`). A step that is looked at and leads up, or to where the objective is not finite, is not taken,
    and λ is divided by `factor`^(5 `every`).

    Args:
        initial: λ at the start, > 0, in the units of the eigenvalues of the curvature of the MEAN loss.
        every: Steps from one adaptation to the next; None keeps λ as it is.
        factor: By which λ shrinks in a step, between 0 and 1.
        limits: λ stays between these.
        exact: F + γI, γ = `share` λ + η, in the joint eigenbasis of the factors of a layer, instead of the product of
            the factors with π√γ and √γ/π added. Eigenvectors instead of Cholesky factors, and λ is never out of date.
        penalty: η, where the objective has ½ η ‖θ‖² in it, as the gradients that you pass then have; it is not adapted.
        share: The part of λ in the preconditioner (F + (share · λ + η) I)⁻¹; M has all of it. `"auto"` is 1 beside a
            given learning rate and for K-BFGS, and 0.1 for the steps of the exact quadratic model: what is not in F,
            curvature across layers and positions, makes their α small (0.02 to 0.3 for deep networks and
            transformers), and α (F + γI)⁻¹ = (F/α + γ/α I)⁻¹, in which γ = λ would damp as λ/α.
        kl_clip: κ: steps with δᵀFδ > κ (twice the Kullback–Leibler divergence of a likelihood, to second order) are
            shortened to κ; None for no bound. Beside a given learning rate α, α² gᵀF⁻¹g stands for it, bounded by κ
            (1 − μ) with momentum μ, since what μ sums up is longer. `"auto"` is 0.01 there, for without a bound easy
            problems diverge: what F knows of a batch says little about a long step; and no bound for the steps of the
            exact quadratic model.

    Raises:
        ValueError: A number out of its range.

    Example:
        ```python
        import curvax as cx

        cx.optim.Damping(1e-2, every=None, exact=True, kl_clip=1e-3)
        ```
    """

    initial: float = 0.1
    every: int | None = 5
    factor: float = 0.95
    limits: tuple[float, float] = (1e-8, 1e4)
    exact: bool = False
    penalty: float = 0.0
    share: float | Literal["auto"] = "auto"
    kl_clip: float | Literal["auto"] | None = "auto"

    def __check_init__(self) -> None:
        low, high = self.limits
        _check(
            0 < low <= high < math.inf, "limits", self.limits, "two numbers with 0 < limits[0] <= limits[1]"
        )
        _check(low <= self.initial <= high, "initial", self.initial, f"between the limits, {low} and {high}")
        _check(
            self.every is None or _is_count(self.every),
            "every",
            self.every,
            "None or a whole number of steps",
        )
        _check(0 < self.factor < 1, "factor", self.factor, "between 0 and 1")
        _check(0 <= self.penalty < math.inf, "penalty", self.penalty, "at least 0")
        share, clip = self.share, self.kl_clip
        _check(
            share == "auto" if isinstance(share, str) else 0 < share < math.inf,
            "share",
            share,
            '"auto" or above 0',
        )
        _check(
            clip is None or (clip == "auto" if isinstance(clip, str) else clip > 0),
            "kl_clip",
            clip,
            '"auto", None or above 0',
        )

    def in_preconditioner(self, given_rate: bool) -> float:
        """The part of λ that is in the preconditioner.

        Args:
            given_rate: Whether the learning rate is given.
        """
        if isinstance(self.share, str):
            return 1.0 if given_rate else AUTO_SHARE
        return float(self.share)

    def clip(self, given_rate: bool) -> float | None:
        """κ, or None for no bound.

        Args:
            given_rate: Whether the learning rate is given.
        """
        if isinstance(self.kl_clip, str):
            return AUTO_CLIP if given_rate else None
        return self.kl_clip


class Momentum(eqx.Module):
    """A running sum of gradients, before the preconditioner or after it.

    `"after"`: δ ← learning rate · d + decay · δ, d the preconditioned gradient. `"before"`: d is the preconditioned
    mean (1 − decay) Σ decayᵏ g of the gradients, corrected for its start at zero.

    Args:
        decay: At least 0 and below 1.
        place: `"after"` or `"before"`.

    Raises:
        ValueError: A decay out of its range, an unknown place.

    Example:
        ```python
        import curvax as cx

        cx.optim.Momentum(0.9, "before")
        ```
    """

    decay: float = 0.9
    place: Literal["after", "before"] = "after"

    def __check_init__(self) -> None:
        _check(0 <= self.decay < 1, "decay", self.decay, "at least 0 and below 1")
        _check(self.place in ("after", "before"), "place", self.place, '"after" or "before"')


class Factors(eqx.Module):
    """How the factors of the layers are estimated, and in what they are kept.

    Args:
        kind: `"monte_carlo"` (targets drawn from the model, one for each example), `"empirical"` (those of the data) or
            `"exact"` (a backward pass for every output of an example).
        sharing: `"expand"` or `"reduce"`, for weights that an example uses more than once, as for
            `cx.operators.kfac`.
        decay: Of the running mean of the factors: a batch counts 1 − decay, more in the first steps, in which it is the
            plain mean of all batches.
        fraction: The part of each batch that is used, another one at each step.
        dtype: Of the factors and their inverses, such as `jnp.bfloat16`; None for that of the parameters, at least
            float32. They are summed and factorised in at least float32.

    Raises:
        ValueError: An unknown kind, sharing or dtype, a number out of its range.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        cx.optim.Factors("empirical", decay=0.99, fraction=0.25, dtype=jnp.bfloat16)
        ```
    """

    kind: Kind = "monte_carlo"
    sharing: Literal["expand", "reduce"] = "expand"
    decay: float = 0.95
    fraction: float = 1.0
    dtype: Any = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        kinds = ("monte_carlo", "empirical", "exact")
        _check(self.kind in kinds, "kind", self.kind, f"one of {', '.join(map(repr, kinds))}")
        check_sharing(self.sharing)
        _check(0 <= self.decay < 1, "decay", self.decay, "at least 0 and below 1")
        _check(0 < self.fraction <= 1, "fraction", self.fraction, "above 0 and at most 1")
        known = self.dtype is None or jnp.issubdtype(self.dtype, np.floating)
        _check(known, "dtype", self.dtype, "a floating-point dtype, or None")


class Schedule(eqx.Module):
    """When factors are estimated, and when they are factorised.

    In the first three steps everything is. After that all factors are factorised once in `inverses` steps: spread over
    these steps, so that each has about the same work (factors of equal shape in one batched call), or all at once.

    Args:
        statistics: Steps from one estimate of the factors to the next.
        inverses: Steps in which every factor is factorised once.
        staggered: Whether that work is spread over the steps. Where the damping is adapted every `inverses` steps too,
            that is the work of the last of them.
        drift: If given, a share of the factors is factorised only when it is its turn by need: in each step the one
            share that is most out of date, and only if it is by more than this. Measured by a probe z, ‖(F + γI) X z −
            z‖/‖z‖ for the inverse X in use (for eigenvectors ‖F z − U S Uᵀz‖/‖F z‖), at two products of a matrix with
            a vector for each factor.

    Raises:
        ValueError: A number out of its range, or a drift without shares.

    Example:
        ```python
        import curvax as cx

        cx.optim.Schedule(statistics=2, inverses=10, drift=0.1)
        ```
    """

    statistics: int = 1
    inverses: int = 5
    staggered: bool = True
    drift: float | None = None

    def __check_init__(self) -> None:
        for name in ("statistics", "inverses"):
            _check(
                _is_count(getattr(self, name)),
                name,
                getattr(self, name),
                "a whole number of steps, at least 1",
            )
        _check(self.drift is None or self.drift > 0, "drift", self.drift, "None or above 0")
        _check(
            self.drift is None or self.staggered,
            "drift",
            self.drift,
            "None without `staggered`: it picks a share",
        )


def as_momentum(momentum: "float | Momentum | None") -> Momentum | None:
    """A number as momentum after the preconditioner."""
    if momentum is None or isinstance(momentum, Momentum):
        return momentum
    if not isinstance(momentum, int | float | np.floating):
        raise TypeError(
            f"`momentum` must be a number, a `cx.optim.Momentum` or None, found {type(momentum).__name__}."
        )
    return Momentum(float(momentum))


def check_option(name: str, value: Any, wanted: type) -> None:
    """Raise unless an argument is the group of options that it must be."""
    if not isinstance(value, wanted):
        raise TypeError(
            f"`{name}` must be a `cx.optim.{wanted.__name__}`, found {value!r}; such as "
            f"`{name}=cx.optim.{wanted.__name__}(...)`."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _check(holds: Any, name: str, found: Any, wanted: str) -> None:
    if not holds:
        raise ValueError(f"`{name}` must be {wanted}; found {found!r}.")
