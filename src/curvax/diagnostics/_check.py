"""Hypergradients against finite differences of re-solved inner problems."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from curvax._pytree import tree_all_finite, tree_axpy, tree_dot, tree_dtype, tree_norm, tree_size, tree_sub
from curvax._results import RESULTS, describe
from curvax.bilevel import Bilevel, hypergradient
from curvax.diagnostics._differences import FiniteDifference, differentiate
from curvax.diagnostics._directions import (
    Direction,
    choose_directions,
    only_leaf,
    paths,
    random_direction,
    scales,
)
from curvax.diagnostics._noise import estimate_noise
from curvax.diagnostics._report import Comparison, DirectionRow, HypergradientCheck, Ingredient, judge
from curvax.diagnostics._resolve import tighten
from curvax.diagnostics._setting import (
    Base,
    Setting,
    base_point,
    direct_value,
    ingredient_value,
    products,
    resolved_values,
)
from curvax.diagnostics._summary import summarise
from curvax.implicit._rule import AbstractRule
from curvax.unroll import Unrolled

Curve = Callable[[float], np.ndarray]
_MAX_LEAVES = 8


def _host(tree: Any) -> np.ndarray:
    return np.asarray(tree, np.float64)


class _Evaluator:
    """The compiled functions of one setting as functions of a float, with a count of inner solves."""

    def __init__(self, setting: Setting, base: Base) -> None:
        self.setting, self.base, self.num_solves = setting, base, 0
        self.dtype = tree_dtype((base.phi, base.theta))
        self.eps = float(jnp.finfo(self.dtype).eps)

    def resolved(self, direction: Direction) -> Curve:
        """Outer loss with θ re-solved; careful where the quick re-solve failed."""
        if not bool(self.base.converged):  # not even at φ itself: nothing to take differences of
            return lambda t: np.full(2, np.nan)

        def curve(t: float) -> np.ndarray:
            self.num_solves += 1
            args = (self.setting, self.base, direction.tree, jnp.asarray(t, self.dtype))
            values = _host(resolved_values(*args, False))
            if np.all(np.isfinite(values)) or self.setting.follows_path:
                return values
            self.num_solves += 1
            return _host(resolved_values(*args, True))

        return curve

    def direct(self, direction: Direction) -> Curve:
        """Outer loss with θ fixed."""
        return lambda t: _host(
            direct_value(self.setting, self.base, direction.tree, jnp.asarray(t, self.dtype))
        )

    def ingredient(self, which: str, point: PyTree, direction: Direction, cotangent: PyTree) -> Curve:
        """See `ingredient_value`."""
        return lambda t: _host(
            ingredient_value(
                self.setting, self.base, which, point, direction.tree, cotangent, jnp.asarray(t, self.dtype)
            )
        )

    def noise(self, curve: Curve, step: float) -> np.ndarray:
        """Noise of a curve, from points much closer together than the steps of the differences."""
        return estimate_noise(curve, step * self.eps ** (1 / 3), eps=self.eps, scale=step).level


def _compare_part(
    claimed: float, found: FiniteDifference, index: int, rtol: float, scale: float, allowance: float
) -> Comparison:
    return judge(
        claimed,
        float(found.value[index]),
        float(found.uncertainty[index]),
        float(found.step[index]),
        rtol=rtol,
        scale=scale,
        allowance=allowance,
    )


def _direction_rows(
    evaluator: _Evaluator, grad: PyTree[Array], directions: list[Direction], rtol: float, error: float
) -> tuple[list[DirectionRow], float]:
    """One row for each direction, and the noise of the outer loss over re-solves."""
    base = evaluator.base
    implicit = tree_sub(grad, base.direct)
    size = float(np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(scales(base.phi)))))
    # What is small against both of these is of no interest: the mean slope of the parts along one
    # coordinate, and the slope that would change the loss by a fraction rtol when φ changes by its own size.
    parts = float(tree_norm(base.direct) + tree_norm(implicit)) / np.sqrt(tree_size(base.phi))
    scale = np.nanmax([parts, rtol * abs(float(base.value)) / size, 0.0])
    allowance = 2.0 * error if np.isfinite(error) else 0.0
    rows, noise, direct_noise = [], np.full(2, np.nan), np.full(1, np.nan)
    for direction in directions:
        resolved, direct = evaluator.resolved(direction), evaluator.direct(direction)
        if not np.all(np.isfinite(noise)):
            noise = evaluator.noise(resolved, direction.step)
        if not np.all(np.isfinite(direct_noise)):
            direct_noise = evaluator.noise(direct, direction.step)
        whole = differentiate(resolved, direction.step, noise)
        part = differentiate(direct, direction.step, direct_noise)
        along = lambda tree, d=direction.tree: float(tree_dot(tree, d))
        rows.append(
            DirectionRow(
                direction.name,
                total=_compare_part(along(grad), whole, 0, rtol, scale, allowance),
                direct=_compare_part(along(base.direct), part, 0, rtol, scale, 0.0),
                implicit=_compare_part(along(implicit), whole, 1, rtol, scale, allowance),
            )
        )
    return rows, float(noise[0])


def _ingredients(evaluator: _Evaluator, rtol: float, rng: np.random.Generator) -> list[Ingredient]:
    """∂f/∂θ, ∂g/∂θ, curvature and cross derivative against differences of the functions they come from."""
    base = evaluator.base
    along_theta = random_direction("theta", base.theta, rng)
    along_phi = random_direction("phi", base.phi, rng)
    assert along_theta is not None and along_phi is not None  # the door has refused trees without elements
    cotangent = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), base.theta
    )
    # At the solution ∂g/∂θ vanishes and could not be compared: go a few steps away.
    away = random_direction("theta", base.theta, rng)
    assert away is not None
    displaced = tree_axpy(3.0 * away.step, away.tree, base.theta)
    claims = products(evaluator.setting, base, displaced, cotangent)

    plan = [("outer", "outer: ∂f/∂θ", base.theta, along_theta, claims.outer)]
    if claims.inner is not None:
        plan.append(("inner", "inner: ∂g/∂θ, near the solution", displaced, along_theta, claims.inner))
        names = ("inner: curvature ∂²g/∂θ²", "inner: cross derivative ∂²g/∂θ∂φ")
    else:
        names = ("inner: Jacobian ∂F/∂θ", "inner: Jacobian ∂F/∂φ")
    plan.append(("curvature", names[0], base.theta, along_theta, claims.curvature))
    leaves = paths(base.phi)
    if 1 < len(leaves) <= _MAX_LEAVES:
        for i, leaf in enumerate(leaves):
            one = only_leaf(along_phi.tree, i)
            length = float(tree_norm(one))
            if length > 0:
                unit = Direction(leaf, jax.tree.map(lambda x, s=length: x / s, one), along_phi.step * length)
                plan.append(("cross", f"{names[1]}, {leaf}", base.theta, unit, claims.cross))
    else:
        plan.append(("cross", names[1], base.theta, along_phi, claims.cross))

    found = []
    for which, name, point, direction, claim in plan:
        curve = evaluator.ingredient(which, point, direction, cotangent)
        difference = differentiate(curve, direction.step, evaluator.noise(curve, direction.step))
        scale = float(tree_norm(claim)) / np.sqrt(max(tree_size(claim), 1))
        claimed = float(tree_dot(claim, direction.tree))
        found.append(Ingredient(name, _compare_part(claimed, difference, 0, rtol, scale, 0.0)))
    return found


def check_hypergradient(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    rule: AbstractRule,
    inner_data: Any = None,
    outer_data: Any = None,
    key: Array | None = None,
    num_directions: int = 2,
    coordinates: int | str = 2,
    rtol: float | None = None,
    printed: bool = True,
    throw: bool = False,
) -> HypergradientCheck:
    """Compare a hypergradient with finite differences of the outer loss, part by part.

    For unit directions d the derivative hᵀd is compared with the derivative of t ↦ f(θ(φ + t d), φ + t d) at 0,
    where θ(·) is the inner problem solved again: the tightened inner solver at φ itself, from there Newton steps until
    rounding stops them. For `cx.Unrolled()` θ(·) is the end of the same steps with the same keys, not polished.
    The same is done for the two parts of the derivative,

        direct: ∂f/∂φ at fixed θ,   implicit: d/dt f(θ(φ + t d), φ),

    and for the partial derivatives of the user's functions from which the implicit part is made, so that the
    table says which part disagrees and which derivative is to blame. Steps follow the measured noise of the
    re-solve; every difference comes with an uncertainty. Directions: along the hypergradient (also leaf by leaf),
    random, and single coordinates.

    Args:
        problem: the bilevel problem.
        phi: hyperparameters, any pytree.
        theta0: start of the inner solver.
        inner_solver: as in `cx.hypergradient`.
        rule: as in `cx.hypergradient`.
        inner_data: as in `cx.hypergradient`; a sampler draws the same batches in every evaluation.
        outer_data: the same for the outer function.
        key: random key for samplers; it also seeds the directions (0 if None).
        num_directions: number of random directions.
        coordinates: single coordinates for each leaf of φ (the one where the hypergradient is largest, others at
            random), or `"all"`.
        rtol: relative difference that counts as agreement, beside three uncertainties and twice the error that
            the hypergradient estimates for itself. Default: cube root of the precision (6e-6 in float64).
        printed: whether to print the table.
        throw: raise if the check is not `ok`.

    Returns:
        A `HypergradientCheck`. `ok` needs a successful hypergradient, no disagreement, and each part compared
        conclusively at least once. A failed hypergradient is reported there, not raised.

    Raises:
        ValueError: `num_directions`, `coordinates` or `rtol` out of range, nothing to compare along, or wrong
            arguments of `hypergradient`.
        TypeError: wrong arguments of `hypergradient`.
        RuntimeError: `throw=True` and the check is not `ok`; the message is the table.

    Cost: about 10 re-solves a direction and 9 more to measure the noise. A re-solve costs 5 to 20 gradients
        up to 2000 inner parameters (the Jacobian is formed and inverted once), a few CG or GMRES solves above.

    Example:
        ```python
        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
            outer=lambda w, lam, _: jnp.sum((w - 0.3) ** 2),
        )
        check = cx.check_hypergradient(
            problem, jnp.array(0.5), jnp.zeros(3), inner_solver=optx.BFGS(1e-8, 1e-8), rule=cx.Implicit()
        )
        check.ok  # True
        ```

    Source: noise after Moré and Wild, "Estimating computational noise", SIAM J. Sci. Comput. 33 (2011); steps and
        extrapolation after Ridders, Adv. Eng. Software 4 (1982).
    """
    _check_arguments(num_directions, coordinates, rtol)
    hg = hypergradient(
        problem,
        phi,
        theta0,
        inner_solver=inner_solver,
        rule=rule,
        inner_data=inner_data,
        outer_data=outer_data,
        key=key,
        throw=False,
    )
    follows_path = isinstance(rule, Unrolled)
    # Tightened here, so that another tolerance of the user's solver compiles nothing anew.
    tight = tighten(inner_solver, float(jnp.finfo(tree_dtype(eqx.filter(theta0, eqx.is_inexact_array))).eps))
    setting = Setting(problem, phi, theta0, tight, inner_data, outer_data, key, follows_path)
    # Where no hypergradient could be computed the solver may have run off to infinity: start anew.
    reached = hg.theta if bool(tree_all_finite(hg.grad)) else theta0
    base = base_point(setting, reached, False)
    if not bool(base.converged):
        base = base_point(setting, reached, True)
    evaluator = _Evaluator(setting, base)
    if rtol is None:
        # φ in half precision: its gradient is rounded to that, however exactly it was computed.
        half = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(hg.grad))
        rtol = max(evaluator.eps ** (1 / 3), 4.0 * half)
    grad = jax.tree.map(lambda a, b: a.astype(b.dtype), hg.grad, base.phi)
    seed = 0 if key is None else int(np.asarray(jax.random.key_data(key)).ravel()[-1])
    rng = np.random.default_rng(seed)

    directions = choose_directions(base.phi, grad, num_directions, coordinates, rng)
    if not directions:
        raise ValueError("no direction to compare along: raise `num_directions` or `coordinates`.")
    error = float(hg.stats.error_estimate)
    rows, noise = _direction_rows(evaluator, grad, directions, rtol, error)
    ingredients = _ingredients(evaluator, rtol, rng)

    message = "" if bool(hg.result == RESULTS.successful) else describe(hg.result)
    ok, summary = summarise(
        rows,
        ingredients,
        message=message,
        resolved=bool(base.converged),
        theta_error=float(base.theta_error),
        follows_path=follows_path,
        has_estimate=bool(np.isfinite(error)),
    )
    cosine, relative = _alignment(rows)
    report = HypergradientCheck(
        ok=ok,
        summary=summary,
        rows=tuple(rows),
        ingredients=tuple(ingredients),
        value=float(hg.value),
        cosine=cosine,
        relative_error=relative,
        error_estimate=error,
        noise=noise,
        theta_error=float(base.theta_error),
        num_solves=evaluator.num_solves,
        message=message,
    )
    if throw and not ok:
        raise RuntimeError(f"The hypergradient check failed.\n{report}")
    if printed:
        report.print()
    return report


def _check_arguments(num_directions: int, coordinates: int | str, rtol: float | None) -> None:
    if num_directions < 0:
        raise ValueError(f"`num_directions` must be at least 0, found {num_directions}.")
    if coordinates != "all" and not (isinstance(coordinates, int) and coordinates >= 0):
        raise ValueError(f"`coordinates` must be an integer of at least 0 or 'all', found {coordinates!r}.")
    if rtol is not None and not 0.0 < rtol < 1.0:
        raise ValueError(f"`rtol` must lie between 0 and 1, found {rtol}.")


def _alignment(rows: list[DirectionRow]) -> tuple[float, float]:
    """Cosine and relative error of all derivatives against all differences; 1 and 0 where both vanish."""
    pairs = np.array([(row.total.claimed, row.total.difference) for row in rows])
    pairs = pairs[np.isfinite(pairs[:, 1])]
    claimed, found = pairs[:, 0], pairs[:, 1]
    if pairs.size == 0:
        return float("nan"), float("nan")
    norms = np.linalg.norm(claimed), np.linalg.norm(found)
    if norms[0] == 0 and norms[1] == 0:
        return 1.0, 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(claimed @ found / (norms[0] * norms[1])), float(
            np.linalg.norm(claimed - found) / norms[1]
        )
