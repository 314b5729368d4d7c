"""One-step differentiation: the derivative of the last step alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._pytree import tree_norm
from curvax.implicit._condition import FixedPoint
from curvax.implicit._influence import unreached
from curvax.implicit._rule import AbstractRule, Outcome, State, Task
from curvax.unroll._outcome import extrapolated, in_reverse, outcome, reported
from curvax.unroll._path import follow
from curvax.unroll._path_stats import PathStats, num_repeated
from curvax.unroll._reverse import by_adjoint, tail
from curvax.unroll._rollout import Rollout
from curvax.unroll._steps import Steps


class OneStep(AbstractRule):
    r"""Derivative of the outer loss through one step from the solution reached, what is before it held fixed.

    With Φ the step (the last one of `cx.Steps`, or the map of a `cx.FixedPoint` applied once, whatever solved it),

        df/dφ ≈ ∂f/∂φ + (∂Φ/∂φ)ᵀ ∂f/∂θ:

    the first term of the Neumann series of the implicit derivative, (∂Φ/∂φ)ᵀ(I + Aᵀ + A²ᵀ + …), A = ∂Φ/∂θ. Its error
    is O(‖A‖): exact in the limit for a step of Newton's method, whose A vanishes at the solution, and good where steps
    contract fast; of small steps of gradient descent it has the direction at best.

    `error_estimate` is what the other terms of the series would add if each were smaller than the one before by
    ‖Aᵀ∂f/∂θ‖ / ‖∂f/∂θ‖; infinite where that is no less than 1.

    Raises:
        ValueError: When it is used: the solver is neither `cx.Steps` nor solves a `cx.FixedPoint`.

    Cost: the inner solve and the derivative of one step; the memory of one step.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=cx.FixedPoint(lambda x, w, _: jnp.tanh(0.1 * x + w)), outer=lambda x, w, _: jnp.sum(x)
        )
        solver = optx.FixedPointIteration(1e-6, 1e-6)
        hg = cx.hypergradient(problem, jnp.ones(3), jnp.zeros(3), inner_solver=solver, rule=cx.OneStep())
        hg.stats.relative_error
        ```

    Source: J. Bolte, E. Pauwels, S. Vaiter, "One-step differentiation of iterative algorithms", 2023, arXiv 2305.13768;
        for fixed points S. W. Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", 2021, arXiv
        2103.12803. The estimate is ours.
    """

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """What fits depends on the problem: see `hypergradient`."""

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """The derivative of one step."""
        if isinstance(task.condition, FixedPoint):
            return _of_map(task, state)
        rollout: Any = task.rollout
        check_steps(rollout.steps if isinstance(rollout, Rollout) else None)
        outer = lambda theta, phi: task.outer(theta, phi, task.outer_batch)
        step, walk = rollout.step(task.phi)
        # Differentiated as JAX does: the graph of a single step is no burden, and the loss may hold what it likes.
        with in_reverse():
            found = by_adjoint(rollout, step, walk, outer, lengths=(1,), truncate=1, clip=None)
        count, norms, shares = found.walk.taken, found.derivative_norms, found.shares
        assert shares is not None  # asked for by `truncate`
        path = PathStats(
            mode="reverse",
            lengths=(1,),
            reason="the last step alone",
            truncate=1,
            num_steps=count,
            gradient_norms=found.gradient_norms,
            derivative_norms=norms,
            num_clipped=jnp.zeros((), jnp.int32),
            num_repeated=num_repeated(found.walk),
        )
        return outcome(
            task, state, step, found, path, extrapolated(shares[0], norms[count - 1] / norms[count], None)
        )

    def solution(self, rollout: Rollout, phi: PyTree[Array]) -> PyTree[Array]:
        """θ at the end of the path, with the derivative of its last step; for `cx.solution_map`."""
        step, walk = rollout.step(phi)
        start = tail(step, walk, rollout.steps.num_steps, 1)
        return follow(lambda _: step, start.walk, 1, rollout.steps.num_steps, None)[0].theta


def check_steps(inner_solver: Any) -> None:
    """Refuse a solver of which there is no step to differentiate."""
    if not isinstance(inner_solver, Steps):
        raise ValueError(
            "`rule=OneStep()` differentiates the last step of `inner_solver=cx.Steps(...)`, or the map of an inner "
            "`cx.FixedPoint`, but neither was given. After a step of Newton's method one-step differentiation is "
            "implicit differentiation: use `cx.Implicit(rtol=None)`."
        )


def _of_map(task: Task, state: State) -> Outcome:
    """One application of the map at the fixed point."""
    theta, num_steps, result = task.solve(task.theta0)
    fixed_point: Any = task.condition
    value, (pulled, direct) = jax.value_and_grad(task.outer, argnums=(0, 1))(
        theta, task.phi, task.outer_batch
    )
    image, pull = jax.vjp(lambda t, p: fixed_point.fn(t, p, task.inner_batch), theta, task.phi)
    before, share = pull(jax.tree.map(lambda c, i: c.astype(i.dtype), pulled, image))
    change = tree_norm(before) / tree_norm(pulled)
    cross = lambda q: task.condition.cross(theta, task.phi, task.inner_batch, q)
    return reported(
        task,
        state,
        theta,
        value,
        jax.tree.map(jnp.add, direct, share),
        result,
        unreached(cross, theta),
        residual=jax.tree.map(jnp.subtract, theta, image),
        num_steps=num_steps,
        error=extrapolated(tree_norm(share).astype(change.dtype), change, None),
    )
