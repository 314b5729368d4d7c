"""The solver that looks at the operator, and says what it did."""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, PyTree, Scalar

from curvax._control import in_one_kernel, run_if
from curvax._pytree import tree_all_finite, tree_size, tree_zeros_like
from curvax.linear._auto_dense import Factors, factors, has_entries, written_out
from curvax.linear._auto_methods import (
    bicgstab_stage,
    by_factors,
    cg_stage,
    condition_of,
    direct_stage,
    forward_error,
    gmres_stage,
    jacobi_if_graded,
    minres_stage,
    structured_stage,
)
from curvax.linear._auto_phases import Terms, in_phases
from curvax.linear._auto_price import Prices, prices
from curvax.linear._auto_stages import Attempt, Marks, Method, Reason, begin, sign_of, stats_of
from curvax.linear._cg_core import default_max_steps
from curvax.linear._jacobi import diagonal_is_known
from curvax.linear._system import (
    check_options,
    check_square,
    check_tolerances,
    conjugated_options,
    final_result,
    in_units,
    looks_symmetric,
    preconditioner_of,
    start_and_residual,
    tolerance,
    traced_once,
    transposed_options,
)
from curvax.operators._direct import structured_inverse
from curvax.operators._structured import is_symmetric

# A matrix that is there already is factorised up to so many times the size.
_WITH_ENTRIES = 4


class _State(eqx.Module):
    operator: lx.AbstractLinearOperator
    factors: Factors | None
    inverse: lx.AbstractLinearOperator | None
    condition: Scalar | None  # where there is an inverse
    prices: Prices | None = eqx.field(static=True)  # where there are no factors


def _unless(marks: Marks, trusted: Bool[Array, ""]) -> Marks:
    """With its failure where the tags are not to be trusted."""
    lied = jnp.full_like(marks.failure, int(Reason.not_symmetric))
    return marks._replace(failure=jnp.where(trusted, marks.failure, lied))


def _result(marks: Marks, finite: Bool[Array, ""], target: Scalar) -> lx.RESULTS:
    failure = marks.failure
    usable = ~marks.singular & (failure != int(Reason.not_symmetric)) & finite
    lost = (failure == int(Reason.indefinite)) | (failure == int(Reason.not_symmetric))
    return final_result(
        (marks.residual_norm <= target) & usable,
        (
            (marks.singular | ~jnp.isfinite(marks.residual_norm), lx.RESULTS.singular),
            (lost, lx.RESULTS.breakdown),
            (failure == int(Reason.budget), lx.RESULTS.max_steps_reached),
        ),
        lx.RESULTS.stagnation,
    )


class Auto(lx.AbstractLinearSolver[_State]):
    """A direct or an iterative solver, chosen by size, tags and prices, watched, with a fallback where one fails.

    | size n | tagged | first | then |
    |---|---|---|---|
    | any, A has a structure | | its inverse, refined | as below |
    | ≤ `dense_size` | definite | Cholesky | LU |
    | ≤ `dense_size` | otherwise | LU | |
    | larger | definite | CG | Cholesky, LU; or MINRES |
    | larger | symmetric | MINRES | LU |
    | larger | neither, and looks symmetric | MINRES | as below |
    | larger | neither, products cheap | BiCGSTAB | LU; or GMRES(`restart`), GMRES(4 · `restart`) |
    | larger | neither, products dear | GMRES(`restart`), GMRES(4 · `restart`) | LU; or BiCGSTAB |

    A structure is that of `curvax.operators`' own (Kronecker, low rank plus diagonal, blocks, circulant, Toeplitz, and
    damped ones of these), or a diagonal, tridiagonal or triangular matrix; not one whose parts are known through
    products alone. "Looks symmetric" means uᵀAv = vᵀAu up to rounding for two generic vectors, two products. What
    follows an "or" is for sizes at which the matrix may not be written out (`fallback_size`).

    Where it may, the iterative methods compete with it. What a product costs is estimated from its program while
    tracing; so is the factorisation, n products included where the entries are not there already. A method is looked at
    after about an eighth of that cost, and given up (`Reason.slow`) as soon as its residual falls so slowly that the
    factorisation would be done before it. Products are dear where one takes longer than to orthogonalise a
    vector against 30.

    CG is preconditioned with the diagonal where that is known (a matrix that is given, `curvax.operators`' structures)
    and varies by more than ten: variables in different units. `Method.cg_jacobi` says so.

    Each stage starts from the best iterate so far. One that is not needed costs nothing at run time, under `vmap` too
    (it costs compile time). Kept in mind from the theory: CG is right only for a definite A; small or ill-conditioned
    systems are for factorisations.

    Success means ‖b − Ax‖ ≤ atol + rtol · ‖b‖ for the true residual, and that A is not singular to working
    precision as far as was seen: condition number at most 1/(10·eps), estimated in the Frobenius norm for
    factorisations, in the 2-norm for structures, and by Ritz values for CG. CG works to a relative
    *forward* error of `rtol` as well, the others to the residual.

    Options of `lineax.linear_solve`: `preconditioner` (approximates A⁻¹; definite where A is symmetric) and `y0`, for
    the iterative methods; a factorisation needs neither.

    Statistics: `method` (a `Method`), `reason` (a `Reason`: why the stage before failed), `num_steps`
    (products with A, over all stages, without those that wrote a matrix out), `residual_norm` (true),
    `condition` (estimate, of what CG is preconditioned to where it is, 0 where there is none).

    Results: `lineax.RESULTS.singular`, `max_steps_reached`, `breakdown` (CG met negative curvature and nothing
    after it succeeded, or a tag is false), `stagnation` (rounding keeps the residual above the tolerance).

    Args:
        rtol: Tolerance relative to ‖b‖, at least 0; not both tolerances may be 0.
        atol: Absolute tolerance.
        max_steps: Budget of products of each stage; by default 40 times the size, within [1000, 100 000].
        dense_size: Largest size for which the matrix is written out at once, n products. 0 for never.
        fallback_size: Largest size for which it is written out after iterative methods failed or were given up, four
            times as large where A is a `MatrixLinearOperator`. 0 for never.
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
        size, operator = operator.in_size(), lx.linearise(operator)
        inverse = structured_inverse(operator) if size > 0 else None
        if inverse is None and 0 < size <= self.dense_size:
            return _State(operator, factors(written_out(operator, size), sign_of(operator)), None, None, None)
        condition = None if inverse is None else condition_of(operator, inverse)
        return _State(operator, None, inverse, condition, prices(operator))

    @traced_once
    @in_units
    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Run the stages until one has answered."""
        check_options("Auto", options)
        target = tolerance(self.rtol, self.atol, vector)
        if tree_size(vector) == 0:
            return tree_zeros_like(vector), lx.RESULTS.successful, stats_of(begin(vector, vector))
        if state.factors is not None:
            end = by_factors(state.factors, vector, target)
        else:
            end = self._iterate(state, vector, target, options)
        result = in_one_kernel(_result)(end.packed, tree_all_finite(end.x), target).tree
        return end.x, result, stats_of(end)

    def _iterate(
        self,
        state: _State,
        vector: PyTree[Array],
        target: Scalar,
        options: dict[str, Any],
    ) -> Attempt:
        operator, given = state.operator, options.get("preconditioner")
        symmetric = is_symmetric(operator)
        if symmetric and isinstance(given, lx.AbstractLinearOperator) and not is_symmetric(given):
            raise ValueError(
                "`options['preconditioner']` of `Auto` must be tagged `lx.positive_semidefinite_tag` for a "
                "symmetric operator: CG and MINRES need a symmetric positive definite preconditioner."
            )
        asks = symmetric and self.check_tags
        x, r = start_and_residual(operator.mv, vector, options)
        trusted = looks_symmetric(operator.mv, vector) if asks else jnp.asarray(True)
        progress = begin(x, r, num_matvecs=2 if asks else 0)

        def unsolved(marks: Marks, trusted: Bool[Array, ""], target: Scalar) -> Bool[Array, ""]:
            going = (marks.failure != int(Reason.slow)) & ~marks.singular
            return trusted & going & ~(marks.residual_norm <= target)

        def unsettled(marks: Marks, trusted: Bool[Array, ""], target: Scalar) -> Bool[Array, ""]:
            missed = ~(marks.residual_norm <= target) | marks.singular
            return trusted & missed & jnp.isfinite(marks.residual_norm)

        for stage in self._stages(state, vector, target, options):
            progress = run_if(in_one_kernel(unsolved)(progress.packed, trusted, target).tree, stage, progress)
        if self._may_factorise(operator) and state.prices is not None:
            widest = state.prices.widest
            needed = in_one_kernel(unsettled)(progress.packed, trusted, target).tree
            progress = direct_stage(operator, widest, vector, progress, target, needed)
        if not asks:
            return progress
        lied = in_one_kernel(_unless)(progress.packed, trusted)
        return progress._replace(packed=lied)

    def _may_factorise(self, operator: lx.AbstractLinearOperator) -> bool:
        """Whether the matrix may be written out after all."""
        return operator.in_size() <= self.fallback_size * (_WITH_ENTRIES if has_entries(operator) else 1)

    def _stages(
        self, state: _State, vector: PyTree[Array], target: Scalar, options: dict[str, Any]
    ) -> list[Callable[[Attempt], Attempt]]:
        """What is tried, in this order, before the matrix is written out."""
        operator, inverse, condition, price = state.operator, state.inverse, state.condition, state.prices
        assert price is not None
        size, direct, sign = tree_size(vector), self._may_factorise(operator), sign_of(operator)
        budget = default_max_steps(size) if self.max_steps is None else self.max_steps
        system = (operator.mv, vector, preconditioner_of("Auto", operator, options), target)

        error = forward_error(vector, target)

        def phased(stage: Any, turn: float, most: int = budget, **rest: Any) -> Callable[[Attempt], Attempt]:
            """As long as it promises to be done before a factorisation."""
            exchange = (
                price.exchange(size, definite=sign != 0, has_entries=has_entries(operator), turn=turn)
                if direct
                else math.inf
            )
            terms = Terms(target, error, min(budget, most), exchange)
            return lambda p: in_phases(stage, p, terms, **rest)

        def gmres(length: int, method: Method) -> Callable[[Attempt], Attempt]:
            stage = ft.partial(gmres_stage, *system, length, method)
            return phased(stage, price.turn + price.orthogonalisation, least=8)

        stages: list[Callable[[Attempt], Attempt]] = []
        if inverse is not None and condition is not None:
            stages.append(lambda p: structured_stage(operator, inverse, condition, vector, p, target))
        minres = ft.partial(minres_stage, *system)
        if sign:
            precondition, by_jacobi = system[2], jnp.asarray(False)
            if precondition is None and diagonal_is_known(operator):
                precondition, by_jacobi = jacobi_if_graded(operator)
            conjugate = ft.partial(cg_stage, operator, vector, precondition, target, error, by_jacobi)
            stages.append(phased(conjugate, price.turn, polished=True))
            return stages if direct else [*stages, phased(minres, price.turn)]
        if is_symmetric(operator):
            return [*stages, phased(minres, price.turn)]
        given = options.get("preconditioner")
        if self.probe and (given is None or lx.is_positive_semidefinite(given)):
            # The probe is no proof: no more steps than a symmetric operator would mostly need.
            attempt = phased(minres, price.turn, most=max(4 * self.restart, 3 * size))

            def if_symmetric(p: Attempt) -> Attempt:
                asked = lambda marks: marks._replace(num_matvecs=marks.num_matvecs + 2)  # noqa: E731
                p = p._replace(packed=in_one_kernel(asked)(p.packed))
                return run_if(looks_symmetric(operator.mv, vector), attempt, p)

            stages.append(if_symmetric)
        short = phased(ft.partial(bicgstab_stage, *system), price.turn, least=8)
        # Where products are cheap, the long recurrence of GMRES is what costs.
        if price.product < price.orthogonalisation:
            stages.append(short)
            if not direct:
                stages += [gmres(self.restart, Method.gmres), gmres(4 * self.restart, Method.gmres_long)]
            return stages
        stages += [gmres(self.restart, Method.gmres)]
        if size > self.restart:
            stages.append(gmres(4 * self.restart, Method.gmres_long))
        return stages if direct else [*stages, short]

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """The factors are read the other way; the operator is transposed."""
        transposed = None if state.factors is None else state.factors.transpose()
        inverse = None if state.inverse is None else state.inverse.transpose()
        rest = (transposed, inverse, state.condition, state.prices)
        return _State(state.operator.transpose(), *rest), transposed_options(options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """Real operators are their own conjugates."""
        rest = (state.factors, state.inverse, state.condition, state.prices)
        return _State(lx.conj(state.operator), *rest), conjugated_options(options)

    def assume_full_rank(self) -> bool:
        """A singular operator is a failure."""
        return True
