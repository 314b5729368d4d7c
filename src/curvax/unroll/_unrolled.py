"""Derivative of the path: reverse mode through the steps of the inner solver."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._pytree import tree_all_finite, tree_dtype, tree_norm, tree_zeros_like
from curvax._results import RESULTS
from curvax.implicit._rule import AbstractRule, Outcome, State, Stats, Task


class Unrolled(AbstractRule):
    """Derivative of the outer loss through every step of `cx.Steps`, by reverse mode.

    Exact, up to rounding, for the point that the steps reach, solved or not. That is what is wanted when
    hyperparameters act through the path (learning rates, starts, schedules, few steps). As an approximation of
    the derivative at the solution it lags the iterate: with a linear rate q the error is O(K qᴷ) after K steps,
    one factor K more than the error of θ. No error against the solution is estimated (the statistics hold NaN).

    Cost: about three times the inner run, and the memory of K steps.

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
        ```

    Source: D. Maclaurin, D. Duvenaud, R. Adams, "Gradient-based hyperparameter optimization through reversible
        learning", 2015, arXiv 1502.03492; L. Franceschi et al., 2017, arXiv 1703.01785.
    """

    def check(self, *, stochastic_steps: bool, has_rollout: bool) -> None:
        """Only steps can be unrolled."""
        del stochastic_steps
        if not has_rollout:
            raise ValueError(
                "`rule=Unrolled()` differentiates through the steps of `inner_solver=cx.Steps(...)`, but another "
                "solver was given. Use `cx.Steps` with an Optax optimiser, or `rule=cx.Implicit()`."
            )

    def hypergradient(self, task: Task, state: State) -> Outcome:
        """One reverse pass through the steps."""
        assert task.rollout is not None  # `check` has seen to it

        def loss(phi: PyTree[Array]) -> tuple[Array, PyTree[Array]]:
            theta = task.rollout(phi)  # type: ignore[misc]
            return task.outer(theta, phi, task.outer_batch), theta

        (value, theta), grad = jax.value_and_grad(loss, has_aux=True)(task.phi)
        dtype = tree_dtype((task.theta0, task.phi))
        nan = jnp.asarray(jnp.nan, dtype)
        finite = jnp.isfinite(value) & tree_all_finite((theta, grad))
        residual = tree_norm(task.condition.residual(theta, task.phi, task.inner_batch))
        stats = Stats(
            inner_residual=residual.astype(dtype),
            adjoint_residual=nan,
            error_estimate=nan,
            relative_error=nan,
            num_matvecs=jnp.zeros((), jnp.int32),
            num_sweeps=jnp.zeros((), jnp.int32),
            num_inner_steps=jnp.asarray(task.num_steps, jnp.int32),
            curvature_min=nan,
            curvature_max=nan,
        )
        return Outcome(
            value=value.astype(dtype),
            grad=grad,
            theta=theta,
            result=RESULTS.where(finite, RESULTS.successful, RESULTS.nonfinite),
            stats=stats,
            # The path starts where the user says, so that nothing is warm.
            state=eqx.tree_at(lambda s: s.adjoint, state, tree_zeros_like(state.adjoint)),
            no_influence=jax.tree.map(lambda _: jnp.asarray(False), task.phi),
        )
