"""What `minimise` is given: refused by name where it cannot work, and brought into one form."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from curvax._pytree import tree_all_finite
from curvax.bilevel._door import check_finite
from curvax.bilevel._driver import Carry


def check_arguments(
    phi0: PyTree, theta0: PyTree, optimizer: Any, num_steps: Any, key: PyTree, **data: Any
) -> int:
    """Refuse arguments that cannot work; the number of steps as an int."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((phi0, theta0, data, key))):
        raise ValueError(
            "minimise: called inside `jit`, `vmap` or `grad`. It is a loop on the host: call it outside, or "
            "differentiate one solve with `cx.hypergradient` or `cx.solution_map`."
        )
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"minimise: `num_steps` must be a positive int, found {num_steps!r}.")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"minimise: `optimizer` must be an optax transformation such as `optax.adam(1e-2)`, found {optimizer!r}."
        )
    for name, tree in (("phi0", phi0), ("theta0", theta0)):
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
        leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not leaves:
            raise ValueError(
                f"minimise: `{name}` holds no floating-point array, so there is nothing to optimise; wrap Python "
                f"numbers in `jnp.asarray(..., float)`. Found {name} = {tree!r}."
            )
        if not bool(tree_all_finite(leaves)):
            raise ValueError(f"minimise: `{name}` holds NaN or infinity; start from finite numbers.")
    check_finite(**{name: batch for name, batch in data.items() if not callable(batch)})
    for name, batch in data.items():
        if callable(batch) and key is None:
            raise ValueError(
                f"minimise: `{name}` is a sampler, which draws from a key; pass `key=jax.random.key(0)`."
            )
    return int(num_steps)


def check_schedule(schedule: Any, rule: Any) -> None:
    """Refuse a schedule that is none, or that the rule cannot follow."""
    if schedule is None:
        return
    if not callable(schedule):
        raise TypeError(
            "minimise: `rtol_schedule` must be a function of the number of points, such as "
            f"`optax.exponential_decay(0.3, 1, 0.9, end_value=1e-4)`, found {schedule!r}. A constant belongs into "
            "the `rtol` of `rule`."
        )
    if getattr(rule, "rtol", None) is None:
        raise ValueError(
            "minimise: `rtol_schedule` needs a rule that asks for an accuracy: `cx.Implicit` with an `rtol` that is "
            "not None."
        )
    first = schedule(jnp.zeros((), jnp.int32))
    if jnp.ndim(first) != 0 or not 0 < float(first) < 1:
        raise ValueError(f"minimise: `rtol_schedule` must give a number in (0, 1), found {first!r} for 0.")


def as_jax(tree: PyTree) -> PyTree:
    """NumPy arrays as JAX arrays, transferred once and not in every chunk; weak types, which recompile, as strong."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic) or getattr(leaf, "weak_type", False):
            return jnp.asarray(leaf, dtype=leaf.dtype)
        return leaf

    return jax.tree.map(convert, tree)


def check_state(state: Carry, expected: Carry) -> None:
    """A state goes on only with the kind of run that it came from."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(
            eqx.filter(tree, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
        )
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    found, wanted = shapes(state), shapes(expected)
    other = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if other:
        raise ValueError(
            "minimise: `state` belongs to a run with another `phi0`, `theta0`, `optimizer` or `rule` (its `recycle`, "
            f"say): they differ in {', '.join(other[:3])}. Go on with what that run was given, or start with "
            "`phi0=solution.phi` and no `state`."
        )
