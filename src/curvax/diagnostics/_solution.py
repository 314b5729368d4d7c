"""Existence and uniqueness of the inner solution: restarts, curvature, contraction."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from curvax._pytree import tree_add
from curvax.bilevel import Bilevel
from curvax.bilevel._data import is_sampler
from curvax.bilevel._door import check_data, check_finite, check_inner_solver
from curvax.diagnostics._krylov import flatten_like
from curvax.diagnostics._setting import Setting
from curvax.diagnostics._solution_report import InnerSolution, Kind, SolutionCheck, conclude
from curvax.diagnostics._solution_visit import REGULAR, SINGULAR, UNKNOWN, Visit, visit_from
from curvax.implicit._condition import FixedPoint, Minimum
from curvax.implicit._rule import Task
from curvax.unroll import Steps

# Solutions closer together than this share of their size are one.
_SAME = 1e-5
# Pairs closer together than this share of the largest distance say nothing but rounding.
_NEAR = 1e-3


@eqx.filter_jit
def _residual(setting: Setting, theta: PyTree[Array]) -> Float[Array, " n"]:
    task = setting.task()
    return flatten_like(theta).pack(task.condition.residual(theta, task.phi, task.inner_batch))


@eqx.filter_jit
def _moved(theta0: PyTree[Array], like: PyTree[Array], spread: Scalar, key: Array) -> PyTree[Array]:
    """A random start around θ₀: every leaf moved by `spread` times its size in `like`, in θ₀, or 1."""
    leaves, structure = jax.tree.flatten(theta0)
    sizes = jax.tree.leaves(like)

    def draw(leaf: Array, other: Array, key: Array) -> Array:
        rms, own = (jnp.sqrt(jnp.mean(x**2)) if x.size else jnp.zeros((), x.dtype) for x in (other, leaf))
        size = jnp.where(jnp.isfinite(rms) & (rms > 0), rms, jnp.where(own > 0, own, 1))
        return spread.astype(leaf.dtype) * size * jax.random.normal(key, leaf.shape, leaf.dtype)

    keys = jax.random.split(key, len(leaves))
    noise = [draw(*args) for args in zip(leaves, sizes, keys, strict=True)]
    return tree_add(theta0, jax.tree.unflatten(structure, noise))


def _host(tree: PyTree[Array]) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def _kind(visit: Visit, task: Task) -> Kind:
    sign = int(visit.curvature.sign)
    if sign == SINGULAR:
        return "singular"
    if bool(visit.degenerate):
        return "degenerate"
    if sign == UNKNOWN:
        return "uncertain"
    if isinstance(task.condition, Minimum):
        return "strict minimum" if sign == REGULAR else "no minimum"
    if isinstance(task.condition, FixedPoint):
        return "attracting" if float(visit.radius) < 1 else "repelling"
    return "regular"


def _contraction(visit: Visit, task: Task) -> float:
    if not isinstance(task.condition, Minimum):
        return float(visit.radius)
    low, high = float(visit.curvature.smallest), float(visit.curvature.largest)
    return (high - low) / (high + low) if high + low > 0 else np.inf


def _distinct(visits: list[Visit]) -> list[list[int]]:
    """Which of the visits lead to the same solution."""
    points = [_host(visit.theta) for visit in visits]
    groups: list[list[int]] = []
    for i, visit in enumerate(visits):
        if not bool(visit.arrived):
            continue
        for group in groups:
            j = group[0]
            size = max(np.linalg.norm(points[i]), np.linalg.norm(points[j]))
            within = _SAME * size + 3 * float(visit.distance + visits[j].distance)
            if np.linalg.norm(points[i] - points[j]) <= within:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def _over_pairs(points: np.ndarray, residuals: np.ndarray, step: float, eps: float) -> tuple[float, float]:
    """The largest ‖(a − ηF(a)) − (b − ηF(b))‖/‖a − b‖, and the smallest (F(a) − F(b))ᵀ(a − b)/‖a − b‖² or 0."""
    # Pair after pair: all differences at once would be a multiple of what the points take.
    rows = []
    for i, j in itertools.combinations(range(len(points)), 2):
        apart, change = points[i] - points[j], residuals[i] - residuals[j]
        moved = np.linalg.norm(apart - step * change)
        rows.append((np.linalg.norm(apart), moved, change @ apart, np.linalg.norm(change)))
    sizes, shifts, along, changes = np.reshape(rows, (-1, 4)).T
    far = sizes > _NEAR * np.max(sizes, initial=0)
    if not np.any(far):
        return np.nan, np.nan
    least = float(np.min(along[far] / sizes[far] ** 2))
    rounding = eps**0.5 * float(np.max(changes[far] / sizes[far]))
    return float(np.max(shifts[far] / sizes[far])), least if abs(least) > rounding else 0.0


def _row(task: Task, theta0: PyTree, visits: list[Visit], group: list[int], exact: bool) -> InnerSolution:
    visit = visits[group[0]]
    like = eqx.filter(theta0, eqx.is_inexact_array)
    theta = jax.tree.map(lambda a, b: a.astype(b.dtype), visit.theta, like)
    return InnerSolution(
        theta=eqx.combine(theta, theta0),
        kind=_kind(visit, task),
        count=len(group),
        from_theta0=0 in group,
        inner_loss=float(visit.inner_loss),
        outer_loss=float(visit.outer_loss),
        residual=float(visit.residual),
        distance=float(visit.distance),
        smallest=float(visit.curvature.smallest),
        largest=float(visit.curvature.largest),
        contraction=_contraction(visit, task),
        followed=bool(visit.curvature.followed) if exact else None,
    )


def check_solution(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    key: Array,
    inner_data: Any = None,
    outer_data: Any = None,
    num_starts: int = 8,
    spread: float = 1.0,
    dense_size: int = 512,
    printed: bool = True,
) -> SolutionCheck:
    """Is there an inner solution, is there only one, and does it move differentiably with φ?

    The inner problem is solved from `theta0` and from random starts around it. For each solution that is found,
    ∂F/∂θ tells what the implicit function theorem needs: regular, singular or (for a minimum) indefinite. A Newton
    step from there tells how exact it is, and whether several solutions meet there. The starts and the solutions in
    pairs tell whether T contracts, or the loss is convex, as far as they reach. What is sampled proves the bad news
    only: a second solution, an expansion, a direction of negative curvature.

    Args:
        problem: the bilevel problem.
        phi: hyperparameters.
        theta0: the first start, any pytree.
        inner_solver: as in `cx.hypergradient`, and used as it is: what it finds is what a hypergradient would be of.
        key: for the starts, and for samplers.
        inner_data: as in `cx.hypergradient`; a sampler draws once, for all starts.
        outer_data: the same for the outer function.
        num_starts: how many starts, `theta0` among them.
        spread: standard deviation of the random starts around `theta0`, relative to the size (root mean square) that
            each leaf has in the solution from `theta0`; where that is 0 to its size in `theta0`, or 1.
        dense_size: up to this many unknowns ∂F/∂θ is written out and decomposed, by n products, twice for each start.
            Above, a minimum costs 100 Lanczos steps (fewer of more than 2^24/100 unknowns) and a MINRES solve, twice
            for each start; roots and fixed points twice that, with ∂F/∂θᵀ∂F/∂θ.
        printed: whether to print the table.

    Returns:
        A `SolutionCheck`. What is wrong with the solutions is reported there, never raised.

    Raises:
        TypeError: wrong arguments, as in `cx.hypergradient`.
        ValueError: `num_starts` below 1 or `spread` below 0; `cx.Steps` with a sampler as `inner_data`, which solves
            another problem at every step; other wrong arguments, as in `cx.hypergradient`.

    Cost: `num_starts` inner solves, and what `dense_size` says.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w**2 - 1.0) ** 2) + lam * jnp.sum(w**2), outer=lambda w, lam, _: jnp.sum(w)
        )
        found = cx.diagnostics.check_solution(
            problem, jnp.array(0.5), jnp.array([0.3]), inner_solver=optx.BFGS(1e-8, 1e-8), key=jax.random.key(0)
        )
        [row.outer_loss for row in found.rows]  # two minima, at ±√0.75
        ```

    Source: A. Dontchev, R. T. Rockafellar, "Implicit functions and solution mappings", 2nd edition, 2014, theorems 1B.1
        and 2F.7 (regularity, strong monotonicity), 1A.3 (contraction); J. M. Ortega, W. C. Rheinboldt, "Iterative
        solution of nonlinear equations in several variables", 1970, 12.6 (Kantorovich's test for a degenerate one).
    """
    if not isinstance(problem, Bilevel):
        raise TypeError(f"`problem` must be a `cx.Bilevel`, got {type(problem).__name__}.")
    if isinstance(num_starts, bool) or not isinstance(num_starts, int) or num_starts < 1:
        raise ValueError(f"`num_starts` must be an integer of at least 1, found {num_starts!r}.")
    if not spread >= 0:
        raise ValueError(f"`spread` must be at least 0, found {spread!r}.")
    check_inner_solver(problem, inner_solver)
    check_finite(phi=phi, theta0=theta0, inner_data=inner_data, outer_data=outer_data)
    check_data(inner_data, outer_data, key)
    if isinstance(inner_solver, Steps) and is_sampler(inner_data):
        raise ValueError(
            "`inner_data` is a sampler and `cx.Steps` draws a new batch at every step, so that no solution stays where "
            "it is. Pass the inner data as arrays."
        )
    draws, probes, data = jax.random.split(key, 3)
    setting = Setting(problem, phi, theta0, inner_solver, inner_data, outer_data, data, False)
    task = setting.task()
    flat = flatten_like(task.theta0)
    exact = flat.size <= dense_size
    starts, visits = [task.theta0], [visit_from(setting, task.theta0, probes, exact)]
    width = jnp.asarray(spread, float)
    for draw in jax.random.split(draws, num_starts)[1:]:
        starts.append(_moved(task.theta0, visits[0].theta, width, draw))
        visits.append(visit_from(setting, starts[-1], probes, exact))

    rows = [_row(task, theta0, visits, group, exact) for group in _distinct(visits)]
    order = (lambda row: row.inner_loss) if isinstance(task.condition, Minimum) else (lambda row: -row.count)
    rows.sort(key=order)
    tried = starts + [visit.theta for visit in visits if bool(visit.arrived)]
    step = 1.0 if isinstance(task.condition, FixedPoint) else np.nan
    if rows and rows[0].kind == "strict minimum":
        step = 2 / (rows[0].smallest + rows[0].largest)
    residuals = np.stack([np.asarray(_residual(setting, point), np.float64) for point in tried])
    points, eps = np.stack([_host(point) for point in tried]), float(jnp.finfo(flat.dtype).eps)
    lipschitz, monotonicity = _over_pairs(points, residuals, step, eps)
    num_failed = sum(not bool(visit.arrived) for visit in visits)
    ok, summary = conclude(rows, num_starts, num_failed, lipschitz, monotonicity)
    found = SolutionCheck(ok, summary, tuple(rows), num_starts, num_failed, lipschitz, monotonicity)
    if printed:
        found.print()
    return found
