"""Kronecker trust region: K-FAC's step, no longer than what the last steps showed can be trusted."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, Scalar

from curvax._pytree import tree_dtype, tree_where
from curvax.operators._cotangents import Loss
from curvax.optim._checks import check_functions
from curvax.optim._kronecker import KroneckerCurvature
from curvax.optim._options import Damping, Factors, Schedule, check_option
from curvax.optim._quadratic import inner
from curvax.optim._scalars import scalars
from curvax.optim._start import full
from curvax.optim._state import OptimiserState, StepInfo
from curvax.optim._tail import change_of_objective
from curvax.optim._transformation import (
    ModelFn,
    checked,
    gradient_leaves,
    infos_of,
    like_gradients,
)


def kf_trust_region(
    model_fn: ModelFn,
    loss: Loss,
    radius: float = 1.0,
    *,
    example: PyTree,
    damping: float = 1e-3,
    penalty: float = 0.0,
    factors: Factors = Factors(),  # noqa: B008
    schedule: Schedule = Schedule(),  # noqa: B008
) -> optax.GradientTransformationExtraArgs:
    r"""Kronecker trust region: Δ = −min(1, r/‖g‖_{F⁻¹}) F⁻¹g, with K-FAC's F for the model and for the length of steps.

    That is the minimiser of M(δ) = gᵀδ + ½ δᵀFδ over δᵀFδ ≤ r². On the batch of the step ρ = (f(θ + Δ) − f(θ)) / M(Δ);
    r is doubled where ρ > ¾ and the step was as long as r, and halved unless ρ ≥ ¼. Steps with ρ ≤ 0, or to where the
    loss is not finite, are not taken.

    Args:
        model_fn: `model_fn(params, x)` → outputs, for ONE example.
        loss: `loss(output, target)` → scalar, for one example, convex in the outputs. The objective f is its MEAN over
            the batch, and ½ `penalty` ‖θ‖² where that is given.
        radius: r at the start: √(δᵀFδ), for a likelihood √2 times the root of the Kullback–Leibler divergence that a
            step may make.
        example: One example of the inputs (arrays or `jax.ShapeDtypeStruct`s), of which only the shapes count.
        damping: λ, > 0: π√(λ + η) and √(λ + η)/π are added to the factors of F. It stays, for the radius is adapted.
        penalty: η, where the objective has ½ η ‖θ‖² in it, as the gradients that you pass then have.
        factors: How the factors are estimated.
        schedule: When, and when they are factorised.

    Returns:
        A transformation with `init(params)` and `update(grads, state, params, inputs=..., targets=..., key=...)`, as of
            [`kfac`][curvax.optim.kfac]. `state.damping` is the radius of the next step.

    Raises:
        TypeError: An argument of another kind.
        ValueError: A radius, damping or penalty out of its range; in `update` what is missing or does not fit.

    Cost: that of `kfac` with a fixed learning rate, and a forward pass.

    Source: R. Fletcher, "Practical methods of optimization", 1987, for the radius; Y. Wu et al., "Scalable trust-region
    method for deep reinforcement learning using Kronecker-factored approximation", 2017, arXiv 1708.05144, which keeps
    the radius fixed.

    Example:
        ```python
        import jax, jax.numpy as jnp, optax, curvax as cx

        loss, w = cx.operators.SquaredError(), jnp.ones((3, 2))
        x, y = jax.random.normal(jax.random.key(0), (8, 2)), jnp.ones((8, 3))
        model_fn = lambda w, x: jnp.tanh(w @ x)
        optimiser = cx.optim.kf_trust_region(model_fn, loss, 0.5, example=x[0], factors=cx.optim.Factors("empirical"))
        state = optimiser.init(w)
        grads = jax.grad(lambda w: jnp.mean(jax.vmap(lambda x, y: loss(model_fn(w, x), y))(x, y)))(w)
        updates, state = optimiser.update(grads, state, w, inputs=x, targets=y)
        w = optax.apply_updates(w, updates)
        ```
    """
    check_functions(model_fn, loss)
    check_option("factors", factors, Factors)
    check_option("schedule", schedule, Schedule)
    for name, value in (("radius", radius), ("damping", damping)):
        if not isinstance(value, int | float | np.generic) or not 0 < float(value) < np.inf:
            raise ValueError(f"`{name}` must be a number above 0, found {value!r}.")
    # λ stays: nothing but the refresh of inverses takes turns.
    fixed = Damping(damping, None, limits=(damping, damping), penalty=penalty)
    curvature = KroneckerCurvature(factors, schedule, fixed)
    draws = factors.kind == "monte_carlo"

    def init(params: PyTree) -> OptimiserState:
        infos = infos_of(model_fn, params, example)
        dtype = tree_dtype(eqx.filter(params, eqx.is_inexact_array))
        start = full((), radius, dtype)
        return OptimiserState(full((), 0, jnp.int32), curvature.init(infos), {}, start, StepInfo.empty(dtype))

    def update(
        updates: PyTree,
        state: OptimiserState,
        params: PyTree | None = None,
        *,
        inputs: PyTree = None,
        targets: PyTree = None,
        key: PRNGKeyArray | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OptimiserState]:
        del extra
        now = checked(model_fn, loss, example, params, state, inputs, targets, key, draws)
        gradient = now.pack(gradient_leaves(updates, now))
        dtype = state.damping.dtype
        total = jnp.asarray(damping + penalty, dtype)
        known = curvature.observe(state.curvature, now, total)
        solved = curvature.apply(known, now.infos, gradient, total)
        # gᵀF⁻¹g, the squared length of the whole step in F.
        squared = inner([gradient], [solved])[0, 0].astype(dtype)
        share, predicted = scalars(_shortened)(squared, state.damping)
        step = {name: -share.astype(part.dtype) * part for name, part in solved.items()}
        before = now.mean_loss(*now.outputs(now.leaves)).astype(dtype)
        change, after = change_of_objective(now, step, before, penalty)
        judged = scalars(_judged)(squared, state.damping, share, predicted, before, change, after)
        ratio, taken, following, broken = judged
        step = tree_where(taken, step, {name: jnp.zeros_like(part) for name, part in step.items()})
        skipped = state.info.skipped + (~taken).astype(jnp.int32)
        info = StepInfo(
            share,
            jnp.zeros((), dtype),
            state.damping,
            before,
            ratio,
            skipped,
            state.info.nonfinite + broken.astype(jnp.int32),
        )
        after_state = OptimiserState(state.count + 1, known, {}, following, info)
        return like_gradients(updates, now.unpack(step)), after_state

    return optax.GradientTransformationExtraArgs(init, update)


def _shortened(squared: Scalar, radius: Scalar) -> tuple[Scalar, Scalar]:
    """The part of a step of that squared length which is no longer than the radius, and M there."""
    length = jnp.sqrt(squared)
    share = jnp.where(length > radius, radius / length, 1)
    return share, (0.5 * share**2 - share) * squared


def _judged(
    squared: Scalar,
    radius: Scalar,
    share: Scalar,
    predicted: Scalar,
    before: Scalar,
    change: Scalar,
    after: Scalar,
) -> tuple[Scalar, Bool[Array, ""], Scalar, Bool[Array, ""]]:
    """ρ, whether the step is taken, the radius after it, and whether anything was not finite before it."""
    # At a stationary point the model promises nothing, and there is nothing to judge.
    ratio = jnp.where(squared == 0, 1, change / predicted).astype(radius.dtype)
    lost = jnp.abs(predicted) <= 10 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    taken = jnp.isfinite(after) & jnp.isfinite(squared) & ((ratio > 0) | lost)
    grown = jnp.where((ratio > 0.75) & (share < 1), 2 * radius, radius)
    following = jnp.where(lost, radius, jnp.where(~(ratio >= 0.25), 0.5 * radius, grown))
    # A gradient that is not finite says nothing about the radius.
    following = jnp.where(jnp.isfinite(squared), following, radius)
    return ratio, taken, following, ~(jnp.isfinite(squared) & jnp.isfinite(before))
