"""The hypergradient without the dependence of the inner solution on the hyperparameters."""

import jax
import jax.numpy as jnp

from curvax.implicit._influence import unreached
from curvax.implicit._rule import AbstractRule, Outcome, State, Task
from curvax.unroll._outcome import reported


class FirstOrder(AbstractRule):
    """df/dφ ≈ ∂f/∂φ at the inner solution: its dependence on φ is dropped.

    The first-order approximation of DARTS. Exactly zero for a hyperparameter that the outer loss does not contain,
    which is reported as the failure `no_influence`, for each leaf of φ. No error is estimated: how large the dropped
    part is, nothing here can tell.

    Cost: the inner solve and one gradient of the outer loss.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, a, _: jnp.sum((w - a) ** 2), outer=lambda w, a, _: jnp.sum(w * a) + jnp.sum(a**2)
        )
        hg = cx.hypergradient(
            problem, jnp.ones(3), jnp.zeros(3), inner_solver=cx.Steps(optax.sgd(0.1), 5), rule=cx.FirstOrder()
        )
        hg.grad  # theta + 2 phi
        ```

    Source: H. Liu, K. Simonyan, Y. Yang, "DARTS: Differentiable architecture search", 2019, arXiv 1806.09055.
    """

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Any inner solver will do."""

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """One gradient."""
        theta, num_steps, result = task.solve(task.theta0)
        value, pull = jax.vjp(lambda phi: task.outer(theta, phi, task.outer_batch), task.phi)
        (grad,) = pull(jnp.ones_like(value))
        unseen = unreached(lambda c: pull(c)[0], value)
        residual = task.condition.residual(theta, task.phi, task.inner_batch)
        return reported(
            task, state, theta, value, grad, result, unseen, residual=residual, num_steps=num_steps
        )
