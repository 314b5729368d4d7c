"""Derivative of the path: through the steps of the inner solver."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_norm, tree_size, tree_sub
from curvax.implicit._rule import AbstractRule, Outcome, State, Task
from curvax.unroll._forward import Drawn, by_tangents
from curvax.unroll._gradient_flow import Flow
from curvax.unroll._half import is_half
from curvax.unroll._outcome import (
    IrreversibleError,
    beyond,
    check_rollout,
    extrapolated,
    in_reverse,
    outcome,
    unseen_leaves,
)
from curvax.unroll._path import follow
from curvax.unroll._path_stats import PathStats, num_repeated
from curvax.unroll._plan import Method, choose, contracted_part, forward_method
from curvax.unroll._reverse import Followed, by_adjoint, tail
from curvax.unroll._rollout import Rollout
from curvax.unroll._schedule import MemoryBudget, check_checkpoint, named
from curvax.unroll._sensitivities import by_sensitivities
from curvax.unroll._step import Step, Walk

MODES = ("auto", "reverse", "mixed", "forward")

# Folded into the key for the directions, so that they are not drawn from the numbers that the data are drawn from.
DIRECTIONS = 0x64697273


class Unrolled(AbstractRule):
    r"""Derivative of the outer loss through every step of `cx.Steps`.

    Exact, up to rounding, for the point that the steps reach, solved or not. That is what is wanted when
    hyperparameters act through the path (learning rates, schedules, few steps). As an approximation of
    the derivative at the solution it lags the iterate: with a linear rate q the error is O(K qᴷ) after K steps,
    one factor K more than the error of θ. No error against the solution is estimated (the statistics hold NaN).

    With Φ the step, A_i = ∂Φ/∂θ_i and B_i = ∂Φ/∂φ,

        df/dφ = ∂f/∂φ + Σ_i B_iᵀ λ_(i+1),   λ_n = ∂f/∂θ_n,   λ_i = A_iᵀ λ_(i+1).

    `hg.stats.path` (`cx.unroll.PathStats`) tells which mode and schedule were used and why, and ‖λ_i‖ along the path.

    Args:
        mode: How the step is differentiated. "reverse": as JAX does. "mixed": of the inner gradient only products of
            forward over reverse mode are taken, never reverse over reverse, so that no second-order graph is stored;
            what else the step does, and the model's own `jax.checkpoint`, is differentiated as ever. The loss must be
            free of `jax.custom_vjp`, and a `jax.custom_jvp` in it must be the derivative of a function, since mixed
            derivatives are taken to commute. "forward": one tangent for each number in φ, several at a time, and
            nothing of the path is stored. "auto": what `cx.unroll.cost` takes for the fastest by what the
            loss is made of: forward mode for a single hyperparameter, else mixed mode; for losses without matrix
            products forward mode of a few, then reverse mode; that also where the loss has a `jax.custom_vjp`, and
            forward mode where the optimiser loops until a condition holds (`optax.lbfgs`), which has no reverse mode.
        checkpoint: What reverse and mixed mode store of the path. "none": every state (in reverse mode the whole tape
            of every step). "sqrt": two nested loops, about 2√T states, and the path is computed once more. "binomial":
            up to five nested loops, the fewest states that they can do with: k levels store about k·T^(1/k) states
            and compute the path k − 1 more times. `cx.MemoryBudget(num_bytes)`: the fastest that fits.
        truncate: Differentiate the last so many steps only. The bias against the whole path is estimated by
            extrapolating what the steps contribute as a power of the distance from the end, and is what
            `error_estimate` and `relative_error` say (in forward mode from two steps on, for half as much again). An
            extrapolation: three times the true bias in the middle of many trials, below half of it in one of twelve,
            where a part of the path decayed too slowly to be seen.
        clip: An Optax transformation without state that the adjoint goes through at every step, as
            `optax.clip_by_global_norm(1.0)`, `optax.clip(1.0)` or `optax.adaptive_grad_clip(0.1)`. What comes out is no
            derivative any more wherever it acts (`hg.stats.path.num_clipped`). Not in forward mode.
        directions: In forward mode, so many random directions in place of one tangent for each number in φ: what goes
            through the path becomes an unbiased estimate, with a relative error of about √(m/directions) for m numbers,
            which `error_estimate` says. Needs a `key`.
        checkpoint_dtype: `jnp.bfloat16` or `jnp.float16`: states are stored in half precision, θ and the optimiser's
            state (in float16 each leaf by a scale of its own), and no gradients beside them. The path stays as it is;
            what is computed again starts from the rounded states. Not in forward mode.
        measure_error: Compute the hypergradient once more without half precision, of the steps (`cx.HalfPrecision`) and
            of the checkpoints, or for a `cx.GradientFlow` with tolerances ten times smaller; the difference (for a flow
            and what by the order of its solver remains of it) is added to `error_estimate`. For trials: it takes the
            time and the memory of that as well (in place of rounded checkpoints full ones, by the schedule
            "binomial").

    With `cx.GradientFlow` in place of steps the sensitivities dθ/dφ are solved for along with the flow: forward mode,
    of which `mode="auto"` and `measure_error` are the only options that apply. `hg.stats.path` is then None.

    Raises:
        ValueError: An option is none of those above, or two of them exclude each other. When it is used: the solver is
            neither `cx.Steps` nor `cx.GradientFlow`, or nothing fits the memory budget.

    Cost: T steps; about 2.7 inner gradients a step in mixed mode and one more for every further level, 1 + 1.4 m in
        forward mode for m hyperparameters; without matrix products in the loss 3.7 and 1 + 0.3 m. Memory: the stored
        states and the working set of one step. `cx.unroll.cost` predicts both.

    Example:
        ```python
        import jax.numpy as jnp, optax, curvax as cx

        problem = cx.Bilevel(
            inner=lambda w, phi, _: 0.5 * jnp.sum(w**2), outer=lambda w, phi, _: jnp.sum((w - 1.0) ** 2)
        )
        solver = cx.Steps(lambda phi: optax.sgd(phi["lr"]), num_steps=10)
        hg = cx.hypergradient(
            problem, {"lr": jnp.array(0.1)}, jnp.ones(3), inner_solver=solver, rule=cx.Unrolled()
        )
        hg.stats.path.mode  # "forward": there is one hyperparameter
        ```

    Source: D. Maclaurin, D. Duvenaud, R. Adams, "Gradient-based hyperparameter optimization through reversible
        learning", 2015, arXiv 1502.03492; L. Franceschi et al., "Forward and reverse gradient-based hyperparameter
        optimization", 2017, arXiv 1703.01785; A. Shaban et al., "Truncated back-propagation for bilevel
        optimization", 2018, arXiv 1810.10667. Random directions: A. G. Baydin et al., "Gradients without
        backpropagation", 2022, arXiv 2202.08587. Mixed mode: I. Kemaev et al., "Scalable meta-learning via mixed-mode
        differentiation", 2025, arXiv 2505.00793; ours differentiates the gradient by one primitive that carries its
        transpose, so that every nested derivative exists. Binomial checkpointing is A. Griewank and A. Walther's
        "Algorithm 799: revolve", ACM TOMS 26, 2000; ours nests uniform loops: a compiled program would reserve the
        largest of the unequal blocks for all of them.
    """

    mode: str = eqx.field(static=True, default="auto")
    checkpoint: str | MemoryBudget = eqx.field(static=True, default="none")
    truncate: int | None = eqx.field(static=True, default=None)
    clip: optax.GradientTransformation | None = None
    directions: int | None = eqx.field(static=True, default=None)
    checkpoint_dtype: Any = eqx.field(static=True, default=None, kw_only=True)
    measure_error: bool = eqx.field(static=True, default=False, kw_only=True)

    def __check_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"`mode` of `Unrolled` must be one of {', '.join(MODES)}, got {self.mode!r}.")
        check_checkpoint(self.checkpoint)
        truncate = self.truncate
        if truncate is not None and not _is_count(truncate):
            raise ValueError(
                f"`truncate` of `Unrolled` must be None or an integer of at least 1, got {truncate!r}."
            )
        if self.directions is not None and not _is_count(self.directions):
            raise ValueError(
                f"`directions` of `Unrolled` must be None or an integer of at least 1, got {self.directions!r}."
            )
        if self.directions is not None and self.mode != "forward":
            raise ValueError('`directions` of `Unrolled` are those of `mode="forward"`: ask for it as well.')
        if self.mode == "forward" and self.checkpoint in ("sqrt", "binomial"):
            raise ValueError(
                f'`checkpoint="{self.checkpoint}"` of `Unrolled` has no use with `mode="forward"`, which stores '
                "nothing of the path. Leave one of them out."
            )
        if self.clip is not None and not isinstance(self.clip, optax.GradientTransformation):
            raise TypeError(
                "`clip` of `Unrolled` must be an optax.GradientTransformation, as `optax.clip_by_global_norm(1.0)`, "
                f"got {type(self.clip).__name__}."
            )
        if self.clip is not None and self.mode == "forward":
            raise ValueError(
                '`clip` of `Unrolled` acts on the adjoint, which `mode="forward"` has not. Use another mode.'
            )
        if self.checkpoint_dtype is not None and not is_half(self.checkpoint_dtype):
            raise ValueError(
                "`checkpoint_dtype` of `Unrolled` must be None, `jnp.bfloat16` or `jnp.float16`, got "
                f"{self.checkpoint_dtype!r}."
            )
        if self.checkpoint_dtype is not None and self.mode == "forward":
            raise ValueError(
                '`checkpoint_dtype` of `Unrolled` has no use with `mode="forward"`, which stores nothing of the path. '
                "Leave one of them out."
            )
        if not isinstance(self.measure_error, bool):
            raise TypeError(
                f"`measure_error` of `Unrolled` must be True or False, got {self.measure_error!r}."
            )

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Only steps can be unrolled."""
        del stochastic_steps
        check_rollout("Unrolled", has_rollout)

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """The derivative of the path, reported and never raised."""
        rollout: Any = task.rollout
        if isinstance(rollout, Flow):
            self._check_flow()
            return by_sensitivities(task, state, rollout, measure_error=self.measure_error)
        outer = lambda theta, phi: task.outer(theta, phi, task.outer_batch)
        step, walk = rollout.step(task.phi)
        truncate = self._truncated(rollout)
        clip = self._clip(walk.theta)

        def followed(step: Step, method: Method) -> Followed:
            if method.mode == "forward":
                drawn = self._drawn(task, state, step, walk, truncate)
                return by_tangents(
                    rollout, step, walk, outer, truncate=truncate, chunk=method.chunk, drawn=drawn
                )
            with in_reverse():
                return by_adjoint(
                    rollout,
                    step.in_mixed_mode() if method.mode == "mixed" else step,
                    walk,
                    outer,
                    lengths=method.lengths,
                    truncate=truncate,
                    clip=clip,
                    rounded_to=method.rounded_to,
                )

        try:
            with in_reverse():
                method, reason = self._method(rollout, step, walk, outer)
            found = followed(step, method)
        except IrreversibleError:
            if self.mode != "auto" or self.clip is not None or isinstance(self.checkpoint, MemoryBudget):
                raise
            method = forward_method(tree_size(step.phi), contracted_part(step, walk))
            reason = (
                "forward mode, since the optimiser loops until a condition holds: about "
                f"{method.gradients:.1f} inner gradients a step"
            )
            found = followed(step, method)
        path = PathStats(
            mode=method.mode,
            lengths=method.lengths,
            reason=reason,
            truncate=truncate,
            num_steps=found.walk.taken,
            gradient_norms=found.gradient_norms,
            derivative_norms=found.derivative_norms,
            num_clipped=found.num_clipped.astype(jnp.int32),
            num_repeated=num_repeated(found.walk),
        )
        errors = [_bias(found, truncate), found.spread]
        if self.measure_error:
            full = self._without_rounding(step, method, truncate or rollout.steps.num_steps)
            if full is None:
                errors.append(jnp.zeros((), found.derivative_norms.dtype))
            else:
                errors.append(tree_norm(tree_sub(found.grad, followed(*full).grad)))
        known = [error for error in errors if error is not None]
        return outcome(task, state, step, found, path, sum(known[1:], start=known[0]) if known else None)

    def solution(self, rollout: Rollout, phi: PyTree[Array]) -> PyTree[Array]:
        """θ at the end of the path, to be differentiated by JAX in whatever way; for `cx.solution_map`."""
        if self.mode == "forward":
            raise ValueError(
                '`mode="forward"` of `Unrolled` is for `hypergradient`: a solution map is differentiated in the mode '
                "that you call. Leave `mode` out and use `jax.jvp` or `jax.jacfwd`, which store nothing of the path."
            )
        if self.clip is not None:
            raise ValueError(
                "`clip` of `Unrolled` is for `hypergradient`: a solution map has the derivatives of the function that "
                "it computes. Leave it out."
            )
        if self.checkpoint_dtype is not None or self.measure_error:
            name = "measure_error" if self.measure_error else "checkpoint_dtype"
            raise ValueError(
                f"`{name}` of `Unrolled` is for `hypergradient`: rounded checkpoints have first derivatives alone, and "
                "a solution map returns no error. Leave it out."
            )
        total, truncate = rollout.steps.num_steps, self._truncated(rollout)
        step, walk = rollout.step(phi)
        method, _ = self._method(rollout, step, walk, None)
        step = step.in_mixed_mode() if method.mode == "mixed" else step
        start = tail(step, walk, total, truncate)
        end, _ = follow(
            lambda _: step, start.walk, start.num_steps, total, method.lengths, keep_gradient=step.mixed
        )
        return end.theta

    def _truncated(self, rollout: Rollout) -> int | None:
        """As asked for, None where that is the whole path."""
        return None if self.truncate is None or self.truncate >= rollout.steps.num_steps else self.truncate

    def _method(self, rollout: Rollout, step: Step, walk: Walk, outer: Any) -> tuple[Method, str]:
        num_steps = self._truncated(rollout) or rollout.steps.num_steps
        with_forward = outer is not None and self.clip is None
        return choose(
            self.mode,
            self.checkpoint,
            step,
            walk,
            num_steps,
            outer,
            with_forward=with_forward,
            directions=self.directions,
            rounded_to=self.checkpoint_dtype,
        )

    def _without_rounding(self, step: Step, method: Method, num_steps: int) -> tuple[Step, Method] | None:
        """The same hypergradient in full precision; None where nothing was rounded."""
        if step.half is None and self.checkpoint_dtype is None:
            raise ValueError(
                "`measure_error=True` of `Unrolled` measures what half precision does to a hypergradient, but there is "
                "none: neither `half` of `Steps` nor `checkpoint_dtype` is given. Leave it out."
            )
        if step.half is None and method.rounded_to is None:
            return None  # forward mode, which stores nothing, was the fastest
        if method.rounded_to is not None:
            method = method._replace(rounded_to=None, lengths=named("binomial", num_steps))
        return step.in_full_precision(), method

    def _check_flow(self) -> None:
        """Refuse what a flow has no use for."""
        plain = Unrolled(measure_error=self.measure_error)
        names = ("checkpoint", "truncate", "clip", "directions", "checkpoint_dtype")
        given = [name for name in names if getattr(self, name) != getattr(plain, name)]
        if self.mode not in ("auto", "forward"):
            given = ["mode", *given]
        if given:
            raise ValueError(
                f"`{given[0]}` of `Unrolled` is for `cx.Steps`: the sensitivities of a `cx.GradientFlow` are carried "
                "along with it, and nothing of the path is stored. Leave it out."
            )

    def _drawn(self, task: Task, state: State, step: Step, walk: Walk, truncate: int | None) -> Drawn | None:
        """The random directions, if they are wanted."""
        if self.directions is None:
            return None
        if state.key is None:
            raise ValueError(
                "`directions` of `Unrolled` are drawn at random: pass `key=jax.random.key(0)` to `hypergradient`."
            )
        key = jax.random.fold_in(state.key, DIRECTIONS)
        return Drawn(self.directions, key, unseen_leaves(task, step, walk, truncate))

    def _clip(self, theta: PyTree[Array]) -> optax.GradientTransformationExtraArgs | None:
        """The clipping, refused if it has a state."""
        if self.clip is None:
            return None
        if jax.tree.leaves(jax.eval_shape(self.clip.init, theta)):
            raise ValueError(
                "`clip` of `Unrolled` must be an optax transformation without state, as "
                "`optax.clip_by_global_norm(1.0)`: it sees the adjoints of the steps one by one, from the last to the "
                "first."
            )
        return optax.with_extra_args_support(self.clip)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _bias(found: Followed, truncate: int | None) -> Float[Array, ""] | None:
    """What the steps that were not differentiated would add, if the contributions went on changing as they did.

    From the largest contributions of the two oldest quarters of the differentiated steps (momentum makes them
    oscillate), or halves where there are few, and of a single step from the change of the adjoint.
    """
    norms, shares = found.derivative_norms, found.shares
    if found.bias is not None:
        return found.bias
    if truncate is None or shares is None:
        return None
    count = found.walk.taken
    if truncate == 1:
        change = jnp.minimum(norms[count - 1] / norms[count], 1)
        return extrapolated(shares[0], change, jnp.maximum(count - 1, 0))
    part = truncate // 4 if truncate >= 8 else truncate // 2
    return beyond(
        jnp.max(shares[:part]),
        jnp.max(shares[part : 2 * part]),
        near=truncate - 2 * part + 0.5,
        far=truncate - part + 0.5,
        begin=truncate,
        end=count,
    )
