"""Iterative refinement: a solver of low precision, residuals of high precision."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar

from curvax._pytree import tree_add, tree_norm, tree_scale, tree_sub, tree_where, tree_zeros_like
from curvax.linear._doubled import doubled_residual, two_sum
from curvax.linear._system import check_square, check_tolerances, final_result, in_units, start, tolerance
from curvax.operators._dense import ravel, structure_of, unravel
from curvax.operators._parts import tags_of, untagged

_DTYPES = ("bfloat16", "float32", "float64")


class _State(eqx.Module):
    operator: lx.AbstractLinearOperator
    inner_operator: lx.AbstractLinearOperator
    inner: PyTree


class _Carry(NamedTuple):
    x: PyTree[Array]
    rest: PyTree[Array]  # what the rounding of x has left out
    r: PyTree[Array]
    residual_norm: Scalar
    change: Scalar  # ‖last correction‖ / ‖x‖
    steps: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    done: Bool[Array, ""]
    stalled: Bool[Array, ""]


class Refined(lx.AbstractLinearSolver[_State]):
    """x ← x + S(b − Ax) with a solver S of lower precision or accuracy than the answer is to have.

    S works on A cast to `inner_dtype`, the residual and x have the precision of the operator: a float32
    factorisation gives a float64 answer as long as its own error, about κ(A) · 6e-8, is below one half. With `doubled`
    the residual is computed in about twice the precision of the operator and x carries what its rounding leaves
    out, so that the answer is right to the last digits or so, whatever the condition number up to that limit.

    Stops when ‖b − Ax‖ ≤ atol + rtol · ‖b‖; with `doubled` when the last correction, and with it the error, is at most
    rtol · ‖x‖ (or atol). It has failed when a correction does not halve what is tested.

    Options of `lineax.linear_solve`: `y0`, a start; all others are passed on to the solver, preconditioners cast with
    the operator.

    Statistics: `num_steps` (refinements), `num_matvecs` (products with A in full precision), `residual_norm`
    (relative to nothing, in the precision of the residual), `change` (‖last correction‖ / ‖x‖).

    Results: `lineax.RESULTS.singular` (non-finite numbers), `stagnation` (it does not converge: A is too
    ill-conditioned for the inner precision, or the tolerance is below rounding), `max_steps_reached`.

    Args:
        solver: S, any Lineax solver; its tolerance need not be tighter than 0.1. A direct one factorises once.
        rtol: Tolerance, see above; not both tolerances may be 0.
        atol: Absolute tolerance.
        inner_dtype: `"float32"`, `"bfloat16"` (entries; vectors are float32) or None for that of the operator.
        doubled: Residuals in twice the precision; the operator must be a `lx.MatrixLinearOperator`.
        max_steps: Refinements at most.

    Raises:
        ValueError: The operator is not square, cannot be cast, or has no entries where `doubled` needs them; an
            argument does not fit.

    Cost: a refinement one product in full precision and one solve of S; memory A in both precisions. With `doubled`
        about 20 operations for each entry of A.

    Source: J. H. Wilkinson, "Rounding errors in algebraic processes", 1963; E. Carson, N. J. Higham, "Accelerating the
        solution of linear systems by iterative refinement in three precisions", SIAM J. Sci. Comput. 40, 2018.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        operator = lx.MatrixLinearOperator(jnp.array([[4.0, 1.0], [1.0, 3.0]]))
        solver = cx.linear.Refined(lx.LU(), rtol=1e-6, inner_dtype="float32")
        lx.linear_solve(operator, jnp.array([5.0, 4.0]), solver).value  # [1, 1]
        ```
    """

    solver: lx.AbstractLinearSolver
    rtol: Array | float
    atol: Array | float = 0.0
    inner_dtype: str | None = eqx.field(default=None, kw_only=True, static=True)
    doubled: bool = eqx.field(default=False, kw_only=True)
    max_steps: int = eqx.field(default=50, kw_only=True)

    def __check_init__(self) -> None:
        check_tolerances("Refined", self.rtol, self.atol, self.max_steps)
        if not isinstance(self.solver, lx.AbstractLinearSolver):
            raise ValueError(
                f"`solver` of `Refined` must be a Lineax solver, got {type(self.solver).__name__}."
            )
        if self.inner_dtype is not None and self.inner_dtype not in _DTYPES:
            raise ValueError(
                f"`inner_dtype` of `Refined` must be one of {', '.join(_DTYPES)} or None, got {self.inner_dtype!r}."
            )

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Cast the operator, and let the solver factorise it."""
        check_square("Refined", operator)
        if self.doubled and not isinstance(untagged(operator), lx.MatrixLinearOperator):
            raise ValueError(
                "`doubled` of `Refined` needs the entries of the operator: wrap them in `lx.MatrixLinearOperator`; "
                f"found {type(untagged(operator)).__name__}."
            )
        inner = operator if self.inner_dtype is None else _cast(operator, self.inner_dtype)
        return _State(
            lx.linearise(operator), inner, self.solver.init(inner, _cast_options(options, self.inner_dtype))
        )

    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Refine until the test is met or a correction does not help."""
        given = start(vector, options)
        options = _cast_options({k: v for k, v in options.items() if k != "y0"}, self.inner_dtype)
        target = tolerance(self.rtol, self.atol, vector)
        norm = tree_norm(vector)
        like = state.inner_operator.out_structure()

        def solve(r: PyTree[Array], size: Scalar) -> PyTree[Array]:
            # Of unit length: a small residual underflows in low precision.
            scaled = tree_scale(1 / jnp.where(size > 0, size, 1), r)
            low = jax.tree.map(lambda a, s: a.astype(s.dtype), scaled, like)
            solution, _, _ = self.solver.compute(state.inner, low, options)
            return tree_scale(size, jax.tree.map(lambda d, a: d.astype(a.dtype), solution, r))

        def body(c: _Carry) -> _Carry:
            correction = solve(c.r, c.residual_norm)
            x, rest = _add(c.x, c.rest, correction)
            r = self._residual(state.operator, vector, x, rest)
            size, x_norm = tree_norm(r), tree_norm(x)
            change = tree_norm(correction) / jnp.where(x_norm > 0, x_norm, 1)
            if self.doubled:
                limit = jnp.asarray(self.rtol) + jnp.asarray(self.atol) / jnp.where(x_norm > 0, x_norm, 1)
                met, helped = change <= limit, change <= 0.5 * c.change
            else:
                met, helped = size <= target, size <= 0.5 * c.residual_norm
            # A correction that makes the residual larger is taken back.
            better = jnp.isfinite(size) & (helped | (size <= c.residual_norm))
            x, rest, r = tree_where(better, (x, rest, r), (c.x, c.rest, c.r))
            return _Carry(
                x=x,
                rest=rest,
                r=r,
                residual_norm=jnp.where(better, size, c.residual_norm),
                change=change.astype(c.change.dtype),
                steps=c.steps + 1,
                num_matvecs=c.num_matvecs + 1,
                done=met & better,
                stalled=~helped & ~met,
            )

        zero = tree_zeros_like(vector)
        inf = jnp.full_like(norm, jnp.inf)
        none = jnp.asarray(0)
        no = jnp.asarray(False)
        x = zero if given is None else given
        r = vector if given is None else self._residual(state.operator, vector, given, zero)
        size = tree_norm(r)
        # Doubled, a start is not believed before a correction has confirmed it.
        good_enough = (norm == 0) | (~jnp.asarray(self.doubled) & (size <= target))
        begin = _Carry(x, zero, r, size, inf, none, none, good_enough, no)
        end = jax.lax.while_loop(lambda c: ~c.done & ~c.stalled & (c.steps < self.max_steps), body, begin)
        broken = ~end.done & ~jnp.isfinite(end.change + end.residual_norm)
        failures = ((broken, lx.RESULTS.singular), (end.stalled, lx.RESULTS.stagnation))
        result = final_result(end.done, failures, lx.RESULTS.max_steps_reached)
        stats = {
            "num_steps": end.steps,
            "num_matvecs": end.num_matvecs,
            "residual_norm": end.residual_norm,
            "change": end.change,
        }
        return tree_where(broken, tree_scale(jnp.nan, end.x), end.x), result, stats

    def _residual(
        self,
        operator: lx.AbstractLinearOperator,
        vector: PyTree[Array],
        x: PyTree[Array],
        rest: PyTree[Array],
    ) -> PyTree[Array]:
        if not self.doubled:
            return tree_sub(vector, operator.mv(x))
        matrix = operator.as_matrix()
        flat = (ravel(leaf, matrix.dtype) for leaf in (x, rest, vector))
        x, rest, rhs = flat
        return unravel(doubled_residual(matrix, x, rest, rhs), structure_of(vector))

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The transposed operator, with the solver's own transposed state."""
        inner, inner_options = self.solver.transpose(state.inner, options)
        transposed = _State(state.operator.transpose(), state.inner_operator.transpose(), inner)
        return transposed, inner_options

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        inner, inner_options = self.solver.conj(state.inner, options)
        return _State(lx.conj(state.operator), lx.conj(state.inner_operator), inner), inner_options

    def assume_full_rank(self) -> bool:
        """A singular operator is a failure."""
        return True


def _add(
    x: PyTree[Array], rest: PyTree[Array], correction: PyTree[Array]
) -> tuple[PyTree[Array], PyTree[Array]]:
    """x + correction, with what the rounding leaves out carried on."""
    wanted = tree_add(correction, rest)
    pairs = jax.tree.map(two_sum, x, wanted)
    return jax.tree.transpose(jax.tree.structure(x), jax.tree.structure((0, 0)), pairs)


def _cast(operator: lx.AbstractLinearOperator, name: str) -> lx.AbstractLinearOperator:
    """The operator in another precision."""
    dtype = jnp.dtype(name)
    part = untagged(operator)
    if name == "bfloat16":
        if not isinstance(part, lx.MatrixLinearOperator):
            raise ValueError(
                "`inner_dtype='bfloat16'` of `Refined` needs the entries of the operator: wrap them in "
                f"`lx.MatrixLinearOperator`; found {type(part).__name__}."
            )
        entries = part.matrix.astype(dtype)
        structure = jax.ShapeDtypeStruct((entries.shape[1],), jnp.float32)
        product = lambda v: jnp.matmul(entries, v.astype(dtype), preferred_element_type=jnp.float32)  # noqa: E731
        return lx.FunctionLinearOperator(product, structure, tags_of(operator))
    lower = lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf  # noqa: E731
    cast = jax.tree.map(lower, operator)
    # An operator whose function closes over data, or whose structure is fixed, keeps its precision.
    try:
        out = jax.eval_shape(cast.mv, cast.in_structure())
    except (TypeError, ValueError):  # of functions that mix precisions
        out = None
    leaves = jax.tree.leaves((cast.in_structure(), out))
    if out is None or any(leaf.dtype != dtype for leaf in leaves):
        raise ValueError(
            f"`inner_dtype={name!r}` of `Refined` cannot cast a {type(part).__name__}: its arrays are not all its own. "
            "Pass its data as arguments (`cx.operators.hessian(fn, theta, *args)`), write it out in a "
            "`lx.MatrixLinearOperator`, or leave `inner_dtype` out."
        )
    return cast


def _cast_options(options: dict[str, Any], name: str | None) -> dict[str, Any]:
    """A preconditioner goes with the operator; a start is for x, not for its corrections."""
    given = options.get("preconditioner")
    if name is None or not isinstance(given, lx.AbstractLinearOperator):
        return options
    return options | {"preconditioner": _cast(given, "float32" if name == "bfloat16" else name)}
