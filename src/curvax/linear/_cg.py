"""Conjugate gradients as a Lineax solver."""

from typing import Any, TypeAlias

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, PyTree

from curvax._pytree import stop_gradient, tree_neg, tree_size, tree_sub, tree_zeros_like
from curvax.linear._cg_core import default_max_steps, negated
from curvax.linear._cg_scalars import CONVERGED, INDEFINITE, NONFINITE, PRECISION_LIMITED, SINGULAR
from curvax.linear._many import solve_sharing_products
from curvax.linear._system import check_options, preconditioner_of, traced_once
from curvax.linear._system import start as start_of
from curvax.operators._damped import check_real

_State: TypeAlias = tuple[lx.AbstractLinearOperator, bool]


class CG(lx.AbstractLinearSolver[_State]):
    """Conjugate gradients, stopped on an estimate of the relative forward error of the solution.

    Solves A x = b for a symmetric positive (or negative) definite A. The loop keeps the extreme Ritz values
    of A at O(1) a step and stops when ‖r‖²/‖p‖ ≤ rtol · λ̂min · ‖x‖, which asks for ‖x − A⁻¹b‖ ≤ rtol · ‖x‖.
    That is not what other solvers call `rtol`: a relative residual of 1e-6 can go with a solution
    that is 5 % wrong. Down to `rtol` of about 1e-2 the smallest Ritz value may not have settled when the loop
    stops, and the error of a badly conditioned system can be several times `rtol`; below, misses are rare and
    small. A preconditioner does not change what `rtol` means. Where its drift could feign the end,
    the residual is replaced by b − Ax.

    Under `vmap` over right-hand sides of one operator, up to 32 of them are solved together by block conjugate
    gradients (A. A. Dubrulle, 2001): each product serves all of them, so that fewer are needed (at best as many times
    fewer as there are right-hand sides) and stiff directions are found once. A block that meets negative or singular
    curvature fails as a whole. Where the operator is batched too, each right-hand side is on its own.

    Options of `lineax.linear_solve`: `preconditioner` (a positive definite operator, an approximation of
    A⁻¹) and `y0` (a start, which has no derivative).

    Statistics: `num_steps` (products with A), `residual_norm`, `curvature_min` and `curvature_max` (Ritz
    values, of the preconditioned operator where there is one), `indefinite`, `singular` and
    `precision_limited` (stopped at rounding level before `rtol` was reached: the error is then about
    eps · curvature_max / curvature_min).

    Results: `lineax.RESULTS.singular` when λ̂min ≤ √n · eps · λ̂max, `breakdown` when a direction with pᵀAp < 0
    was met or the preconditioner is not positive definite, `max_steps_reached`.

    Args:
        rtol: Relative forward error wanted of the solution, in (0, 1).
        max_steps: Budget of products with A; by default 40 times the size, within [1000, 100 000].

    Raises:
        ValueError: The operator is not square, or is tagged neither symmetric nor definite.

    Cost: one product with A a step; about √κ/2 · log(2√κ/rtol) steps; 4 vectors (8 preconditioned).

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        matrix = jnp.array([[4.0, 1.0], [1.0, 3.0]])
        operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
        solution = lx.linear_solve(operator, jnp.array([1.0, 2.0]), cx.linear.CG(rtol=1e-5))
        ```

    Source: M. R. Hestenes, E. Stiefel, "Methods of conjugate gradients for solving linear systems", 1952;
        the Ritz values after G. Meurant, P. Tichý, 2018; the drift of the residual after
        H. van der Vorst, Q. Ye, 2000.
    """

    rtol: Array | float
    max_steps: int | None = None

    def __check_init__(self) -> None:
        if isinstance(self.rtol, int | float) and not 0 < self.rtol < 1:
            raise ValueError(f"`rtol` of `CG` must lie in (0, 1), got {self.rtol}.")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"`max_steps` of `CG` must be at least 1, got {self.max_steps}.")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Check the operator and linearise it."""
        del options
        check_real(operator, "the operator of `CG`")
        if operator.in_structure() != operator.out_structure():
            raise ValueError(
                "`CG` solves with square operators only; use `lx.LSMR` or `lx.NormalCG` otherwise."
            )
        negative = lx.is_negative_semidefinite(operator)
        if not (lx.is_symmetric(operator) or lx.is_positive_semidefinite(operator) or negative):
            raise ValueError(
                "`CG` needs an operator tagged `lx.symmetric_tag` or `lx.positive_semidefinite_tag`; "
                "tag it if it is, or use `cx.linear.Auto` or `lx.GMRES`."
            )
        return lx.linearise(operator), negative

    @traced_once
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Run the loop."""
        check_options("CG", options)
        operator, negative = state
        matvec = negated(operator.mv) if negative else operator.mv
        rhs = tree_neg(vector) if negative else vector
        start = stop_gradient(start_of(vector, options))
        apply = preconditioner_of("CG", operator, options)
        preconditioner = options.get("preconditioner")
        if preconditioner is not None and not (
            lx.is_symmetric(preconditioner) or lx.is_positive_semidefinite(preconditioner)
        ):
            raise ValueError(
                "`options['preconditioner']` of `CG` must be tagged `lx.positive_semidefinite_tag`: CG needs a "
                "symmetric positive definite preconditioner."
            )
        size = tree_size(vector)
        if size == 0:
            return tree_zeros_like(vector), lx.RESULTS.successful, {"num_steps": jnp.asarray(0)}
        solution, info = solve_sharing_products(
            matvec,
            rhs if start is None else tree_sub(rhs, matvec(start)),
            rtol=self.rtol,
            max_steps=default_max_steps(size) if self.max_steps is None else self.max_steps,
            preconditioner=apply,
            reference=start,
        )
        if start is not None:
            solution = eqx.apply_updates(start, solution)
        converged = (info.status == CONVERGED) | (info.status == PRECISION_LIMITED)
        result = lx.RESULTS.where(converged, lx.RESULTS.successful, lx.RESULTS.max_steps_reached)
        singular, indefinite = info.status == SINGULAR, info.status == INDEFINITE
        result = lx.RESULTS.where(indefinite, lx.RESULTS.breakdown, result)
        result = lx.RESULTS.where(singular | (info.status == NONFINITE), lx.RESULTS.singular, result)
        stats = {
            "num_steps": info.num_matvecs,
            "max_steps": self.max_steps,
            "residual_norm": info.residual_norm,
            "curvature_min": info.curvature_min,
            "curvature_max": info.curvature_max,
            "indefinite": indefinite,
            "singular": singular,
            "precision_limited": info.status == PRECISION_LIMITED,
        }
        return solution, result, stats

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The transposed problem is the same problem."""
        operator, negative = state
        kept = (
            {"preconditioner": options["preconditioner"].transpose()} if "preconditioner" in options else {}
        )
        return (operator.transpose(), negative), kept

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        operator, negative = state
        kept = {"preconditioner": lx.conj(options["preconditioner"])} if "preconditioner" in options else {}
        return (lx.conj(operator), negative), kept

    def assume_full_rank(self) -> bool:
        """A definite operator has full rank."""
        return True
