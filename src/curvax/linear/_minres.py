"""The minimum residual method for symmetric systems, definite or not, as a Lineax solver."""

from typing import Any, TypeAlias

import lineax as lx
from jaxtyping import Array, PyTree

from curvax._pytree import tree_size
from curvax.linear._cg_core import default_max_steps
from curvax.linear._minres_core import MINRESInfo, minres
from curvax.linear._system import (
    check_options,
    check_square,
    check_tolerances,
    conjugated_options,
    final_result,
    in_units,
    preconditioner_of,
    start_and_residual,
    tolerance,
    traced_once,
    transposed_options,
)
from curvax.operators._structured import is_symmetric

_State: TypeAlias = lx.AbstractLinearOperator


class MINRES(lx.AbstractLinearSolver[_State]):
    """The minimum residual method for A x = b with A symmetric, definite or not.

    Step k minimises ‖b − Ax‖ (in the norm of the preconditioner's inverse, where there is one) over the
    Krylov space of dimension k, by Lanczos' three-term recurrence and Givens rotations. Where A is singular
    and b lies in its range the answer is a solution, the one of least norm for y0 = 0 and no preconditioner.

    Stops when ‖b − Ax‖ ≤ atol + rtol · ‖b‖ (Euclidean, whatever the preconditioner). The true residual is
    computed at the end, and the method starts again from there if the recursive one had drifted.
    A residual says little about the error: that may be larger by the condition number.

    Options of `lineax.linear_solve`: `preconditioner`, a symmetric positive definite operator that
    approximates A⁻¹, and `y0`, a start.

    Statistics: `num_steps` (products with A), `num_restarts`, `residual_norm` (true).

    Results: `lineax.RESULTS.singular` (b has a part outside the range of A; also for non-finite numbers),
    `breakdown` (the preconditioner is not positive definite), `max_steps_reached`, `stagnation` (rounding
    keeps the residual above the tolerance).

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance.
        max_steps: Budget of products with A; by default 40 times the size, within [1000, 100 000].

    Raises:
        ValueError: The operator is not square or not tagged symmetric, or an option does not fit.

    Cost: one product with A (and with the preconditioner) a step and one more at the end; 7 vectors. Steps:
    about κ/2 · log(2/rtol) at worst for an indefinite A, √κ/2 · log(2/rtol) for a definite one.

    Derivatives are those of the solution of a nonsingular system.

    Source: C. C. Paige, M. A. Saunders, "Solution of sparse indefinite systems of linear equations", SIAM J.
        Numer. Anal. 12, 1975; the residual's recurrence after S.-C. Choi, C. C. Paige, M. A. Saunders,
        "MINRES-QLP", SIAM J. Sci. Comput. 33, 2011. SciPy's stops on ‖r‖ ≤ rtol ‖A‖‖x‖, which is looser.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        matrix = jnp.array([[1.0, 2.0], [2.0, -1.0]])
        operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
        lx.linear_solve(operator, jnp.array([3.0, 1.0]), cx.linear.MINRES(rtol=1e-5)).value  # [1, 1]
        ```
    """

    rtol: Array | float
    atol: Array | float = 0.0
    max_steps: int | None = None

    def __check_init__(self) -> None:
        check_tolerances("MINRES", self.rtol, self.atol, self.max_steps)

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Check the operator and linearise it."""
        del options
        check_square("MINRES", operator)
        if not is_symmetric(operator):
            raise ValueError(
                "`MINRES` needs an operator tagged `lx.symmetric_tag` (or definite); tag it if it is symmetric, "
                "or use `curvax.linear.Auto` or `lx.GMRES`."
            )
        return lx.linearise(operator)

    @traced_once
    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Run the loop."""
        check_options("MINRES", options)
        preconditioner = options.get("preconditioner")
        if preconditioner is not None and not is_symmetric(preconditioner):
            raise ValueError(
                "`options['preconditioner']` of `MINRES` must be tagged `lx.positive_semidefinite_tag`: the "
                "method needs a symmetric positive definite preconditioner."
            )
        x, r = start_and_residual(state.mv, vector, options)
        solution, _, info = minres(
            state.mv,
            vector,
            x,
            r,
            target=tolerance(self.rtol, self.atol, vector),
            max_steps=default_max_steps(tree_size(vector)) if self.max_steps is None else self.max_steps,
            preconditioner=preconditioner_of("MINRES", state, options),
        )
        stats = {
            "num_steps": info.num_matvecs,
            "num_restarts": info.num_restarts,
            "residual_norm": info.residual_norm,
        }
        return solution, minres_result(info), stats

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The transposed problem is the same problem."""
        return state.transpose(), transposed_options(options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        return lx.conj(state), conjugated_options(options)

    def assume_full_rank(self) -> bool:
        """Derivatives take the operator to be nonsingular."""
        return True


def minres_result(info: MINRESInfo) -> lx.RESULTS:
    """The status that a run of MINRES deserves."""
    budget_left = info.num_matvecs < info.max_steps
    return final_result(
        info.converged,
        (
            (info.singular | info.nonfinite, lx.RESULTS.singular),
            (info.breakdown, lx.RESULTS.breakdown),
            (budget_left, lx.RESULTS.stagnation),
        ),
        lx.RESULTS.max_steps_reached,
    )
