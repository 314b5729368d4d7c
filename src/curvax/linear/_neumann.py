"""The Neumann series as a Lineax solver."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import tree_axpy, tree_dtype, tree_norm, tree_sub, tree_where
from curvax.linear._neumann_step import series_step
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
    transposed_options,
)
from curvax.operators._dense import ravel, structure_dtype, unravel

_State: TypeAlias = tuple[lx.AbstractLinearOperator, Array]
# Terms between two looks at the growth of the residual.
_WINDOW = 32


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    residual_norm: Scalar
    best: PyTree[Array]
    best_norm: Scalar
    window_norm: Scalar
    contraction: Scalar
    terms: Int[Array, ""]
    stalled: Bool[Array, ""]


class Neumann(lx.AbstractLinearSolver[_State]):
    """The Neumann series x = α Σₖ (I − αA)ᵏ b, summed until the residual is small.

    It converges if and only if the spectral radius of I − αA is below one (a norm below one is sufficient
    only). For a symmetric positive definite A that is 0 < α < 2/λmax: with α = 1, as the series is often printed,
    it diverges for λmax > 2. For A = I − ∂T/∂θ and α = 1 it is the fixed-point iteration of the
    linearised T. K terms with α a learning rate are K steps of truncated backpropagation at the solution.

    `step=None` chooses α from 20 products: the operator is compressed to a Krylov space and α minimises
    the growth rate of the powers there, which is right for complex pairs of eigenvalues too.

    Every term is checked against the true residual, and the iterate of smallest residual is returned: a
    divergent series is a failure with a finite value (0 where every term made it worse).

    Options of `lineax.linear_solve`: `preconditioner` P (any operator near A⁻¹; the series is then that of
    PA) and `y0`, a start.

    Statistics: `num_steps` (products with A in the series), `step`, `residual_norm`, `contraction` (the factor
    by which a term shrank the residual, over the last terms: 1 or more is divergence).

    Results: `lineax.RESULTS.breakdown` when the residual grew, `stagnation` when rounding keeps it above the
    tolerance, `max_steps_reached` when it was shrinking still, `singular` for non-finite numbers.

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance; the test is ‖b − Ax‖ ≤ atol + rtol · ‖b‖.
        max_terms: Number of terms at most.
        step: α, or None for an estimate.

    Raises:
        ValueError: The operator is not square, or an option or argument does not fit.

    Cost: one product a term, 3 vectors; an estimated step adds 20 products and 21 vectors, once per
    operator. About log(1/rtol)/(1 − ρ) terms, κ log(1/rtol) for a definite A: CG needs the root of that.

    Source: J. Lorraine, P. Vicol, D. Duvenaud, "Optimizing millions of hyperparameters by implicit
        differentiation", 2020, arXiv:1911.02590, where it is truncated without a check; L. F. Richardson, 1910.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        operator = lx.MatrixLinearOperator(jnp.array([[10.0, 1.0], [0.0, 5.0]]))
        lx.linear_solve(operator, jnp.array([11.0, 5.0]), cx.linear.Neumann(rtol=1e-5)).value  # [1, 1]
        ```
    """

    rtol: Array | float
    atol: Array | float = 0.0
    max_terms: int = 1000
    step: Array | float | None = None

    def __check_init__(self) -> None:
        check_tolerances("Neumann", self.rtol, self.atol, self.max_terms)
        if isinstance(self.step, int | float) and self.step == 0:
            raise ValueError("`step` of `Neumann` must not be 0: the series would stay at its start.")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Linearise the operator and choose the step."""
        check_square("Neumann", operator)
        operator = lx.linearise(operator)
        structure = operator.in_structure()
        dtype = structure_dtype(structure)
        if self.step is not None:
            return operator, jnp.asarray(self.step, dtype)
        if operator.in_size() == 0:
            return operator, jnp.ones((), dtype)
        precondition = preconditioner_of("Neumann", operator, options)

        def apply(v: Array) -> Array:
            product = operator.mv(unravel(v, structure))
            return ravel(product if precondition is None else precondition(product), dtype)

        return operator, series_step(apply, operator.in_size(), dtype)[0]

    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Sum the series."""
        check_options("Neumann", options)
        operator, step = state
        precondition = preconditioner_of("Neumann", operator, options)
        dtype = tree_dtype(vector)
        target = tolerance(self.rtol, self.atol, vector)
        x, r = start_and_residual(operator.mv, vector, options)
        norm = tree_norm(r)
        begin = _Carry(x, r, norm, x, norm, norm, jnp.zeros((), dtype), jnp.asarray(0), jnp.asarray(False))
        # Beyond this growth the digits of b are lost.
        limit = norm / jnp.finfo(dtype).eps

        def unfinished(c: _Carry) -> Bool[Array, ""]:
            within = c.residual_norm <= limit  # False for NaN
            return ~(c.residual_norm <= target) & within & ~c.stalled & (c.terms < self.max_terms)

        def body(c: _Carry) -> _Carry:
            x = tree_axpy(step, c.r if precondition is None else precondition(c.r), c.x)
            r = tree_sub(vector, operator.mv(x))
            residual_norm = tree_norm(r)
            better = residual_norm < c.best_norm
            terms = c.terms + 1
            closing = terms % _WINDOW == 0
            length = 1 + c.terms % _WINDOW
            rate = (residual_norm / c.window_norm) ** (1 / length.astype(dtype))
            return _Carry(
                x,
                r,
                residual_norm,
                tree_where(better, x, c.best),
                jnp.where(better, residual_norm, c.best_norm),
                jnp.where(closing, residual_norm, c.window_norm),
                rate,
                terms,
                # No progress over a window although most of b is explained: rounding level.
                closing & ~(rate < 1) & (residual_norm <= 1e-2 * norm),
            )

        end = jax.lax.while_loop(unfinished, body, begin)
        converged = end.best_norm <= target
        result = final_result(
            converged,
            (
                (~jnp.isfinite(norm), lx.RESULTS.singular),
                (end.stalled, lx.RESULTS.stagnation),
                (~(end.residual_norm < norm) | ~(end.residual_norm <= limit), lx.RESULTS.breakdown),
            ),
            lx.RESULTS.max_steps_reached,
        )
        stats = {
            "num_steps": end.terms,
            "step": step,
            "residual_norm": end.best_norm,
            "contraction": end.contraction,
        }
        return end.best, result, stats

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The transposed operator has the same spectrum, so that the step stays."""
        operator, step = state
        return (operator.transpose(), step), transposed_options(options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        operator, step = state
        return (lx.conj(operator), step), conjugated_options(options)

    def assume_full_rank(self) -> bool:
        """The series converges for nonsingular operators only."""
        return True
