"""The solver that looks at the operator, and says what it did."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree, Scalar

from curvax._control import run_if
from curvax._pytree import tree_all_finite, tree_size, tree_zeros_like
from curvax.linear._auto_stages import (
    Method,
    Progress,
    Reason,
    begin,
    by_factors,
    cg_stage,
    gmres_stage,
    lu_stage,
    minres_stage,
    sign_of,
    stats_of,
)
from curvax.linear._cg_core import default_max_steps
from curvax.linear._system import (
    check_square,
    check_tolerances,
    conjugated_options,
    final_result,
    is_symmetric,
    preconditioner_of,
    start_and_residual,
    tolerance,
    transposed_options,
)
from curvax.operators._factorisation import Factorisation, factorise, written_out


class _State(eqx.Module):
    operator: lx.AbstractLinearOperator
    factorisation: Factorisation | None


class Auto(lx.AbstractLinearSolver[_State]):
    """A direct or an iterative solver, chosen by size and tags, with a fallback where one fails.

    | size n | tagged | first | then | then |
    |---|---|---|---|---|
    | ≤ `dense_size` | definite | Cholesky | LU | |
    | ≤ `dense_size` | otherwise | LU | | |
    | larger | definite | CG | MINRES | LU |
    | larger | symmetric | MINRES | LU | |
    | larger | neither | GMRES(`restart`) | GMRES(4 · `restart`) | LU |

    The last LU writes the matrix out and runs up to n = `fallback_size` only. Each stage starts from the best
    iterate so far. A stage that is not needed costs nothing at run time, under `vmap` too (it costs compile
    time). Kept in mind from the theory: CG is right only for a definite A; small or ill-conditioned systems
    are for factorisations.

    Success means ‖b − Ax‖ ≤ atol + rtol · ‖b‖ for the true residual, and that A is not singular to working
    precision as far as was seen (condition number at most 1/(n·eps), estimated in the 1-norm for
    factorisations, by Ritz values for CG). CG works to a relative *forward* error of `rtol`, the others to
    the residual.

    Options of `lineax.linear_solve`: `preconditioner` (approximates A⁻¹; definite where A is symmetric) and `y0`, for
    the iterative methods; a factorisation needs neither.

    Statistics: `method` (a `Method`), `reason` (a `Reason`: why the stage before failed), `num_steps`
    (products with A, over all stages, without those that wrote a matrix out), `residual_norm` (true),
    `condition` (estimate, 0 where there is none).

    Results: `lineax.RESULTS.singular`, `max_steps_reached`, `breakdown` (CG met negative curvature and nothing
    after it succeeded), `stagnation` (rounding keeps the residual above the tolerance).

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance.
        max_steps: Budget of products of each stage; by default 40 times the size, within [1000, 100 000].
        dense_size: Largest size for which the matrix is written out at once, n products. 0 for never.
        fallback_size: Largest size for which it is written out after iterative methods failed. 0 for never.
        restart: Length of the Krylov space of GMRES.

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
        if 0 < operator.in_size() <= self.dense_size:
            return _State(operator, factorise(written_out(operator), sign_of(operator)))
        return _State(lx.linearise(operator), None)

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
            end = self._iterate(state.operator, vector, target, options)
        converged = (end.residual_norm <= target) & ~end.singular & tree_all_finite(end.x)
        failure = end.failure
        result = final_result(
            converged,
            (
                (end.singular | ~jnp.isfinite(end.residual_norm), lx.RESULTS.singular),
                (failure == Reason.indefinite, lx.RESULTS.breakdown),
                (failure == Reason.budget, lx.RESULTS.max_steps_reached),
            ),
            lx.RESULTS.stagnation,
        )
        return end.x, result, stats_of(end)

    def _iterate(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        target: Scalar,
        options: dict[str, Any],
    ) -> Progress:
        size = tree_size(vector)
        budget = default_max_steps(size) if self.max_steps is None else self.max_steps
        precondition = preconditioner_of("Auto", operator, options)
        symmetric = is_symmetric(operator)
        if symmetric and precondition is not None and not is_symmetric(options["preconditioner"]):
            raise ValueError(
                "`options['preconditioner']` of `Auto` must be tagged `lx.positive_semidefinite_tag` for a "
                "symmetric operator: CG and MINRES need a symmetric positive definite preconditioner."
            )
        stages: list[Callable[[Progress], Progress]] = []
        if sign_of(operator):
            stages.append(lambda p: cg_stage(operator, vector, p, target, budget, precondition))
        if symmetric:
            stages.append(lambda p: minres_stage(operator.mv, vector, p, target, budget, precondition))
        else:
            stages.append(
                lambda p: gmres_stage(
                    operator.mv, vector, p, target, budget, precondition, self.restart, Method.gmres
                )
            )
            if size > self.restart:
                long = 4 * self.restart
                stages.append(
                    lambda p: gmres_stage(
                        operator.mv, vector, p, target, budget, precondition, long, Method.gmres_long
                    )
                )
        progress = begin(*start_and_residual(operator.mv, vector, options))
        for stage in stages:
            progress = run_if(~(progress.residual_norm <= target) & ~progress.singular, stage, progress)
        if size <= self.fallback_size:
            needed = (~(progress.residual_norm <= target) | progress.singular) & jnp.isfinite(
                progress.residual_norm
            )
            progress = run_if(needed, lambda p: lu_stage(operator, vector, p), progress)
        return progress

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The factors are read the other way; the operator is transposed."""
        factorisation = None if state.factorisation is None else state.factorisation.transpose()
        return _State(state.operator.transpose(), factorisation), transposed_options(options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        return _State(lx.conj(state.operator), state.factorisation), conjugated_options(options)

    def assume_full_rank(self) -> bool:
        """A singular operator is a failure."""
        return True
