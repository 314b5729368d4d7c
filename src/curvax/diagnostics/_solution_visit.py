"""What one start of the inner solver leads to, and whether the implicit function theorem holds there."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._pytree import (
    tree_add,
    tree_all_finite,
    tree_generic_like,
    tree_norm,
    tree_scale,
    tree_sub,
    tree_where,
    tree_zeros_like,
)
from curvax.diagnostics._krylov import Flat, flatten_like
from curvax.diagnostics._setting import Setting
from curvax.diagnostics._spectrum import spectral_radius
from curvax.implicit._condition import FixedPoint, Linearised, Minimum
from curvax.implicit._family import can_be_followed
from curvax.implicit._rule import Task
from curvax.linear import MINRES
from curvax.operators import lowest_curvature
from curvax.operators._dense import matrix_by_columns

EXACT = jax.lax.Precision.HIGHEST
# A solver has arrived where the Newton step that is left is below this share of the way and of the solution.
_ARRIVED = 1e-3
# By how much A may change along a Newton step, relatively: 1/2 at a double solution, 0 at a regular one (Kantorovich's
# h, for which one half is the limit, in one direction).
_KANTOROVICH = 0.1
# Lanczos steps of large problems, and how many numbers they may keep.
_MOST_STEPS, _FEWEST_STEPS, _KEPT = 100, 30, 2**24

# What `Curvature.sign` says; all that is not symmetric is SINGULAR or REGULAR, and UNKNOWN is for large problems.
NEGATIVE, SINGULAR, REGULAR, UNKNOWN = -1, 0, 1, 2


class Curvature(NamedTuple):
    """A = ∂F/∂θ at a point; `step` is A⁺(F + noise)."""

    step: PyTree[Array]
    smallest: Scalar
    largest: Scalar
    sign: Int[Array, ""]
    followed: Bool[Array, ""]


class Visit(NamedTuple):
    """What one start leads to."""

    theta: PyTree[Array]
    arrived: Bool[Array, ""]
    degenerate: Bool[Array, ""]
    residual: Scalar
    distance: Scalar
    curvature: Curvature
    radius: Scalar
    inner_loss: Scalar
    outer_loss: Scalar


def _exactly(
    at: Linearised,
    rhs: PyTree[Array],
    flat: Flat,
    symmetric: bool,
    before: Float[Array, "n n"],
    trust: Scalar,
) -> tuple[Curvature, Float[Array, "n n"]]:
    """From all eigenvalues, or singular values; `trust` times the change of the matrix counts as its error."""
    structure = jax.eval_shape(lambda: at.residual)
    matrix = matrix_by_columns(lx.FunctionLinearOperator(at.apply, structure)).astype(flat.dtype)
    finite = jnp.all(jnp.isfinite(matrix))
    # Decompositions may hang on a NaN, or lie.
    matrix = jnp.where(finite, matrix, 0)
    if symmetric:
        values, left = jnp.linalg.eigh((matrix + matrix.T) / 2)
        right, orientation = left, jnp.ones((), flat.dtype)
        smallest, largest = values[0], values[-1]
    else:
        left, values, rows = jnp.linalg.svd(matrix)
        right, orientation = rows.T, jnp.linalg.slogdet(matrix)[0]
        smallest, largest = values[-1], values[0]
    error = jnp.where(jnp.isfinite(trust), trust * jnp.linalg.norm(matrix - before), 0)
    eps, top = jnp.finfo(flat.dtype).eps, jnp.max(jnp.abs(values))
    error += max(flat.size, 4) ** 0.5 * eps * top
    # What is smaller than this is as likely a zero at an inexact θ: a step along it would go anywhere.
    kept = jnp.abs(values) > jnp.maximum(error, eps**0.75 * top)

    def pseudo_inverse(vector: PyTree[Array]) -> PyTree[Array]:
        along = jnp.matmul(left.T, flat.pack(vector), precision=EXACT)
        weights = jnp.where(kept, along / jnp.where(kept, values, 1), 0)
        return flat.unpack(jnp.matmul(right, weights, precision=EXACT))

    followed = can_be_followed(at.apply, pseudo_inverse, lambda z: at.transposed(z)[1], at.residual)
    sign = jnp.where(
        smallest < -error, NEGATIVE, jnp.where(jnp.all(jnp.abs(values) > error), REGULAR, SINGULAR)
    )
    nan = jnp.where(finite, 1, jnp.nan).astype(flat.dtype)
    return Curvature(pseudo_inverse(rhs), nan * smallest * orientation, nan * largest, sign, followed), matrix


def _by_products(at: Linearised, rhs: PyTree[Array], symmetric: bool, key: Array) -> Curvature:
    """From Lanczos steps and MINRES on A, or on AᵀA."""
    structure = jax.eval_shape(lambda: at.residual)
    apply = at.apply if symmetric else (lambda v: at.transposed(at.apply(v))[0])
    tag = lx.symmetric_tag if symmetric else lx.positive_semidefinite_tag
    operator = lx.FunctionLinearOperator(apply, structure, tag)
    rhs = rhs if symmetric else at.transposed(rhs)[0]
    step = lx.linear_solve(operator, rhs, MINRES(rtol=1e-3), throw=False).value
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, _KEPT // operator.in_size()))
    found = lowest_curvature(operator, key=key, num_steps=steps)
    sign = jnp.where(found.is_indefinite, NEGATIVE, jnp.where(found.is_definite, REGULAR, UNKNOWN))
    smallest, largest = found.value, found.largest
    if not symmetric:
        smallest, largest = jnp.sqrt(jnp.maximum(smallest, 0)), jnp.sqrt(largest)
    return Curvature(step, smallest, largest, sign, jnp.asarray(True))


class _Look(NamedTuple):
    """F and A at a point, how A acts on the step that led there and on the next one."""

    point: PyTree[Array]
    residual: PyTree[Array]
    curvature: Curvature
    before: PyTree[Array]
    after: PyTree[Array]


def _two_looks(
    task: Task, theta: PyTree[Array], noise: PyTree[Array], key: Array, exact: bool
) -> tuple[_Look, _Look]:
    """At θ, and one Newton step from there."""
    flat, symmetric = flatten_like(theta), task.condition.symmetric

    def look(carry: tuple, _: None) -> tuple[tuple, _Look]:
        point, step, matrix, norm = carry
        at = task.condition.linearise(point, task.phi, task.inner_batch)
        rhs, trust = tree_add(at.residual, noise), jnp.minimum(tree_norm(at.residual) / norm, 1)
        if exact:
            found, matrix = _exactly(at, rhs, flat, symmetric, matrix, trust)
        else:
            found = _by_products(at, rhs, symmetric, key)
        carry = tree_sub(point, found.step), found.step, matrix, tree_norm(at.residual)
        return carry, _Look(point, at.residual, found, at.apply(step), at.apply(found.step))

    # Of the first look nothing before it is known: no change.
    nothing = jnp.zeros((flat.size, flat.size) if exact else (), flat.dtype)
    init = (theta, tree_zeros_like(theta), nothing, jnp.asarray(jnp.inf, flat.dtype))
    _, looks = jax.lax.scan(look, init, None, length=2)
    first, second = (jax.tree.map(lambda x, i=i: x[i], looks) for i in range(2))
    return first, second


@eqx.filter_jit
def visit_from(setting: Setting, start: PyTree[Array], key: Array, exact: bool) -> Visit:
    """The user's solver from a start, and one Newton step from where it stops."""
    task = setting.task()
    reached, _, _ = task.solve(start)
    usable = tree_all_finite(reached)
    theta = tree_where(usable, reached, task.theta0)
    way = tree_norm(tree_sub(theta, start))
    scale = tree_norm(theta) + way
    initial = tree_norm(task.condition.residual(start, task.phi, task.inner_batch))
    # F is no more exact than this, even where it happens to be 0; the slope on the way is none of a double solution.
    rounding = jnp.finfo(scale.dtype).eps * initial * scale / jnp.where(way > 0, way, 1)
    direction = tree_generic_like(theta)
    noise = tree_scale(rounding / jnp.maximum(tree_norm(direction), 1), direction)
    key, key_radius = jax.random.split(key)
    first, second = _two_looks(task, theta, noise, key, exact)

    residual, curvature = tree_norm(first.residual), first.curvature
    distance, linear = tree_norm(curvature.step), first.after
    degenerate = ~(tree_norm(tree_sub(second.before, linear)) <= _KANTOROVICH * tree_norm(linear))
    # Where A is singular a step of 0 does not mean that F is.
    unreached = tree_norm(tree_sub(first.residual, linear))
    allowed = _ARRIVED * jnp.maximum(initial, jnp.abs(curvature.largest) * scale)
    better = tree_norm(second.residual) <= residual
    point, found = tree_where(better, (second.point, second.curvature), (first.point, curvature))
    arrived = usable & (distance <= _ARRIVED * scale) & (unreached <= allowed) & tree_all_finite(found.step)

    condition: Any = task.condition
    inner_loss = radius = jnp.full_like(distance, jnp.nan)
    if isinstance(condition, Minimum):
        inner_loss = condition.fn(point, task.phi, task.inner_batch)
    if isinstance(condition, FixedPoint):
        mapped = lambda th: condition.fn(th, task.phi, task.inner_batch)  # noqa: E731
        radius = spectral_radius(mapped, point, key=key_radius).value
    outer_loss = task.outer(point, task.phi, task.outer_batch)
    return Visit(point, arrived, degenerate, residual, distance, found, radius, inner_loss, outer_loss)
