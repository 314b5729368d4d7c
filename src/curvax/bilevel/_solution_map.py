"""The inner solution as a differentiable function of the hyperparameters."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import lineax as lx
import optimistix as optx
from jaxtyping import Array, PyTree

from curvax._pytree import stop_gradient
from curvax.bilevel._data import is_sampler
from curvax.bilevel._door import check_inner_solver, check_rule, closed, scalar, solve_optimistix, split
from curvax.bilevel._problem import Bilevel
from curvax.implicit._adjoint import implicit_solution
from curvax.implicit._condition import FixedPoint, Minimum
from curvax.implicit._implicit import Implicit
from curvax.implicit._rule import AbstractRule
from curvax.unroll import GradientFlow, OneStep, Steps, Unrolled
from curvax.unroll._one_step import check_steps
from curvax.unroll._rollout import Rollout


class SolutionMap(eqx.Module):
    """θ*(φ), what `solution_map` returns; call it as `theta_star(phi, theta0, batch=None)`."""

    problem: Bilevel
    inner_solver: Any
    rule: AbstractRule

    def __call__(self, phi: PyTree, theta0: PyTree, batch: PyTree = None) -> PyTree:
        """The inner solution at phi, started from theta0; differentiable in phi and in a floating-point batch."""
        if is_sampler(batch):
            raise ValueError("`batch` of a solution map must be a pytree of arrays: draw it before the call.")
        phi_dynamic, phi_static = split(phi, "phi")
        theta_dynamic, theta_static = split(theta0, "theta0")
        condition = self.problem.condition
        if isinstance(condition, Minimum):
            condition = condition.with_function(lambda fn: scalar(fn, theta_static, phi_static, "inner"))
        else:
            condition = condition.with_function(lambda fn: closed(fn, theta_static, phi_static))
        theta_dynamic = (
            jax.lax.stop_gradient(theta_dynamic) if isinstance(self.rule, Implicit) else theta_dynamic
        )
        if isinstance(self.inner_solver, Steps):
            solution = self._steps(condition, phi_dynamic, phi_static, theta_dynamic, batch)
        elif isinstance(self.rule, OneStep):
            solution = self._one_application(condition, phi_dynamic, theta_dynamic, batch)
        else:
            solution = solve_optimistix(
                condition,
                self.inner_solver,
                theta_dynamic,
                (phi_dynamic, batch),
                adjoint=self.rule,
                throw=True,
            ).value
        like = eqx.filter(theta0, eqx.is_inexact_array)
        solution = jax.tree.map(lambda a, b: a.astype(b.dtype), solution, like)
        return eqx.combine(solution, theta_static)

    def _one_application(
        self, condition: Any, phi: PyTree[Array], theta: PyTree[Array], batch: PyTree
    ) -> PyTree[Array]:
        """The map of a fixed point at its frozen solution; frozen is also what its function closes over."""
        fn = eqx.filter_closure_convert(lambda *args: condition.fn(*args), theta, phi, batch)
        still, theta, args = stop_gradient((fn, theta, (phi, batch)))
        found = solve_optimistix(type(condition)(still), self.inner_solver, theta, args, throw=True).value
        return fn(stop_gradient(found), phi, batch)

    def _steps(
        self, condition: Any, phi: PyTree, phi_static: PyTree, theta: PyTree[Array], batch: PyTree
    ) -> PyTree:
        steps = self.inner_solver
        if isinstance(self.rule, Unrolled | OneStep):
            return self.rule.solution(Rollout(steps, condition.fn, theta, phi_static, batch, None), phi)
        gradient = eqx.filter_closure_convert(condition.residual, theta, phi, batch)

        def run(start: PyTree[Array], hyper: PyTree[Array], data: PyTree) -> PyTree[Array]:
            return Rollout(steps, condition.fn, start, phi_static, data, None)(hyper)

        run = eqx.filter_closure_convert(run, theta, phi, batch)
        # The layout of Optimistix's inputs: (fn, solver, y0, args), so that preconditioners find their args.
        inputs = (gradient, run, theta, (phi, batch))
        root, _ = implicit_solution(
            _run_steps, _steps_condition, inputs, self.rule, frozenset({lx.symmetric_tag})
        )
        return root


def _run_steps(inputs: Any) -> tuple[PyTree[Array], None]:
    _, run, theta, (phi, batch) = inputs
    return run(theta, phi, batch), None


def _steps_condition(root: PyTree[Array], residual: None, inputs: Any) -> PyTree[Array]:
    del residual
    gradient, _, _, (phi, batch) = inputs
    return gradient(root, phi, batch)


def solution_map(problem: Bilevel, inner_solver: Any, rule: AbstractRule) -> Callable[..., PyTree]:
    """The inner solution as a function theta_star(phi, theta0, batch=None) -> theta.

    Differentiable in phi, forward and reverse and any nesting of the two, under `jit` and `vmap`, and inside other
    inner problems: use it where the derivative of the solution itself is wanted, or levels nest. Inner loops
    differentiated by `cx.Implicit` need a solver that converges: an unfinished or failed solve raises when
    its derivative is used.

    Args:
        problem: The bilevel problem; its `outer` is not used.
        inner_solver: An Optimistix solver of the kind that the inner problem needs, or `cx.Steps`.
        rule: `cx.Implicit(...)`; `cx.Unrolled()` with `cx.Steps`; `cx.OneStep()` with `cx.Steps` or a fixed point.

    Returns:
        A `SolutionMap`.

    Raises:
        TypeError: The inner solver is of the wrong kind, or a `cx.GradientFlow`.
        ValueError: The rule cannot serve this solver.
        RuntimeError: When called, the inner solver failed.

    Cost: the inner solve; a derivative costs one linear solve a tangent or cotangent, and one more for the check
        that the inner problem is solved (`Implicit(rtol=None)` leaves that out).

    Example:
        ```python
        import jax, jax.numpy as jnp, optimistix as optx, curvax as cx

        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - 1.0) ** 2) + lam * jnp.sum(w**2), outer=lambda w, lam, _: 0.0
        )
        theta_star = cx.solution_map(problem, optx.BFGS(1e-5, 1e-5), cx.Implicit())
        jax.jacobian(theta_star)(jnp.array(0.5), jnp.zeros(3))
        ```

    Source: `Implicit` and `Unrolled` name theirs.
    """
    if not isinstance(problem, Bilevel):
        raise TypeError(f"`problem` must be a `cx.Bilevel`, got {type(problem).__name__}.")
    check_rule(rule)
    check_inner_solver(problem, inner_solver)
    if isinstance(inner_solver, GradientFlow):
        raise TypeError(
            "`inner_solver` `GradientFlow` gives hypergradients, not solution maps: its sensitivities are solved for "
            "along with it. Use `cx.hypergradient`, or for a solution map `cx.Steps` with small steps of `optax.sgd`."
        )
    half = inner_solver.half if isinstance(inner_solver, Steps) else None
    if half is not None and half.scales and isinstance(rule, Unrolled | OneStep):
        raise ValueError(
            "`half=HalfPrecision(jnp.float16)` of `inner_solver` guards first derivatives against overflow, and a "
            "solution map has derivatives of every order. Use `jnp.bfloat16`, or `cx.hypergradient`."
        )
    rule.check(stochastic_steps=False, has_rollout=isinstance(inner_solver, Steps))
    if isinstance(rule, OneStep) and not isinstance(problem.condition, FixedPoint):
        check_steps(inner_solver)
    if not isinstance(rule, optx.AbstractAdjoint | Unrolled | OneStep):
        raise TypeError(
            f"`rule` {type(rule).__name__} gives hypergradients, not solution maps; use `cx.Implicit(...)`."
        )
    return SolutionMap(problem, inner_solver, rule)
