"""Descent on the hypergradient with an optax optimiser, as an algorithm that the driver runs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_all_finite, tree_norm
from curvax._results import RESULTS
from curvax.bilevel._driver import AbstractAlgorithm
from curvax.bilevel._history import Measurements
from curvax.bilevel._hypergradient import hypergradient, initial_state

# Near an outer optimum the hypergradient vanishes and no relative accuracy can be had: an error of
# this fraction of the accuracy asked for at the start counts as zero there.
ATOL_FRACTION = 0.01


class DescentState(eqx.Module):
    """A good point, the update to be taken from it, and what the next hypergradient starts from."""

    phi: PyTree[Array]
    update: PyTree[Array]
    opt_state: PyTree
    theta: PyTree[Array]
    value: Float[Array, ""]
    warm: PyTree
    atol: Float[Array, ""] | None


class HypergradientDescent(AbstractAlgorithm):
    r"""$\varphi_{i+1} = \varphi_i + s_i\, u_i$, where $u_i$ is the optax update for the hypergradient at $\varphi_i$."""

    problem: Any
    inner_solver: Any
    rule: Any
    optimizer: optax.GradientTransformation
    phi_rest: PyTree
    theta0: PyTree

    def init(self, phi: PyTree[Array], data: PyTree, key: PyTree) -> DescentState:
        """The start, with a zero update."""
        inner_data, outer_data = data
        warm = initial_state(
            self.problem,
            eqx.combine(phi, self.phi_rest),
            self.theta0,
            inner_solver=self.inner_solver,
            rule=self.rule,
            key=key,
        )
        opt_state = self.optimizer.init(phi)
        value = jnp.full((), jnp.nan, float)
        update, _ = eqx.filter_eval_shape(self._update, phi, opt_state, phi, value)
        return DescentState(
            phi=phi,
            # In the dtype of the optimiser's update, which may be wider than that of a bfloat16 `phi`.
            update=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), update),
            opt_state=opt_state,
            theta=eqx.filter(self.theta0, eqx.is_inexact_array),
            value=value,
            warm=warm,
            atol=_requested(self.rule)[1],
        )

    def _update(self, grad: PyTree, opt_state: PyTree, phi: PyTree, value: Scalar) -> tuple[PyTree, PyTree]:
        optimizer = optax.with_extra_args_support(self.optimizer)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            return optimizer.update(grad, opt_state, phi, value=value, grad=grad)

    def step(
        self, state: DescentState, scale: Scalar, data: PyTree
    ) -> tuple[DescentState, Measurements, RESULTS]:
        """Take the update, compute the hypergradient there, ask the optimiser for the next update."""
        inner_data, outer_data = data
        scaled = jax.tree.map(lambda u: scale.astype(u.dtype) * u, state.update)
        with jax.numpy_dtype_promotion("standard"):
            phi = optax.apply_updates(state.phi, scaled)
        rule = self.rule if state.atol is None else eqx.tree_at(lambda r: r.atol, self.rule, state.atol)
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
        update, opt_state = self._update(hg.grad, state.opt_state, phi, hg.value)
        finite = jnp.isfinite(hg.value) & tree_all_finite(hg.grad) & tree_all_finite(update)
        # A result that says more than "not finite" is kept.
        result = RESULTS.where((hg.result == RESULTS.successful) & ~finite, RESULTS.nonfinite, hg.result)
        norm = tree_norm(hg.grad)
        new = DescentState(
            phi=phi,
            update=update,
            opt_state=opt_state,
            theta=eqx.filter(hg.theta, eqx.is_inexact_array),
            value=hg.value.astype(state.value.dtype),
            warm=hg.state,
            atol=self._atol(state, norm),
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

    def _atol(self, state: DescentState, norm: Scalar) -> Scalar | None:
        """The user's, raised by the first hypergradient; unchanged ever after."""
        if state.atol is None:
            return None
        rtol, atol = _requested(self.rule)
        first = jnp.maximum(atol, ATOL_FRACTION * rtol * norm.astype(atol.dtype))
        return jnp.where(jnp.isnan(state.value), first, state.atol)

    def point(self, state: DescentState) -> tuple[PyTree, PyTree]:
        """Hyperparameters and inner solution at the last good point."""
        return (
            eqx.combine(state.phi, self.phi_rest),
            eqx.combine(state.theta, self.theta0),
        )


def _requested(rule: Any) -> tuple[Any, Any]:
    """Relative and absolute accuracy that a rule asks of the hypergradient; None if it asks for none."""
    rtol = getattr(rule, "rtol", None)
    if rtol is None:
        return None, None
    real = jnp.zeros((), float).dtype
    return jnp.asarray(rtol).astype(real), jnp.asarray(rule.atol).astype(real)
