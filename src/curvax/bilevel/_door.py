"""From the user's pytrees and functions to the inexact arrays that the rules work on."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array, PyTree

from curvax._pytree import promote_half
from curvax._results import RESULTS
from curvax.bilevel._data import draw, is_sampler
from curvax.bilevel._problem import Bilevel
from curvax.implicit._condition import FixedPoint, Minimum, check_like, check_scalar
from curvax.implicit._rule import AbstractRule, Task
from curvax.unroll import GradientFlow, Steps
from curvax.unroll._gradient_flow import Flow
from curvax.unroll._rollout import Rollout

MAX_INNER_STEPS = 20_000


def split(tree: PyTree, name: str) -> tuple[PyTree[Array], PyTree]:
    """Inexact arrays (half precision promoted to float32) and all the rest; refuses a tree without any."""
    dynamic, static = eqx.partition(tree, eqx.is_inexact_array)
    leaves = jax.tree.leaves(dynamic)
    if name == "phi" and leaves:
        # In theta a float is a setting of a module; in phi it is far more often a hyperparameter that was forgotten.
        floats = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree.leaves_with_path(static)
            if type(leaf) is float
        ]
        if floats:
            raise ValueError(
                f"`phi` holds Python floats, which would not be tuned: {', '.join(floats)}. Wrap them in "
                "`jnp.asarray(...)` to tune them, or close over them to keep them fixed."
            )
    if not leaves:
        found = sorted({_kind(leaf) for leaf in jax.tree.leaves(tree)})
        raise ValueError(
            f"`{name}` holds no floating-point array, so there is nothing to differentiate: found "
            f"{found or 'no leaves'}. Wrap Python numbers in `jnp.asarray(..., dtype=float)`."
        )
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        raise TypeError(f"`{name}` holds complex arrays: split them into real and imaginary parts.")
    return promote_half(jax.tree.map(jnp.asarray, dynamic)), static


def _kind(leaf: Any) -> str:
    return f"array of {leaf.dtype}" if eqx.is_array(leaf) else type(leaf).__name__


def check_inner_solver(problem: Bilevel, inner_solver: Any) -> None:
    """The kind of solver must fit the kind of inner problem."""
    minimum = isinstance(problem.condition, Minimum)
    kinds: tuple[type, ...]
    if minimum:
        kinds = (optx.AbstractMinimiser, Steps, GradientFlow)
        wanted = (
            "an Optimistix minimiser (`optx.LBFGS`, `optx.BFGS`, …), `cx.Steps` or `cx.GradientFlow`, because `inner` "
            "is a loss"
        )
    elif isinstance(problem.condition, FixedPoint):
        kinds = (optx.AbstractFixedPointSolver, optx.AbstractRootFinder)
        wanted = "an Optimistix fixed-point solver or root finder, because `inner` is a `FixedPoint`"
    else:
        kinds = (optx.AbstractRootFinder, optx.AbstractLeastSquaresSolver)
        wanted = "an Optimistix root finder or least-squares solver, because `inner` is a `Root`"
    if not isinstance(inner_solver, kinds):
        raise TypeError(f"`inner_solver` must be {wanted}; got {type(inner_solver).__name__}.")


def check_rule(rule: Any) -> None:
    """Refuse what is no rule; a class in place of its instance is the likeliest slip."""
    if not isinstance(rule, AbstractRule):
        found = f"the class {rule.__name__}" if isinstance(rule, type) else type(rule).__name__
        raise TypeError(f"`rule` must be `cx.Implicit(...)` or `cx.Unrolled()`, got {found}.")


def check_data(inner_data: Any, outer_data: Any, key: Any) -> None:
    """Data are arrays or samplers, and a sampler needs a key."""
    for name, data in (("inner_data", inner_data), ("outer_data", outer_data)):
        if isinstance(data, str | bytes):
            raise TypeError(
                f"`{name}` must be a pytree of arrays or a sampler key -> batch, got the text {data!r}. Read the file "
                "first."
            )
        for path, leaf in jax.tree.leaves_with_path(data):
            if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind not in "biufcV":
                raise TypeError(
                    f"`{name}{jax.tree_util.keystr(path)}` is an array of {leaf.dtype}, which JAX cannot hold: encode "
                    "text and objects as numbers first."
                )
    names = [
        name for name, data in (("inner_data", inner_data), ("outer_data", outer_data)) if is_sampler(data)
    ]
    if names and key is None:
        raise ValueError(
            f"`{'` and `'.join(names)}` draw at random, so that `key` is needed: pass `key=jax.random.key(0)`."
        )
    if key is not None and not (eqx.is_array(key) and _is_key(key)):
        raise TypeError(f"`key` must be a random key, `jax.random.key(0)`, got {_kind(key)}.")


def _is_key(key: Any) -> bool:
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    return typed or (key.dtype == jnp.uint32 and key.ndim == 1)


def check_finite(**arguments: PyTree) -> None:
    """Refuse NaN and infinities in what is given, while it is concrete."""
    for name, tree in arguments.items():
        for path, leaf in jax.tree.leaves_with_path(eqx.filter(tree, eqx.is_inexact_array)):
            if isinstance(leaf, jax.core.Tracer):
                continue
            # NumPy: what is concrete stays so inside the caller's `jit`.
            if not np.all(np.isfinite(np.asarray(leaf))):
                raise ValueError(
                    f"`{name}{jax.tree_util.keystr(path)}` holds NaN or infinite values; clean them before the call."
                )


def tolerances_as_arrays(item: Any) -> Any:
    """Tolerances that are Python floats as (weakly typed) arrays, so that another value is no other program.

    No damping at all is another program: directions are recycled only without it.
    """
    known = ("rtol", "atol", "damping", "tolerance", "horizon")
    names = [n for n in known if isinstance(getattr(item, n, None), float)]
    names = [n for n in names if n != "damping" or item.damping != 0]
    if names:
        values = [jnp.asarray(getattr(item, name)) for name in names]
        item = eqx.tree_at(lambda x: [getattr(x, name) for name in names], item, values)
    nested = getattr(item, "linear_solver", None)
    if isinstance(item, AbstractRule) and nested is not None:
        item = eqx.tree_at(lambda x: x.linear_solver, item, tolerances_as_arrays(nested))
    return item


def _called(fn: Callable, name: str, theta: PyTree, phi: PyTree, batch: PyTree) -> Any:
    """`fn(theta, phi, batch)`; where that fails without data, the error says that there are none."""
    try:
        return fn(theta, phi, batch)
    except Exception as error:
        if batch is None:
            error.add_note(
                f"`{name}` was called with batch=None, since `{name}_data` is None (in a solution map: its `batch`). "
                "If it needs data, pass them."
            )
        raise


def closed(fn: Callable, theta_static: PyTree, phi_static: PyTree) -> Callable:
    """`fn` as a function of the inexact arrays of θ and φ; its inexact outputs promoted and split likewise."""

    def wrapped(theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Any:
        theta, phi = eqx.combine(theta, theta_static), eqx.combine(phi, phi_static)
        return promote_half(eqx.filter(_called(fn, "inner", theta, phi, batch), eqx.is_inexact_array))

    return wrapped


def scalar(fn: Callable, theta_static: PyTree, phi_static: PyTree, name: str) -> Callable:
    """`fn` as above, refused unless it returns one real number."""

    def wrapped(theta: PyTree[Array], phi: PyTree[Array], batch: PyTree) -> Array:
        theta, phi = eqx.combine(theta, theta_static), eqx.combine(phi, phi_static)
        value = _called(fn, name, theta, phi, batch)
        check_scalar(value, name)
        return promote_half(jnp.asarray(value))

    return wrapped


def solve_optimistix(
    condition: Any,
    solver: Any,
    theta: PyTree[Array],
    args: tuple,
    *,
    adjoint: Any = None,
    throw: bool = False,
) -> Any:
    """The inner solution by an Optimistix solver; `args` is (phi, batch)."""
    adjoint = optx.ImplicitAdjoint() if adjoint is None else adjoint
    options: dict = {"max_steps": MAX_INNER_STEPS, "throw": throw, "adjoint": adjoint}
    try:
        if isinstance(condition, Minimum):
            return optx.minimise(lambda t, a: condition.fn(t, *a), solver, theta, args, **options)
        if isinstance(solver, optx.AbstractFixedPointSolver):
            return optx.fixed_point(lambda t, a: condition.fn(t, *a), solver, theta, args, **options)
        return optx.root_find(lambda t, a: condition.residual(t, *a), solver, theta, args, **options)
    except (TypeError, ValueError) as error:
        dtype = jnp.result_type(float)
        if any(leaf.dtype != dtype for leaf in jax.tree.leaves(theta)):
            error.add_note(
                f"`theta0` is not {dtype}, JAX's default, and some Optimistix solvers (`LBFGS`, `Dogleg`, "
                f"`LevenbergMarquardt`, `FixedPointIteration`) need it to be. If this error comes from within "
                f"{type(solver).__name__}, cast `theta0` to {dtype}, switch `jax_enable_x64`, or use `optx.BFGS` or "
                "`optx.Newton`."
            )
        raise


def make_task(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    inner_solver: Any,
    inner_data: Any,
    outer_data: Any,
    key: Array | None,
) -> Task:
    """Draw the data, split the trees and close the functions over what is not differentiated."""
    phi_dynamic, phi_static = split(phi, "phi")
    theta_dynamic, theta_static = split(theta0, "theta0")
    steps_key, inner_key, outer_key = (None,) * 3 if key is None else jax.random.split(key, 3)
    inner_batch, outer_batch = draw(inner_data, inner_key), draw(outer_data, outer_key)
    condition: Any
    if isinstance(problem.condition, Minimum):
        condition = problem.condition.with_function(lambda fn: scalar(fn, theta_static, phi_static, "inner"))
    else:
        condition = problem.condition.with_function(lambda fn: closed(fn, theta_static, phi_static))
        check_like(
            jax.eval_shape(condition.fn, theta_dynamic, phi_dynamic, inner_batch), theta_dynamic, "inner"
        )

    rollout: Any = None
    if isinstance(inner_solver, Steps):
        rollout = Rollout(inner_solver, condition.fn, theta_dynamic, phi_static, inner_data, steps_key)
        theta_dynamic = rollout.begin(phi_dynamic)

        def solve(start: PyTree[Array]) -> tuple[PyTree[Array], Array, RESULTS]:
            end = rollout.end(phi_dynamic, start)
            return end.theta, end.taken, RESULTS.successful
    elif isinstance(inner_solver, GradientFlow):
        rollout = flow = Flow(inner_solver, condition.fn, theta_dynamic, phi_static, inner_batch)

        def solve(start: PyTree[Array]) -> tuple[PyTree[Array], Array, RESULTS]:
            return flow.end(phi_dynamic, start)
    else:

        def solve(start: PyTree[Array]) -> tuple[PyTree[Array], Array, RESULTS]:
            solution = solve_optimistix(condition, inner_solver, start, (phi_dynamic, inner_batch))
            return solution.value, jnp.asarray(solution.stats["num_steps"]), RESULTS.promote(solution.result)

    return Task(
        condition=condition,
        outer=scalar(problem.outer, theta_static, phi_static, "outer"),
        solve=solve,
        rollout=rollout,
        phi=phi_dynamic,
        theta0=theta_dynamic,
        inner_batch=inner_batch,
        outer_batch=outer_batch,
        rebuild=lambda theta: eqx.combine(theta, theta_static),
        args=(phi, inner_batch),
    )
