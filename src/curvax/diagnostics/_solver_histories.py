"""True residuals of linear solvers against the products that they made."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, PyTree

from curvax._pytree import tree_norm, tree_sub
from curvax.operators._dispatch import register

# What solvers call the number of steps that they may take.
_BUDGETS = ("max_steps", "max_terms")
# Budgets grow by this factor: all runs together make at most 1 / (1 - 1/1.25) = 5 times the products of the longest.
_GROWTH = 1.25
# Where each budget is compiled for itself.
_COARSE_GROWTH = 2.0
_NEEDS_A_NUMBER = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.TracerArrayConversionError,
)
_QUESTIONS = {
    lx.is_symmetric: lx.symmetric_tag,
    lx.is_diagonal: lx.diagonal_tag,
    lx.is_tridiagonal: lx.tridiagonal_tag,
    lx.is_lower_triangular: lx.lower_triangular_tag,
    lx.is_upper_triangular: lx.upper_triangular_tag,
    lx.has_unit_diagonal: lx.unit_diagonal_tag,
    lx.is_positive_semidefinite: lx.positive_semidefinite_tag,
    lx.is_negative_semidefinite: lx.negative_semidefinite_tag,
}


@dataclass(frozen=True)
class SolverHistory:
    """Convergence of one linear solver.

    Attributes:
        products: (k,), products with the operator or its transpose that a run made, ascending from 0; of a direct
            solver the one number. A matrix written out counts as one for each column.
        residuals: (k,), ‖b − Ax‖ / ‖b‖ of what that run returned, computed anew from its x.
        converged: Whether the solver reported success.
        message: What it reported otherwise.
    """

    products: np.ndarray
    residuals: np.ndarray
    converged: bool
    message: str


class _Counter:
    """Counts on the host, from several threads. Hashable by identity, so that it can be a static field."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self, number: Any) -> None:
        with self._lock:
            self.count += int(number)

    def add_one(self, anchor: Any) -> None:
        del anchor
        self.add(1)


class _Counted(lx.AbstractLinearOperator):
    """An operator whose products are counted, of which solvers see the products, the matrix and the tags."""

    operator: lx.AbstractLinearOperator
    counter: _Counter = eqx.field(static=True)

    @property
    def tags(self) -> frozenset[object]:
        return frozenset(tag for question, tag in _QUESTIONS.items() if question(self.operator))

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        # With a number of the vector, so that under `vmap` every vector counts.
        numbers = [leaf.ravel()[0] for leaf in jax.tree.leaves(vector) if leaf.size]
        jax.debug.callback(self.counter.add_one, numbers[0] if numbers else 0)
        return self.operator.mv(vector)

    def as_matrix(self) -> Array:
        jax.debug.callback(self.counter.add, self.in_size())
        return self.operator.as_matrix()

    def transpose(self) -> "_Counted":
        return _Counted(self.operator.transpose(), self.counter)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        return self.operator.out_structure()


register(_Counted)


def _budget_of(solver: Any) -> tuple[str, ...] | None:
    """Where in a solver its budget of steps is: a path of names, None for a direct solver."""
    for name in _BUDGETS:
        if name in getattr(solver, "__dataclass_fields__", {}):
            return (name,)
    for wrapped in ("inner_solver", "solver"):
        inner = getattr(solver, wrapped, None)
        path = None if inner is None else _budget_of(inner)
        if path is not None:
            return (wrapped, *path)
    return None


def _with_budget(solver: Any, path: tuple[str, ...], budget: Any) -> Any:
    def at(tree: Any) -> Any:
        for name in path:
            tree = getattr(tree, name)
        return tree

    return eqx.tree_at(at, solver, budget, is_leaf=lambda x: x is None)


@eqx.filter_jit
def _run(solver, counted, vector, options):
    # Not `lx.linear_solve`: what it adds (implicit derivatives, checks of the result) would count for nothing here.
    x, result, _ = solver.compute(solver.init(counted, options), vector, options)
    return tree_norm(tree_sub(vector, counted.operator.mv(x))) / tree_norm(vector), result


def _takes_arrays(solver: Any, path: tuple[str, ...], arguments: tuple[Any, ...]) -> bool:
    """Whether the budget may be an array, so that one compilation serves all; some need to know it while tracing."""
    try:
        eqx.filter_eval_shape(_run, _with_budget(solver, path, jnp.asarray(1)), *arguments)
    except _NEEDS_A_NUMBER:
        return False
    return True


def _history(
    solver: lx.AbstractLinearSolver,
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    options: dict[str, Any],
    max_products: int,
) -> SolverHistory:
    counter = _Counter()
    arguments = (_Counted(lx.linearise(operator), counter), vector, options)
    path = _budget_of(solver)
    as_array = path is not None and _takes_arrays(solver, path, arguments)
    products, residuals, budget = [0], [1.0 if "y0" not in options else np.nan], 1
    if "y0" in options:
        start = tree_norm(tree_sub(vector, operator.mv(options["y0"]))) / tree_norm(vector)
        residuals = [float(start)]
    while True:
        counter.count = 0
        limited = solver
        if path is not None:
            limited = _with_budget(solver, path, jnp.asarray(budget) if as_array else budget)
        residual, result = _run(limited, *arguments)
        residual = float(residual)
        jax.effects_barrier()
        stuck = counter.count == products[-1]
        if path is None:
            products, residuals = [], []
        if not stuck or path is None:
            products.append(counter.count)
            residuals.append(residual)
        converged = bool(result == lx.RESULTS.successful)
        # A larger budget that is not spent will not be spent by the next one either.
        idle = stuck and budget > 4 * max(products[-1], 4)
        if path is None or converged or counter.count >= max_products or idle:
            break
        budget = max(budget + 1, int(budget * (_GROWTH if as_array else _COARSE_GROWTH)))
    order = np.argsort(products, kind="stable")
    message = "" if converged else lx.RESULTS[result]
    return SolverHistory(np.asarray(products)[order], np.asarray(residuals)[order], converged, message)


def solver_histories(
    operator: lx.AbstractLinearOperator,
    vector: PyTree[Array],
    solvers: Mapping[str, lx.AbstractLinearSolver | tuple[lx.AbstractLinearSolver, dict[str, Any]]],
    *,
    max_products: int = 200,
) -> dict[str, SolverHistory]:
    """Convergence of several Lineax solvers on one system A x = b: true residual against products made.

    Each solver runs anew with a budget of 1, 2, 3, … steps, growing by a quarter, until it reports success or has made
    `max_products` products. So the residual is that of the answer it would have given, not one that it carries along,
    and products are counted as they happen, those of preparations, restarts and transposes included. A direct solver
    is a single point.

    Solvers see products, the matrix and the tags of the operator; one that looks for a structure of its class
    (`cx.linear.Auto`) does not find it.

    Args:
        operator: A.
        vector: b, not zero.
        solvers: name -> solver, or -> (solver, options) with the options of `lx.linear_solve`, for instance a
            `preconditioner` (whose products are not counted).
        max_products: No longer run is begun after one that made so many.

    Returns:
        name -> `SolverHistory`.

    Raises:
        ValueError: No solver, b = 0 or of another structure than A's output, or `max_products` < 1.

    Cost: about five times the products of the longest run of each solver, and one compilation of each. A
    solver that needs to know its budget while tracing, as `Auto` does, is compiled for each; its budgets double.

    Example:
        ```python
        operator = lx.DiagonalLinearOperator(jnp.linspace(1.0, 100.0, 50))
        operator = lx.TaggedLinearOperator(operator, lx.positive_semidefinite_tag)
        solvers = {"CG": lx.CG(rtol=1e-5, atol=0.0), "GMRES(20)": lx.GMRES(rtol=1e-5, atol=0.0)}
        found = cx.diagnostics.solver_histories(operator, jnp.ones(50), solvers)
        found["CG"].products[-1], found["CG"].residuals[-1]
        ```
    """
    if not solvers:
        raise ValueError("`solvers` is empty: there is nothing to run.")
    if max_products < 1:
        raise ValueError(f"`max_products` must be at least 1, found {max_products}.")
    like = jax.eval_shape(lambda: vector)
    if jax.tree.map(lambda x: (x.shape, x.dtype), like) != jax.tree.map(
        lambda x: (x.shape, x.dtype), operator.out_structure()
    ):
        raise ValueError(f"`vector` must be like the output of `operator`: found {like}.")
    if not float(tree_norm(vector)) > 0:
        raise ValueError("`vector` is zero or not finite: relative residuals are not defined.")
    found = {}
    for name, entry in solvers.items():
        solver, options = entry if isinstance(entry, tuple) else (entry, {})
        found[str(name)] = _history(solver, operator, vector, dict(options), max_products)
    return found
