"""From directions to steps: learning rate, momentum, clip and adaptive damping, the same for every curvature."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Scalar

from curvax._pytree import tree_where
from curvax.optim._blocks import Context, Matrices
from curvax.optim._options import Damping, Momentum
from curvax.optim._quadratic import inner, minimiser, quadratic
from curvax.optim._scalars import scalars
from curvax.optim._state import OptimiserState, StepInfo

Rate = Callable[[Array], Any] | None


# A step that is not taken raises the damping as so many that were poor: the next one must differ. Likewise at most so
# many steps at once lower it.
LEAP = 5


class Proposal(NamedTuple):
    """A step, before anybody looked where it leads.

    Attributes:
        step: δ.
        velocity: For the next step.
        learning_rate: α in it.
        momentum: μ in it.
        loss: Mean loss before it, None where that is not known yet.
        predicted: M(δ), likewise.
        good: Whether it is finite.
    """

    step: Matrices
    velocity: Matrices
    learning_rate: Scalar
    momentum: Scalar
    loss: Scalar | None
    predicted: Scalar | None
    good: Bool[Array, ""]


class Judgement(NamedTuple):
    """What came of a look at the objective after a step."""

    damping: Scalar
    loss: Scalar
    ratio: Scalar
    down: Bool[Array, ""]
    finite: Bool[Array, ""]


class Tail(eqx.Module):
    """What all optimisers do with a preconditioned gradient.

    Attributes:
        learning_rate: A function of the number of steps before; None for the one of the exact quadratic model.
        momentum: None for that of the model too, or for none beside a given learning rate.
        damping: Its adaptation and the clip.
    """

    learning_rate: Rate
    momentum: Momentum | None
    damping: Damping

    @property
    def keeps_velocity(self) -> bool:
        """Whether a step depends on the ones before."""
        return self.learning_rate is None if self.momentum is None else self.momentum.decay > 0

    def __call__(
        self, state: OptimiserState, now: Context, gradient: Matrices, solve: Callable[[Matrices], Matrices]
    ) -> tuple[Matrices, Matrices, Scalar, StepInfo]:
        """The step, and velocity, damping and report after it.

        Args:
            state: Before it.
            now: Model and batch.
            gradient: Of the objective.
            solve: The preconditioner.
        """
        velocity, source = self._source(state, gradient)
        propose = self._of_model if self.learning_rate is None else self._of_rate
        made = propose(state, now, gradient, source, solve(source), velocity)
        judged = self._judged(state, now, gradient, made)
        taken = made.good & judged.down
        nothing = {name: jnp.zeros_like(matrix) for name, matrix in made.step.items()}
        step = tree_where(taken, made.step, nothing)
        if self.keeps_velocity:
            # A gradient that is not finite leaves the velocity as it was, a step into the void ends it.
            after = tree_where(taken, made.velocity, tree_where(made.good, nothing, state.velocity))
        else:
            after = {}
        dtype = state.damping.dtype
        info = StepInfo(
            made.learning_rate.astype(dtype),
            made.momentum.astype(dtype),
            state.damping,
            judged.loss.astype(dtype),
            judged.ratio.astype(dtype),
            state.info.skipped + (~taken).astype(jnp.int32),
            state.info.nonfinite + (~(made.good & judged.finite)).astype(jnp.int32),
        )
        return step, after, judged.damping.astype(dtype), info

    def _source(self, state: OptimiserState, gradient: Matrices) -> tuple[Matrices, Matrices]:
        """The velocity, and what is preconditioned."""
        if self.momentum is None or self.momentum.place == "after" or not self.keeps_velocity:
            return state.velocity, gradient
        decay = self.momentum.decay
        mean = {name: decay * state.velocity[name] + (1 - decay) * g for name, g in gradient.items()}
        weight = 1 - decay ** (state.count + 1).astype(state.damping.dtype)
        return mean, {name: v / weight.astype(v.dtype) for name, v in mean.items()}

    @property
    def _is_before(self) -> bool:
        return self.momentum is not None and self.momentum.place == "before"

    def _of_rate(
        self,
        state: OptimiserState,
        now: Context,
        gradient: Matrices,
        source: Matrices,
        solved: Matrices,
        velocity: Matrices,
    ) -> Proposal:
        """With a given learning rate."""
        assert self.learning_rate is not None
        dtype = state.damping.dtype
        decay = 0.0 if self.momentum is None else self.momentum.decay
        clip = self.damping.clip(given_rate=True)
        summed = self.keeps_velocity and not self._is_before
        # Between the steps that agree, whose sum is 1/(1 − μ) as long, and those that do not, 1/√(1 − μ²) as long.
        most = clip if clip is None or not summed else clip * (1 - decay)

        def choose(rate: Scalar, size: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
            return rate if most is None else rate * _shortening(most, rate**2 * size), jnp.isfinite(size)

        given = jnp.asarray(self.learning_rate(state.count)).astype(dtype)
        rate, good = scalars(choose)(given, inner([solved], [source])[0, 0].astype(dtype))
        step = _scaled(-rate, solved)
        if summed:
            step = _sum(step, _scaled(jnp.asarray(decay, dtype), velocity))
            velocity = step
        return Proposal(step, velocity, rate, jnp.asarray(decay, dtype), None, None, good)

    def _of_model(
        self,
        state: OptimiserState,
        now: Context,
        gradient: Matrices,
        source: Matrices,
        solved: Matrices,
        velocity: Matrices,
    ) -> Proposal:
        """With the learning rate, and unless it is given the momentum, that minimise the exact model."""
        del source
        second = self.keeps_velocity and not self._is_before
        directions = [solved, velocity] if second else [solved]
        model = quadratic(now, directions)
        products = inner(directions, [*directions, gradient])
        weights, predicted, good = scalars(self._weights)(model.curvature, products, state.damping)
        step = _scaled(weights[0], solved)
        if second:
            step = _sum(step, _scaled(weights[1], velocity))
        decay = 0.0 if self.momentum is None else self.momentum.decay
        momentum = weights[1] if second else jnp.asarray(decay, model.loss.dtype)
        kept = velocity if self._is_before else step
        return Proposal(step, kept, -weights[0], momentum, model.loss, predicted, good)

    def _weights(
        self, curvature: Float[Array, "k k"], products: Float[Array, "k k+1"], damping: Scalar
    ) -> tuple[list[Scalar], Scalar, Bool[Array, ""]]:
        """What each direction counts in the step, M of the step, and whether that is finite.

        Args:
            curvature: uᵢᵀ G uⱼ of the directions.
            products: uᵢᵀ uⱼ, and uᵢᵀ g in the last column.
            damping: λ.
        """
        shift = (damping + self.damping.penalty).astype(curvature.dtype)
        matrix, slope = curvature + shift * products[:, :-1], products[:, -1]
        if len(matrix) == 1:
            weights = -slope / matrix[0]
        elif self.momentum is None:
            weights = minimiser(matrix, slope)
        else:
            decay = jnp.asarray(self.momentum.decay, slope.dtype)
            weights = jnp.stack([-(slope[0] + decay * matrix[0, 1]) / matrix[0, 0], decay])
        # Nothing moves where the gradient is zero.
        weights = jnp.where(matrix[0, 0] > 0, weights, jnp.where(matrix[0, 0] == 0, 0, jnp.nan))
        clip = self.damping.clip(given_rate=False)
        if clip is not None:
            weights = weights * _shortening(clip, weights @ curvature @ weights)
        predicted = slope @ weights + 0.5 * weights @ matrix @ weights
        good = jnp.all(jnp.isfinite(weights)) & jnp.all(jnp.isfinite(slope))
        return list(weights), predicted, good

    def _judged(self, state: OptimiserState, now: Context, gradient: Matrices, made: Proposal) -> Judgement:
        """Where the step leads, in every so many of them."""
        kept = Judgement(
            state.damping, state.info.loss, state.info.ratio, jnp.asarray(True), jnp.asarray(True)
        )
        if self.damping.every is None:
            return kept

        def look(kept: Judgement) -> Judgement:
            before, predicted = made.loss, made.predicted
            slope = inner([made.step], [gradient])[0, 0]
            if before is None or predicted is None:
                model = quadratic(now, [made.step])
                shift = state.damping + self.damping.penalty
                squared = inner([made.step], [made.step])[0, 0]
                before = model.loss
                predicted = slope + 0.5 * (model.curvature[0, 0] + shift.astype(squared.dtype) * squared)
            change, after = change_of_objective(now, made.step, before, self.damping.penalty)
            judge = scalars(ft.partial(self._judgement, kept.ratio.dtype))
            return judge(state.damping, before, predicted, slope, change, after, made.good)

        due = (state.count % self.damping.every == self.damping.every - 1) | (
            state.count < self.damping.every
        )
        return jax.lax.cond(due, look, lambda kept: kept, kept)

    def _judgement(
        self,
        dtype: Any,
        damping: Scalar,
        before: Scalar,
        predicted: Scalar,
        slope: Scalar,
        change: Scalar,
        after: Scalar,
        good: Bool[Array, ""],
    ) -> Judgement:
        """Of a step that changed the objective by so much, to a mean loss of `after`."""
        # A change that is lost in the rounding of the loss says nothing.
        rounding = 10 * jnp.finfo(before.dtype).eps * jnp.abs(before)
        lost = jnp.abs(predicted) <= rounding
        down = jnp.isfinite(after) & ((change <= 0) | lost)
        # A gradient that is not finite says nothing either.
        silent = lost | ~good
        ratio = change / predicted
        # Likewise a curvature, of steps so short that the objective is linear along them: then it is the model's.
        curved = jnp.abs(predicted - slope) > rounding
        curvature = jnp.where(curved, (change - slope) / jnp.where(curved, predicted - slope, 1), 1)
        adapted = self._adapted(damping, ratio, curvature, predicted, down)
        return Judgement(
            jnp.where(silent, damping, adapted),
            before.astype(dtype),
            ratio.astype(dtype),
            down,
            jnp.isfinite(before),
        )

    def _adapted(
        self, damping: Scalar, ratio: Scalar, curvature: Scalar, predicted: Scalar, down: Bool[Array, ""]
    ) -> Scalar:
        """Levenberg and Marquardt's rule; faster where the model has far too much curvature along the step.

        Args:
            damping: λ.
            ratio: ρ.
            curvature: That of the objective along the step, ÷ the model's.
            predicted: M(δ).
            down: Whether the step is taken.
        """
        assert self.damping.every is not None
        factor = self.damping.factor**self.damping.every
        # A step that is one up in the model itself is too long.
        poor = ~(ratio >= 0.25) | (predicted > 0)
        lower = damping * jnp.clip(curvature, factor**LEAP, factor)
        changed = jnp.where(poor, damping / factor, jnp.where(ratio > 0.75, lower, damping))
        changed = jnp.where(down, changed, damping / factor**LEAP)
        return jnp.clip(changed, *self.damping.limits).astype(damping.dtype)


def change_of_objective(
    now: Context, step: Matrices, before: Scalar, penalty: float
) -> tuple[Scalar, Scalar]:
    """f(θ + δ) − f(θ), and the mean loss at θ + δ.

    Args:
        now: Of the step.
        step: δ.
        before: The mean loss at θ.
        penalty: η of ½ η ‖θ‖² in the objective.
    """
    moved = [leaf + part.astype(leaf.dtype) for leaf, part in zip(now.leaves, now.unpack(step), strict=True)]
    after = now.mean_loss(*now.outputs(moved)).astype(before.dtype)
    change = after - before
    if penalty:
        there = now.pack(now.leaves)
        both = inner([step], [there, step])[0].astype(change.dtype)
        change = change + penalty * (both[0] + 0.5 * both[1])
    return change, after


def as_rate(learning_rate: Any) -> Rate:
    """A function of the number of steps; None stays.

    Raises:
        TypeError: Neither None, a number nor a function.
        ValueError: Not above zero.
    """
    if learning_rate is None or callable(learning_rate):
        return learning_rate
    if not isinstance(learning_rate, int | float | np.ndarray | np.generic | jax.Array):
        raise TypeError(
            "`learning_rate` must be a number, an optax schedule, or None for the one of the exact quadratic model; "
            f"found {type(learning_rate).__name__}."
        )
    if not isinstance(learning_rate, jax.Array) and not float(learning_rate) > 0:
        raise ValueError(f"`learning_rate` must be above 0, found {learning_rate!r}.")
    return lambda count: learning_rate


def _shortening(most: float, squared: Scalar) -> Scalar:
    """What brings a squared length down to its bound."""
    bound = jnp.asarray(most, squared.dtype)
    return jnp.where(
        squared > bound, jnp.sqrt(bound / jnp.maximum(squared, bound)), jnp.ones((), squared.dtype)
    )


def _scaled(scale: Float[Array, ""], matrices: Matrices) -> Matrices:
    return {name: scale.astype(matrix.dtype) * matrix for name, matrix in matrices.items()}


def _sum(first: Matrices, second: Matrices) -> Matrices:
    return {name: matrix + second[name] for name, matrix in first.items()}
