"""Flexible GMRES as a Lineax solver: the preconditioner may be an iteration of its own."""

from typing import Any, TypeAlias

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._pytree import tree_norm, tree_size, tree_zeros_like
from curvax.linear._cg_core import default_max_steps
from curvax.linear._gmres_core import gmres
from curvax.linear._system import (
    MatVec,
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

_State: TypeAlias = lx.AbstractLinearOperator


class FGMRES(lx.AbstractLinearSolver[_State]):
    """Flexible, restarted GMRES for A x = b, whatever the symmetry of A.

    Each step minimises ‖b − Ax‖ over the vectors that the preconditioner has returned so far in this cycle. Because
    these are stored, the preconditioner need not be linear, nor the same in every step: it may be a few steps of
    another solver. Stops when ‖b − Ax‖ ≤ atol + rtol · ‖b‖, checked with the true residual at the end of every cycle.

    Options of `lineax.linear_solve`: `preconditioner`, an operator near A⁻¹ or a function v ↦ z with Az ≈ v; `y0`, a
    start. A function has no transpose: the transposed solve, which derivatives in reverse mode need, uses the
    option `transposed_preconditioner` (an operator or a function) and goes without where there is none.

    Statistics: `num_steps` (products with A), `residual_norm` (true).

    Results: `lineax.RESULTS.singular` (non-finite numbers), `stagnation` (a cycle took off less than a twentieth of the
    residual), `max_steps_reached`.

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance.
        max_steps: Budget of products with A; by default 40 times the size, within [1000, 100 000].
        restart: Steps of a cycle.

    Raises:
        ValueError: The operator is not square, or an option or argument does not fit.

    Cost: one product with A and with the preconditioner a step, and one product more a cycle; 2 · restart + 1 vectors
        (restart + 1 without a preconditioner), 2 · restart inner products a step at most.

    Source: Y. Saad, "A flexible inner-outer preconditioned GMRES algorithm", SIAM J. Sci. Comput. 14, 1993.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        operator = lx.MatrixLinearOperator(jnp.array([[3.0, 1.0], [0.0, 2.0]]))
        options = {"preconditioner": lambda v: v / jnp.array([3.0, 2.0])}
        lx.linear_solve(operator, jnp.ones(2), cx.linear.FGMRES(rtol=1e-6), options=options).value
        ```
    """

    rtol: Array | float
    atol: Array | float = 0.0
    max_steps: int | None = None
    restart: int = 30

    def __check_init__(self) -> None:
        check_tolerances("FGMRES", self.rtol, self.atol, self.max_steps)
        if self.restart < 1:
            raise ValueError(f"`restart` of `FGMRES` must be at least 1, got {self.restart}.")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Check the operator and linearise it."""
        del options
        check_square("FGMRES", operator)
        return lx.linearise(operator)

    @traced_once
    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Run the cycles."""
        check_options("FGMRES", options, "transposed_preconditioner")
        if tree_size(vector) == 0:
            none = {"num_steps": jnp.asarray(0), "residual_norm": tree_norm(vector)}
            return tree_zeros_like(vector), lx.RESULTS.successful, none
        preconditioner = _preconditioner(state, options)
        x, r = start_and_residual(state.mv, vector, options)
        size = tree_size(vector)
        solution, _, info = gmres(
            state.mv,
            vector,
            x,
            r,
            target=tolerance(self.rtol, self.atol, vector),
            max_steps=default_max_steps(size) if self.max_steps is None else self.max_steps,
            restart=self.restart,
            preconditioner=preconditioner,
            flexible=preconditioner is not None,
        )
        failures = (
            (info.nonfinite, lx.RESULTS.singular),
            (info.stalled, lx.RESULTS.stagnation),
        )
        result = final_result(info.converged, failures, lx.RESULTS.max_steps_reached)
        return solution, result, {"num_steps": info.num_matvecs, "residual_norm": info.residual_norm}

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The transposed operator, with the preconditioner meant for it."""
        given, other = options.get("preconditioner"), options.get("transposed_preconditioner")
        if isinstance(given, lx.AbstractLinearOperator) and other is None:
            return state.transpose(), transposed_options(options)
        swapped = {"preconditioner": other, "transposed_preconditioner": given}
        return state.transpose(), {name: value for name, value in swapped.items() if value is not None}

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        if isinstance(options.get("preconditioner"), lx.AbstractLinearOperator):
            return lx.conj(state), conjugated_options(options)
        return lx.conj(state), options

    def assume_full_rank(self) -> bool:
        """Derivatives take the operator to be nonsingular."""
        return True


def _preconditioner(operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> MatVec | None:
    given = options.get("preconditioner")
    if given is None or isinstance(given, lx.AbstractLinearOperator):
        return preconditioner_of("FGMRES", operator, options)
    if not callable(given):
        raise ValueError(
            "`options['preconditioner']` of `FGMRES` must be a Lineax operator that approximates the inverse, or a "
            f"function v ↦ z, found {type(given).__name__}."
        )
    return given
