"""DARTS: the last step differentiated, its second derivatives by a difference of gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_add, tree_axpy, tree_dtype, tree_norm, tree_scale
from curvax.implicit._rule import AbstractRule, Outcome, State, Task
from curvax.unroll._gradient import gradient
from curvax.unroll._outcome import check_rollout, extrapolated, in_reverse, outcome
from curvax.unroll._path_stats import PathStats, num_repeated
from curvax.unroll._reverse import Followed, tail
from curvax.unroll._rollout import Rollout
from curvax.unroll._step import Step


class FiniteDifference(AbstractRule):
    r"""Derivative through the last step of `cx.Steps`, with a difference of two gradients as its second derivative.

    With θ the point before the last step, θ′ = U(∇_θ g(θ, φ), φ) the one behind it, v = ∇_θ f(θ′, φ) and
    u = (∂U/∂∇g)ᵀ v (−η v for gradient descent with rate η),

        df/dφ ≈ ∂f/∂φ + (∂U/∂φ)ᵀ v + (∇_φ g(θ + εu, φ) − ∇_φ g(θ − εu, φ)) / 2ε:

    no second derivative of the model is taken and none of its code needs to have one. Any optimiser serves, its state
    is held fixed. What it approximates is `cx.OneStep()`.

    Args:
        epsilon: Length ‖εu‖ of the displacement of θ. None: ∛(machine precision) · max(1, ‖θ‖), where the errors of
            rounding and of the difference balance. DARTS takes 0.01.

    `error_estimate` is against the derivative at a solution to which further such steps would lead, as for `cx.OneStep`
    (the contraction comes out of the same gradients), and includes the rounding of the difference.

    Raises:
        ValueError: `epsilon` is not positive; when it is used: the solver is not `cx.Steps`.

    Cost: the inner steps and two gradients; the memory of a gradient.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, a, _: 0.5 * jnp.sum((w - a) ** 2), outer=lambda w, a, _: jnp.sum(w**2)
        )
        solver = cx.Steps(optax.sgd(0.5), 1)
        hg = cx.hypergradient(
            problem, jnp.ones(3), jnp.zeros(3), inner_solver=solver, rule=cx.FiniteDifference()
        )
        hg.grad  # 2 * 0.5 * 0.5
        ```

    Source: H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable architecture search", 2019, arXiv 1806.09055, equations
        7 and 8, with v at θ′, both displacements about θ and the factor −η, which the text leaves implicit.
    """

    epsilon: Float[Array, ""] | float | None = None

    def __check_init__(self) -> None:
        value = self.epsilon
        if value is None:
            return
        if isinstance(value, str | bool) or jnp.ndim(value):
            raise ValueError(
                f"`epsilon` of `FiniteDifference` must be None or a positive number, got {value!r}."
            )
        if isinstance(value, int | float | np.ndarray | np.generic) and not value > 0:
            raise ValueError(f"`epsilon` of `FiniteDifference` must be positive, got {value}.")

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Only steps have a last one."""
        del stochastic_steps
        check_rollout("FiniteDifference", has_rollout)

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """One step and a difference of gradients."""
        rollout: Any = task.rollout
        check_rollout("FiniteDifference", isinstance(rollout, Rollout))
        if rollout.steps.half is not None:
            raise ValueError(
                "`rule=FiniteDifference()` subtracts two gradients, of which half precision would leave no digit. "
                "Leave `half` of `Steps` out, or use `cx.OneStep()`."
            )
        step, walk = rollout.step(task.phi)
        total, phi = rollout.steps.num_steps, task.phi
        start = tail(step, walk, total, 1)
        theta, batch = start.walk.theta, step.batch(start.walk.taken)
        slope = gradient(step.loss, theta, phi, batch)
        value = step.value(theta, batch)

        def move(slope: PyTree[Array], value: Array, theta: PyTree[Array], phi: PyTree[Array]) -> Any:
            return step.update(phi, slope, value, start.walk.state, theta, batch, start.walk.taken)

        with in_reverse():
            end, pull, end_state = jax.vjp(move, slope, value, theta, phi, has_aux=True)
        outer_value, (adjoint, direct) = jax.value_and_grad(task.outer, argnums=(0, 1))(
            end, phi, task.outer_batch
        )
        with in_reverse():
            vector, value_cotangent, theta_part, phi_part = pull(adjoint)

        by_theta, by_phi, noise = self._product(step, theta, phi, batch, vector)
        if step.uses_value:
            # The optimiser has looked at the loss as well.
            more = jax.grad(step.loss, argnums=(0, 1))(theta, phi, batch)
            by_theta, by_phi = tree_axpy(value_cotangent, more, (by_theta, by_phi))
        share = tree_add(phi_part, by_phi)
        before = tree_add(theta_part, by_theta)
        count = start.walk.taken + 1
        norms = jnp.full(total + 1, jnp.nan, tree_dtype(theta))
        norms = norms.at[count - 1].set(tree_norm(before)).at[count].set(tree_norm(adjoint))
        found = Followed(
            value=outer_value,
            grad=tree_add(direct, share),
            walk=start.walk._replace(theta=end, state=end_state, taken=count),
            gradient_norms=start.all_norms(tree_norm(slope)[None]),
            derivative_norms=norms,
            num_clipped=jnp.zeros((), norms.dtype),
            shares=None,
        )
        path = PathStats(
            mode="difference",
            lengths=(1,),
            reason="the last step, by a difference of gradients",
            truncate=1,
            num_steps=count,
            gradient_norms=found.gradient_norms,
            derivative_norms=norms,
            num_clipped=jnp.zeros((), jnp.int32),
            num_repeated=num_repeated(found.walk),
        )
        rest = extrapolated(tree_norm(share).astype(norms.dtype), norms[count - 1] / norms[count], None)
        return outcome(task, state, step, found, path, rest + noise.astype(norms.dtype))

    def _product(
        self, step: Step, theta: PyTree[Array], phi: PyTree[Array], batch: PyTree, vector: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array], Array]:
        """The second derivatives of the loss times a direction of θ, by a difference; the rounding of those in φ."""
        eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves((theta, phi)))
        norm = tree_norm(vector)
        length = eps ** (1 / 3) * jnp.maximum(tree_norm(theta), 1) if self.epsilon is None else self.epsilon
        epsilon = jnp.asarray(length, norm.dtype) / jnp.where(norm > 0, norm, 1)

        def at(sign: Array) -> tuple[PyTree[Array], PyTree[Array]]:
            point = tree_axpy(sign * epsilon, vector, theta)
            return jax.grad(step.loss, argnums=(0, 1))(point, phi, batch)

        # A loop of two turns: one gradient to compile.
        both = jax.lax.map(at, jnp.asarray([1.0, -1.0], norm.dtype))
        by_theta, by_phi = tree_scale(0.5 / epsilon, jax.tree.map(lambda g: g[0] - g[1], both))
        return by_theta, by_phi, eps * tree_norm(both[1]) / epsilon
