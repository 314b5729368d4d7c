"""Solving the inner problem again, as tightly as the precision allows, near a known solution."""

import operator
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, PyTree

from curvax._control import map_in_chunks
from curvax._pytree import tree_all_finite, tree_axpy, tree_norm, tree_size, tree_where
from curvax.diagnostics._krylov import flatten_like

Residual = Callable[[PyTree[Array], PyTree[Array]], PyTree[Array]]

# Up to this size the Jacobian is formed and inverted, once for all re-solves.
DENSE_LIMIT = 2000
_CHORD_STEPS = 80
_PATIENCE = 3
_SOLVER_STEPS = 2000


class Polished(eqx.Module):
    """A solution of F(θ, φ) = 0 from which Newton's step makes no further progress."""

    theta: PyTree[Array]
    step: Float[Array, ""]
    converged: Bool[Array, ""]


def dense_inverse(residual: Residual, theta: PyTree[Array], phi: PyTree[Array]) -> Float[Array, "n n"] | None:
    """(∂F/∂θ)⁻¹ at (θ, φ), or None above `DENSE_LIMIT` elements.

    An explicit inverse, because a chord step needs no accuracy of it, and a product is ten times as fast as two
    triangular solves.
    """
    if tree_size(theta) > DENSE_LIMIT:
        return None
    flat = flatten_like(theta)
    _, product = jax.linearize(lambda th: residual(th, phi), theta)
    # In batches: a vmap over all columns would hold DENSE_LIMIT copies of the model's activations.
    column = lambda v: flat.pack(product(flat.unpack(v)))  # noqa: E731
    columns = map_in_chunks(column, jnp.eye(flat.size, dtype=flat.dtype), 64)
    return jnp.linalg.inv(columns.T)


def _newton_step(
    residual: Residual,
    theta: PyTree[Array],
    phi: PyTree[Array],
    inverse: Float[Array, "n n"] | None,
    symmetric: bool,
) -> PyTree[Array]:
    """−(∂F/∂θ)⁻¹ F, with the given inverse or by CG/GMRES to four digits at this very point."""
    flat = flatten_like(theta)
    if inverse is not None:
        return flat.unpack(-(inverse @ flat.pack(residual(theta, phi))))
    value, product = jax.linearize(lambda th: residual(th, phi), theta)
    jacobian = lx.FunctionLinearOperator(
        lambda v: flat.pack(product(flat.unpack(v))),
        jax.ShapeDtypeStruct((flat.size,), flat.dtype),
        lx.positive_semidefinite_tag if symmetric else (),
    )
    solver = lx.CG if symmetric else lx.GMRES
    vector = flat.pack(value)
    # Scaled to norm 1, so that Lineax's absolute tolerance plays no part.
    size = jnp.linalg.norm(vector)
    scaled = vector / jnp.where(size > 0, size, 1)
    found = lx.linear_solve(jacobian, scaled, solver(rtol=1e-4, atol=1e-4, max_steps=2000), throw=False)
    return flat.unpack(-size * found.value)


def polish(
    residual: Residual,
    theta: PyTree[Array],
    phi: PyTree[Array],
    inverse: Float[Array, "n n"] | None,
    symmetric: bool,
) -> Polished:
    """Newton (or chord) steps until three in a row bring no smaller step; the best point is kept.

    Chord steps θ ← θ − J₀⁻¹ F(θ) reuse the inverse of a neighbouring point: each costs one evaluation of F
    and the limit is as accurate as Newton's, because only F decides where it is.

    Converged means that the last step was small compared with θ or with the first step, by the square root of the
    precision. What is left is rounding, which the caller measures.
    """
    eps = jnp.finfo(flatten_like(theta).dtype).eps

    first = _newton_step(residual, theta, phi, inverse, symmetric)
    size = tree_norm(first)

    def going_on(carry):
        _, step, _, smallest, stale, count = carry
        return (stale < _PATIENCE) & (count < _CHORD_STEPS) & tree_all_finite(step) & (smallest > 0)

    def body(carry):
        point, step, best, smallest, stale, count = carry
        point = tree_axpy(1.0, step, point)
        step = _newton_step(residual, point, phi, inverse, symmetric)
        size = tree_norm(step)
        better = size < smallest
        stale = jnp.where(size < 0.9 * smallest, 0, stale + 1)
        return (
            point, step, tree_where(better, point, best), jnp.where(better, size, smallest), stale, count + 1,
        )  # fmt: skip

    carry = (theta, first, theta, size, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))
    _, _, best, smallest, _, _ = jax.lax.while_loop(going_on, body, carry)
    scale = jnp.maximum(tree_norm(best), size)
    return Polished(best, smallest, (smallest <= jnp.sqrt(eps) * scale) & tree_all_finite(best))


def tighten(solver: Any, eps: float) -> Any:
    """An Optimistix solver with its tolerances at precision^0.75, wrapped solvers included."""
    tight = eps**0.75
    for name in ("rtol", "atol"):
        if isinstance(getattr(solver, name, None), float | int | jax.Array):
            old = getattr(solver, name)
            new = jnp.asarray(tight, old.dtype) if eqx.is_array(old) else tight
            solver = eqx.tree_at(operator.attrgetter(name), solver, new)
    if isinstance(getattr(solver, "solver", None), eqx.Module):
        solver = eqx.tree_at(lambda s: s.solver, solver, tighten(solver.solver, eps))
    return solver


def run_tight(
    solver: Any,
    objective: Callable | None,
    residual: Residual,
    theta: PyTree[Array],
    phi: PyTree[Array],
    kind: str,
) -> PyTree[Array]:
    """The inner solver from θ; where it is no Optimistix solver, L-BFGS for a minimum, nothing else.

    Args:
        solver: the user's inner solver, tightened.
        objective: g(θ, φ) for `kind` "minimum", T(θ, φ) for "fixed_point", None for "root".
        residual: F(θ, φ).
        theta: start.
        phi: hyperparameters.
        kind: "minimum", "fixed_point" or "root".

    Returns:
        The point reached, whatever the solver says of it: it is polished and judged afterwards.
    """
    # Optimistix's L-BFGS mixes float32 with the default float: under strict promotion it would not trace.
    with jax.numpy_dtype_promotion("standard"):
        return _run(solver, objective, residual, theta, phi, kind)


def _run(
    solver: Any, objective: Any, residual: Residual, theta: PyTree[Array], phi: PyTree[Array], kind: str
) -> PyTree[Array]:
    options: dict[str, Any] = {"max_steps": _SOLVER_STEPS, "throw": False}
    if kind == "minimum":
        if not isinstance(solver, optx.AbstractMinimiser):
            solver = tighten(
                optx.LBFGS(rtol=1e-6, atol=1e-6), float(jnp.finfo(flatten_like(theta).dtype).eps)
            )
        return optx.minimise(objective, solver, theta, phi, **options).value
    if isinstance(solver, optx.AbstractFixedPointSolver):
        return optx.fixed_point(objective, solver, theta, phi, **options).value
    if isinstance(solver, optx.AbstractRootFinder | optx.AbstractLeastSquaresSolver):
        return optx.root_find(residual, solver, theta, phi, **options).value
    return theta
