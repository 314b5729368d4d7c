"""The solver that looks at the operator, and says what it did."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import tree_all_finite, tree_size, tree_zeros_like
from curvax.linear._auto_stages import (
    Attempt,
    Method,
    Reason,
    begin,
    bicgstab_stage,
    by_factors,
    cg_stage,
    condition_of,
    gmres_stage,
    lu_stage,
    minres_stage,
    sign_of,
    stats_of,
    structured_stage,
)
from curvax.linear._cg_core import default_max_steps
from curvax.linear._system import (
    MatVec,
    check_square,
    check_tolerances,
    conjugated_options,
    final_result,
    in_units,
    is_symmetric,
    looks_symmetric,
    preconditioner_of,
    start_and_residual,
    tolerance,
    transposed_options,
)
from curvax.operators._direct import structured_inverse
from curvax.operators._factorisation import Factorisation, factorise, written_out


class _State(eqx.Module):
    operator: lx.AbstractLinearOperator
    factorisation: Factorisation | None
    inverse: lx.AbstractLinearOperator | None
    condition: Scalar | None  # where there is an inverse


class Auto(lx.AbstractLinearSolver[_State]):
    """A direct or an iterative solver, chosen by size and tags, with a fallback where one fails.

    | size n | tagged | first | then | then |
    |---|---|---|---|---|
    | any, A has a structure | | its inverse, refined | then as below | |
    | ≤ `dense_size` | definite | Cholesky | LU | |
    | ≤ `dense_size` | otherwise | LU | | |
    | larger | definite | CG | MINRES | LU |
    | larger | symmetric | MINRES | LU | |
    | larger | neither, and looks symmetric | MINRES | then as below | |
    | larger | neither | GMRES(`restart`) | GMRES(4 · `restart`) | LU, or BiCGSTAB |

    A structure is that of `curvax.operators`' own (Kronecker, low rank plus diagonal, blocks, circulant, Toeplitz, and
    damped ones of these), or a diagonal, tridiagonal or triangular matrix; not one whose parts are known through
    products alone. "Looks symmetric" means uᵀAv = vᵀAu up to rounding for two generic vectors, two products. The last
    LU writes the matrix out and runs up to n = `fallback_size` only; above that BiCGSTAB takes its place. Each stage
    starts from the best iterate so far. One that is not needed costs nothing at run time, under `vmap` too (it costs
    compile time). Kept in mind from the theory: CG is right only for a definite A; small or ill-conditioned systems
    are for factorisations.

    Success means ‖b − Ax‖ ≤ atol + rtol · ‖b‖ for the true residual, and that A is not singular to working
    precision as far as was seen: condition number at most 1/(n·eps), estimated in the 1-norm, for factorisations,
    at most 1/(10·eps), by two steps of the power method, for structures, and by Ritz values for CG. CG works to a
    relative *forward* error of `rtol`, the others to the residual.

    Options of `lineax.linear_solve`: `preconditioner` (approximates A⁻¹; definite where A is symmetric) and `y0`, for
    the iterative methods; a factorisation needs neither.

    Statistics: `method` (a `Method`), `reason` (a `Reason`: why the stage before failed), `num_steps`
    (products with A, over all stages, without those that wrote a matrix out), `residual_norm` (true),
    `condition` (estimate, 0 where there is none).

    Results: `lineax.RESULTS.singular`, `max_steps_reached`, `breakdown` (CG met negative curvature and nothing
    after it succeeded, or a tag is false), `stagnation` (rounding keeps the residual above the tolerance).

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance.
        max_steps: Budget of products of each stage; by default 40 times the size, within [1000, 100 000].
        dense_size: Largest size for which the matrix is written out at once, n products. 0 for never.
        fallback_size: Largest size for which it is written out after iterative methods failed. 0 for never.
        restart: Length of the Krylov space of GMRES.
        probe: Whether an operator without tags is asked if it looks symmetric; not where it is factorised, or where a
            preconditioner is given that is not tagged definite.
        check_tags: Whether a tag of symmetry is put to the same question, at two products, before iterative methods
            rely on it: `breakdown` with `Reason.not_symmetric` if it is false. For debugging.

    Raises:
        ValueError: The operator is not square, or an option or argument does not fit.

    Cost: dense, n products, 8n² bytes three times and n³/3 (Cholesky) or 2n³/3 multiplications once per
    operator, so that further right-hand sides cost n² each; iterative, as the methods.

    Source: Y. Saad, "Iterative methods for sparse linear systems", 2nd edition, SIAM 2003.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        operator = lx.MatrixLinearOperator(jnp.array([[1.0, 2.0], [0.0, 3.0]]))
        solution = lx.linear_solve(operator, jnp.array([3.0, 3.0]), cx.linear.Auto(rtol=1e-6))
        solution.value  # [1, 1]
        cx.linear.Method(int(solution.stats["method"]))  # Method.lu
        ```
    """

    rtol: Array | float
    atol: Array | float = 0.0
    max_steps: int | None = None
    dense_size: int = eqx.field(default=128, kw_only=True)
    fallback_size: int = eqx.field(default=2048, kw_only=True)
    restart: int = eqx.field(default=30, kw_only=True)
    probe: bool = eqx.field(default=True, kw_only=True)
    check_tags: bool = eqx.field(default=False, kw_only=True)

    def __check_init__(self) -> None:
        check_tolerances("Auto", self.rtol, self.atol, self.max_steps)
        for name, value, least in (
            ("dense_size", self.dense_size, 0),
            ("fallback_size", self.fallback_size, 0),
            ("restart", self.restart, 1),
        ):
            if value < least:
                raise ValueError(f"`{name}` of `Auto` must be at least {least}, got {value}.")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Choose; factorise a small operator, linearise a large one."""
        del options
        check_square("Auto", operator)
        inverse = structured_inverse(operator) if operator.in_size() > 0 else None
        if inverse is None and 0 < operator.in_size() <= self.dense_size:
            return _State(operator, factorise(written_out(operator), sign_of(operator)), None, None)
        condition = None if inverse is None else condition_of(operator, inverse)
        return _State(lx.linearise(operator), None, inverse, condition)

    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Run the stages until one has answered."""
        size = tree_size(vector)
        target = tolerance(self.rtol, self.atol, vector)
        if size == 0:
            return tree_zeros_like(vector), lx.RESULTS.successful, stats_of(begin(vector, vector))
        if state.factorisation is not None:
            end = by_factors(state.factorisation, vector)
        else:
            end = self._iterate(state, vector, target, options)
        failure = end.failure
        usable = ~end.singular & (failure != Reason.not_symmetric) & tree_all_finite(end.x)
        converged = (end.residual_norm <= target) & usable
        result = final_result(
            converged,
            (
                (end.singular | ~jnp.isfinite(end.residual_norm), lx.RESULTS.singular),
                ((failure == Reason.indefinite) | (failure == Reason.not_symmetric), lx.RESULTS.breakdown),
                (failure == Reason.budget, lx.RESULTS.max_steps_reached),
            ),
            lx.RESULTS.stagnation,
        )
        return end.x, result, stats_of(end)

    def _iterate(
        self,
        state: _State,
        vector: PyTree[Array],
        target: Scalar,
        options: dict[str, Any],
    ) -> Attempt:
        operator, size = state.operator, tree_size(vector)
        budget = default_max_steps(size) if self.max_steps is None else self.max_steps
        given, symmetric = options.get("preconditioner"), is_symmetric(operator)
        if symmetric and isinstance(given, lx.AbstractLinearOperator) and not is_symmetric(given):
            raise ValueError(
                "`options['preconditioner']` of `Auto` must be tagged `lx.positive_semidefinite_tag` for a "
                "symmetric operator: CG and MINRES need a symmetric positive definite preconditioner."
            )
        progress = begin(*start_and_residual(operator.mv, vector, options))
        trusted = jnp.asarray(True)
        if symmetric and self.check_tags:
            trusted = looks_symmetric(operator.mv, vector)
            progress = progress._replace(num_matvecs=progress.num_matvecs + 2)
        stages = self._stages(state, vector, target, budget, options)
        for stage in stages:
            needed = trusted & ~(progress.residual_norm <= target) & ~progress.singular
            progress = run_if(needed, stage, progress)
        if size <= self.fallback_size:
            unsolved = ~(progress.residual_norm <= target) | progress.singular
            needed = trusted & unsolved & jnp.isfinite(progress.residual_norm)
            progress = run_if(needed, lambda p: lu_stage(operator, vector, p), progress)
        lied = jnp.asarray(int(Reason.not_symmetric), progress.failure.dtype)
        return progress._replace(failure=jnp.where(trusted, progress.failure, lied))

    def _stages(
        self,
        state: _State,
        vector: PyTree[Array],
        target: Scalar,
        budget: int,
        options: dict[str, Any],
    ) -> list[Callable[[Attempt], Attempt]]:
        """What is tried, in this order, before the matrix is written out."""
        operator, inverse, condition = state.operator, state.inverse, state.condition
        apply, given = operator.mv, options.get("preconditioner")
        budgeted = (target, budget, preconditioner_of("Auto", operator, options))
        minres = ft.partial(minres_stage, apply, vector)
        stages: list[Callable[[Attempt], Attempt]] = []
        if inverse is not None and condition is not None:
            stages.append(lambda p: structured_stage(operator, inverse, condition, vector, p, target))
        if sign_of(operator):
            stages.append(lambda p: cg_stage(operator, vector, p, *budgeted))
        if is_symmetric(operator):
            return [*stages, lambda p: minres(p, *budgeted)]
        size = tree_size(vector)
        if self.probe and (given is None or lx.is_positive_semidefinite(given)):
            # The probe is no proof: no more steps than a symmetric operator would mostly need.
            most = min(budget, max(4 * self.restart, 3 * size))

            def if_symmetric(p: Attempt) -> Attempt:
                asked = p._replace(num_matvecs=p.num_matvecs + 2)
                attempt = lambda p: minres(p, target, most, budgeted[2])  # noqa: E731
                return run_if(looks_symmetric(apply, vector), attempt, asked)

            stages.append(if_symmetric)
        for length, method in ((self.restart, Method.gmres), (4 * self.restart, Method.gmres_long)):
            if method == Method.gmres or size > self.restart:
                stages.append(ft.partial(self._gmres, apply, vector, budgeted, length, method))
        if size > self.fallback_size:
            stages.append(lambda p: bicgstab_stage(apply, vector, p, *budgeted))
        return stages

    def _gmres(
        self,
        apply: MatVec,
        vector: PyTree[Array],
        budgeted: tuple[Scalar, int, MatVec | None],
        length: int,
        method: Method,
        progress: Attempt,
    ) -> Attempt:
        return gmres_stage(apply, vector, progress, *budgeted, length, method)

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The factors are read the other way; the operator is transposed."""
        factorisation = None if state.factorisation is None else state.factorisation.transpose()
        inverse = None if state.inverse is None else state.inverse.transpose()
        transposed = _State(state.operator.transpose(), factorisation, inverse, state.condition)
        return transposed, transposed_options(options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        same = _State(lx.conj(state.operator), state.factorisation, state.inverse, state.condition)
        return same, conjugated_options(options)

    def assume_full_rank(self) -> bool:
        """A singular operator is a failure."""
        return True
