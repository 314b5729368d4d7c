"""One hypergradient as a set of compiled functions of φ: what the check evaluates again and again."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._pytree import tree_all_finite, tree_axpy, tree_dot, tree_dtype, tree_norm, tree_sub, tree_where
from curvax.bilevel import Bilevel
from curvax.bilevel._door import make_task
from curvax.diagnostics._resolve import Polished, dense_inverse, polish, run_tight
from curvax.implicit._condition import FixedPoint, Minimum
from curvax.implicit._rule import Task


class Setting(eqx.Module):
    """The arguments of `hypergradient`, from which each compiled function below builds the task anew.

    `follows_path` is whether the differentiated object is the path of the inner steps (unrolling) or the
    inner solution.
    """

    problem: Bilevel
    phi: PyTree
    theta0: PyTree
    inner_solver: Any
    inner_data: Any
    outer_data: Any
    key: Array | None
    follows_path: bool = eqx.field(static=True)

    def task(self) -> Task:
        """The task that `hypergradient` builds from the same arguments: same batches, same keys."""
        key = None if self.key is None else jax.random.split(self.key)[0]
        return make_task(
            self.problem, self.phi, self.theta0, self.inner_solver, self.inner_data, self.outer_data, key
        )


class Base(eqx.Module):
    """What is known at φ itself.

    `theta` is where the hypergradient was taken, `solution` the tightly solved inner solution next to it,
    `direct` is ∂f/∂φ at `theta`.
    """

    phi: PyTree[Array]
    theta: PyTree[Array]
    solution: PyTree[Array]
    converged: Array
    inverse: Float[Array, "n n"] | None
    value: Float[Array, ""]
    direct: PyTree[Array]
    theta_error: Float[Array, ""]


def _kind(task: Task) -> str:
    if isinstance(task.condition, Minimum):
        return "minimum"
    return "fixed_point" if isinstance(task.condition, FixedPoint) else "root"


def _tight(setting: Setting, task: Task, theta: PyTree[Array], phi: PyTree[Array]) -> Polished:
    """The tightened solver from θ, then chord steps, twice with a Jacobian of its own."""
    residual = lambda th, ph: task.condition.residual(th, ph, task.inner_batch)
    kind = _kind(task)
    fn = None if kind == "root" else (lambda th, ph: task.condition.fn(th, ph, task.inner_batch))  # type: ignore[attr-defined]
    near = run_tight(setting.inner_solver, fn, residual, theta, phi, kind)

    def polish_here(found: Polished, _: None) -> tuple[Polished, None]:
        inverse = dense_inverse(residual, found.theta, phi)
        return polish(residual, found.theta, phi, inverse, task.condition.symmetric), None

    start = Polished(near, jnp.zeros((), tree_dtype(near)), jnp.asarray(False))
    return jax.lax.scan(polish_here, start, None, length=2)[0]


@eqx.filter_jit
def base_point(setting: Setting, theta: PyTree, careful: bool) -> Base:
    """Solve tightly at φ from `theta`, the point of the hypergradient, and invert the Jacobian there.

    Quick: invert at `theta` itself and go on by chord steps, which is all that a nearly converged point needs;
    not converged if that leads further than a tenth of the solution. `careful`: the tightened inner solver first.
    """
    task = setting.task()
    theta = jax.tree.map(lambda a, b: a.astype(b.dtype), eqx.filter(theta, eqx.is_inexact_array), task.theta0)
    residual = lambda th, ph: task.condition.residual(th, ph, task.inner_batch)
    usable = tree_all_finite(theta)
    if setting.follows_path:
        solution, converged, inverse = theta, jnp.asarray(True), None
    elif careful:
        found = _tight(setting, task, tree_where(usable, theta, task.theta0), task.phi)
        solution, converged = found.theta, found.converged
        # A hypergradient that failed with NaN has no point: differences are still worth seeing.
        theta = tree_where(usable, theta, solution)
        inverse = dense_inverse(residual, solution, task.phi)
    else:
        inverse = dense_inverse(residual, theta, task.phi)
        found = polish(residual, theta, task.phi, inverse, task.condition.symmetric)
        solution, converged = found.theta, found.converged
    size, distance = tree_norm(solution), tree_norm(tree_sub(theta, solution))
    if not careful:
        converged = converged & (distance <= 0.1 * size)
    value, direct = jax.value_and_grad(lambda ph: task.outer(theta, ph, task.outer_batch))(task.phi)
    error = jnp.where(distance > 0, distance / jnp.where(size > 0, size, 1), 0)
    return Base(task.phi, theta, solution, converged, inverse, value, direct, error)


@eqx.filter_jit
def resolved_values(
    setting: Setting, base: Base, direction: PyTree[Array], t: Float[Array, ""], careful: bool
) -> Float[Array, "2"]:
    """The outer loss at θ(φ + t d): with φ + t d in the outer function too, and with φ kept there.

    The derivatives at t = 0 are the total derivative and its implicit part. NaN where the re-solve failed;
    `careful` runs the tightened inner solver first and inverts anew.
    """
    task = setting.task()
    moved = tree_axpy(t, direction, base.phi)
    if setting.follows_path:
        assert task.rollout is not None  # the rule has refused anything else
        theta, good = task.rollout(moved), jnp.asarray(True)
    else:
        if careful:
            found = _tight(setting, task, base.solution, moved)
        else:
            residual = lambda th, ph: task.condition.residual(th, ph, task.inner_batch)
            found = polish(residual, base.solution, moved, base.inverse, task.condition.symmetric)
        theta, good = found.theta, found.converged
    values = jnp.stack(
        [task.outer(theta, moved, task.outer_batch), task.outer(theta, base.phi, task.outer_batch)]
    )
    return jnp.where(good, values, jnp.nan)


@eqx.filter_jit
def direct_value(
    setting: Setting, base: Base, direction: PyTree[Array], t: Float[Array, ""]
) -> Float[Array, "1"]:
    """The outer loss at φ + t d and the θ of the hypergradient."""
    task = setting.task()
    return task.outer(base.theta, tree_axpy(t, direction, base.phi), task.outer_batch)[None]


class Products(NamedTuple):
    """Derivatives as the rule uses them: ∂f/∂θ, ∂g/∂θ at a displaced point (None if not scalar), Aᵀc, Bᵀc."""

    outer: PyTree[Array]
    inner: PyTree[Array] | None
    curvature: PyTree[Array]
    cross: PyTree[Array]


@eqx.filter_jit
def products(setting: Setting, base: Base, displaced: PyTree[Array], cotangent: PyTree[Array]) -> Products:
    """What autodiff says of the user's functions at the point of the hypergradient."""
    task = setting.task()
    transposed = task.condition.linearise(base.theta, base.phi, task.inner_batch).transposed(cotangent)
    outer = jax.grad(task.outer)(base.theta, base.phi, task.outer_batch)
    inner = None
    if isinstance(task.condition, Minimum):
        inner = jax.grad(task.condition.fn)(displaced, base.phi, task.inner_batch)
    return Products(outer, inner, *transposed)


@eqx.filter_jit
def ingredient_value(
    setting: Setting,
    base: Base,
    which: str,
    point: PyTree[Array],
    direction: PyTree[Array],
    cotangent: PyTree[Array],
    t: Float[Array, ""],
) -> Float[Array, "1"]:
    """The scalar whose derivative at t = 0 an ingredient claims; `which` names the function and its argument."""
    task = setting.task()
    theta, phi = point, base.phi
    if which == "cross":
        phi = tree_axpy(t, direction, phi)
    else:
        theta = tree_axpy(t, direction, theta)
    if which == "outer":
        value = task.outer(theta, phi, task.outer_batch)
    elif which == "inner":
        value = task.condition.fn(theta, phi, task.inner_batch)  # type: ignore[attr-defined]
    else:
        value = tree_dot(cotangent, task.condition.residual(theta, phi, task.inner_batch))
    return value[None]
