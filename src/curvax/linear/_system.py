"""What the solvers of this room share: checks, options, and work that runs only when it is needed."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PyTree, Scalar

from curvax._pytree import (
    tree_dot,
    tree_dtype,
    tree_generic_like,
    tree_norm,
    tree_scale,
    tree_size,
    tree_sub,
    tree_unit,
    tree_where,
    tree_zeros_like,
)
from curvax.operators._damped import check_real

MatVec = Callable[[PyTree[Array]], PyTree[Array]]


_Compute = Callable[
    [Any, Any, PyTree[Array], dict[str, Any]], tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]
]


def traced_once(compute: _Compute) -> _Compute:
    """`compute` of a linear solver, traced once where Lineax asks twice: for the shapes, and for the program."""
    jitted = eqx.filter_jit(compute)

    @ft.wraps(compute)
    def cached(
        self: Any, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        # While shapes are asked for there may be no mesh, and an empty one while the program is: the same to us, but
        # not to JAX's cache.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return jitted(self, state, vector, options)

    return cached


def in_units(compute: _Compute) -> _Compute:
    """`compute` of a linear solver in units in which the right-hand side is near one: no square vanishes or overflows.

    The unit is a power of two, so that no digit changes. It scales `y0`, the solver's `atol` and the `residual_norm` of
    the statistics as well.
    """

    @ft.wraps(compute)
    def scaled(
        self: Any, state: Any, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        y0 = options.get("y0")
        unit = tree_unit(vector if y0 is None else (vector, y0))
        if y0 is not None:
            options = options | {"y0": tree_scale(unit, y0)}
        if not (isinstance(self.atol, int | float) and self.atol == 0):
            self = eqx.tree_at(lambda solver: solver.atol, self, self.atol * unit)
        value, result, stats = compute(self, state, tree_scale(unit, vector), options)
        factor = 1 / unit
        return tree_scale(factor, value), result, stats | {"residual_norm": factor * stats["residual_norm"]}

    return scaled


def check_square(name: str, operator: lx.AbstractLinearOperator) -> None:
    """Raise `ValueError` unless `operator` maps a space of real arrays to itself."""
    check_real(operator, f"the operator of `{name}`")
    same = jax.tree.structure(operator.in_structure()) == jax.tree.structure(
        operator.out_structure()
    ) and all(
        a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(
            jax.tree.leaves(operator.in_structure()), jax.tree.leaves(operator.out_structure()), strict=True
        )
    )
    if not same:
        raise ValueError(
            f"`{name}` solves square systems only, found an operator from {operator.in_structure()} to "
            f"{operator.out_structure()}. For least squares use `lx.LSMR` or `lx.Normal(...)`."
        )


def looks_symmetric(matvec: MatVec, like: PyTree[Array]) -> Bool[Array, ""]:
    """Whether uᵀAv = vᵀAu up to rounding for two generic vectors: two products, no proof, but rarely wrong."""
    u, v = tree_generic_like(like), tree_generic_like(like, another=True)
    au, av = matvec(u), matvec(v)
    scale = tree_norm(u) * tree_norm(av) + tree_norm(v) * tree_norm(au)
    rounding = 10 * max(tree_size(like), 4) ** 0.5 * jnp.finfo(tree_dtype(like)).eps
    return jnp.abs(tree_dot(u, av) - tree_dot(v, au)) <= rounding * scale


def check_tolerances(name: str, rtol: Any, atol: Any, max_steps: int | None) -> None:
    """Raise `ValueError` for tolerances or budgets that cannot be meant. Traced values pass."""
    for label, value in (("rtol", rtol), ("atol", atol)):
        if isinstance(value, int | float) and not value >= 0:
            raise ValueError(f"`{label}` of `{name}` must be at least 0, got {value}.")
    if isinstance(rtol, int | float) and rtol >= 1:
        raise ValueError(f"`rtol` of `{name}` must be below 1, got {rtol}: x = 0 would be a solution.")
    if isinstance(rtol, int | float) and isinstance(atol, int | float) and rtol == 0 and atol == 0:
        raise ValueError(
            f"`{name}` needs `rtol` or `atol` above 0: no solve in floating point reaches residual 0."
        )
    if max_steps is not None and not (isinstance(max_steps, int) and max_steps >= 1):
        raise ValueError(f"`max_steps` of `{name}` must be an integer of at least 1, got {max_steps}.")


def check_options(name: str, options: dict[str, Any], *others: str) -> None:
    """Raise `ValueError` for an option that no one would read."""
    known = ("preconditioner", "y0", *others)
    for key in options:
        if key not in known:
            listed = ", ".join(f"'{k}'" for k in known)
            raise ValueError(f"`{name}` has no option '{key}'; its options are {listed}.")


def tolerance(rtol: Scalar | float, atol: Scalar | float, vector: PyTree[Array]) -> Scalar:
    """atol + rtol · ‖b‖, the residual norm at which a solve is done; NaN, which none meets, if ‖b‖ is infinite."""
    dtype = tree_dtype(vector)
    size = tree_norm(vector)
    wanted = jnp.asarray(atol, dtype) + jnp.asarray(rtol, dtype) * size
    return jnp.where(jnp.isfinite(size), wanted, jnp.nan)


def start(vector: PyTree[Array], options: dict[str, Any]) -> PyTree[Array] | None:
    """`options["y0"]`, or None for zero. A zero right-hand side starts at its solution, zero."""
    y0 = options.get("y0")
    if y0 is None:
        return None
    if jax.tree.structure(y0) != jax.tree.structure(vector):
        raise ValueError(
            "`options['y0']` must have the structure of the right-hand side, found "
            f"{jax.tree.structure(y0)} for {jax.tree.structure(vector)}."
        )
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (y0, vector)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`options['y0']` must have the shapes of the right-hand side, found {shapes[0]} for {shapes[1]}."
        )
    y0 = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), y0, vector)
    return tree_where(tree_norm(vector) > 0, y0, tree_zeros_like(vector))


def start_and_residual(
    matvec: MatVec, vector: PyTree[Array], options: dict[str, Any]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """x₀ and b − A x₀, without a product where x₀ = 0."""
    y0 = start(vector, options)
    if y0 is None:
        return tree_zeros_like(vector), vector
    return y0, tree_sub(vector, matvec(y0))


def preconditioner_of(
    name: str, operator: lx.AbstractLinearOperator, options: dict[str, Any]
) -> MatVec | None:
    """Products with `options["preconditioner"]`, linearised; None where there is none."""
    preconditioner = options.get("preconditioner")
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, lx.AbstractLinearOperator):
        raise ValueError(
            f"`options['preconditioner']` of `{name}` must be a Lineax operator that approximates the inverse, "
            f"found {type(preconditioner).__name__}."
        )
    if preconditioner.in_size() != operator.out_size() or preconditioner.out_size() != operator.in_size():
        raise ValueError(
            f"`options['preconditioner']` of `{name}` is {preconditioner.out_size()} × {preconditioner.in_size()} "
            f"for an operator of {operator.out_size()} × {operator.in_size()}."
        )
    return lx.linearise(preconditioner).mv


def transposed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the transposed solve: the preconditioner transposed, the start forgotten."""
    return {"preconditioner": options["preconditioner"].transpose()} if "preconditioner" in options else {}


def conjugated_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of the conjugated solve, as `transposed_options`."""
    return {"preconditioner": lx.conj(options["preconditioner"])} if "preconditioner" in options else {}


def final_result(
    converged: Bool[Array, ""],
    failures: tuple[tuple[Bool[Array, ""], lx.RESULTS], ...],
    otherwise: lx.RESULTS,
) -> lx.RESULTS:
    """`successful` if converged, else the first failure that holds, else `otherwise`."""
    result = otherwise
    for holds, failure in reversed(failures):
        result = lx.RESULTS.where(holds, failure, result)
    return lx.RESULTS.where(converged, lx.RESULTS.successful, result)
