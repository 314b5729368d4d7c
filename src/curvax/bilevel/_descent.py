"""Descent on the hypergradient with an optax optimiser, as an algorithm that the driver runs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree, Scalar

from curvax._pytree import tree_all_finite, tree_norm, tree_zeros_like
from curvax._results import RESULTS
from curvax.bilevel._driver import AbstractAlgorithm
from curvax.bilevel._history import Measurements
from curvax.bilevel._hypergradient import hypergradient
from curvax.bilevel._state import initial_state

# Near an outer optimum the hypergradient vanishes and no relative accuracy can be had: an error of
# this fraction of the accuracy asked for at the start counts as zero there.
ATOL_FRACTION = 0.01


class DescentState(eqx.Module):
    """A good point, its hypergradient, the optimiser's state before its update, and warm starts."""

    phi: PyTree[Array]
    grad: PyTree[Array]
    opt_state: PyTree
    theta: PyTree[Array]
    value: Float[Array, ""]
    warm: PyTree
    floor: (
        Float[Array, ""] | None
    )  # absolute accuracy that goes with a relative one of 1; None if none is asked for
    num_points: Int[Array, ""]  # measured so far


class HypergradientDescent(AbstractAlgorithm):
    r"""$\varphi_{i+1} = \varphi_i + s_i\, u_i$, with $u_i$ the optax update for the hypergradient at $\varphi_i$."""

    problem: Any
    inner_solver: Any
    rule: Any
    optimizer: optax.GradientTransformation
    phi_rest: PyTree
    theta0: PyTree
    rtol_schedule: Any = None

    def init(self, phi: PyTree[Array], data: PyTree, key: PyTree) -> DescentState:
        """The start, where nothing was measured yet: `value` is NaN."""
        inner_data, _ = data
        warm = initial_state(
            self.problem,
            eqx.combine(phi, self.phi_rest),
            self.theta0,
            inner_solver=self.inner_solver,
            rule=self.rule,
            inner_data=inner_data,
            key=key,
        )
        return DescentState(
            phi=phi,
            grad=tree_zeros_like(phi),
            opt_state=self.optimizer.init(phi),
            theta=eqx.filter(self.theta0, eqx.is_inexact_array),
            value=jnp.full((), jnp.nan, float),
            warm=warm,
            floor=None if getattr(self.rule, "rtol", None) is None else jnp.zeros((), float),
            num_points=jnp.zeros((), jnp.int32),
        )

    def _move(self, state: DescentState, scale: Scalar, restart: Scalar) -> tuple[PyTree, PyTree]:
        """The next point and the optimiser's state behind it; the old ones before the first measurement."""

        def forget(fresh: Any, old: Any) -> Any:
            # Counters go on, so that a schedule of learning rates does.
            return jnp.where(restart, fresh, old) if eqx.is_inexact_array(old) else old

        before = jax.tree.map(forget, self.optimizer.init(state.phi), state.opt_state)
        optimizer = optax.with_extra_args_support(self.optimizer)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            update, after = optimizer.update(
                state.grad, before, state.phi, value=state.value, grad=state.grad
            )
            scaled = jax.tree.map(lambda u: scale.astype(u.dtype) * u, update)
            phi = optax.apply_updates(state.phi, scaled)
        is_start = jnp.isnan(state.value)
        keep = lambda old, new: jnp.where(is_start, old, new) if eqx.is_array(new) else new  # noqa: E731
        return jax.tree.map(keep, (state.phi, state.opt_state), (phi, after))

    def step(
        self, state: DescentState, scale: Scalar, restart: Scalar, data: PyTree
    ) -> tuple[DescentState, Measurements, RESULTS]:
        """Take the update and compute the hypergradient there."""
        inner_data, outer_data = data
        phi, opt_state = self._move(state, scale, restart)
        rule = self._rule(state)
        hg = hypergradient(
            self.problem,
            eqx.combine(phi, self.phi_rest),
            self.theta0,
            inner_solver=self.inner_solver,
            rule=rule,
            inner_data=inner_data,
            outer_data=outer_data,
            state=state.warm,
            throw=False,
        )
        finite = jnp.isfinite(hg.value) & tree_all_finite(hg.grad) & tree_all_finite(phi)
        # A result that says more than "not finite" is kept.
        result = RESULTS.where((hg.result == RESULTS.successful) & ~finite, RESULTS.nonfinite, hg.result)
        norm = tree_norm(hg.grad)
        new = DescentState(
            phi=phi,
            grad=hg.grad,
            opt_state=opt_state,
            theta=eqx.filter(hg.theta, eqx.is_inexact_array),
            value=hg.value.astype(state.value.dtype),
            warm=hg.state,
            # Set by the first hypergradient, and never again.
            floor=None
            if state.floor is None
            else jnp.where(
                state.num_points == 0, ATOL_FRACTION * norm.astype(state.floor.dtype), state.floor
            ),
            num_points=state.num_points + 1,
        )
        stats = hg.stats
        entry = Measurements(
            hg.value,
            norm,
            stats.error_estimate,
            stats.relative_error,
            stats.num_matvecs,
            stats.num_inner_steps,
        )
        return new, entry, result

    def _rule(self, state: DescentState) -> Any:
        """The rule with the accuracy that is asked for at the next point."""
        if state.floor is None:
            return self.rule
        real = state.floor.dtype
        rtol = self.rule.rtol if self.rtol_schedule is None else self.rtol_schedule(state.num_points)
        rtol, atol = jnp.asarray(rtol).astype(real), jnp.asarray(self.rule.atol).astype(real)
        accuracy = (rtol, jnp.maximum(atol, rtol * state.floor))
        return eqx.tree_at(lambda r: (r.rtol, r.atol), self.rule, accuracy)

    def point(self, state: DescentState) -> tuple[PyTree, PyTree]:
        """Hyperparameters and inner solution at the last good point."""
        return (
            eqx.combine(state.phi, self.phi_rest),
            eqx.combine(state.theta, self.theta0),
        )
