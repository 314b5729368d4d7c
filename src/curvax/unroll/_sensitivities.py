"""The hypergradient of a gradient flow: its sensitivities are solved for along with it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from curvax._pytree import tree_add, tree_dot, tree_norm, tree_size, tree_sub
from curvax._results import RESULTS
from curvax.implicit._influence import unreached
from curvax.implicit._rule import Outcome, State, Task
from curvax.unroll._forward import CHUNK, basis, combined
from curvax.unroll._gradient_flow import Flow
from curvax.unroll._outcome import reported

# What a measured error is measured against: the flow with tolerances that much smaller.
TIGHTER = 0.1


def by_sensitivities(task: Task, state: State, flow: Flow, *, measure_error: bool) -> Outcome:
    """The derivative by the equation that S = ∂θ/∂φ satisfies along the flow.

    With time scaled to 0 ≤ s ≤ 1,

        dθ/ds = −T ∇_θ g,   dS/ds = −T (∇²_θθ g S + ∇²_θφ g) − ∇_θ g (∂T/∂φ),   S(0) = 0.

    Both are solved for together, so that the tolerances hold for S too. Nothing of the path is stored.
    """
    theta, value, grad, num_steps, result = _solved(task, flow, 1.0)
    error = None
    if measure_error:
        _, _, tighter, _, also = _solved(task, flow, TIGHTER)
        error = tree_norm(tree_sub(grad, tighter)) / (1 - flow.remaining(TIGHTER))
        error = jnp.where(also == RESULTS.successful, error, jnp.nan)
    field = flow.field(task.phi)
    unseen = unreached(lambda v: jax.vjp(lambda p: field(p, theta), task.phi)[1](v)[0], theta)
    return reported(
        task,
        state,
        theta,
        value,
        grad,
        flow.checked(task.phi, result),
        unseen,
        residual=task.condition.residual(theta, task.phi, task.inner_batch),
        num_steps=num_steps,
        error=error,
    )


def _solved(
    task: Task, flow: Flow, tighter: float
) -> tuple[PyTree[Array], Float[Array, ""], PyTree[Array], Int[Array, ""], RESULTS]:
    """θ(T), the outer loss there, its derivative, the steps of the solver, and how it went."""
    phi, field = task.phi, flow.field(task.phi)
    size = tree_size(phi)
    chunk = min(CHUNK, size)
    num_chunks = -(-size // chunk)

    def run(indices: Int[Array, " chunk"]) -> Any:
        directions = basis(phi, indices)

        def both(point: Any) -> Any:
            theta, tangents = point
            moved = lambda p, t: jax.jvp(field, (phi, theta), (p, t))
            return jax.vmap(moved, out_axes=(None, 0))(directions, tangents)

        still = jax.tree.map(lambda leaf: jnp.zeros((chunk, *leaf.shape), leaf.dtype), flow.theta0)
        (theta, tangents), num_steps, result = flow.follow(both, (flow.theta0, still), tighter)
        value, (pull, direct) = jax.value_and_grad(
            lambda t, p: task.outer(t, p, task.outer_batch), argnums=(0, 1)
        )(theta, phi)
        slopes = jax.vmap(lambda t: tree_dot(pull, t))(tangents)
        return theta, value, direct, combined(slopes, directions), num_steps, result

    indices = jnp.arange(num_chunks * chunk, dtype=jnp.int32).reshape(num_chunks, chunk)
    if num_chunks == 1:
        theta, value, direct, through, num_steps, result = run(indices[0])
    else:
        every = jax.lax.map(run, indices)
        theta, value, direct, num_steps = jax.tree.map(lambda leaf: leaf[0], (*every[:3], every[4]))
        through = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), every[3])
        arrived = jnp.all(every[5] == RESULTS.successful)
        result = RESULTS.where(arrived, RESULTS.successful, RESULTS.flow_not_finished)
    return theta, value, tree_add(direct, through), num_steps, result
